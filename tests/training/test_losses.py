"""Losses against their formulas: cross-entropy, expert balance, router z."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax.model import hf, transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import losses
from qwen3_jax.training import step as training


def with_totals(batch):
  return batch | dict(total_weight=batch['weight_BT'][:, 1:].sum(),
                      total_tokens=(batch['segment_BT'] > 0).sum())


def plain(params, batch):
  """Mean next-token loss by whole-array log-softmax."""
  hidden = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT']).hidden_BTD
  logp_BTV = jax.nn.log_softmax(params.logits(hidden)[:, :-1])
  nll_BT = -jnp.take_along_axis(logp_BTV, batch['tokens_BT'][:, 1:, None], -1)[..., 0]
  return jnp.average(nll_BT, weights=batch['weight_BT'][:, 1:])


@pytest.mark.parametrize('name', ['dense', 'moe'])
def test_cross_entropy_of_the_whole_model(models, draw_batch, name):
  batch = draw_batch() | {}
  batch['weight_BT'] = batch['weight_BT'] * np.random.default_rng(3).random((8, 24), np.float32)
  both = jax.jit(lambda params, batch: (  # one program: it compiles in half the time
    jax.value_and_grad(plain)(params, batch),
    jax.value_and_grad(losses.next_token, has_aux=True)(params, batch)))
  (want, want_grads), ((got, sums), grads) = both(models[name], with_totals(batch))
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(sums['nll'] / sums['weight'], want, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_last_token_of_a_row_predicts_nothing(models, draw_batch):
  """Neither the first token of the same row (as `roll` would have it) nor any segment's first."""
  batch = with_totals(draw_batch(T=12))
  batch['segment_BT'][:], batch['weight_BT'][:, 1:] = 1, 1
  batch['weight_BT'][:, 0] = 5  # no token stands before it
  nll = functools.partial(jax.jit(losses.next_token), models['dense'])
  hidden = models['dense'](batch['tokens_BT'], batch['segment_BT'], batch['position_BT'])
  logp_BTV = jax.nn.log_softmax(models['dense'].logits(hidden.hidden_BTD))
  want = -np.take_along_axis(np.asarray(logp_BTV)[:, :-1], batch['tokens_BT'][:, 1:, None], -1)
  np.testing.assert_allclose(nll(batch)[1]['nll'], want.sum(), rtol=1e-6)


def test_balance_of_known_routings():
  """Uniform is 1 in each layer by itself; all on one expert of four is 4; and by hand."""
  count_LE = np.array([[10, 10, 10, 10], [40, 0, 0, 0], [20, 10, 10, 0]])
  probability_LE = np.array([[5., 5, 5, 5], [20, 0, 0, 0], [8, 6, 4, 2]])
  want = [1, 4, 4 * (0.5 * 0.4 + 0.25 * 0.3 + 0.25 * 0.2)]
  np.testing.assert_allclose(losses.balance_loss(count_LE, probability_LE, 20), want, rtol=1e-6)


def test_balance_gradient_goes_through_probabilities_only(models, draw_batch):
  model, batch = models['moe'], with_totals(draw_batch())
  count_LE = jax.jit(losses.next_token)(model, batch)[1]['count_LE']
  share_LE = np.asarray(count_LE / count_LE.sum(-1, keepdims=True))

  def by_hand(params):
    out = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'])
    return jnp.mean(8 * jnp.sum(share_LE * out.balance.probability_E, -1)) / batch['total_tokens']

  def ours(params):
    silent = batch | {'weight_BT': np.zeros_like(batch['weight_BT'])}
    return losses.next_token(params, silent, balance=2.)[0]
  want, got = jax.jit(lambda params: (jax.grad(by_hand)(params), jax.grad(ours)(params)))(model)
  assert np.abs(want.stacks[0].mlp.router_DE[...]).max() > 1e-4
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, 2 * b, atol=2e-7)


def test_padding_is_in_no_statistic(models, draw_batch):
  batch = draw_batch(B=4)
  padding = batch['segment_BT'] == 0
  assert padding.sum() > 10
  other = batch | {'tokens_BT': np.where(padding, 7, batch['tokens_BT'])}
  loss = jax.jit(functools.partial(losses.next_token, balance=0.01, router_z=0.01))
  (value, sums), (value2, sums2) = (loss(models['moe'], with_totals(x)) for x in (batch, other))
  assert value == value2
  for name in sums:
    np.testing.assert_array_equal(sums[name], sums2[name])
  np.testing.assert_array_equal(sums['count_LE'].sum(-1), (~padding).sum() * 2)
  np.testing.assert_allclose(sums['probability_LE'].sum(-1), (~padding).sum(), rtol=1e-6)


@pytest.mark.parametrize('name', ['c_moe', 'd_moe_mixed'])
def test_transformers_convention(golden, name):
  folder = golden / 'models' / name
  model, numbers = hf.load(folder, dtype=jnp.float32), np.load(folder / 'golden.npz')
  for case in ('right', 'left'):
    mask = numbers[f'{case}_attention_mask'].astype(np.int32)
    balance = jax.jit(type(model).__call__)(model, numbers[f'{case}_input_ids'], mask).balance
    np.testing.assert_allclose(losses.hf_balance_loss(balance), numbers[f'{case}_aux_loss'],
                               rtol=1e-5)
    ours = [losses.hf_balance_loss(jax.tree.map(lambda x, i=i: x[i:i + 1], balance))
            for i in range(len(balance.tokens))]
    np.testing.assert_allclose(  # a layer alone: theirs is ours times the number chosen
      losses.balance_loss(balance.count_E, balance.probability_E, balance.tokens[0]),
      np.array(ours) / model.spec.chosen, rtol=1e-5)


DOMAINS, SHARP = 4, 6.0


@pytest.fixture(scope='module')
def specialists():
  """One layer whose router sends tokens 4 i + d to experts 2 d and 2 d + 1 of eight."""
  spec = Spec(layers=1, width=32, heads=2, kv_heads=1, mlp=8, vocab=16, head_width=16, experts=8,
              chosen=2, expert_mlp=8)
  shapes = jax.eval_shape(functools.partial(transformer.make, spec))
  model = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  direction_ED = np.eye(8, 32, dtype=np.float32)
  model.embed_VD.set_value(jnp.array(direction_ED[np.arange(16) % DOMAINS]))
  layer = model.stacks[0]
  layer.attention.o_NHD.set_value(jnp.zeros_like(layer.attention.o_NHD[...]))
  router_DE = np.zeros((1, 32, 8), np.float32)
  for d in range(DOMAINS):
    router_DE[0, d, 2 * d:2 * d + 2] = SHARP * np.sqrt(1 / 32 + 1e-6)  # undoes the norm
  layer.mlp.router_DE.set_value(jnp.array(router_DE))
  return model


@pytest.fixture(scope='module')
def domains():
  """Eight rows, row r of domain r % 4 alone: four micro-batches of one domain each."""
  tokens = np.random.default_rng(0).integers(0, 4, (8, 16)) * DOMAINS
  ones = np.ones((8, 16), np.int32)
  return dict(tokens_BT=(tokens + np.arange(8)[:, None] % DOMAINS).astype(np.int32),
              segment_BT=ones, position_BT=np.cumsum(ones, 1, dtype=np.int32) - 1,
              weight_BT=np.concatenate([ones[:, :1] * 0., ones[:, 1:]], 1).astype(np.float32))


def micro_batches(batch):
  return [with_totals(batch) | {k: v[d::DOMAINS] for k, v in batch.items()} for d in range(DOMAINS)]


def test_counts_run_over_micro_batches(specialists, domains):
  """Algorithm 1 of 2501.11873: domain-pure micro-batches end balanced, though each alone is not."""
  term = jax.jit(lambda params, batch: [
    losses.next_token(params, batch, balance=x) for x in (0., 1.)])
  running, alone, counts = [], [], jnp.zeros((1, 8))
  for part in micro_batches(domains):
    (without, sums), (value, _) = term(specialists, part | {'count_LE': counts})
    running.append(DOMAINS * (value - without))  # its terms weigh by share of tokens
    counts += sums['count_LE']
    (without, _), (value, _) = term(specialists, part | {'count_LE': jnp.zeros((1, 8))})
    alone.append(DOMAINS * (value - without))
  on = 2 * np.exp(SHARP) / (2 * np.exp(SHARP) + 6)  # probability of the two experts of a domain
  off = 1 - on
  np.testing.assert_allclose(alone, [4 * on] * 4, rtol=1e-5)
  np.testing.assert_allclose(  # after k domains each of 2 k experts had 1 / 2 k of the tokens
    running, [8 / (2 * k) * (on + (k - 1) * off / 3) for k in (1, 2, 3, 4)], rtol=1e-5)
  np.testing.assert_allclose(running[-1], 1, rtol=1e-5)
  assert min(alone) > 3.9


def test_step_carries_the_counts(specialists, domains):
  """`make_step` gives the gradient of the running terms, and reports the balance of all."""
  loss = functools.partial(losses.next_token, balance=1.)
  step = training.make_step(loss, optax.identity(), lambda step: 1.0, DOMAINS)
  state, values = jax.jit(step)(training.state_of(specialists, optax.identity()), domains)
  grad = jax.jit(jax.grad(loss, has_aux=True))
  counts, total = jnp.zeros((1, 8)), jax.tree.map(jnp.zeros_like, specialists)
  for part in micro_batches(domains):
    part_grads, sums = grad(specialists, part | {'count_LE': counts})
    counts, total = counts + sums['count_LE'], jax.tree.map(jnp.add, total, part_grads)
  for new, old, g in zip(*map(jax.tree.leaves, (state.params, specialists, total)), strict=True):
    np.testing.assert_allclose(old - new, g, atol=1e-6)
  np.testing.assert_allclose(values['balance'], 1, rtol=1e-5)
  np.testing.assert_allclose(values['expert_peak'], 1, rtol=1e-6)
  np.testing.assert_array_equal(values['expert_load_LE'], np.full((1, 8), 8 * 16 * 2 / 8))


def test_router_z(specialists, domains):
  """Mean over tokens of logsumexp(router logits) squared."""
  loss = jax.jit(lambda x: losses.next_token(specialists, with_totals(domains), router_z=x))
  (plain, sums), (value, _) = loss(0.), loss(0.5)
  want = np.log(2 * np.exp(SHARP) + 6) ** 2
  np.testing.assert_allclose(sums['router_z'], want, rtol=1e-5)
  np.testing.assert_allclose(value - plain, 0.5 * want, rtol=1e-5)
