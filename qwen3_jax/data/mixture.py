"""Sources become one endless stream: shares of tokens, seeded order, lengths by bucket."""

import functools
import hashlib
import json

import grain
import numpy as np

BLOCK = 4096  # picks after which the shares come round exactly
SAMPLE = 256  # excerpts or documents tokenised to learn the lengths of a source
EXCERPT = 2000  # characters


def mixture(sources_and_weights, seed, encode=None):
  """Endless indexable of (source name, document) in which `weights` are shares of *tokens*.

  A source is picked with probability proportional to weight / mean document length (see
  `mean_length`), counted with `encode` or, without it, in characters. Each source is read in a
  seeded order, every document once before any comes again, in a new order each time round.
  """
  sources = [source for source, _ in sources_and_weights]
  weights = np.array([float(weight) for _, weight in sources_and_weights])
  if not len(weights) or not np.all(np.isfinite(weights)) or weights.min() <= 0:
    raise ValueError(f'a mixture needs positive weights, got {weights.tolist()}: leave out a '
                     'source that should not be read')
  for source in sources:
    if not len(source):
      raise ValueError(f'source {source.name} has no document')
  return Mixture(sources, weights / [mean_length(source, encode) for source in sources], seed)


class Mixture:
  """See `mixture`; `rates` are the relative numbers of documents.

  Own picking rather than grain's `mix`: that takes a millisecond a document for general weights,
  and its fixed cycle would give each row of a batch its own share of the sources.
  """

  def __init__(self, sources, rates, seed):
    self.sources, self.seed = sources, seed
    exact = rates / rates.sum() * (BLOCK - len(sources))
    counts = np.floor(exact).astype(int) + 1
    counts[np.argsort(exact % 1)[len(sources) - (BLOCK - counts.sum()):]] += 1
    self._counts = counts.tolist()
    self._slots = np.repeat(np.arange(len(sources)), counts).tolist()
    self._starts = (np.cumsum(counts) - counts).tolist()

  @property
  def identity(self):
    """Short string that changes with the sources, their sizes, the shares or the seed."""
    what = [[s.name for s in self.sources], [len(s) for s in self.sources],
            [getattr(s, 'fingerprint', None) for s in self.sources], self._counts, self.seed]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()

  def locate(self, i):
    """(source number, index in that source) of global ordinal `i`, in constant time."""
    block, slot = divmod(i, BLOCK)
    slot = shuffle(slot, BLOCK, self.seed, block)
    s = self._slots[slot]
    nth = block * self._counts[s] + slot - self._starts[s]
    epoch, index = divmod(nth, len(self.sources[s]))
    return s, shuffle(index, len(self.sources[s]), self.seed + 1 + s, epoch)

  def __getitem__(self, i):
    s, index = self.locate(i)
    source = self.sources[s]
    try:
      return source.name, source[index]
    except Exception as error:
      raise RuntimeError(
        f'cannot read document {index} of source {source.name}: {error}') from error


def shuffle(index, size, seed, epoch=0):
  """Where `index` goes in the seeded permutation of range(size) of this epoch."""
  seed = (seed * 1_000_003 + epoch * 7_919) % 2 ** 32
  if size <= BLOCK:  # grain's shuffle walks cycles of 2 ** 16: milliseconds for a few documents
    return int(_permutation(size, seed)[index])
  return grain.experimental.index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)


@functools.lru_cache(256)
def _permutation(size, seed):
  return np.random.default_rng(seed).permutation(size)


def _sample(source, count):
  return [shuffle(i, len(source), 0, 0) for i in range(min(count, len(source)))]


def density(source, encode=None):
  """Tokens (characters without `encode`) a byte, from excerpts evenly spaced over all the bytes."""
  ends = np.cumsum(source.sizes)
  tokens = size = 0
  for at in (np.arange(SAMPLE) + 0.5) / SAMPLE * ends[-1]:
    i = int(np.searchsorted(ends, at, side='right'))
    text = source[i]
    start = int((at - ends[i] + source.sizes[i]) / source.sizes[i] * len(text))
    excerpt = text[max(0, min(start, len(text) - EXCERPT)):][:EXCERPT]
    tokens += len(encode(excerpt) if encode else excerpt)
    size += len(excerpt.encode())
  return tokens / size


def mean_length(source, encode=None):
  """Mean tokens of a document of `source`, the closing token included; an estimate.

  Exact where the documents are arrays of tokens with weights: there `sizes` count tokens.
  """
  if isinstance(source, LengthView):
    picks = _sample(source, SAMPLE // 4)
    return (np.mean([len(source[i]) + 1 for i in picks]) / source.sizes[picks].mean()
            * source.sizes.mean())
  if getattr(source, 'sizes', None) is not None:
    first = source[0]
    if isinstance(first, np.ndarray) and first.dtype.names:
      return source.sizes.mean()
    return density(source, encode) * source.sizes.mean() + 1
  texts = [source[i] for i in _sample(source, SAMPLE)]
  return np.mean([len(encode(text) if encode else text) for text in texts]) + 1


class LengthView:
  """The documents of a source whose length lies in [low, high] tokens, as arrays of token ids.

  `pieces` rows are (first document, documents, part, parts): a document, neighbours joined by a
  blank line, or one of `parts` parts of a long document, cut at line ends. They were chosen by
  estimated length, so the true one is enforced here: longer is cut to `high`, and in place of a
  shorter one the next piece that is long enough is given. The length counts the closing token.
  """

  def __init__(self, source, encode, low, high, pieces, sizes):
    self.name = f'{source.name} of {low}-{high} tokens'
    self.fingerprint = getattr(source, 'fingerprint', None)
    self.sizes = sizes
    self._source, self._encode, self._low, self._high = source, encode, low, high
    self._pieces = pieces

  def __len__(self):
    return len(self._pieces)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    for k in range(len(self)):
      first, count, part, parts = self._pieces[(i + k) % len(self)].tolist()
      text = '\n\n'.join(self._source[j] for j in range(first, first + count))
      ids = self._encode(_cut(text, part, parts))[:self._high - 1]
      if len(ids) + 1 >= self._low:
        return np.asarray(ids, np.int32)
    raise ValueError(f'no document of source {self.name}; choose shorter lengths or other data')


def _cut(text, part, parts):
  """Part `part` of `parts` about equal ones of `text`, cut behind line ends if it has any."""
  def edge(k):
    at = k * len(text) // parts
    return at if k in (0, parts) else text.find('\n', at, at + 2000) + 1 or at
  return text[edge(part):edge(part + 1)]


def by_length(source, encode, low, high, cut=False, join=None):
  """View of the documents of `source` with `low` to `high` tokens (lengths in tokens, inclusive).

  `source` must have `sizes`; from these and a sample lengths are estimated, so that nothing but the
  sample is tokenised here. `cut`: longer documents are cut into equal parts of at most `high`.
  `join`: documents shorter than `low` are joined with the neighbours of their group (the folder of
  a file, the package of a standard-library module); None joins where the documents that are long
  enough by themselves hold less than a tenth of the tokens. Raises ValueError where none is left.
  """
  if not 1 < low <= high:
    raise ValueError(f'lengths from {low} to {high} tokens make no sense')
  if getattr(source, 'sizes', None) is None:
    raise ValueError(f'source {source.name} does not know the sizes of its documents')
  lengths = source.sizes * density(source, encode) + 1
  parts = np.ones(len(lengths), int)
  if cut:  # parts stay somewhat below `high`, lest an estimate too low costs the end of each
    parts = np.where(lengths > high, np.ceil(lengths / (low + 3 * high) * 4), 1).astype(int)
  fits = (lengths / parts >= low) & (lengths / parts <= high)
  pieces = [(i, 1, part, parts[i]) for i in np.flatnonzero(fits) for part in range(parts[i])]
  groups = getattr(source, 'groups', None)
  if join is None:
    join = groups is not None and lengths[fits].sum() < 0.1 * lengths.sum()
  if join:
    pieces += _join(lengths, np.zeros(len(lengths)) if groups is None else groups, low, high)
  if not pieces:
    raise ValueError(f'source {source.name} has no document of {low} to {high} tokens (longest '
                     f'about {lengths.max():.0f}); use a shorter length or longer documents')
  pieces = np.array(pieces)
  ends = np.concatenate([[0], np.cumsum(lengths)])
  estimates = (ends[pieces[:, 0] + pieces[:, 1]] - ends[pieces[:, 0]]) / pieces[:, 3]
  return LengthView(source, encode, low, high, pieces, estimates)


def _join(lengths, groups, low, high):
  """Runs of neighbours of one group, each shorter than `low`, that together fit [low, high]."""
  runs, first, total = [], 0, 0.0
  for i in range(len(lengths) + 1):
    ends = i == len(lengths) or lengths[i] >= low or groups[i] != groups[max(0, i - 1)]
    if ends or total + lengths[i] > high:
      runs.append((first, i - first, total))
      first, total = i, 0.0
    if i < len(lengths):
      first, total = (i + 1, 0.0) if lengths[i] >= low else (first, total + lengths[i])
  return [(first, count, 0, 1) for first, count, total in runs if count > 1 and total >= low]


def length_mix(source, encode, length, mix=((0.75, (0.5, 1.0)), (0.25, (0.125, 0.5)))):
  """[(view, share of tokens)] of one source by document length, for `mixture`.

  `mix` holds (share, (low, high)) with low and high as fractions of the row length `length`. The
  default is the long-context stage of the Qwen3 report (section 3): 75 % of the text in documents
  of 16,384 to 32,768 tokens, 25 % in 4,096 to 16,384. Documents longer than the longest are cut.
  """
  longest = max(high for _, (_, high) in mix)
  return [(by_length(source, encode, int(low * length), int(high * length), cut=high == longest),
           share) for share, (low, high) in mix]
