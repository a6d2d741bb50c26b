"""AdamW against optax's own, what decays, and the schedules' shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import optim

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
