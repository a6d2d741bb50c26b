"""Substantial repetition: loops at the end, passages said again and again, hardly any content."""

import re
import zlib
from collections import Counter

import numpy as np

_UNSPACED = r'\u3005-\u30ff\u3400-\u9fff\u0e00-\u0eff'
_TOKEN = re.compile(rf'[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]|_')
_LETTERS = re.compile(r'[^\W\d_]')
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def find_repetition(text, share=0.3, window=12, loop_tokens=40, loop_times=4, line_times=8,
                    ratio=0.1, ratio_bytes=2000):
  """None, or why `text` is substantially repetitive, with the measure.

  Four measures, in this order. Tokens are words, punctuation marks and unspaced characters.
  - Loop: the text ends in at least `loop_times` rounds of one run of tokens, over `loop_tokens`
    tokens or more (where the run is one or two tokens, three times as many).
  - Lines: at least `line_times` lines of prose (4 words or more) that are equal but for their
    numbers make up the share `share` of the text.
  - Passages: at least the share `share` of the tokens lies in a prose run of `window` tokens that
    was there before, and one such run is there three times or more.
  - Compression: zlib makes a text of `ratio_bytes` or more smaller than `ratio` of it.
  What has few letters (tables, arithmetic, rulers) is not prose. In verse, that is short lines, a
  refrain may make up twice the share.
  """
  tokens = _TOKEN.findall(text)
  return (_find_loop(tokens, loop_tokens, loop_times)
          or _find_lines(text, share, line_times)
          or _find_passages(text, tokens, share, window)
          or _find_redundancy(text, ratio, ratio_bytes))


def _is_prose(words, least):
  """At least `least` words of letters, and these at least half of the tokens."""
  count = sum(1 for word in words if word[0].isalpha())
  return count >= least and 2 * count >= len(words)


def _find_loop(tokens, least, times):
  """A run of tokens that fills the end of the text; the last round may be cut anywhere.

  The last 4 tokens occur one period earlier, so every earlier place of theirs is a candidate; the
  smallest period that reaches far enough is taken.
  """
  size = len(tokens)
  if size < least:
    return None
  tail = tokens[-4000:]
  end = tail[-4:]
  last = len(tail) - 4
  tried = 0
  for start in range(last - 1, -1, -1):
    if tail[start] != end[0] or tail[start:start + 4] != end:
      continue
    period = last - start
    if period * times > len(tail) or tried == 50:
      return None
    tried += 1
    length = period
    while length < len(tail) and tail[-1 - length] == tail[-1 - length + period]:
      length += 1
    unit = tail[-period:]
    enough = max(least * (3 if period <= 2 else 1), period * times)
    if length >= enough and _is_prose(unit, 1):
      return (f'ends in a loop: {" ".join(unit)[:60]!r} {length // period} times '
              f'({length / size:.0%} of the text)')
  return None


def _find_lines(text, share, times):
  lines = text.split('\n')
  if len(lines) < times:
    return None
  masked = [re.sub(r'\d+', '0', line.strip()).casefold() for line in lines]
  counts = Counter(line for line in masked if len(line) >= 16)
  if not counts or counts.most_common(1)[0][1] < times:
    return None
  prose = {line for line, count in counts.items()
           if count >= times and _is_prose(_TOKEN.findall(line), 4)}
  again = sum(len(line) for line in masked if line in prose)
  total = sum(map(len, masked))
  if not prose or again < share * total:
    return None
  line = max(prose, key=counts.get)
  return (f'{counts[line]} lines differ in numbers only: {line[:60]!r} '
          f'({again / total:.0%} of the text)')


def _find_passages(text, tokens, share, window):
  count = len(tokens) - window + 1
  if count < 2 * window:
    return None
  codes = np.fromiter(map(hash, tokens), np.int64, len(tokens)).astype(np.uint64)
  hashes = np.zeros(count, np.uint64)
  for i in range(window):
    hashes = (hashes + codes[i:i + count]) * _MULTIPLIER
    hashes ^= hashes >> np.uint64(29)
  _, first, inverse, counts = np.unique(hashes, return_index=True, return_inverse=True,
                                        return_counts=True)
  most = int(counts.max())
  if most < 3:
    return None
  again = np.flatnonzero(first[inverse] != np.arange(count))
  covered = np.zeros(len(tokens) + 1, np.int64)
  np.add.at(covered, again, 1)
  np.add.at(covered, again + window, -1)
  words = [i for i in np.flatnonzero(np.cumsum(covered[:-1]) > 0).tolist()]
  part = len(words) / len(tokens)
  start = int(first[counts.argmax()])
  passage = tokens[start:start + window]
  if part < share * (2 if _is_verse(text) else 1) or not _is_prose(passage, window // 2):
    return None
  if not _is_prose([tokens[i] for i in words], window):
    return None
  return (f'repeats a {window}-word passage {most} times ({part:.0%} of the text said before): '
          f'{" ".join(passage)[:60]!r}')


def _is_verse(text):
  """Eight lines or more, nine of ten shorter than 60 characters."""
  lines = [line for line in text.split('\n') if line.strip()]
  return len(lines) >= 8 and 10 * sum(len(line) < 60 for line in lines) >= 9 * len(lines)


def _find_redundancy(text, ratio, least):
  data = text.encode('utf-8', 'replace')
  if len(data) < least:
    return None
  small = len(zlib.compress(data, 6)) / len(data)
  if small >= ratio or not _is_prose(_TOKEN.findall(text[:4000]), 20):
    return None
  return f'compresses to {small:.1%} of its {len(data)} bytes'
