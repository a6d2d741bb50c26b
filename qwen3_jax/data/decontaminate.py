"""Whether a training text contains a test item: the longest common substring rule of Qwen2.

A training text t is contaminated by a test item e (Qwen2 report, section 3.1; Qwen2.5 the same)
if their longest common run of tokens L has |L| >= 13 and |L| >= 0.6 min(|t|, |e|). Tokens here are
normalised words, numbers and operators (`tokenise`), so that spacing, case, punctuation and the
ways to write one LaTeX formula do not hide an item. Two additions make the rule work on short
questions. Boilerplate (phrases that several unrelated test items share, and `PHRASES`) counts in
neither |L| nor |t| nor |e|, unless L is all of t or e. And below 13 tokens, where the rule is
silent, an item counts as found if it is in t whole (from `short` tokens on, with a number in it
from `least` on), if t is 60 % of it in a row (from `least` on), or if both are equal.
"""

import dataclasses
import re
import unicodedata
from collections import defaultdict

import numpy as np

RUN, SHARE = 13, 0.6
PHRASES = (
  'where m and n are relatively prime positive integers. Find m + n.',
  'can be expressed as m/n where m and n are relatively prime positive integers. Find m+n.',
  'can be written in the form \\frac{m}{n}, where $m$ and $n$ are relatively prime positive',
  'Express your answer as a common fraction in simplest radical form.',
  'Express your answer as a decimal to the nearest tenth. Round your answer to the nearest',
  'Find the sum of all possible values of x. Enter all the solutions separated by commas.',
  'Which of the following statements is true? Which one of the following is correct?',
  'Please reason step by step, and put your final answer within \\boxed{}.')

_SAME = {
  'dfrac': 'frac', 'tfrac': 'frac', 'cfrac': 'frac', 'leq': 'le', 'leqslant': 'le', 'geq': 'ge',
  'geqslant': 'ge', 'neq': 'ne', 'cdot': '*', 'times': '*', 'ast': '*', 'div': '/', 'to': 'to',
  'rightarrow': 'to', 'ldots': '', 'dots': '', 'cdots': '', 'left': '', 'right': '', 'big': '',
  'bigg': '', 'text': '', 'textbf': '', 'textit': '', 'mathrm': '', 'mathbf': '', 'mbox': '',
  'rm': '', 'displaystyle': '', 'quad': '', 'qquad': '', 'limits': '', 'hspace': '', 'emph': '',
  'degree': 'circ', 'lvert': '|', 'rvert': '|', 'mid': '|', 'boxed': '', 'operatorname': ''}
_SIGNS = str.maketrans({
  '−': '-', '–': '-', '—': ' ', '×': '*', '·': '*', '÷': '/', '≤': ' le ', '≥': ' ge ',
  '≠': ' ne ', '√': ' sqrt ', 'π': ' pi ', '°': ' circ ', '’': "'", '…': ' ', '→': ' to '})
_SPLIT_FRACTION = re.compile(r'(\\[dtc]?frac)\s*(\d)\s*(\d)')
_SUBSCRIPT = re.compile(r'_\s*(\d)(?=\d)')  # LaTeX takes one digit: log_2 1
_THOUSANDS = re.compile(r'(?<=\d)(?:\{,\}|\\?,\\?!?|,)(?=\d{3}(?!\d))')
_TOKEN = re.compile(
  r'\d+(?:\.\d+)?|[\u2e80-\u2fdf\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]'
  r"|[^\W\d_\u2e80-\u2fdf\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af]+(?:'[a-z]+)?|[+\-*/^=<>|]")
_COMMAND = re.compile(r'\\([a-z]+)')
_DRAWING = re.compile(r'\[asy\].*?(?:\[/asy\]|\Z)', re.DOTALL)


def tokenise(text):
  """Words, numbers, operators and single Chinese, Japanese or Korean characters, normalised.

  Case, white space, `$`, braces, brackets, punctuation and LaTeX's spacing and font commands
  vanish, and so do Asymptote drawings; `\\dfrac12`, `\\frac{1}{2}` and `\\tfrac 1 2` are the same
  tokens, `1,000` is `1000`.
  """
  if not text.isascii():
    text = unicodedata.normalize('NFKC', text.translate(_SIGNS))
  text = text.lower()
  if '[asy]' in text:
    text = _DRAWING.sub(' ', text)
  if '\\' in text:
    text = _SUBSCRIPT.sub(r'_\1 ', _SPLIT_FRACTION.sub(r'\1 \2 \3 ', text))
    text = _THOUSANDS.sub('', text)
    text = re.sub(r'\\[,;:! ]|~|&|\^(?=\s*\{?\s*\\circ)', ' ', text)
    text = _COMMAND.sub(lambda m: f' {_SAME.get(m[1], m[1])} ', text)
  elif ',' in text:
    text = _THOUSANDS.sub('', text)
  text = re.sub(r'(?<=[a-z])-(?=[a-z])', ' ', text)
  return _TOKEN.findall(text)


@dataclasses.dataclass(frozen=True)
class Match:
  """Test item `item` shares the run `text` of `length` tokens, `share` of the shorter of both."""
  item: object
  length: int
  share: float
  text: str


_PRIME = np.uint64(0x9E3779B97F4A7C15)


def _hash_windows(codes, width):
  """64-bit hashes of the windows of `width` token codes; equal windows have equal hashes."""
  count = len(codes) - width + 1
  if count <= 0:
    return np.empty(0, np.uint64)
  hashes = np.zeros(count, np.uint64)
  for i in range(width):
    hashes = (hashes + codes[i:i + count]) * _PRIME
    hashes ^= hashes >> np.uint64(29)
  return hashes


@dataclasses.dataclass
class _Table:
  """Sorted hashes of runs of `width` tokens and, for each, where in the items it starts."""
  width: int
  keys: np.ndarray
  places: np.ndarray

  @classmethod
  def build(cls, width, keys, places):
    order = np.argsort(keys, kind='stable')
    return cls(width, keys[order], places[order])

  def find(self, codes, most=64):
    """(index into `codes`, place) of each common run; of one run at most `most` places."""
    hashes = _hash_windows(codes, self.width)
    first = np.searchsorted(self.keys, hashes)
    inside = np.minimum(first, len(self.keys) - 1)
    for i in np.flatnonzero(self.keys[inside] == hashes) if len(self.keys) else ():
      j = int(first[i])
      last = min(int(np.searchsorted(self.keys, hashes[i], 'right')), j + most)
      for place in self.places[j:last].tolist():
        yield int(i), place

  def find_rarest(self, codes):
    """The occurrences of the run of `codes` that has fewest, as by `find`."""
    hashes = _hash_windows(codes, self.width)
    first, last = (np.searchsorted(self.keys, hashes, side) for side in ('left', 'right'))
    i = int((last - first).argmin())
    return [(i, place) for place in self.places[first[i]:last[i]].tolist()]


class Index:
  """Test items, by hashes of their runs of 13 (and `least`) tokens; every hit is checked exactly.

  `texts` are (id, text) pairs; memory is about 60 bytes a token of them. `shared` unrelated items
  make a run of `gram` tokens boilerplate; items with half of their runs in common are related.
  """

  def __init__(self, texts, boilerplate=PHRASES, run=RUN, share=SHARE, short=8, least=3,
               gram=6, shared=3):
    self.run, self.share, self.short, self.least, self.gram = run, share, short, least, gram
    self.items, rows = [], []
    self.codes = {}
    for item, text in texts:
      tokens = tokenise(text)
      if len(tokens) >= 2:
        self.items.append(item)
        rows.append(self._encode(tokens, grow=True))
    if not rows:
      raise ValueError('no test item of two words or more to decontaminate against; '
                       'give the files of the test sets')
    self.lengths = np.array([len(row) for row in rows])
    self.starts = np.cumsum(self.lengths + 1) - self.lengths - 1
    self.flat = np.concatenate([np.append(row, np.uint64(0)) for row in rows])
    self.owner = np.repeat(np.arange(len(rows)), self.lengths + 1)
    self.equal = {row.tobytes(): i for i, row in reversed(list(enumerate(rows)))}
    self.phrases = self._learn(rows, boilerplate, shared)
    self.common = np.concatenate([np.append(self._mark(row), False) for row in rows])
    self.long = self._table(run)
    self.brief = self._table(least)
    self.whole = self._heads()

  @classmethod
  def build(cls, texts, boilerplate=PHRASES, **options):
    """The index of (id, text) pairs, of a dict from id to text, or of a list of texts."""
    if isinstance(texts, dict):
      texts = texts.items()
    pairs = (text if isinstance(text, tuple) else (i, text) for i, text in enumerate(texts))
    return cls(pairs, boilerplate, **options)

  def _encode(self, tokens, grow=False):
    """A random-looking 64-bit code a token; 0 for a token that no test item has."""
    codes = self.codes
    if grow:
      for token in tokens:
        if token not in codes:
          n = (len(codes) + 1) * 0xD1342543DE82EF95 % 2 ** 64
          codes[token] = (n ^ n >> 32) * 0xAF251AF3B0F025B5 % 2 ** 64
    return np.array([codes.get(token, 0) for token in tokens], np.uint64)

  def _table(self, width):
    """All runs of `width` tokens within an item."""
    hashes = _hash_windows(self.flat, width)
    ends = self.owner[width - 1:] if len(hashes) else self.owner[:0]
    inside = (self.owner[:len(hashes)] == ends) & (self.flat[width - 1:] != 0)
    places = np.flatnonzero(inside)
    return _Table.build(width, hashes[places], places)

  def _heads(self):
    """The first `least` tokens of the items shorter than a run that count wherever they are."""
    digits = [code for token, code in self.codes.items() if token[0].isdigit()]
    numbered = np.unique(self.owner[np.isin(self.flat, np.array(digits, np.uint64))])
    counts = self.lengths >= self.short
    counts[numbered] |= self.lengths[numbered] >= self.least
    self.counts = counts
    places = self.starts[counts & (self.lengths < self.run)]
    hashes = [_hash_windows(self.flat[s:s + self.least], self.least)[0] for s in places]
    return _Table.build(self.least, np.array(hashes, np.uint64), places)

  def _learn(self, rows, boilerplate, shared):
    """Hashes of the `gram`-token runs that `shared` unrelated items, or a phrase, contain."""
    sets = [set(_hash_windows(row, self.gram).tolist()) for row in rows]
    where = defaultdict(list)
    for i, grams in enumerate(sets):
      for gram in grams:
        where[gram].append(i)
    common = set()
    for gram, items in where.items():
      unrelated = []
      for i in items if len(items) >= shared else ():
        if all(2 * len(sets[i] & sets[j]) < max(len(sets[i]), len(sets[j])) for j in unrelated):
          unrelated.append(i)
          if len(unrelated) >= shared:
            common.add(gram)
            break
    for phrase in boilerplate:
      row = self._encode(tokenise(phrase))
      known = np.convolve(row != 0, np.ones(self.gram, int), 'valid') == self.gram
      common |= set(_hash_windows(row, self.gram)[known].tolist() if len(row) >= self.gram else ())
    return np.array(sorted(common), np.uint64)

  def _mark(self, row):
    """Which tokens are part of boilerplate."""
    marks = np.zeros(len(row), bool)
    hashes = _hash_windows(row, self.gram)
    if len(hashes) and len(self.phrases):
      places = np.minimum(np.searchsorted(self.phrases, hashes), len(self.phrases) - 1)
      for i in np.flatnonzero(self.phrases[places] == hashes):
        marks[i:i + self.gram] = True
    return marks

  def check(self, text):
    """The Match of `text` with most shared tokens, or None where no test item is in it."""
    row = self._encode(tokenise(text))
    if row.tobytes() in self.equal and len(row):
      i = self.equal[row.tobytes()]
      return self._report(i, int(self.starts[i]), len(row), 1.0)
    if len(row) < self.least:
      return None
    if len(row) < self.run:
      hits = self.brief.find_rarest(row)
    else:
      hits = list(self.long.find(row))
    hits += self.whole.find(row)
    best, marks, seen = None, None, {}
    for i, place in hits:
      if i < seen.get(place - i, 0):
        continue
      first, length = self._extend(row, i, place)
      seen[place - i] = first + length
      marks = self._mark(row) if marks is None else marks
      found = self._judge(row, marks, first, place - i + first, length)
      if found and (best is None or found.length > best.length):
        best = found
    return best

  def _extend(self, row, i, place):
    """(start in `row`, length) of the longest run through `row[i]` and `flat[place]`."""
    item = self.owner[place]
    start = int(self.starts[item])
    end = start + int(self.lengths[item])
    back = min(i, place - start)
    differ = np.flatnonzero(row[i - back:i] != self.flat[place - back:place])
    before = back - 1 - int(differ[-1]) if len(differ) else back
    ahead = min(len(row) - i, end - place)
    differ = np.flatnonzero(row[i:i + ahead] != self.flat[place:place + ahead])
    after = int(differ[0]) if len(differ) else ahead
    return i - before, before + after

  def _judge(self, row, marks, first, place, length):
    """The rule for one common run: see the module's first paragraph."""
    item = int(self.owner[place])
    size, start = int(self.lengths[item]), int(self.starts[item])
    if length == size and self.counts[item]:
      return self._report(item, place, length, 1.0)
    if length == len(row) and length >= self.share * size:
      return self._report(item, place, length, 1.0)
    own = length - int(marks[first:first + length].sum())
    text_own = len(row) - int(marks.sum())
    item_own = size - int(self.common[start:start + size].sum())
    shorter = max(min(text_own, item_own), 1)
    if own >= self.run and own >= self.share * shorter:
      return self._report(item, place, length, min(own / shorter, 1.0))
    return None

  def _report(self, item, place, length, share):
    if not hasattr(self, '_words'):
      self._words = {code: token for token, code in self.codes.items()}
    words = [self._words[code] for code in self.flat[place:place + length].tolist()]
    return Match(self.items[item], length, round(share, 3), ' '.join(words))


def find_contamination(text, index):
  """None, or the reason to drop `text`: the test item it contains and the shared words."""
  match = index.check(text)
  if match is None:
    return None
  words = match.text if len(match.text) <= 120 else match.text[:117] + '...'
  return (f'shares {match.length} tokens in a row ({match.share:.0%}) with test item '
          f'{match.item}: {words}')
