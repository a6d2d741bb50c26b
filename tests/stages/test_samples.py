"""Samples in rows: nothing lost, nothing mixed up, few shapes."""
import numpy as np
import pytest

from qwen3_jax.stages import samples
from qwen3_jax.stages.samples import Sample


def make(rng, length, routes=False):
  prompt = rng.integers(1, length)
  weight = np.r_[np.zeros(prompt), rng.integers(0, 2, length - prompt)].astype(np.float32)
  return Sample(rng.integers(1, 99, length), weight, rng.normal(size=length).astype(np.float32),
                rng.integers(0, 8, (length, 2, 3)).astype(np.uint8) if routes else None,
                advantage=float(rng.normal()), scale=float(rng.random()),
                old_logp=rng.normal(size=length).astype(np.float32))


def test_every_token_of_every_sample_is_in_the_batch_with_what_belongs_to_it():
  rng = np.random.default_rng(0)
  given = [make(rng, n, routes=True) for n in rng.integers(2, 30, 40)]
  rows = samples.rows_of(given, 32)
  batch = samples.make_batch(rows, len(rows) + 3, 32)
  assert sum(map(len, rows)) == 40 and len(rows) < 26  # 40 samples of 16: 20 rows would be full
  assert (batch['segment_BT'] > 0).sum() == sum(map(len, given))
  seen = 0
  for b, row in enumerate(rows):
    for number, sample in enumerate(row, 1):
      place = np.flatnonzero(batch['segment_BT'][b] == number)
      np.testing.assert_array_equal(batch['tokens_BT'][b, place], sample.tokens)
      np.testing.assert_array_equal(batch['position_BT'][b, place], np.arange(len(sample)))
      np.testing.assert_array_equal(batch['routes_BTLX'][b, place], sample.routes)
      for name in ('weight', 'rollout_logp', 'old_logp', 'advantage', 'scale'):
        np.testing.assert_array_equal(batch[f'{name}_BT'][b, place],
                                      np.float32(getattr(sample, name)), name)
      seen += 1
  assert seen == 40 and not batch['weight_BT'][len(rows):].any()
  assert 'reference_logp_BT' not in batch


def test_values_of_rows_go_back_to_their_samples():
  rng = np.random.default_rng(1)
  given = [make(rng, n) for n in rng.integers(2, 20, 15)]
  rows = samples.rows_of(given, 24)
  batch = samples.make_batch(rows, len(rows), 24)
  samples.take_back(rows, batch['tokens_BT'] * 2.0, 'reference_logp')
  for sample in given:
    np.testing.assert_array_equal(sample.reference_logp, sample.tokens * 2.0)


def test_rows_come_in_few_counts():
  sizes = {samples.count_rows(n, 8) for n in range(1, 800)}
  assert sizes == {8 * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)}
  assert all(n <= samples.count_rows(n, 8) <= max(8, 1.5 * n + 8) for n in range(1, 800))
  assert samples.count_rows(0, 8) == 8


def test_a_sample_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match='a sample has 9 tokens, config.data.length is 8'):
    samples.rows_of([make(np.random.default_rng(0), 9)], 8)
