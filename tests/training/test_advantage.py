"""Advantages and aggregations: TRL's numbers, missing rewards, what each token weighs."""

import numpy as np
import pytest

from qwen3_jax.training import advantage, policy


@pytest.mark.parametrize('kind, key, eps', [
  ('group', 'trl_scale_group', 1e-4), ('dr', 'trl_scale_none_drgrpo', 1e-4),
  ('group_mean_batch_std', 'trl_scale_batch', 1e-4), ('group', 'ddof1_eps1e-6', 1e-6),
  ('rloo', 'rloo', 1e-4)])
def test_values_are_those_of_the_oracle(golden, kind, key, eps):
  numbers = np.load(golden / 'loss' / 'advantages.npz')
  got, valid = advantage.advantages(numbers['rewards'], kind, eps)
  np.testing.assert_allclose(got, numbers[key], atol=1e-6)
  assert np.all(valid)
  for group, equal in zip(got, numbers['zero_std_group']):
    assert (group == 0).all() == equal  # exactly: rounding of a mean is no advantage


def test_batch_takes_mean_and_deviation_of_all():
  groups = [[1.0, 0.0], [3.0, 4.0, 2.0]]
  every = np.concatenate(groups)
  got, _ = advantage.advantages(groups, 'batch')
  np.testing.assert_allclose(np.concatenate(got), (every - 2) / (every.std(ddof=1) + 1e-4))
  assert (advantage.advantages([[0.1] * 3, [0.1] * 2], 'batch')[0][0] == 0).all()


@pytest.mark.parametrize('kind', ['group', 'dr', 'batch', 'group_mean_batch_std', 'rloo'])
def test_a_missing_reward_is_as_if_its_sample_were_not_there(kind):
  """And counts for nobody: not as zero, not in a mean, not in a deviation."""
  full = [[1.0, 0.0, 0.5], [0.25, 0.75], [2.0]]
  holes = [[1.0, None, 0.0, 0.5], [float('nan'), 0.25, 0.75], [2.0, None], [None, None]]
  want, _ = advantage.advantages(full, kind)
  got, valid = advantage.advantages(holes, kind)
  for group, good, values in zip(got, valid, want):
    np.testing.assert_allclose(group[good], values, atol=1e-12)
    assert (group[~good] == 0).all()
  assert [list(good) for good in valid] == [
    [True, False, True, True], [False, True, True], [True, False], [False, False]]
  assert (got[3] == 0).all() and (kind == 'batch' or got[2][0] == 0)


def test_decoupled_components_keep_what_a_sum_of_rewards_hides():
  """GDPO's example: (1, 0) and (0, 1) have equal sums; (1, 1) beats (1, 0) beats (0, 0)."""
  groups = [np.array([[1, 0], [1, 1], [0, 0], [0, 1]], float), np.array([[1, 1], [1, 0]], float)]
  (first, second), _ = advantage.advantages(groups, 'decoupled')
  def norm(x):
    return (x - x.mean()) / (x.std(ddof=1) + 1e-4)
  total = [norm(groups[0][:, 0]) + norm(groups[0][:, 1]), norm(groups[1][:, 1])]
  deviation = np.concatenate(total).std(ddof=1) + 1e-4
  np.testing.assert_allclose(first, total[0] / deviation, atol=1e-12)
  np.testing.assert_allclose(second, total[1] / deviation, atol=1e-12)
  weights = [(1.0, 0.0), (0.0, 2.0)]  # each prompt has its own components
  (weighted, other), _ = advantage.advantages(groups, 'decoupled', weights=weights)
  assert weighted[0] == weighted[1] > 0 > weighted[2] == weighted[3]
  assert other[0] > 0 > other[1]


def test_decoupled_with_a_component_missing_and_with_all_missing():
  nan = np.nan
  (got,), (valid,) = advantage.advantages(
    [np.array([[1, 0], [0, nan], [nan, 1], [nan, nan]])], 'decoupled')
  assert list(valid) == [True, True, True, False] and got[3] == 0
  assert np.isfinite(got).all() and abs(got[:3].sum()) < 1e-9


LENGTHS, PROMPTS = [3, 0, 5, 2, 10], [7, 7, 7, 9, 9]


@pytest.mark.parametrize('mode, want', [
  ('token', [1 / 20] * 5), ('sequence', [1 / 15, 1 / 5, 1 / 25, 1 / 10, 1 / 50]),
  ('dr', [1 / 60] * 5), ('prompt', [1 / 16] * 3 + [1 / 24] * 2)])
def test_aggregations(mode, want):
  got = advantage.aggregate(LENGTHS, mode, groups=PROMPTS, longest=12)
  np.testing.assert_allclose(got, want)
  if mode in ('token', 'prompt'):
    np.testing.assert_allclose(got @ LENGTHS, 1)  # a mean: the weights of all tokens add up to 1


def test_nothing_to_train_is_no_division_by_zero():
  for mode in ('token', 'sequence', 'dr', 'prompt'):
    assert np.isfinite(advantage.aggregate([0, 0], mode, groups=[1, 1], longest=4)).all()
    assert advantage.aggregate([], mode, groups=[], longest=4).shape == (0,)
  assert advantage.advantages([]) == ([], [])


def test_what_each_kind_of_policy_names_exists():
  for kind in policy.KINDS:
    settings = policy.Policy(kind)
    advantage.advantages([[0.0, 1.0]], settings.advantage)
    advantage.aggregate([1], settings.aggregation, groups=[0], longest=2)


@pytest.mark.parametrize('call, message', [
  (lambda: advantage.advantages([[1.0]], 'grpo'), "no advantages 'grpo'; want one of group"),
  (lambda: advantage.advantages([[[1.0]]], 'group'), r'shape \(1, 1\).*wants \(samples,\)'),
  (lambda: advantage.advantages([[1.0]], 'decoupled'), r'wants \(samples, components\)'),
  (lambda: advantage.aggregate([1], 'mean'), "no aggregation 'mean'; want one of token"),
  (lambda: advantage.aggregate([9], 'dr', longest=8), 'largest length.*got 8, and a sample of 9'),
  (lambda: advantage.aggregate([9], 'dr'), 'got None'),
  (lambda: advantage.aggregate([9, 1], 'prompt', groups=[0]), 'needs the prompt of each sample')])
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()
