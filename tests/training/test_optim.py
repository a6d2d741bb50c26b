"""AdamW and Muon against optax's own, the types of their state, and the schedules' shapes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import optim
from qwen3_jax.training.checkpoint import Checkpoints

DECAYED = {'embed_VD', 'head_VD', 'q_DNH', 'k_DKH', 'v_DKH', 'o_NHD', 'gate_DF', 'up_DF', 'down_FD',
           'router_DE', 'gate_EDF', 'up_EDF', 'down_EFD'}
KEPT = {'norm_D', 'attention_norm_D', 'mlp_norm_D', 'q_norm_H', 'k_norm_H',
        'q_bias_NH', 'k_bias_KH', 'v_bias_KH'}


@pytest.fixture(scope='module')
def toy():
  """(weights, three gradients) of a model that has a weight of every kind."""
  spec = Spec(layers=2, width=8, heads=2, kv_heads=1, mlp=8, vocab=12, head_width=4, qkv_bias=True,
              experts=4, chosen=2, expert_mlp=4, mlp_only=(0,))
  shapes = jax.eval_shape(functools.partial(transformer.make, spec))
  rng = np.random.default_rng(0)
  fill = lambda: jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), shapes)
  return fill(), [fill() for _ in range(3)]


def name_of(path):
  return path[-2].name


def run(optimizer, weights, grads, rates=None):
  """Weights after a step with each of `grads`, scaled by -rate where rates are given."""
  state = optimizer.init(weights)
  for i, g in enumerate(grads):
    updates, state = jax.jit(optimizer.update)(g, state, weights)
    scale = 1 if rates is None else -rates[i]
    weights = jax.tree.map(lambda w, u, scale=scale: w + scale * u, weights, updates)
  return weights, state


def test_adamw_is_that_of_optax(toy):
  """Clip at 1 (the gradients' norm is about 30), decay 0.1, and a rate that changes."""
  weights, grads = toy
  rates = [1e-2, 3e-2, 2e-2]
  mask = jax.tree_util.tree_map_with_path(lambda path, _: name_of(path) in DECAYED, weights)
  reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
    lambda count: jnp.array(rates)[count], b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask))
  want, _ = run(reference, weights, grads)
  got, _ = run(optim.adamw(), weights, grads, rates)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_only_matrices_decay(toy):
  weights, grads = toy
  zero = [jax.tree.map(jnp.zeros_like, grads[0])]
  got, _ = run(optim.adamw(weight_decay=0.5), weights, zero, [0.1])
  seen = set()
  for (path, w), new in zip(jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(got)):
    seen.add(name_of(path))
    np.testing.assert_allclose(new, w * (0.95 if name_of(path) in DECAYED else 1), rtol=1e-6)
  assert seen == DECAYED | KEPT


def test_clipping_is_by_the_norm_of_all(toy):
  weights, grads = toy
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads[0])))
  for clip, scale in ((norm / 4, 0.25), (norm * 4, 1.0)):
    _, state = run(optim.adamw(b1=0.75, clip=clip), weights, grads[:1], [0.1])
    for m, g in zip(jax.tree.leaves(state[1].mu), jax.tree.leaves(grads[0]), strict=True):
      np.testing.assert_allclose(m, 0.25 * scale * g, rtol=1e-5)


def test_moments_in_bfloat16_stay_within_their_bound(toy):
  """Kept rounded, computed in float32: off by 2^-8 / (1 - b) of the largest that they were."""
  weights, grads = toy
  many = [jax.tree.map(lambda g, i=i: g * (1 + 0.3 * i), grads[i % 3]) for i in range(12)]
  rounded, exact = (optim.adamw(clip=1e9, moments=kind) for kind in ('bfloat16', 'float32'))
  (_, got), (_, want) = (run(each, weights, many) for each in (rounded, exact))
  largest = [0 * np.abs(x) for x in jax.tree.leaves((want[1].mu, want[1].nu))]
  for count in range(1, 13):
    _, state = run(exact, weights, many[:count])
    largest = [np.maximum(x, np.abs(y)) for x, y in zip(
      largest, jax.tree.leaves((state[1].mu, state[1].nu)))]
  bounds = [b for b in (0.9, 0.95) for _ in jax.tree.leaves(weights)]
  for (path, a), b, top, decay in zip(
      jax.tree_util.tree_leaves_with_path((got[1].mu, got[1].nu)),
      jax.tree.leaves((want[1].mu, want[1].nu)), largest, bounds, strict=True):
    assert a.dtype == (jnp.bfloat16 if name_of(path) in DECAYED else jnp.float32)
    assert (np.abs(np.float32(a) - b) <= 1.01 * 2 ** -8 / (1 - decay) * top + 1e-7).all()


def test_factored_moments_are_adams_where_squares_are_of_rank_one(toy):
  """Signs are free: only the squares must be a product. Layers and experts have their own."""
  weights, _ = toy
  rng = np.random.default_rng(5)

  def rank_one(path, w):
    if name_of(path) in KEPT:
      return jnp.array(rng.normal(size=w.shape), w.dtype)
    inputs, outputs = optim._sides(path)
    sizes = [[n if axis - w.ndim not in skip else 1 for axis, n in enumerate(w.shape)]
             for skip in (inputs, outputs)]
    row, column = (rng.uniform(0.1, 2, size) for size in sizes)
    return jnp.array(row * column * rng.choice([-1, 1], w.shape), w.dtype)
  first = jax.tree_util.tree_map_with_path(rank_one, weights)
  grads = [jax.tree.map(lambda g, i=i: g * (1 + i), first) for i in range(3)]
  got, state = run(optim.adamw(moments='factored', weight_decay=0), weights, grads, [0.1] * 3)
  want, _ = run(optim.adamw(weight_decay=0), weights, grads, [0.1] * 3)
  for a, b, w in zip(*map(jax.tree.leaves, (got, want, weights)), strict=True):
    np.testing.assert_allclose(a - w, b - w, rtol=2 ** -7, atol=1e-6)  # the first is in bfloat16
  whole = sum(w.size for w in jax.tree.leaves(weights))
  assert sum(x.size for x in jax.tree.leaves((state[1].rows, state[1].columns))) < whole / 2


def test_factored_second_moment_of_any_gradient(toy):
  """rows x columns / all, of mean squares, after one step from 0, which the correction undoes."""
  weights, grads = toy
  updates, _ = optim._adam(0.9, 0.95, 1e-8, 'factored').update(
    grads[0], optim._adam(0.9, 0.95, 1e-8, 'factored').init(weights))
  g, u = (x.stacks[1].mlp.down_EFD[...] for x in (grads[0], updates))
  square = np.square(np.float64(g))
  v = square.mean(-1, keepdims=True) * square.mean(-2, keepdims=True) / square.mean(
    (-1, -2), keepdims=True)
  np.testing.assert_allclose(u, g / np.sqrt(v), rtol=1e-5)
  np.testing.assert_allclose(updates.norm_D[...], np.sign(grads[0].norm_D[...]), rtol=1e-5)
  zero = jax.tree.map(jnp.zeros_like, grads[0])
  still, _ = run(optim.adamw(moments='factored', weight_decay=0), weights, [zero], [0.1])
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(weights)))


def test_muon_is_that_of_optax_for_each_matrix_and_adam_for_the_rest(toy):
  weights, grads = toy
  got, _ = run(optim.muon(clip=1e9), weights, grads, [0.1] * 3)
  adam, _ = run(optim.adamw(clip=1e9), weights, grads, [0.1] * 3)
  matrices = {'q_DNH', 'k_DKH', 'v_DKH', 'o_NHD', 'gate_DF', 'up_DF', 'down_FD', 'gate_EDF',
              'up_EDF', 'down_EFD'}
  one = optax.contrib.muon(0.1, weight_decay=0.1, consistent_rms=0.2)
  for (path, found), other, w, *g in zip(
      jax.tree_util.tree_leaves_with_path(got), *map(jax.tree.leaves, (adam, weights, *grads))):
    if name_of(path) not in matrices:
      np.testing.assert_array_equal(found, other)
      continue
    inputs, outputs = (math.prod(w.shape[axis] for axis in side) for side in optim._sides(path))
    for i, single in enumerate(w.reshape(-1, inputs, outputs)):
      want, _ = run_as_is(one, single, [each.reshape(-1, inputs, outputs)[i] for each in g])
      np.testing.assert_allclose(found.reshape(-1, inputs, outputs)[i], want, atol=2e-5)


def run_as_is(optimizer, weights, grads):
  """As `run`, of an optimizer whose updates are added."""
  return run(optimizer, weights, grads, [-1.0] * len(grads))


CHOICES = [('adamw', 'bfloat16'), ('adamw', 'factored'), ('muon', 'float32'), ('muon', 'bfloat16')]


@pytest.mark.parametrize('kind, moments', [
  pytest.param(*choice, marks=[pytest.mark.slow] if choice != ('adamw', 'factored') else [])
  for choice in CHOICES])
def test_state_is_cut_as_the_weights_are_and_is_resumed(toy, tmp_path, kind, moments):
  """On a mesh as alone; saved, restored on another mesh, and continued bit by bit."""
  weights, grads = toy
  optimizer = optim.make(kind, 0.9, 0.95, 1e-8, 0.1, 1.0, moments)
  want, want_state = run(optimizer, weights, grads, [1e-2] * 3)
  mesh = alphabet.make_mesh(dict(fsdp=2, tensor=2))
  place = lambda tree, mesh: jax.device_put(tree, alphabet.shardings(tree, mesh))
  half, state = run(optimizer, place(weights, mesh), [place(g, mesh) for g in grads[:2]],
                    [1e-2] * 2)
  state = place(state, mesh)
  held = sum(x.nbytes for x in jax.tree.leaves(state))
  here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  assert here < 0.6 * held
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  checkpoints.save(2, state, {}, {})
  shapes = jax.eval_shape(optimizer.init, weights)
  other = alphabet.make_mesh(dict(fsdp=4))
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                          alphabet.shardings(shapes, other))
  _, restored, _ = checkpoints.restore(abstract)
  checkpoints.close()
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  updates, _ = jax.jit(optimizer.update)(place(grads[2], other), restored, place(half, other))
  for w, u, end in zip(*map(jax.tree.leaves, (half, updates, want)), strict=True):
    np.testing.assert_allclose(np.asarray(w) - 1e-2 * np.asarray(u), end, atol=2e-5)


def test_choices_that_do_not_exist_are_refused():
  def make(kind='adamw', b1=0.9, b2=0.95, moments='float32'):
    return optim.make(kind, b1, b2, 1e-8, 0.1, 1.0, moments)
  with pytest.raises(ValueError, match="kind is 'lion'; want one of adamw, muon"):
    make('lion')
  with pytest.raises(ValueError, match="moments is 'int8'; want one of float32, bfloat16, fact"):
    make(moments='int8')
  with pytest.raises(ValueError, match='Muon keeps no second moment; want float32 or bfloat16'):
    make('muon', moments='factored')
  with pytest.raises(ValueError, match='b1 0.9 and b2 0.999 a step changes them by less than'):
    make(b2=0.999, moments='bfloat16')
  make(b2=0.999, moments='factored')  # its second moment is float32


def rates(*args, at, **options):
  return np.array([optim.schedule(*args, **options)(step) for step in at])


def test_warmup_is_linear_and_reaches_the_peak():
  for name in optim.SCHEDULES:
    got = rates(name, 2.0, 100, warmup=4, at=range(4))
    np.testing.assert_allclose(got, [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert rates(name, 2.0, 100, at=[0]) == 2


def test_shapes():
  def at(name, *steps):
    return rates(name, 2.0, 110, warmup=10, final=0.1, decay=0.2, at=steps)
  np.testing.assert_allclose(at('constant', 10, 60, 109), 2)
  np.testing.assert_allclose(at('linear', 10, 60, 110, 200), [2, 1.1, 0.2, 0.2], rtol=1e-6)
  np.testing.assert_allclose(at('cosine', 10, 35, 60, 110, 200),
                             [2, 0.2 + 0.9 * (1 + np.cos(np.pi / 4)), 1.1, 0.2, 0.2], rtol=1e-6)
  np.testing.assert_allclose(at('wsd', 10, 50, 88, 99, 110), [2, 2, 2, 1.1, 0.2], rtol=1e-6)
  for name in ('linear', 'cosine', 'wsd'):
    assert np.all(np.diff(at(name, *range(10, 130))) <= 0)
    np.testing.assert_allclose(rates(name, 2.0, 100, final=0., at=[100]), 0)


def test_bad_schedules_are_refused():
  with pytest.raises(ValueError, match='cosin.*want one of constant, cosine, wsd, linear'):
    optim.schedule('cosin', 1.0, 10)
  with pytest.raises(ValueError, match='warm-up of 10 steps does not fit into 10 steps'):
    optim.schedule('cosine', 1.0, 10, warmup=10)
