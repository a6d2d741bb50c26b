"""Properties of the whole model: causal, packed, cached, rematerialised, sharded."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels.head import cross_entropy
from qwen3_jax.model import transformer
from qwen3_jax.model.cache import Cache
from qwen3_jax.spec import Spec

DENSE = Spec(layers=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=32, head_width=8)
MIXTURE = Spec(layers=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=32, head_width=8, experts=8,
               chosen=2, expert_mlp=12)
BOTH = pytest.mark.parametrize('spec', [DENSE, MIXTURE], ids=['dense', 'mixture'])
DOCUMENTS = np.arange(12).reshape(1, 12), np.array([[1] * 5 + [2] * 3 + [3] * 2 + [0] * 2])


# Graphs and layouts are compared here, not machine code: half the time to compile.
compile_quickly = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def make_model(spec):
  """Random weights, larger than those training starts from: each layer matters."""
  random = np.random.default_rng(1)
  def draw(shape):
    around = 1 if len(shape.shape) < 3 and shape.shape[-1] in (8, 16) else 0  # a norm
    return jnp.asarray(random.normal(around, 0.15, shape.shape), jnp.float32)
  return jax.tree.map(draw, jax.eval_shape(lambda: transformer.make(spec)))


@compile_quickly
def forward(model, tokens, segment, cache=None):
  return model(tokens, segment, cache=cache)


@BOTH
def test_gradient_reaches_only_earlier_tokens_of_the_same_document(spec):
  """Each token is different, so the gradient of the embedding shows what a position saw."""
  tokens, segment = DOCUMENTS
  direction_D = jax.random.normal(jax.random.key(0), (spec.width,))
  @compile_quickly
  def probe(model):
    _, pull = jax.vjp(lambda m: m(tokens, segment).hidden_BTD[0] @ direction_D, model)
    return jax.lax.map(lambda one_hot: pull(one_hot)[0].embed_VD[...], jnp.eye(12))
  seen = np.abs(probe(make_model(spec))).sum(-1)[:, :12] > 0
  t = np.arange(12)
  want = (t <= t[:, None]) & (segment[0] == segment[0][:, None])
  real = segment[0] > 0  # a padded position is never read: what it sees does not matter
  np.testing.assert_array_equal(seen[real], want[real])


@BOTH
def test_packed_equals_separate(spec):
  tokens, segment = DOCUMENTS
  model = make_model(spec)
  packed = forward(model, tokens, segment).hidden_BTD[0]
  for number in (1, 2, 3):
    here = segment[0] == number
    alone = np.zeros((2, 1, 12), np.int32)
    alone[0, 0, :here.sum()], alone[1, 0, :here.sum()] = tokens[0, here], 1
    separate = forward(model, *alone).hidden_BTD[0, :here.sum()]
    np.testing.assert_allclose(packed[here], separate, atol=2e-5)


@BOTH
def test_prefill_and_decode_equal_one_pass(spec):
  """Two rows of different length, padded on the left; then three tokens at once, then singly."""
  tokens = np.asarray(jax.random.randint(jax.random.key(3), (2, 12), 0, spec.vocab))
  segment = np.ones((2, 12), np.int32)
  segment[1, :4] = 0
  model = make_model(spec)
  want = forward(model, tokens, segment).hidden_BTD
  cache = Cache.make(spec, 2, 14)
  for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
    out = forward(model, tokens[:, start:stop], segment[:, start:stop], cache)
    cache = out.cache
    real = segment[:, start:stop] == 1
    np.testing.assert_allclose(out.hidden_BTD[real], want[:, start:stop][real], atol=2e-5)
  assert cache.length == 12


def test_positions_count_within_segments():
  segment = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0]])
  position = transformer.default_position(segment)
  np.testing.assert_array_equal(position[segment > 0], [0, 1, 2, 0, 1])


def loss(model, tokens, segment, remat):
  out = model(tokens, segment, remat=remat)
  target = jnp.roll(tokens, -1, axis=1)
  value = cross_entropy(out.hidden_BTD, model.head(), target, (segment > 0).astype(jnp.float32))
  if out.balance is not None:  # nothing real: touches every statistic
    count_E, probability_E = out.balance.count_E.sum(0), out.balance.probability_E.sum(0)
    value += 0.1 * count_E @ probability_E / tokens.size + 0.01 * out.balance.z.sum()
  return value, out.routes


gradients = compile_quickly(jax.value_and_grad(loss, has_aux=True), static_argnums=3)


def make_batch():
  tokens = jax.random.randint(jax.random.key(5), (4, 8), 0, 32)
  return tokens, jnp.array([[1] * 8, [1] * 4 + [2] * 4, [1] * 7 + [0], [1] * 8])


def worst(got, want):
  """The largest relative difference of any parameter's gradient."""
  def one(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
  return max(jax.tree.leaves(jax.tree.map(one, got, want)))


@pytest.mark.slow
def test_remat_policies_give_equal_gradients():
  model = make_model(MIXTURE)
  (value, _), want = gradients(model, *make_batch(), 'none')
  for policy in transformer.POLICIES:
    (other, _), got = gradients(model, *make_batch(), policy)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    assert worst(got, want) <= 1e-5, policy


@pytest.mark.parametrize('shape', [dict(fsdp=4), dict(tensor=2, fsdp=2), dict(data=2, fsdp=2)],
                         ids=str)
@BOTH
def test_sharded_equals_alone(spec, shape, capfd):
  model, batch = make_model(spec), make_batch()
  (value, routes), want = gradients(model, *batch, 'none')
  mesh = alphabet.make_mesh(shape)
  model = jax.device_put(model, alphabet.shardings(model, mesh))
  layout = alphabet.shardings(dict(tokens_BT=batch[0]), mesh)['tokens_BT']
  with jax.set_mesh(mesh):
    (value_sharded, routes_sharded), got = gradients(model, *jax.device_put(batch, layout), 'none')
  np.testing.assert_allclose(value_sharded, value, rtol=1e-5)
  if routes is not None:
    np.testing.assert_array_equal(routes_sharded, routes)
  assert worst(got, want) <= 1e-4
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err


def test_init_on_a_mesh_makes_each_device_its_part():
  spec = dataclasses.replace(DENSE, vocab=512, tied=True)
  model = transformer.init(spec, 3, alphabet.make_mesh(dict(tensor=2, fsdp=2)))
  q_DNH = model.stacks[0].attention.q_DNH[...]
  assert q_DNH.sharding.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor', None)
  assert q_DNH.addressable_shards[0].data.size == q_DNH.size // 4
  assert np.std(model.embed_VD) == pytest.approx(0.02, rel=0.05)
  assert np.std(q_DNH) == pytest.approx(0.02, rel=0.1)
  assert (np.asarray(model.norm_D) == 1).all()
  assert len(np.unique(q_DNH)) > 0.99 * q_DNH.size  # neither layers nor devices repeat


def test_given_routes_are_used():
  model, (tokens, segment) = make_model(MIXTURE), make_batch()
  run = jax.jit(lambda routes: model(tokens, segment, routes=routes))
  chosen = forward(model, tokens, segment)
  again, other = run(chosen.routes), run((chosen.routes + 1) % MIXTURE.experts)
  np.testing.assert_allclose(again.hidden_BTD, chosen.hidden_BTD, atol=1e-6)
  np.testing.assert_array_equal(other.routes, (chosen.routes + 1) % MIXTURE.experts)
  assert np.abs(other.hidden_BTD - chosen.hidden_BTD).max() > 0.01


def test_balance_counts_real_tokens():
  _, segment = batch = make_batch()
  out = forward(make_model(MIXTURE), *batch)
  real = int((segment > 0).sum())
  np.testing.assert_allclose(out.balance.tokens, [real, real])
  np.testing.assert_allclose(out.balance.count_E.sum(-1), 2 * real)
  np.testing.assert_allclose(out.balance.probability_E.sum(-1), real, rtol=1e-5)
  for layer, routes in enumerate(out.routes):
    count = np.bincount(np.asarray(routes)[segment > 0].ravel(), minlength=8)
    np.testing.assert_array_equal(out.balance.count_E[layer], count)


def test_tied_routers_choose_the_first_experts():
  """Equal probabilities (a zeroed router) go to the lowest numbers, on every token alike."""
  model = jax.tree.map(lambda w: w, make_model(MIXTURE))
  router = model.stacks[0].mlp.router_DE
  router[...] = jnp.zeros_like(router[...])
  routes = forward(model, *make_batch()).routes
  np.testing.assert_array_equal(routes, np.broadcast_to([0, 1], routes.shape))


@BOTH
def test_bfloat16_compute_keeps_float32_master_weights(spec):
  tokens, segment = make_batch()
  model = make_model(spec)
  low = jax.jit(lambda m: m(tokens, segment, dtype=jnp.bfloat16).hidden_BTD)(model)
  assert low.dtype == jnp.bfloat16
  high = forward(model, tokens, segment).hidden_BTD
  difference = np.abs(low.astype(np.float32) - high)[np.asarray(segment) > 0]
  assert np.median(difference) < 0.05


def test_cast_leaves_norms_and_routers():
  low = transformer.cast(make_model(MIXTURE), jnp.bfloat16)
  assert low.stacks[0].mlp.gate_EDF.dtype == low.embed_VD.dtype == jnp.bfloat16
  assert low.stacks[0].mlp.router_DE.dtype == low.norm_D.dtype == jnp.float32
  assert low.stacks[0].attention.q_norm_H.dtype == jnp.float32


@pytest.mark.parametrize('name', ['0.6b', '8b', '30b-a3b', '235b-a22b', 'qwen2.5-7b'])
def test_full_sizes_trace_and_have_the_published_number_of_weights(name):
  spec = Spec.named(name)
  shapes = jax.eval_shape(lambda: transformer.make(spec))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == spec.parameters()
