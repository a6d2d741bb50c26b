"""Substantial repetition: loops at the end, passages said again and again, hardly any content."""

import re
import zlib
from collections import Counter

import numpy as np

_UNSPACED = r'\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff'
_TOKEN = re.compile(rf'[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]|_')
_WORD = re.compile(rf'[{_UNSPACED}]|[^\s{_UNSPACED}]+')
_LETTER = re.compile(r'[^\W\d_]')
_COMMAND = re.compile(r'\\[a-zA-Z]+')
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
TAIL = 12000  # characters of the end in which a loop is looked for


def find_repetition(text, share=0.3, window=12, loop_tokens=40, loop_times=4, often=8, ratio=0.1,
                    ratio_bytes=2000):
  """None, or why `text` is substantially repetitive, with the measure.

  Five measures, in this order; words are what white space separates, and single characters where
  nothing does, tokens are words, numbers and punctuation marks.
  - Loop: the text ends in at least `loop_times` rounds of a run of tokens that has a letter, over
    `loop_tokens` tokens (three times as many where the run is one or two); in 8 rounds of a run of
    5 different tokens without one; or in 120 characters of period 20 or less (600 without letters).
  - Paragraphs: three equal ones of 80 characters or more are the share `share` of the text.
  - Lines: `often` lines that are equal but for their numbers are the share `share` of the text.
  - Passages: the share `share` of the words lies in a run of `window` words (twice as many
    characters) that was there before, one such run at least three times; half the share is enough
    where one is there `often` times.
  - Compression: zlib makes a text of `ratio_bytes` or more smaller than `ratio` of it.
  What has less than 30 % letters (tables, arithmetic, rulers) is not prose: only the first two see
  it. Where lines are short (verse has refrains) or indented (code), twice the share is needed.
  """
  return (_find_loop(text, loop_tokens, loop_times)
          or _find_paragraphs(text, share)
          or _find_lines(text, share, often)
          or _find_passages(text, share, window, often)
          or _find_redundancy(text, ratio, ratio_bytes))


def _is_prose(text, letters):
  """At least `letters` letters, names of LaTeX commands aside, and these 30 % of all or more."""
  count = len(_LETTER.findall(_COMMAND.sub('', text)))
  return count >= letters and 10 * count >= 3 * (len(text) - text.count(' '))


def _find_loop(text, least, times):
  """A run that fills the end of the text; the last round may be cut anywhere.

  A loop's last 4 tokens occur one period earlier, so every earlier place of theirs gives a period
  to try, the shortest first.
  """
  end = text.rstrip()[-600:]
  for period in range(1, 21 if len(end) >= 120 else 0):
    part = end if ' ' in end[-period:] and not _LETTER.search(end[-period:]) else end[-120:]
    if part[period:] == part[:-period] and len(part) >= (600 if part is end else 120) and (
        part is end or _LETTER.search(part[-period:])):
      return f'ends in a loop of {part[-period:]!r}, {len(part)} characters or more'
  tail = _TOKEN.findall(text[-TAIL:])[-4000:]
  end, last = tail[-4:], len(tail) - 4
  tried = 0
  for start in range(last - 1, -1, -1) if len(tail) >= least else ():
    if tail[start] != end[0] or tail[start:start + 4] != end:
      continue
    period = last - start
    tried += 1
    if period * times > len(tail) or tried > 50:
      return None
    length = period
    while length < len(tail) and tail[-1 - length] == tail[-1 - length + period]:
      length += 1
    unit = tail[-period:]
    enough = max(least * (3 if period <= 2 else 1), period * times)
    plain = any(token[0].isalpha() for token in unit)
    if length >= enough and (plain or length >= 8 * period and len(set(unit)) >= 5):
      return f'ends in a loop: {" ".join(unit)[:60]!r} {length // period} times'
  return None


def _find_paragraphs(text, share):
  parts = [part.strip() for part in text.split('\n\n')]
  counts = Counter(part for part in parts if len(part) >= 80 and _LETTER.search(part))
  part, count = max(counts.items(), key=lambda item: item[1], default=('', 0))
  if count < 3 or count * len(part) < share * len(text):
    return None
  return f'the same paragraph {count} times ({count * len(part) / len(text):.0%}): {part[:60]!r}'


def _find_lines(text, share, times):
  if text.count('\n') + 1 < times:
    return None
  lines = [line.strip() for line in text.split('\n')]
  shapes = Counter(re.sub(r'\d+', '0', line) for line in lines if len(line) >= 16)
  found = {line: count for line, count in shapes.items()
           if count >= times and line.count(' ') >= 3 and _is_prose(line, 12)}
  part = sum(len(line) * count for line, count in found.items()) / max(1, sum(map(len, lines)))
  if part < share:
    return None
  line = max(found, key=found.get)
  return f'{found[line]} lines differ in numbers only: {line[:60]!r} ({part:.0%} of the text)'


def _find_passages(text, share, window, often):
  words = _WORD.findall(text)
  if 2 * sum(len(word) == 1 for word in words) > len(words):
    window *= 2  # characters instead of words
  count = len(words) - window + 1
  if count < 2 * window:
    return None
  codes = np.fromiter(map(hash, words), np.int64, len(words)).astype(np.uint64)
  hashes = np.zeros(count, np.uint64)
  for i in range(window):
    hashes = (hashes + codes[i:i + count]) * _MULTIPLIER
    hashes ^= hashes >> np.uint64(29)
  order = np.argsort(hashes, kind='stable')
  changes = np.flatnonzero(np.diff(hashes[order])) + 1
  groups = np.diff(np.concatenate([[0], changes, [count]]))
  most = int(groups.max())
  if most < 3:
    return None
  first = np.concatenate([[0], changes])
  again = np.ones(count, bool)
  again[order[first]] = False
  covered = np.convolve(again, np.ones(window, np.int64)) > 0
  part = covered.mean()
  least = share / 2 if most >= often else share
  if part < least or part < 2 * least and _has_layout(text):
    return None
  if not _is_prose(' '.join(words[i] for i in np.flatnonzero(covered)), 4 * window):
    return None
  start = order[first[groups == most]].min()  # the hashes, so their order, differ by process
  passage = ' '.join(words[start:start + window])
  return f'repeats a {window}-word passage {most} times ({part:.0%} said before): {passage[:60]!r}'


def _has_layout(text):
  """Eight lines or more, of which nine of ten have under 60 bytes or half are indented."""
  lines = [line for line in text.split('\n') if line.strip()]
  short = sum(len(line.encode('utf-8', 'replace')) < 60 for line in lines)
  inset = sum(line.startswith(('  ', '\t')) for line in lines)
  return len(lines) >= 8 and (10 * short >= 9 * len(lines) or 2 * inset >= len(lines))


def _find_redundancy(text, ratio, least):
  data = text.encode('utf-8', 'replace')
  if len(data) < least:
    return None
  small = len(zlib.compress(data, 6)) / len(data)
  if small >= ratio or not _is_prose(text[:4000], 200):
    return None
  return f'compresses to {small:.1%} of its {len(data)} bytes'
