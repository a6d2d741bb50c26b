"""Exact and near duplicates of a stream of texts, against everything kept so far.

Exact: equal 64-bit hashes of the text without case, punctuation and white space. Near: estimated
Jaccard similarity of the sets of shingles (5 words; 5 characters where words are not spaced) by
MinHash of 128 slots (rensa's R-MinHash), candidates by 21 bands of 6 slots: a pair of similarity
0.8 is a candidate with probability 0.998, of 0.6 with 0.63, of 0.3 with 0.015. The estimate has a
standard deviation of sqrt(s (1 - s) / 128), 0.035 at 0.8.
"""

import hashlib
import re
import unicodedata

import numpy as np
import rensa

SLOTS, BANDS, ROWS = 128, 21, 6
_WORD = re.compile(
  r'[\u2e80-\u2fdf\u3005-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|'
  r'[^\W_\u2e80-\u2fdf\u3005-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+'
  r'|[+*/^=<>-]')


def shingle(text, width=5):
  """Distinct runs of `width` words; a character is a word in scripts that do not space words.

  Case, white space and punctuation do not count, operators do. A text of fewer words is one
  shingle, an empty one has none.
  """
  if not text.isascii():
    text = unicodedata.normalize('NFKC', text)
  words = _WORD.findall(text.lower())
  if len(words) <= width:
    return {' '.join(words)} if words else set()
  return set(map(' '.join, zip(*(words[i:] for i in range(width)))))


def jaccard(one, other):
  """Exact similarity of two sets of shingles; of two empty ones 1."""
  return len(one & other) / len(one | other) if one or other else 1.0


class Deduplicator:
  """Texts kept so far: 520 bytes a text whatever its length, its id apart, and 20 MB.

  These are 256 of MinHash and 264 of keys (22 of 8 bytes with a 4-byte number); the arrays grow by
  doubling. Only texts that pass are remembered, so a chain of small changes keeps its first member.
  Verdicts depend on the texts and their order alone.
  """

  def __init__(self, threshold=0.8, width=5, seed=1):
    if not 0 < threshold <= 1:
      raise ValueError(f'the similarity threshold must lie in (0, 1], got {threshold}')
    self.threshold, self.width, self.seed = threshold, width, seed
    self.names = []
    self.slots = np.empty((1024, SLOTS), np.uint16)
    self.runs = []  # (keys, texts) sorted by key, each at least twice as long as the next
    self.recent = {}  # key -> texts, the newest

  def __len__(self):
    return len(self.names)

  def check(self, name, text):
    """None, after which the text is remembered, or (kind, earlier id, similarity) of its match.

    `kind` is 'exact' (similarity 1) or 'near' (the estimate). Texts without a word pass.
    """
    keys, slots = self._sketch(text)
    if keys is None:
      return None
    found = self._find(keys, slots)
    if found is None:
      self._remember(name, keys, slots)
    return found

  def find(self, text):
    """What `check` would say, without remembering the text."""
    keys, slots = self._sketch(text)
    return None if keys is None else self._find(keys, slots)

  def _sketch(self, text):
    """Keys of a text, that of exact equality first, and the low halves of its MinHash slots."""
    shingles = shingle(text, self.width)
    if not shingles:
      return None, None
    sketch = rensa.RMinHash(num_perm=SLOTS, seed=self.seed)
    sketch.update(list(shingles))
    digest = np.array(sketch.digest(), np.uint64)
    keys = np.arange(BANDS + 1, dtype=np.uint64)
    for row in digest[:BANDS * ROWS].reshape(BANDS, ROWS).T:
      keys[1:] = (keys[1:] ^ row) * np.uint64(0x9E3779B97F4A7C15)
      keys[1:] ^= keys[1:] >> np.uint64(31)
    keys[0] = hash_words(text)
    return keys, (digest & np.uint64(0xFFFF)).astype(np.uint16)

  def _find(self, keys, slots):
    groups = [self.recent.get(key, []) for key in keys.tolist()]
    for keys_of_run, texts in self.runs:
      first = np.searchsorted(keys_of_run, keys)
      last = np.searchsorted(keys_of_run, keys, 'right')
      for i in np.flatnonzero(last > first):
        groups[i] = groups[i] + texts[first[i]:last[i]].tolist()
    if groups[0]:
      return 'exact', self.names[min(groups[0])], 1.0
    candidates = sorted(set().union(*groups[1:]))
    if not candidates:
      return None
    same = (self.slots[candidates] == slots).mean(1)
    best = int(same.argmax())
    if same[best] < self.threshold:
      return None
    return 'near', self.names[candidates[best]], float(same[best])

  def _remember(self, name, keys, slots):
    place = len(self.names)
    self.names.append(name)
    if place == len(self.slots):
      self.slots = np.concatenate([self.slots, np.empty_like(self.slots)])
    self.slots[place] = slots
    for key in keys.tolist():
      self.recent.setdefault(key, []).append(place)
    if len(self.names) % 4096 == 0:
      self._settle()

  def _settle(self):
    """Moves the newest keys into sorted arrays, of which there are at most log2(texts / 4096)."""
    pairs = [(key, place) for key, places in self.recent.items() for place in places]
    if not pairs:
      return
    self.recent = {}
    run = _sort(np.array([key for key, _ in pairs], np.uint64),
                np.array([place for _, place in pairs], np.uint32))
    while self.runs and len(self.runs[-1][0]) < 2 * len(run[0]):
      keys, texts = self.runs.pop()
      run = _sort(np.concatenate([keys, run[0]]), np.concatenate([texts, run[1]]))
    self.runs.append(run)

  def save(self, path):
    """Writes all that is remembered; ids must be numbers or strings."""
    self._settle()
    keys, texts = (np.concatenate(parts) for parts in zip(*self.runs)) if self.runs else (
      np.empty(0, np.uint64), np.empty(0, np.uint32))
    with open(path, 'wb') as file:
      np.savez(file, settings=np.array([self.threshold, self.width, self.seed]), keys=keys,
               texts=texts, slots=self.slots[:len(self)], names=np.array(self.names))

  @classmethod
  def load(cls, path):
    """The Deduplicator that `save` wrote: it goes on as if it had never stopped."""
    with np.load(path) as saved:
      threshold, width, seed = saved['settings'].tolist()
      loaded = cls(threshold, int(width), int(seed))
      loaded.names = saved['names'].tolist()
      loaded.slots = np.concatenate([saved['slots'], np.empty((1024, SLOTS), np.uint16)])
      if len(saved['keys']):
        loaded.runs = [_sort(saved['keys'], saved['texts'])]
    return loaded


def hash_words(text):
  """64 bits of a text's letters, digits and operators, whatever its case and white space."""
  if not text.isascii():
    text = unicodedata.normalize('NFKC', text)
  words = ' '.join(_WORD.findall(text.lower()))
  return int.from_bytes(hashlib.blake2b(words.encode('utf-8', 'replace'), digest_size=8).digest())


def _sort(keys, texts):
  order = np.argsort(keys, kind='stable')
  return keys[order], texts[order]
