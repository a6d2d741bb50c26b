"""Pair losses: against each answer by itself, float64 differences, micro-batches and meshes."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import preferences
from qwen3_jax.kernels import reference
from qwen3_jax.model import reward
from qwen3_jax.training import preference
from qwen3_jax.training import step as training

BETA = 0.5
DPO = functools.partial(preference.dpo, beta=BETA)
T, VOCAB = 64, 96


def draw_pairs(count, seed=0):
  """Pairs with a common prompt of 3 to 8 tokens and answers of 2 to 9, and a reference for them."""
  rng, pairs = np.random.default_rng(seed), []
  for _ in range(count):
    prompt, sides = rng.integers(0, VOCAB, rng.integers(3, 9)), []
    for rejected in (0, 1):
      answer = rng.integers(0, VOCAB, rng.integers(2, 10))
      side = np.zeros(len(prompt) + len(answer), preferences.TOKEN)
      side['id'] = np.concatenate([prompt, answer])
      side['weight'][len(prompt):], side['rejected'] = 1, rejected
      side['reference'][len(prompt):] = -4.5 + 0.2 * rng.normal(size=len(answer))
      sides.append(side)
    pair = np.concatenate(sides)
    pair['margin'] = rng.choice([0, 0.5])
    pairs.append(pair)
  return pairs


@pytest.fixture(scope='module')
def pairs():
  return draw_pairs(10)


@pytest.fixture(scope='module')
def batch(pairs):
  """Rows of 2, 2, 1, 1, 1, 2, 1 and 0 pairs."""
  rows = [pairs[:2], pairs[2:4], pairs[4:5], pairs[5:6], pairs[6:7], pairs[7:9], pairs[9:], []]
  return preferences.make_batch(rows, T)


@pytest.fixture(scope='module')
def rewarder(models):
  model = reward.from_language_model(models['dense'])
  model.reward_D = type(model.reward_D)(20 * model.reward_D[...])
  return model


def alone(pair):
  """(ids, weights, what is no padding) of both answers, each a row of its own: (2, 32)."""
  rows = np.zeros((2, 32), preferences.TOKEN)
  for rejected in (0, 1):
    side = pair[pair['rejected'] == rejected]
    rows[rejected, :len(side)] = side
  used = rows['weight'][:, ::-1].cumsum(1)[:, ::-1] > 0  # answers come last
  return jnp.array(rows['id']), jnp.array(rows['weight']), used.astype(np.int32)


@jax.jit
def reward_alone(model, ids_BT, weight_BT, used_BT):
  reward_BT = model(ids_BT, used_BT).hidden_BTD @ model.reward_D[...]
  return jnp.take_along_axis(reward_BT, used_BT.sum(1, keepdims=True) - 1, 1)[:, 0]


@jax.jit
def logp_alone(model, ids_BT, weight_BT, used_BT):
  hidden_BTD = model(ids_BT, used_BT).hidden_BTD[:, :-1]
  logp_BT = reference.token_logp(hidden_BTD, model.head(), ids_BT[:, 1:])
  return (logp_BT * weight_BT[:, 1:]).sum(1)


def test_rewards_of_packed_pairs_are_those_of_each_answer_alone(rewarder, pairs, batch):
  loss, sums = jax.jit(preference.bradley_terry)(rewarder, batch)
  r = np.array([reward_alone(rewarder, *alone(pair)) for pair in pairs])
  gap, margin = r[:, 0] - r[:, 1], np.array([pair['margin'][0] for pair in pairs])
  want = np.log1p(np.exp(-(gap - margin)))
  np.testing.assert_allclose(loss, want.sum(), rtol=1e-5)
  values = preference.report(sums)
  length = np.array([[pair['weight'][pair['rejected'] == k].sum() for k in (0, 1)]
                     for pair in pairs])
  longer = length[:, 0] - length[:, 1]
  assert 0 < (longer > 0).sum() < len(pairs) and np.std(gap) > 0.1
  for name, value in dict(
      loss=want.mean(), pairs=len(pairs), accuracy=np.mean(gap > 0), margin=gap.mean(),
      chosen_reward=r[:, 0].mean(), rejected_reward=r[:, 1].mean(), longer=np.mean(longer > 0),
      accuracy_longer=np.mean(gap[longer > 0] > 0), accuracy_shorter=np.mean(gap[longer < 0] > 0),
      length_correlation=np.corrcoef(np.concatenate([gap, -gap]),
                                     np.concatenate([longer, -longer]))[0, 1]).items():
    np.testing.assert_allclose(values[name], value, rtol=1e-4, err_msg=name)
  centred = jax.jit(functools.partial(preference.bradley_terry, centre=0.1))(rewarder, batch)[0]
  np.testing.assert_allclose(centred - loss, 0.1 * (r.sum(1) ** 2).sum(), rtol=1e-4)


def test_dpo_is_the_equation(models, pairs, batch):
  model = models['dense']
  loss, sums = jax.jit(DPO)(model, batch)
  logp = np.array([logp_alone(model, *alone(pair)) for pair in pairs])
  ref = np.array([[pair['reference'][pair['rejected'] == k].sum() for k in (0, 1)]
                  for pair in pairs])
  gap = BETA * ((logp - ref)[:, 0] - (logp - ref)[:, 1])
  np.testing.assert_allclose(loss, np.log1p(np.exp(-gap)).sum(), rtol=1e-4)
  values = preference.report(sums)
  tokens = sum(pair['weight'].sum() for pair in pairs)
  np.testing.assert_allclose(values['margin'], gap.mean(), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(values['kl_k1'], -(logp - ref).sum() / tokens, rtol=1e-4)
  assert values['kl_k3'] > 0
  np.testing.assert_allclose(
    values['chosen_logp'], logp[:, 0].sum() / sum(
      pair['weight'][pair['rejected'] == 0].sum() for pair in pairs), rtol=1e-5)


@jax.jit
def with_own_reference(model, batch):
  out = model(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'])
  return batch | dict(reference_BT=preference.answer_logp(model, out, batch))


def test_at_the_reference_dpo_is_log_2_and_its_gradient_a_difference_of_log_probabilities(
    models, batch):
  """There the sigmoid is 1/2: the gradient is -beta / 2 of that of log pi(y+) - log pi(y-)."""
  model = models['dense']
  own = with_own_reference(model, batch)
  (loss, sums), gradient = jax.jit(jax.value_and_grad(DPO, has_aux=True))(model, own)
  values = preference.report(sums)
  np.testing.assert_allclose(loss / values['pairs'], np.log(2), rtol=1e-6)
  for name in ('margin', 'kl_k1', 'kl_k3'):
    assert abs(values[name]) < 1e-5
  assert values['accuracy'] == 0.5 or values['margin'] != 0

  def difference(model):
    logp_BT = preference.answer_logp(
      model, model(batch['tokens_BT'], batch['segment_BT'], batch['position_BT']), batch)
    chosen_BC, rejected_BC = preference.by_segment(logp_BT, batch)
    return -BETA / 2 * jnp.sum(chosen_BC - rejected_BC)
  for a, b in zip(*map(jax.tree.leaves, (gradient, jax.jit(jax.grad(difference))(model)))):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


def test_kl_estimates_are_right_where_the_answers_come_from_the_reference():
  """Sums over all outcomes weighted by the reference: k1 and k3 both give KL(reference || pi)."""
  ref, pi = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
  x = np.log(pi / ref)
  sums = {name: np.float32(1) for name in (
    'pairs', 'right', 'gap', 'chosen', 'rejected', 'longer', 'right_longer', 'shorter',
    'right_shorter', 'gap_gap', 'gap_length', 'length_length', 'pair_loss', 'chosen_logp',
    'rejected_logp')}
  values = preference.report(sums | dict(
    chosen_tokens=0.5, rejected_tokens=0.5, k1=(ref * -x).sum(),
    k3=(ref * (np.exp(x) - 1 - x)).sum()))
  kl = (ref * np.log(ref / pi)).sum()
  np.testing.assert_allclose([values['kl_k1'], values['kl_k3']], kl, rtol=1e-6)


def one_step(loss, model, batch, parts):
  step = training.make_step(loss, optax.identity(), lambda step: 1.0, parts, preference.report)
  new, values = jax.jit(step)(training.state_of(model, optax.identity()), batch)
  return jax.tree.leaves(jax.tree.map(jnp.subtract, model, new.params)), values


@pytest.mark.parametrize('name', ['dpo', 'reward'])
def test_micro_batches_add_up_to_one_batch(models, rewarder, batch, name):
  """Rows that hold 2, 1 or no pairs: a mean over parts of their means would be another number."""
  loss, model = (DPO, models['dense']) if name == 'dpo' else (preference.bradley_terry, rewarder)
  want, want_values = one_step(loss, model, batch, 1)
  assert want_values['pairs'] == 10 and max(np.abs(g).max() for g in want) > 1e-3
  got, values = one_step(loss, model, batch, 4)
  for key in want_values:
    np.testing.assert_allclose(values[key], want_values[key], rtol=1e-5, atol=1e-6, err_msg=key)
  for a, b in zip(got, want, strict=True):  # float32 sums in another order
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name, shape', [('dpo', dict(fsdp=2, tensor=2)),
                                         ('reward', dict(context=2, data=2))], ids=str)
def test_on_a_mesh_equals_alone(models, rewarder, batch, name, shape):
  loss, model = (DPO, models['dense']) if name == 'dpo' else (preference.bradley_terry, rewarder)
  want, want_values = one_step(loss, model, batch, 1)
  mesh = alphabet.make_mesh(shape)
  placed = jax.tree.map(jax.device_put, (model, batch), alphabet.shardings((model, batch), mesh))
  with jax.set_mesh(mesh):
    got, values = one_step(loss, *placed, 1)
  for key in want_values:
    np.testing.assert_allclose(values[key], want_values[key], rtol=2e-5, atol=2e-6, err_msg=key)
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-7


def test_mixture_of_experts_is_balanced_beside_the_loss(models, batch):
  totals = dict(total_pairs=10.0, total_tokens=float((batch['segment_BT'] > 0).sum()))
  @jax.jit
  def run(balance, router_z):
    return DPO(models['moe'], batch | totals, balance=balance, router_z=router_z)
  (plain, sums), (balanced, _) = run(0.0, 0.0), run(0.5, 0.1)
  np.testing.assert_allclose(plain, preference.report(sums)['loss'], rtol=1e-6)
  assert balanced > plain + 0.4 and sums['count_LE'].sum() > 0


FLOAT64 = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update('jax_enable_x64', True)
jnp.float32 = jnp.float64  # every float32 that the code names is a float64 from here on
sys.path.insert(0, {folder!r})
from test_preference import DPO, T, draw_pairs, with_own_reference
from qwen3_jax.data import preferences
from qwen3_jax.model import reward, transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import preference
spec = Spec(layers=2, width=16, heads=2, kv_heads=1, mlp=24, vocab=96, head_width=8, tied=True)
rng = np.random.default_rng(0)
pairs = draw_pairs(3)
batch = preferences.make_batch([pairs[:2], pairs[2:]], T)
for loss, make in (DPO, transformer.make), (
    lambda *a: preference.bradley_terry(*a, centre=0.05), reward.make):
  model = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape) * 0.3), jax.eval_shape(
    lambda: make(spec)))
  value = jax.jit(lambda model: loss(model, batch)[0])
  gradient = jax.jit(jax.grad(lambda model: loss(model, batch)[0]))(model)
  assert all(g.dtype == np.float64 for g in jax.tree.leaves(gradient))
  assert abs(float(value(model)) / len(pairs) - np.log(2)) > 1e-2
  for k in range(4):
    way = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape)), model)
    at = lambda h: float(value(jax.tree.map(lambda w, d: w + h * d, model, way)))
    h = 1e-4
    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    dot = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (gradient, way))))
    print(slope, dot, abs(dot / slope - 1))
    assert abs(slope) > 1e-3 and abs(dot / slope - 1) < 1e-6, (slope, dot)
"""


def test_gradients_are_those_of_float64_differences():
  """The same code in float64, head and custom gradient included, along random directions."""
  code = FLOAT64.format(folder=str(Path(__file__).parent))
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                        cwd=Path(__file__).parents[2])
  assert done.returncode == 0, done.stderr[-2000:]
  assert len(done.stdout.splitlines()) == 8
