"""Policy losses of whole models: TRL's values and gradients, packing, micro-batches, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.training import advantage, policy
from qwen3_jax.training import step as training


@pytest.fixture(scope='module')
def models(specs):
  """Random models of one layer: 'dense' and 'moe'."""
  def fill(spec):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(
      transformer.make, dataclasses.replace(spec, layers=1)))
    return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.1, x.shape), x.dtype), shapes)
  return {name: fill(spec) for name, spec in specs.items()}


@struct.dataclass
class Table:
  """A model whose logits are its weights (samples, T, V): one prompt token, then T drawn ones.

  `packed` samples lie in each row.
  """
  logits: jax.Array
  packed: int = struct.field(pytree_node=False, default=1)

  def __call__(self, tokens_BT, segment_BT, position_BT, routes=None, remat='none', dtype=None):
    hidden = jnp.pad(self.logits, ((0, 0), (0, 1), (0, 0)))
    return transformer.Output(hidden.reshape(*tokens_BT.shape, hidden.shape[-1]))

  def head(self):
    return jnp.eye(self.logits.shape[-1])


def lay_out(packed, tokens, **each):
  """The batch of samples (N, T), `packed` in a row, behind one prompt token each."""
  def place(x):
    return np.pad(np.asarray(x), ((0, 0), (1, 0))).reshape(len(x) // packed, -1)
  samples, length = np.asarray(tokens).shape
  segment = np.broadcast_to(1 + np.arange(samples)[:, None] % packed, (samples, length + 1))
  position = np.broadcast_to(np.arange(length + 1), segment.shape)
  return dict(tokens_BT=place(tokens), segment_BT=segment.reshape(samples // packed, -1),
              position_BT=position.reshape(samples // packed, -1),
              **{f'{name}_BT': place(x).astype(np.float32) for name, x in each.items()})


@pytest.mark.parametrize('variant, packed', [
  ('dapo_clip_higher', 1), ('grpo_kl_biascorrected', 2), ('gspo_eps3e-4_4e-4', 4)])
def test_values_and_gradients_through_the_head_are_trls(trl, trl_batch, variant, packed):
  numbers, row = trl(variant)
  settings, batch = trl_batch(numbers, row)
  batch = lay_out(packed, numbers['token_ids'], **{
    name.removesuffix('_BT'): x for name, x in batch.items() if name != 'segment_BT'})
  run = jax.jit(jax.value_and_grad(policy.loss, has_aux=True), static_argnums=2)
  (value, _), gradient = run(Table(jnp.array(numbers['cur_logits']), packed), batch, settings)
  np.testing.assert_allclose(value, numbers[f'{variant}/loss'], atol=1e-6)
  np.testing.assert_allclose(gradient.logits, numbers[f'{variant}/grad_logits'], atol=1e-6)


def draw_samples(count, seed=0, vocab=96):
  """Samples: arrays by name, (tokens,): prompts of 2 to 5 and answers of 2 to 9, some with a hole.

  A hole is a stretch of text that no model drew (a tool's). Log-probabilities lie about that of
  a uniform choice; untrained places hold NaN where nobody may look.
  """
  rng, samples = np.random.default_rng(seed), []
  for i in range(count):
    prompt, n = rng.integers(2, 6), rng.integers(4, 10)
    weight = np.repeat([0.0, 1.0], [prompt, n])
    if i % 3 == 0:
      weight[prompt + 1:prompt + 3] = 0
    def logp(spread, trained=weight > 0):
      return np.where(trained, rng.normal(-4.56, spread, len(trained)), np.nan)
    old = logp(0.3)
    samples.append(dict(
      tokens=rng.integers(0, vocab, prompt + n), weight=weight, advantage=weight * rng.normal(),
      old_logp=old, rollout_logp=old + rng.normal(0, 0.3, len(old)), reference_logp=logp(0.3)))
  scale = advantage.aggregate([s['weight'].sum() for s in samples], 'sequence')
  return [sample | dict(scale=x * sample['weight']) for sample, x in zip(samples, scale)]


def pack(rows, length=32):
  """The batch of rows of samples, a list of lists."""
  batch = {name: np.zeros((len(rows), length), np.float32) for name in [
    *(f'{key}_BT' for key in rows[0][0]), 'segment_BT', 'position_BT']}
  for b, row in enumerate(rows):
    start = 0
    for number, sample in enumerate(row, 1):
      here = slice(start, start := start + len(sample['tokens']))
      values = {f'{key}_BT': x for key, x in sample.items()}
      for name, x in (values | dict(segment_BT=number, position_BT=np.arange(
          len(sample['tokens'])))).items():
        batch[name][b, here] = x
  integers = ('tokens_BT', 'segment_BT', 'position_BT')
  return {name: x.astype(np.int32) if name in integers else x for name, x in batch.items()}


EVERYTHING = policy.Policy('gspo', clip_low=0.02, clip_high=0.03, beta=0.1, kl='k3',
                           correction='sequence_tis', entropy='bonus', dual_clip=1.2)


def test_a_sample_counts_the_same_alone_and_packed(models):
  """Values and gradients of the whole model, with all that is summed over a sample."""
  samples, run = draw_samples(6), jax.jit(jax.value_and_grad(functools.partial(
    policy.loss, settings=EVERYTHING), has_aux=True))
  batches = [pack(rows) | dict(bonus_B=np.full(6, 0.02, np.float32)) for rows in (
    [[sample] for sample in samples], [samples[:2], samples[2:4], samples[4:], [], [], []])]
  ((value, sums), gradient), ((value2, sums2), gradient2) = (
    run(models['dense'], batch) for batch in batches)
  assert np.isfinite(value) and abs(value) > 1e-2
  np.testing.assert_allclose(value, value2, rtol=1e-5)
  for key, x in policy.report(sums).items():
    np.testing.assert_allclose(x, policy.report(sums2)[key], rtol=1e-5, atol=1e-6, err_msg=key)
  for a, b in zip(*map(jax.tree.leaves, (gradient, gradient2)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max())


def with_routes(batch, spec, seed=0):
  """The batch with random routes for every layer: X different experts a token, and fresh rows."""
  rng = np.random.default_rng(seed)
  order = rng.permuted(np.tile(np.arange(spec.experts, dtype=np.uint8),
                               (*batch['tokens_BT'].shape, spec.layers, 1)), axis=-1)
  fresh = np.arange(len(batch['tokens_BT'])) % 2
  return batch | dict(routes_BTLX=order[..., :spec.chosen], fresh_B=fresh.astype(np.float32),
                      bonus_B=np.full(len(fresh), 0.02, np.float32))


def one_step(model, batch, parts):
  loss = functools.partial(policy.loss, settings=EVERYTHING)
  step = training.make_step(loss, optax.identity(), lambda step: 1.0, parts, policy.report)
  new, values = jax.jit(step)(training.state_of(model, optax.identity()), batch)
  return jax.tree.leaves(jax.tree.map(jnp.subtract, model, new.params)), values


@pytest.fixture(scope='module')
def replayed(models):
  """(batch, gradients, values) of one step of the mixture, its routes replayed."""
  samples = draw_samples(6, seed=1)
  batch = with_routes(pack([samples[:2], samples[2:3], samples[3:5], samples[5:]]),
                      models['moe'].spec)
  return batch, *one_step(models['moe'], batch, 1)


def test_micro_batches_add_up_to_one_batch(models, replayed):
  """Sums are added, and of maxima the largest is taken."""
  batch, want, want_values = replayed
  got, values = one_step(models['moe'], batch, 2)
  assert want_values['ratio_max'] > want_values['ratio_min'] + 0.02
  assert want_values['mismatch_max'] > want_values['mismatch'] > 0
  for key in want_values:
    np.testing.assert_allclose(values[key], want_values[key], rtol=1e-4, atol=1e-6, err_msg=key)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_on_a_mesh_equals_alone(models, replayed):
  batch, want, want_values = replayed
  mesh = alphabet.make_mesh(dict(context=2, fsdp=2))
  placed = jax.tree.map(jax.device_put, (models['moe'], batch),
                        alphabet.shardings((models['moe'], batch), mesh))
  with jax.set_mesh(mesh):
    got, values = one_step(*placed, 1)
  for key in want_values:
    np.testing.assert_allclose(values[key], want_values[key], rtol=1e-4, atol=2e-6, err_msg=key)
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-7


def test_no_logits_of_all_tokens(models, monkeypatch):
  """Neither for the log-probabilities, nor for the entropy and its gradient."""
  monkeypatch.setattr('qwen3_jax.kernels.head.TOKENS', 16)
  batch = pack([[s] for s in draw_samples(4)]) | dict(bonus_B=np.ones(4, np.float32))
  text = str(jax.make_jaxpr(jax.value_and_grad(functools.partial(
    policy.loss, settings=EVERYTHING), has_aux=True))(models['dense'], batch))
  assert '[16,96]' in text and '4,32,96' not in text and '[128,96]' not in text


def test_in_fresh_rows_the_ratio_is_exactly_one(models):
  """Whatever old log-probabilities say; the other rows use them. Without any, all are fresh."""
  batch = pack([[s] for s in draw_samples(4)])
  logp, *_ = jax.jit(policy.token_values)(models['dense'], batch)
  run = jax.jit(functools.partial(policy.loss, settings=policy.Policy()))
  fresh = policy.report(run(models['dense'], batch | dict(fresh_B=np.ones(4, np.float32)))[1])
  without = {key: x for key, x in batch.items() if key != 'old_logp_BT'}
  for values in fresh, policy.report(run(models['dense'], without)[1]):
    assert values['ratio_max'] == values['ratio_min'] == values['ratio'] == 1
    assert values['kl_old_k1'] == values['kl_old_k3'] == values['clip_low'] == 0
  half = dict(fresh_B=np.array([1, 0, 1, 1], np.float32))
  values = policy.report(run(models['dense'], batch | half)[1])
  trained = batch['weight_BT'][1] > 0
  ratio = np.exp(np.asarray(logp)[1] - batch['old_logp_BT'][1])[trained]
  np.testing.assert_allclose(values['ratio_max'], max(1, ratio.max()), rtol=1e-5)
  np.testing.assert_allclose(values['ratio_min'], min(1, ratio.min()), rtol=1e-5)


def test_token_values_are_those_of_the_loss_and_of_the_plain_softmax(models):
  """At a temperature, over the 80 of 96 ids that a tokenizer has: as an engine draws."""
  batch = pack([[s] for s in draw_samples(3, vocab=80)])
  drawn = dict(temperature=0.5, size=80)
  logp, entropy, routes = jax.jit(functools.partial(policy.token_values, **drawn))(
    models['dense'], batch)
  assert routes is None
  hidden = models['dense'](batch['tokens_BT'], batch['segment_BT'], batch['position_BT'])
  p = jax.nn.log_softmax(models['dense'].logits(hidden.hidden_BTD)[..., :80] / 0.5)[:, :-1]
  at = jnp.take_along_axis(p, batch['tokens_BT'][:, 1:, None], -1)[..., 0]
  weight = batch['weight_BT'][:, 1:]
  np.testing.assert_allclose(logp[:, 1:], at * weight, atol=1e-5)
  np.testing.assert_allclose(entropy[:, 1:], -(jnp.exp(p) * p).sum(-1) * weight, atol=1e-5)
  settings = policy.Policy(temperature=0.5, correction=None)
  values = policy.report(policy.loss(models['dense'], batch | dict(old_logp_BT=logp), settings,
                                     size=80)[1])
  np.testing.assert_allclose([values['ratio_max'], values['ratio_min']], 1, atol=1e-5)


def test_terms_of_the_experts_are_added(models, replayed):
  batch, totals = replayed[0], dict(total_tokens=float((replayed[0]['segment_BT'] > 0).sum()))
  run = functools.partial(policy.loss, models['moe'], settings=EVERYTHING)
  (plain, sums), (more, _) = jax.jit(lambda x: (run(x), run(x, balance=0.5, router_z=0.25)))(
    batch | totals)
  share = sums['count_LE'][0] / sums['count_LE'][0].sum()
  balance = 8 * (share * sums['probability_LE'][0] / totals['total_tokens']).sum()
  np.testing.assert_allclose(more - plain, 0.5 * balance + 0.25 * sums['router_z'], rtol=1e-4)
