"""Each token once and in order, whatever the hosts and the interruptions."""

import json

import numpy as np
import pytest

from qwen3_jax.data import packing

EOD = 0
BATCH, LENGTH = 4, 64


class Numbered:
  """Endless documents whose tokens name their document and their place in it."""
  identity = 'numbered'

  def __init__(self, low=1, high=150, seed=0):
    self.low, self.high, self.seed = low, high, seed

  def ids(self, i):
    size = np.random.default_rng((self.seed, i)).integers(self.low, self.high)
    return 1 + i * 1000 + np.arange(size, dtype=np.int32)

  def __getitem__(self, i):
    return 'numbered', self.ids(i)


class Weighted(Numbered):
  """Documents with weights: structured arrays, in which each third token is not trained."""
  identity = 'weighted'

  def __init__(self, low=1, high=LENGTH + 1, seed=0):
    super().__init__(low, high, seed)

  def __getitem__(self, i):
    return 'weighted', weigh(self.ids(i))


def weigh(ids):
  tokens = np.empty(len(ids), [('id', np.int32), ('weight', np.float32)])
  tokens['id'], tokens['weight'] = ids, ids % 3 / 2
  return tokens


STRICT, AHEAD, WHOLE = {}, {'keep_whole': 3}, {'keep_whole': 5, 'whole': True}


def make(rows=None, documents=None, **options):
  documents = documents or (Weighted() if options.get('whole') else Numbered())
  return packing.Loader(documents, None, BATCH, LENGTH, EOD, rows, **options)


def take(loader, count):
  return [next(loader) for _ in range(count)]


def assert_equal(got, wanted, rows=None):
  assert len(got) == len(wanted)
  for a, b in zip(got, wanted):
    for key in b:
      np.testing.assert_array_equal(a[key], b[key] if rows is None else b[key][rows])


def pieces(batches, r):
  """The segments of lane r as token lists, in order."""
  found = []
  for batch in batches:
    segments = batch['segment_BT'][r]
    for s in range(1, segments.max() + 1):
      found.append(batch['tokens_BT'][r][segments == s].tolist())
  return found


def test_lane_reads_its_documents_in_order_each_token_once():
  loader, documents = make(), Numbered()
  batches = take(loader, 20)
  loader.close()
  for r in range(BATCH):
    stream = [t for piece in pieces(batches, r) for t in piece]
    wanted = [t for k in range(100) for t in [*documents.ids(r + k * BATCH), EOD]]
    assert stream == wanted[:20 * LENGTH]


def test_arrays():
  loader = make()
  batch = next(loader)
  loader.close()
  assert {k: v.dtype.name for k, v in batch.items()} == {
    'tokens_BT': 'int32', 'segment_BT': 'int32', 'position_BT': 'int32', 'weight_BT': 'float32'}
  for tokens, segments, positions, weights in zip(*batch.values()):
    starts = np.flatnonzero(np.diff(segments, prepend=0))
    assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1}
    for t in range(LENGTH):
      start = starts[starts <= t][-1]
      assert positions[t] == t - start
      assert weights[t] == (t != start)
      if t + 1 < LENGTH:  # a segment ends where its document does
        assert (tokens[t] == EOD) == (segments[t + 1] > segments[t])


@pytest.mark.parametrize('options', [STRICT, AHEAD, WHOLE])
def test_resume_at_any_batch_equals_uninterrupted(options):
  loader = make(**options)
  wanted, states = [], [loader.state()]
  for _ in range(12):
    wanted.append(next(loader))
    states.append(json.loads(json.dumps(loader.state())))
  loader.close()
  for step, state in enumerate(states):
    resumed = make(**options)
    resumed.restore(state)
    assert resumed.state() == state and state['step'] == step
    assert_equal(take(resumed, len(wanted) - step), wanted[step:])
    resumed.close()


def test_restore_goes_back_in_a_used_loader():
  loader = make()
  take(loader, 3)
  state = loader.state()
  wanted = take(loader, 3)
  loader.restore(state)
  assert_equal(take(loader, 3), wanted)
  loader.close()


@pytest.mark.parametrize('options', [STRICT, AHEAD, WHOLE])
def test_hosts_may_change_between_batches(options):
  whole = make(**options)
  wanted = take(whole, 15)
  whole.close()
  one = make(**options)
  assert_equal(take(one, 5), wanted[:5])
  one.close()
  halves = ([0, 3], [1, 2])
  two = [make(rows, **options) for rows in halves]
  for host, rows in zip(two, halves):
    host.restore(one.state())
    assert_equal(take(host, 5), wanted[5:10], rows)
    host.close()
  last = make(**options)
  last.restore(packing.merge_states([host.state() for host in two]))
  assert_equal(take(last, 5), wanted[10:])
  last.close()


def test_merge_rejects_states_that_do_not_belong_together():
  hosts = [make([0, 1]), make([2, 3])]
  take(hosts[0], 1)
  with pytest.raises(ValueError, match='step'):
    packing.merge_states([host.state() for host in hosts])
  with pytest.raises(ValueError, match='same row'):
    packing.merge_states([hosts[0].state(), hosts[0].state()])
  for host in hosts:
    host.close()


def test_restore_rejects_other_data_batches_and_missing_rows():
  state = make().state()
  with pytest.raises(ValueError, match="data 'numbered'.*'other'"):
    other = Numbered()
    other.identity = 'other'
    make(documents=other).restore(state)
  with pytest.raises(ValueError, match='length 64.*32'):
    packing.Loader(Numbered(), None, BATCH, 32, EOD).restore(state)
  with pytest.raises(ValueError, match=r'rows \[2, 3\]'):
    make().restore(make([0, 1]).state())


def test_state_is_of_the_batches_handed_out():
  loader = make(prefetch=8)
  first = loader.state()
  next(loader)
  assert first['step'] == 0 and loader.state()['step'] == 1
  loader.close()
  with pytest.raises(RuntimeError, match='closed'):
    next(loader)


def test_errors_name_the_document_and_come_at_their_batch():
  class Broken(Numbered):
    def __getitem__(self, i):
      return 'the books', 'bad' if i == 9 else 'x' * 40

  def encode(text):
    if text == 'bad':
      raise ValueError('no such word')
    return [1] * len(text)

  loader = packing.Loader(Broken(), encode, BATCH, 41, EOD)
  take(loader, 2)
  with pytest.raises(RuntimeError, match=r'9 \(the books\).*no such word'):
    next(loader)
  with pytest.raises(RuntimeError, match='no such word'):
    next(loader)
  loader.close()


def test_encode_batch_changes_nothing():
  class Words(Numbered):
    def __getitem__(self, i):
      return 'words', f'word{i} ' * (i * i % 17)

  encode = lambda text: list(text.encode())
  one = packing.Loader(Words(), encode, BATCH, LENGTH, EOD)
  many = packing.Loader(Words(), encode, BATCH, LENGTH, EOD,
                        encode_batch=lambda texts: [encode(text) for text in texts])
  assert_equal(take(one, 10), take(many, 10))
  one.close()
  many.close()


def test_keep_whole_splits_fewer_long_documents_and_loses_nothing():
  class Mixed(Numbered):
    def ids(self, i):
      low, high = ((33, 63), (8, 32))[i // BATCH % 2]
      return 1 + i * 1000 + np.arange(np.random.default_rng(i).integers(low, high), dtype=np.int32)

  split = {}
  for keep_whole in (0, 6):
    loader = make(documents=Mixed(), keep_whole=keep_whole)
    batches = take(loader, 200)
    state = loader.state()
    loader.close()
    cut = long = 0
    for r in range(BATCH):
      streams = {}
      for piece in pieces(batches, r):
        key = (piece[0] - 1) // 1000 if piece != [EOD] else None
        streams.setdefault(key, []).append([t for t in piece if t != EOD])
      unfinished = [ordinal for ordinal, _ in state['lanes'][str(r)]['open']]
      for i in range(r, state['lanes'][str(r)]['next'], BATCH):
        if i not in unfinished:
          assert sum(streams[i], []) == Mixed().ids(i).tolist()
          cut += len(streams[i]) > 1 and len(Mixed().ids(i)) > 32
          long += len(Mixed().ids(i)) > 32
    split[keep_whole] = cut / long
  assert split[6] < 0.05 and split[0] > 0.5


@pytest.mark.parametrize('keep_whole', [0, 1, 5])
def test_whole_documents_are_never_split_lost_or_repeated(keep_whole):
  loader, documents = make(keep_whole=keep_whole, whole=True), Weighted()
  batches = take(loader, 100)
  state = loader.state()
  loader.close()
  for r in range(BATCH):
    lane = state['lanes'][str(r)]
    waiting = {ordinal for ordinal, offset in lane['open']}
    assert all(offset == 0 for _, offset in lane['open']) and len(waiting) <= max(1, keep_whole)
    wanted = sorted(documents.ids(i).tolist() for i in range(r, lane['next'], BATCH)
                    if i not in waiting)
    assert sorted(pieces(batches, r)) == wanted


def test_whole_packing_has_the_weights_of_the_documents():
  loader = make(**WHOLE)
  padded = 0
  for batch in take(loader, 20):
    starts = np.diff(batch['segment_BT'], axis=1, prepend=0) > 0
    real = batch['segment_BT'] > 0
    wanted = np.where(real & ~starts, batch['tokens_BT'] % 3 / 2, 0)
    np.testing.assert_array_equal(batch['weight_BT'], wanted)
    assert not batch['tokens_BT'][~real].any() and batch['position_BT'][starts].max() == 0
    padded += (~real).sum()
  loader.close()
  assert padded


def test_lookahead_fills_whole_rows_and_none_waits_long():
  filled = {}
  for keep_whole in (0, 16):
    loader = make(keep_whole=keep_whole, whole=True)
    seen = {}
    for step, batch in enumerate(take(loader, 200)):
      seen.update({piece[0]: step for piece in pieces([batch], 0)})
      filled[keep_whole] = filled.get(keep_whole, 0) + (batch['segment_BT'] > 0).mean() / 200
    loader.close()
    at_hand = {}  # the first row of each document, were they taken in order
    for k, first in enumerate(sorted(seen)):
      at_hand[first] = seen[first] - min(seen[later] for later in sorted(seen)[k:])
    assert max(at_hand.values()) <= keep_whole
  assert filled[16] > 0.94 > 0.8 > filled[0]


def test_document_longer_than_a_row_is_named():
  class Long(Weighted):
    def ids(self, i):
      return np.arange(LENGTH + (i == 9), dtype=np.int32)

  loader = make(documents=Long(), whole=True)
  take(loader, 1)
  with pytest.raises(ValueError, match=r'document 9 \(weighted\) has 65 tokens, a row 64'):
    take(loader, 5)
  loader.close()


def test_plain_documents_too_are_packed_whole_with_their_end():
  loader = make(documents=Numbered(high=LENGTH), **WHOLE)
  for row in pieces(take(loader, 10), 0):
    assert row[-1] == EOD and row[:-1] == Numbered(high=LENGTH).ids((row[0] - 1) // 1000).tolist()
  loader.close()


def test_weighted_documents_may_be_split_and_mixed_with_plain_ones():
  class Mixed(Weighted):
    def __getitem__(self, i):
      return 'mixed', self.ids(i) if i // BATCH % 2 else weigh(self.ids(i))

  loader = make(documents=Mixed())
  batches = take(loader, 10)
  loader.close()
  for r in range(BATCH):
    stream, weights = (np.concatenate([batch[key][r] for batch in batches])
                       for key in ('tokens_BT', 'weight_BT'))
    starts = np.concatenate([np.diff(batch['segment_BT'][r], prepend=0) > 0 for batch in batches])
    ids = [[*Mixed().ids(r + k * BATCH), *[EOD] * (k % 2)] for k in range(50)]
    expected = [[1] * len(x) if k % 2 else np.array(x) % 3 / 2 for k, x in enumerate(ids)]
    np.testing.assert_array_equal(stream, np.concatenate(ids)[:len(stream)])
    np.testing.assert_array_equal(
      weights, np.where(starts, 0, np.concatenate(expected)[:len(stream)]))


def test_positions_of_one_packing_are_refused_by_the_other():
  state = make(**AHEAD).state()
  with pytest.raises(ValueError, match='whole False, this run has True'):
    make(documents=Numbered(), keep_whole=3, whole=True).restore(state)
  del state['whole']  # as saved before there was whole packing
  loader = make(**AHEAD)
  loader.restore(state)
  assert loader.state()['lanes'] == state['lanes']


class Few:
  name = 'few'

  def __init__(self, documents):
    self.documents = documents

  def __len__(self):
    return 10

  def __getitem__(self, i):
    if not 0 <= i < 10:
      raise IndexError(i)
    return self.documents[i][1]


@pytest.mark.parametrize('documents, options', [(Numbered(), STRICT), (Weighted(), WHOLE)])
def test_fixed_batches_read_each_document_once_and_pad_the_end(documents, options):
  def fixed(count, **more):
    return list(packing.fixed_batches(Few(documents), None, 2, LENGTH, count, EOD, **options,
                                      **more))
  batches = fixed(1000)
  assert_equal(fixed(1000), batches)
  assert_equal(fixed(1000, rows=[1]), batches, rows=[1])
  assert len(fixed(2)) == 2
  real = np.concatenate([b['tokens_BT'][b['segment_BT'] > 0] for b in batches])
  end = [] if options.get('whole') else [EOD]
  wanted = np.concatenate([np.append(documents.ids(i), end) for i in range(10)])
  np.testing.assert_array_equal(np.sort(real), np.sort(wanted))
  last = batches[-1]
  padding = last['segment_BT'] == 0
  assert padding.any() and not last['weight_BT'][padding].any()
