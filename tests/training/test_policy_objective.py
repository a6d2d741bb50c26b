"""The policy objective as a function of log-probabilities: gradients, estimators, settings."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.training import mismatch, policy

TRL = ('grpo', 'grpo_onpolicy_old_none', 'grpo_kl_k3_beta0.04', 'grpo_clip_higher',
       'grpo_delta1.5_two_sided', 'grpo_kl_biascorrected', 'bnpo', 'dapo_clip_higher',
       'dapo_kl_beta0.02', 'dr_grpo', 'dr_grpo_kl', 'gspo_eps3e-4_4e-4', 'gspo_wide', 'gspo_kl',
       'cispo_hi2', 'sapo')


@pytest.mark.parametrize('variant', TRL)
def test_values_and_gradients_are_trls(trl, trl_batch, variant):
  numbers, row = trl(variant)
  settings, batch = trl_batch(numbers, row)
  logits, target = jnp.asarray(numbers['cur_logits'], jnp.float64), numbers['token_ids']
  value, sums = evaluate(logits, target, batch, settings)
  gradient = gradient_of(logits, target, batch, settings)
  np.testing.assert_allclose(value, numbers[f'{variant}/loss'], atol=1e-6)
  np.testing.assert_allclose(gradient, numbers[f'{variant}/grad_logits'], atol=1e-6)
  values, mask = policy.report(sums), batch['weight_BT']
  tokens, ratio = mask.sum(), numbers[f'{variant}/ratio']
  kl = numbers['grpo_kl_k3_beta0.04/kl_k3']
  for name, want in dict(
      loss=value, entropy=(numbers['entropy'] * mask).sum() / tokens,
      ratio=(ratio * mask).sum() / tokens, ratio_max=ratio[mask > 0].max(),
      ratio_min=ratio[mask > 0].min(), kl_reference_k3=(kl * mask).sum() / tokens).items():
    np.testing.assert_allclose(values[name], want, rtol=1e-5, err_msg=name)
  if 'clip_low' in values and variant != 'cispo_hi2':  # there the cap alone is counted
    clipped = (values['clip_low'] + values['clip_high']) * tokens
    assert clipped == pytest.approx(row['clipped_tokens'])


@pytest.fixture(autouse=True)
def float64():
  """All of this file: differences are then exact, and every operation is compiled for one type."""
  with jax.enable_x64(True):
    yield


def tokens_by_sample(samples=8, length=14, vocab=24, seed=0):
  """Logits (samples, length, vocab) of a policy and the batch of objective, in float64."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(samples, length, vocab))
  weight = (np.arange(length) < rng.integers(3, length + 1, samples)[:, None]).astype(np.float64)
  target = rng.integers(0, vocab, (samples, length))
  def near(spread):
    other = jax.nn.log_softmax(logits + spread * rng.normal(size=logits.shape))
    return np.take_along_axis(np.asarray(other), target[..., None], -1)[..., 0]
  old = near(0.4)
  batch = dict(
    weight_BT=weight, scale_BT=weight / weight.sum(), old_logp_BT=old, reference_logp_BT=near(0.5),
    rollout_logp_BT=old + 0.3 * rng.normal(size=old.shape), bonus_B=np.full(samples, 0.03),
    advantage_BT=rng.normal(size=(samples, 1)) * weight,
    covariance_BT=(rng.random(weight.shape) < 0.4).astype(np.float64),
    segment_BT=np.ones(weight.shape, np.int32))
  return logits, target, batch


def evaluate(logits, target, batch, settings):
  logp = jax.nn.log_softmax(logits)
  entropy_BT = -(jnp.exp(logp) * logp).sum(-1)
  logp_BT = jnp.take_along_axis(logp, target[..., None], -1)[..., 0]
  return policy.objective(logp_BT, entropy_BT, batch, settings)


def gradient_of(logits, target, batch, settings):
  return jax.grad(lambda x: evaluate(x, target, batch, settings)[0])(jnp.asarray(logits))


SMOOTH = dict(
  dual_clip=dict(kind='dapo', dual_clip=1.3), token_tis=dict(correction_high=1.1),
  sequence_tis=dict(correction='sequence_tis', correction_high=1.2), mask=dict(
    correction='mask', correction_low=0.8, correction_high=1.2),
  sequence_mask=dict(correction='sequence_mask', correction_high=1.5), geometric_mask=dict(
    correction='geometric_mask', correction_low=0.9, correction_high=1.1),
  clip_cov=dict(entropy='clip_cov'), kl_cov=dict(entropy='kl_cov', cov_penalty=0.7),
  bonus=dict(entropy='bonus'), gspo=dict(kind='gspo', clip_low=0.2, clip_high=0.3),
  sapo=dict(kind='sapo', gate=(1.3, 0.8)), k2=dict(beta=0.2, kl='k2'), k3=dict(beta=0.2, kl='k3'),
  unbiased=dict(beta=0.2, kl='unbiased'), dr_grpo=dict(kind='dr_grpo'))


@pytest.mark.parametrize('name', SMOOTH)
def test_gradients_are_those_of_float64_differences(name):
  settings = policy.Policy(**SMOOTH[name])
  logits, target, batch = tokens_by_sample()
  value = jax.jit(lambda x: evaluate(x, target, batch, settings)[0])
  gradient = np.asarray(gradient_of(logits, target, batch, settings))
  assert gradient.dtype == np.float64
  rng, h = np.random.default_rng(1), 1e-5
  for _ in range(3):
    way = rng.normal(size=logits.shape)
    at = {k: float(value(logits + k * h * way)) for k in (-2, -1, 1, 2)}
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    dot = float((gradient * way).sum())
    assert abs(slope) > 1e-4 and abs(dot / slope - 1) < 1e-6, (slope, dot)


def test_gspo_token_has_the_samples_ratio_and_the_tokens_own_advantage():
  """With one advantage a sample its gradient is GSPO's; else sum_t s A_t grad log pi_t."""
  logits, target, batch = tokens_by_sample()
  wide = dict(clip_low=0.9, clip_high=9.0, correction=None)
  plain = gradient_of(logits, target, batch, policy.Policy('gspo', **wide))
  own = policy.Policy('gspo_token', **wide)
  np.testing.assert_allclose(
    gradient_of(logits, target, batch, own), plain, atol=1e-12)
  varied = batch | dict(advantage_BT=np.random.default_rng(2).normal(size=target.shape))
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0]
  gap = np.where(batch['weight_BT'] > 0, logp - batch['old_logp_BT'], 0)
  s = np.exp(gap.sum(1) / batch['weight_BT'].sum(1))[:, None]
  factor = s * varied['advantage_BT'] * batch['scale_BT']
  def by_hand(x):
    logp = jnp.take_along_axis(jax.nn.log_softmax(x), target[..., None], -1)[..., 0]
    return -jnp.sum(factor * logp)
  np.testing.assert_allclose(gradient_of(logits, target, varied, own),
                             jax.grad(by_hand)(jnp.asarray(logits)), atol=1e-12)


def test_cispo_bounds_a_tokens_weight_and_loses_no_gradient():
  """Far above the band, where the clipped minimum has no gradient, and with A < 0 as with A > 0."""
  logits, target, batch = tokens_by_sample()
  far = batch | dict(old_logp_BT=batch['old_logp_BT'] - 9)
  for sign in 1, -1:
    one = far | dict(advantage_BT=sign * batch['weight_BT'])
    got = gradient_of(logits, target, one, policy.Policy('cispo', correction=None))
    on_policy = {key: x for key, x in one.items() if key != 'old_logp_BT'}
    want = gradient_of(logits, target, on_policy, policy.Policy('cispo', correction=None))
    np.testing.assert_allclose(got, 5 * want, rtol=1e-4, atol=1e-7)
  clipped = gradient_of(logits, target, far | dict(advantage_BT=batch['weight_BT']),
                        policy.Policy('dapo', correction=None))
  assert np.abs(want).max() > 1e-3 and (clipped == 0).all()


OUTCOMES = dict(weight_BT=np.ones((1, 3)), advantage_BT=np.zeros((1, 3)),
                segment_BT=np.ones((1, 3), np.int32))


def expected_gradient(theta, reference, **settings):
  """On-policy gradient in expectation: every outcome once, weighed by its probability."""
  logits, target = np.broadcast_to(theta, (1, 3, 3)), np.arange(3)[None]
  batch = OUTCOMES | dict(scale_BT=np.asarray(jax.nn.softmax(theta))[None],
                          reference_logp_BT=np.log(reference)[None]) | settings.pop('batch', {})
  settings = policy.Policy(correction=None, **settings)
  return gradient_of(logits, target, batch, settings).sum((0, 1))


def test_which_estimate_of_the_divergence_is_good_as_a_loss():
  """k2 and ratio * k3 have the gradient of KL(pi || ref), as k1 has in the advantage.

  k3 has that of KL(ref || pi). k1 as a loss would have none: E[grad log pi] = 0.
  """
  theta, reference = np.array([0.3, -0.4, 0.8]), np.array([0.6, 0.3, 0.1])
  def reverse(x):
    p = jax.nn.softmax(x)
    return jnp.sum(p * (jnp.log(p) - np.log(reference)))
  def forward(x):
    return jnp.sum(reference * (np.log(reference) - jax.nn.log_softmax(x)))
  want = jax.grad(reverse)(jnp.asarray(theta))
  other = jax.grad(forward)(jnp.asarray(theta))
  assert np.abs(want).min() > 0.01 and np.abs(want - other).max() > 0.05
  for kl in 'k1', 'k2', 'unbiased':
    got = expected_gradient(theta, reference, kl=kl, beta=2.0)
    np.testing.assert_allclose(got, 2 * want, atol=1e-9, err_msg=kl)
  np.testing.assert_allclose(
    expected_gradient(theta, reference, kl='k3', beta=2.0), 2 * other, atol=1e-9)


def test_a_penalty_that_no_action_changes_teaches_nothing():
  """The whole KL at a position, taken from the advantage of whatever is drawn there."""
  theta, reference = np.array([0.3, -0.4, 0.8]), np.array([0.6, 0.3, 0.1])
  p = np.asarray(jax.nn.softmax(theta))
  same = dict(advantage_BT=np.full((1, 3), -np.sum(p * np.log(p / reference))))
  np.testing.assert_allclose(expected_gradient(theta, reference, batch=same), 0, atol=1e-12)
  own = dict(advantage_BT=-np.log(p / reference)[None])
  assert np.abs(expected_gradient(theta, reference, batch=own)).max() > 0.01


def test_a_truncated_engine_shows_in_the_mean_ratio():
  """With top-p the engine's probabilities are too large by the kept mass; without, both agree."""
  p = np.array([0.5, 0.3, 0.15, 0.05])
  kept = p[:2] / p[:2].sum()
  batch = OUTCOMES | dict(weight_BT=np.ones((1, 2)), advantage_BT=np.ones((1, 2)),
                          segment_BT=np.ones((1, 2), np.int32), scale_BT=np.ones((1, 2)))
  def values(engine):
    given = batch | dict(rollout_logp_BT=np.log(engine)[None])
    return policy.report(policy.objective(
      jnp.log(p[None, :2]), jnp.zeros((1, 2)), given, policy.Policy())[1])
  truncated, whole = values(kept), values(p[:2])
  np.testing.assert_allclose(truncated['mismatch_ratio'], 0.8, rtol=1e-5)
  np.testing.assert_allclose(truncated['mismatch'], -np.log(0.8), rtol=1e-5)
  assert truncated['mismatch_k3'] > 0.02
  np.testing.assert_allclose([whole['mismatch_ratio'], whole['effective_sample']], 1, rtol=1e-6)
  assert whole['mismatch_max'] < 1e-6 and whole['corrected'] == 0


def test_corrections_by_hand():
  """Two samples in a row of rho (2, 1/2, 4) and (3, 1)."""
  rho = np.array([[2, 0.5, 4, 3, 1, 7]])
  batch = dict(weight_BT=np.array([[1., 1, 1, 1, 1, 0]]), segment_BT=np.array([[1, 1, 1, 2, 2, 0]]))
  gap = np.log(rho) * batch['weight_BT']
  for settings, want, share in (
      (dict(correction='token_tis'), [2, 0.5, 2, 2, 1], 2 / 5),
      (dict(correction='sequence_tis'), [3, 3, 3, 3, 3], 3 / 5),
      (dict(correction='mask', correction_high=3.5), [2, 0.5, 0, 3, 1], 1 / 5),
      (dict(correction='sequence_mask', correction_high=3.5), [0, 0, 0, 3, 3], 3 / 5),
      (dict(correction='geometric_mask', correction_high=1.6), [1, 1, 1, 0, 0], 2 / 5),
      (dict(correction=None), [1, 1, 1, 1, 1], None)):
    got, sums = mismatch.weights(gap, batch, policy.Policy(**settings))
    np.testing.assert_allclose(got[0, :5], want, rtol=1e-5, err_msg=str(settings))
    values = mismatch.report(sums, 5)
    assert values.get('corrected') == (share and pytest.approx(share))
    np.testing.assert_allclose(values['mismatch_max'], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(values['effective_sample'], 10.5 ** 2 / (5 * 30.25), rtol=1e-5)


CHANGED = dict(
  kind=('grpo', 'cispo'), clip_low=(0.2, 0.05), clip_high=(0.28, 0.05), dual_clip=(None, 1.3),
  gate=((1.0, 1.05), (2.0, 2.0)), beta=(0.1, 0.2), kl=('k2', 'k3'), correction=(None, 'mask'),
  correction_low=(0.0, 1.1), correction_high=(2.0, 1.1),
  entropy=(None, 'clip_cov'), cov_penalty=(1.0, 2.0))
BESIDE = dict(gate=dict(kind='sapo'), kl=dict(beta=0.1), cov_penalty=dict(entropy='kl_cov'),
              correction_low=dict(correction_high=2.0), correction_high=dict(correction_low=0.0))


@pytest.mark.parametrize('field', CHANGED)
def test_every_setting_reaches_the_gradient(field):
  logits, target, batch = tokens_by_sample()
  one, other = (gradient_of(
    logits, target, batch, policy.Policy(**BESIDE.get(field, {}) | {field: value}))
    for value in CHANGED[field])
  assert np.abs(one - other).max() > 1e-4


def test_no_setting_is_left_out_of_these_tests():
  elsewhere = {'temperature', 'advantage', 'aggregation'}  # test_policy, test_advantage
  assert set(CHANGED) | elsewhere == {field.name for field in dataclasses.fields(policy.Policy)}


def test_each_kind_has_its_own_clip(caplog):
  """GRPO's 0.2 on GSPO's mean of a whole answer would clip nothing, and is warned of."""
  got = {kind: (policy.Policy(kind).clip_low, policy.Policy(kind).clip_high)
         for kind in policy.KINDS}
  assert got == dict(grpo=(0.2, 0.2), dr_grpo=(0.2, 0.2), dapo=(0.2, 0.28), gspo=(3e-4, 4e-4),
                     gspo_token=(3e-4, 4e-4), cispo=(1.0, 4.0), sapo=(None, None))
  assert policy.Policy('dr_grpo').advantage == policy.Policy('dr_grpo').aggregation == 'dr'
  assert not caplog.records
  with caplog.at_level(logging.WARNING):
    wide = policy.Policy('gspo', clip_low=0.2, clip_high=0.2)
  assert 'hardly ever clip (published: 3e-4 and 4e-4)' in caplog.text
  logits, target, batch = tokens_by_sample()
  near = batch | dict(old_logp_BT=np.take_along_axis(np.asarray(
    jax.nn.log_softmax(logits)), target[..., None], -1)[..., 0] - 0.01 * np.sign(
      batch['advantage_BT']))
  shares = [policy.report(evaluate(logits, target, near, s)[1]) for s in (
    wide, policy.Policy('gspo'))]
  assert [round(float(v['clip_low'] + v['clip_high']), 3) for v in shares] == [0, 1]


@pytest.mark.parametrize('settings, message', [
  (dict(kind='ppo'), "kind is 'ppo'; it must be one of grpo, dr_grpo"),
  (dict(kl='k4'), "kl is 'k4'"), (dict(entropy='max'), "entropy is 'max'"),
  (dict(correction='tis'), "correction is 'tis'; it must be one of None, token_tis"),
  (dict(clip_low=0), r'clip_low is 0; it must be in \(0, 1\]'),
  (dict(clip_high=-1), 'clip_high is -1; it must be more than 0'),
  (dict(kind='sapo', clip_low=0.2), 'clip_low is 0.2; it must be None: sapo has gates'),
  (dict(kind='sapo', clip_high=0.2), 'sapo has gates'),
  (dict(dual_clip=1.1), r'dual_clip is 1.1; it must be more than 1 \+ clip_high'),
  (dict(kind='cispo', dual_clip=9), 'cispo has no clipped minimum'),
  (dict(beta=-1), 'beta is -1'), (dict(temperature=0), 'temperature is 0'),
  (dict(gate=(1, 0)), 'gate is'), (dict(cov_penalty=0), 'cov_penalty is 0'),
  (dict(correction_low=3), r'correction_low is 3; it must be in \[0, correction_high\)')])
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    policy.Policy(**settings)


@pytest.mark.parametrize('settings, key', [
  (dict(beta=0.1), 'reference_logp_BT'), (dict(entropy='bonus'), 'bonus_B'),
  (dict(entropy='clip_cov'), 'covariance_BT'), (dict(entropy='kl_cov'), 'covariance_BT')])
def test_what_settings_need_must_be_in_the_batch(settings, key):
  logits, target, batch = tokens_by_sample()
  del batch[key]
  with pytest.raises(ValueError, match=f'and the batch has no {key}'):
    evaluate(logits, target, batch, policy.Policy(**settings))
