"""Entropy control: the controller in a closed loop, and which tokens covariance picks."""

import json

import numpy as np
import pytest

from qwen3_jax.training import entropy


def train_softmax(controller, updates=400, rate=0.3):
  """Entropies of a softmax over 4 actions, of which the first is rewarded, by exact gradients."""
  theta, reward, bonus, seen = np.zeros(4), np.array([1.0, 0, 0, 0]), 0.0, []
  for _ in range(updates):
    p = np.exp(theta) / np.exp(theta).sum()
    H = -(p * np.log(p)).sum()
    seen.append(H)
    theta = theta + rate * (p * (reward - p @ reward) - bonus * p * (np.log(p) + H))
    bonus = controller.update(H) if controller else 0.0
  return np.array(seen)


def test_entropy_collapses_without_and_stays_in_the_band_with_a_controller():
  assert train_softmax(None)[-1] < 0.1
  controller = entropy.Controller(0.8, width=0.1, delta=0.02, most=2.0)
  late = train_softmax(controller)[-100:]
  low, high = controller.band()
  assert low - 0.05 < late.min() and late.max() < high + 0.05 and controller.coefficient > 0


def test_a_rising_target_makes_entropy_rise():
  controller = entropy.Controller(0.5, width=0.05, delta=0.02, most=2.0, rise=0.001)
  seen = train_softmax(controller)
  assert controller.target == pytest.approx(0.9)
  assert seen[-50:].mean() > seen[150:200].mean() + 0.1


def test_steps_of_delta_and_none_within_the_band():
  controller = entropy.Controller(1.0, width=0.1, delta=0.01, start=0.02, most=0.035)
  assert [round(controller.update(h), 3) for h in (0.95, 1.09, 0.5, 0.5, 0.5)] == [
    0.02, 0.02, 0.03, 0.035, 0.035]
  assert [round(controller.update(h), 3) for h in (1.2, 1.2, 1.2, 1.2, 1.2)] == [
    0.025, 0.015, 0.005, 0, 0]
  below = entropy.Controller(1.0, delta=0.01, least=-0.01)
  assert [below.update(9.0), below.update(9.0)] == [-0.01, -0.01]


def test_without_a_target_the_first_entropy_is_it_and_a_skipped_update_is_none():
  controller = entropy.Controller(width=0.2)
  assert controller.band() == (0, np.inf)
  assert controller.update(float('nan')) == 0 and controller.target is None
  assert controller.update(0.5) == 0 and controller.band() == pytest.approx((0.4, 0.6))
  assert controller.update(0.3) == 0.005


def test_a_restored_controller_goes_on():
  one, other = (entropy.Controller(width=0.05, rise=0.01) for _ in range(2))
  for h in (1.0, 0.8, 0.7):
    one.update(h)
  other.restore(json.loads(json.dumps(one.state())))
  assert [one.update(h) for h in (0.9, 1.3)] == [other.update(h) for h in (0.9, 1.3)]
  assert one.state() == other.state()


@pytest.mark.parametrize('settings, message', [
  (dict(target=0), 'target of the entropy control is 0'), (dict(width=1), 'width'),
  (dict(delta=0), 'delta'), (dict(start=1), 'start .* between least and most'),
  (dict(rise=-1), 'rise .* steady or to rise')])
def test_bad_control_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    entropy.Controller(**settings)


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  weight = (rng.random((20, 100)) < 0.8).astype(np.float32)
  logp = np.where(weight > 0, -rng.exponential(1.5, weight.shape), np.nan)
  return dict(weight_BT=weight, advantage_BT=rng.normal(size=(20, 1)) * weight, old_logp_BT=logp)


def covariance(batch):
  trained = batch['weight_BT'] > 0
  A, logp = batch['advantage_BT'], batch['old_logp_BT']
  return np.where(trained, (A - A[trained].mean()) * (logp - logp[trained].mean()), np.nan)


def test_kl_cov_takes_the_largest(batch):
  chosen = entropy.select(batch, 'kl_cov', seed=0, share=0.01)
  cov, count = covariance(batch), int(0.01 * (batch['weight_BT'] > 0).sum())
  assert chosen.sum() == count > 10 and chosen.dtype == np.float32
  assert cov[chosen > 0].min() >= np.nanmax(cov[chosen == 0])


def test_clip_cov_takes_some_of_those_in_the_band(batch):
  chosen = entropy.select(batch, 'clip_cov', seed=0, share=0.01)
  cov, count = covariance(batch)[chosen > 0], int(0.01 * (batch['weight_BT'] > 0).sum())
  assert chosen.sum() == count and cov.min() >= 1 and cov.max() <= 5
  np.testing.assert_array_equal(chosen, entropy.select(batch, 'clip_cov', seed=0, share=0.01))
  assert (chosen != entropy.select(batch, 'clip_cov', seed=1, share=0.01)).any()
  assert entropy.select(batch, 'clip_cov', seed=0, band=(1e8, 2e8)).sum() == 0
  assert entropy.select(batch, 'clip_cov', seed=0).sum() == 1  # 2e-4 of 1,600 tokens, at least one


def test_tokens_are_chosen_by_the_policy_that_began_or_else_by_the_engine(batch):
  engine = {key.replace('old', 'rollout'): x for key, x in batch.items()}
  np.testing.assert_array_equal(entropy.select(engine, 'kl_cov', 0),
                                entropy.select(batch, 'kl_cov', 0))
  del engine['rollout_logp_BT']
  with pytest.raises(ValueError, match='kl_cov wants old_logp_BT or rollout_logp_BT'):
    entropy.select(engine, 'kl_cov', 0)
  with pytest.raises(ValueError, match="entropy is 'bonus'"):
    entropy.select(batch, 'bonus', 0)
  nothing = batch | dict(weight_BT=np.zeros((20, 100)))
  assert entropy.select(nothing, 'kl_cov', 0).sum() == 0
