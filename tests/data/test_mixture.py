"""Shares of tokens come out as configured; orders are seeded; lengths stay in their buckets."""

import collections
import itertools

import numpy as np
import pytest

from qwen3_jax.data import mixture, packing, sources, tasks


def encode(text):
  """A token for each piece between spaces and line ends: fast, and uneven over kinds of text."""
  return [len(word) for line in text.splitlines() for word in line.split(' ')]


class Fixed:
  """`count` documents of `words` words each."""

  def __init__(self, name, count, words):
    self.name, self.count, self.words = name, count, words

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    if not 0 <= i < self.count:
      raise IndexError(i)
    return ' '.join([f'{self.name}{i}'] * self.words)


def shares(documents, count):
  tokens = collections.Counter()
  for i in range(count):
    name, item = documents[i]
    tokens[name] += 1 + len(item if isinstance(item, np.ndarray) else encode(item))
  return {name: n / tokens.total() for name, n in tokens.items()}


def test_weights_are_shares_of_tokens():
  documents = mixture.mixture([(Fixed('a', 50, 9), 0.6), (Fixed('b', 7, 99), 0.3),
                               (Fixed('c', 5000, 3), 0.1)], 0, encode)
  got = shares(documents, 4 * mixture.BLOCK)
  assert got == pytest.approx({'a': 0.6, 'b': 0.3, 'c': 0.1}, rel=0.02)


def test_weights_are_shares_of_tokens_on_real_text():
  code, prose = (sources.open_source(s, 'train') for s in ('stdlib:code', 'stdlib:prose'))
  documents = mixture.mixture([(code, 0.5), (prose, 0.3), (tasks.TaskSource(), 0.2)], 1, encode)
  # all documents of each source once: what the shares tend to, without the noise of a short run
  counts, means = np.array(documents._counts), []
  for source in (code, prose):
    means.append(np.mean([len(encode(source[i])) + 1 for i in range(len(source))]))
  means.append(np.mean([len(encode(tasks.TaskSource()[i])) + 1 for i in range(3000)]))
  got = counts * means / np.sum(counts * means)
  np.testing.assert_allclose(got, [0.5, 0.3, 0.2], rtol=0.05)


def test_every_row_of_a_batch_sees_every_source():
  documents = mixture.mixture([(Fixed('a', 50, 9), 0.5), (Fixed('b', 50, 9), 0.5)], 0, encode)
  for row in range(8):
    names = collections.Counter(documents[i][0] for i in range(row, mixture.BLOCK, 8))
    assert 0.4 < names['a'] / names.total() < 0.6


def test_each_document_once_an_epoch_in_a_new_order():
  documents = mixture.mixture([(Fixed('a', 100, 1), 1.0)], 3, encode)
  epochs = [[documents.locate(100 * e + i)[1] for i in range(100)] for e in range(40)]
  slots = [documents.locate(i)[1] for i in range(2 * mixture.BLOCK)]
  assert collections.Counter(slots).most_common()[-1][1] >= 2 * mixture.BLOCK // 100 - 1
  assert len({tuple(e) for e in epochs}) == len(epochs)
  counts = collections.Counter(slots)
  assert max(counts.values()) - min(counts.values()) <= 1


def test_deterministic_by_seed_and_random_access():
  make = lambda seed: mixture.mixture([(Fixed('a', 90, 2), 1), (Fixed('b', 33, 5), 2)], seed)
  one, two, other = make(0), make(0), make(1)
  order = [one[i] for i in range(500)]
  assert [two[i] for i in reversed(range(500))] == order[::-1]
  assert [other[i] for i in range(500)] != order
  assert one.identity == two.identity != other.identity
  assert one[10 ** 12] == two[10 ** 12]


def test_errors():
  with pytest.raises(ValueError, match='positive weights'):
    mixture.mixture([(Fixed('a', 1, 1), 0.0)], 0)
  with pytest.raises(ValueError, match='a has no document'):
    mixture.mixture([(Fixed('a', 0, 1), 1.0)], 0)

  class Broken(Fixed):
    def __getitem__(self, i):
      if i == 5:
        raise OSError('disk gone')
      return super().__getitem__(i)

  broken = Broken('the books', 1000, 1)
  documents = mixture.Mixture([broken], np.array([1.0]), 0)
  with pytest.raises(RuntimeError, match='document 5 of source the books: disk gone'):
    for i in range(mixture.BLOCK):
      documents[i]


@pytest.mark.parametrize('low, high, cut', [(1024, 2048, True), (256, 1024, False)])
def test_lengths_are_enforced(low, high, cut):
  view = mixture.by_length(sources.open_source('stdlib:code'), encode, low, high, cut=cut)
  assert len(view) > 50
  sizes = [len(view[i]) + 1 for i in range(0, len(view), len(view) // 50)]
  assert low <= min(sizes) and max(sizes) <= high


def test_parts_of_a_long_document_are_the_document():
  text = ''.join(f'line {i} of it\n' for i in range(1000))
  parts = [mixture._cut(text, part, 7) for part in range(7)]
  assert ''.join(parts) == text and all(part.endswith('\n') for part in parts)


def test_short_documents_are_joined_with_neighbours_of_their_folder():
  texts = [f'{folder}{i} ' * 50 for folder in 'abc' for i in range(40)]
  sizes = np.array([len(t) for t in texts])
  source = sources.Source('small', texts.__getitem__, sizes,
                          np.arange(len(texts), dtype=np.uint64), np.repeat([0, 1, 2], 40))
  view = mixture.by_length(source, lambda t: [1] * len(t.split()), 256, 512)
  vocabulary = [{word[0] for word in ' '.join(source[j] for j in range(a, a + n)).split()}
                for a, n, _, _ in view._pieces]
  assert len(view) >= 6 and all(len(folders) == 1 for folders in vocabulary)
  spans = [range(a, a + n) for a, n, _, _ in view._pieces.tolist()]
  assert all(not set(x) & set(y) for x, y in itertools.combinations(spans, 2))
  assert all(256 <= len(view[i]) + 1 <= 512 for i in range(len(view)))
  with pytest.raises(ValueError, match='small has no document of 256 to 512 tokens'):
    mixture.by_length(source, lambda t: [1] * len(t.split()), 256, 512, join=False)


def test_long_context_mix_has_its_token_shares_and_splits_few():
  length = 512
  views = mixture.length_mix(sources.open_source('stdlib:code', 'train'), encode, length)
  documents = mixture.mixture(views, 0, encode)
  got = shares(documents, 3000)
  assert list(got.values()) and got[views[0][0].name] == pytest.approx(0.75, abs=0.02)
  loader = packing.Loader(documents, encode, 4, length, 0, keep_whole=8)
  rows = long = 0
  for batch in itertools.islice(loader, 60):
    for segments in batch['segment_BT']:
      assert segments.min() == 1
      rows, long = rows + 1, long + (np.bincount(segments).max() >= length // 2)
  loader.close()
  # as many rows have an unsplit long document as there are long documents in them
  assert long / rows > 0.95 * 0.75 * length / mixture.mean_length(views[0][0])
