"""The head's TPU kernels, interpreted, equal the plain meaning; the real compiler takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.kernels import head_gradient, head_tpu, reference

SMALL = dict(tokens=128, rows=64, part=32)


def make_inputs(M=150, D=128, V=200, dtype=jnp.float32, scale=1.0, seed=0):
  """(hidden_MD, head_VD, target_M, weight_M): ragged in tokens and rows, a third without weight."""
  keys = jax.random.split(jax.random.key(seed), 4)
  hidden = scale * jax.random.normal(keys[0], (M, D)) * D ** -0.25
  head = scale * jax.random.normal(keys[1], (V, D)) * D ** -0.25
  weight = jax.random.uniform(keys[3], (M,)) * (jnp.arange(M) % 3 > 0)
  return (hidden.astype(dtype), head.astype(dtype), jax.random.randint(keys[2], (M,), 0, V), weight)


def in_kernels(hidden, head, target, weight, bonus=None, temperature=1.0, size=None):
  """(logp_M, entropy_M, d_hidden, d_head) of sum(weight * -logp) + sum(bonus * entropy)."""
  options = dict(limit=size, temperature=temperature, blocks=SMALL)
  found = head_tpu.statistics(hidden, head, target, entropy=True, **options)
  more = () if bonus is None else (bonus, found.entropy)
  gradients = head_gradient.gradient(hidden, head, target, weight, found.bits, *more, **options)
  return found.logp, found.entropy, *gradients


def meaning(hidden, head, target, weight, bonus=None, temperature=1.0, size=None):
  def total(hidden, head):
    logp, entropy = reference.token_entropy(hidden[None], head, target[None], temperature, size)
    sum_ = -jnp.sum(weight * logp[0])
    return sum_ + (0 if bonus is None else jnp.sum(bonus * entropy[0])), (logp[0], entropy[0])
  hidden, head = (x.astype(jnp.float32) for x in (hidden, head))
  gradients, values = jax.grad(total, (0, 1), has_aux=True)(hidden, head)
  return *values, *gradients


def compare(got, want, rtol=1e-5, values=1e-5):
  for a, b in zip(got[:2], want[:2]):
    np.testing.assert_allclose(a, b, rtol=values, atol=5e-6)
  for a, b in zip(got[2:], want[2:]):
    assert a.dtype == jnp.float32 and np.isfinite(a).all()
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


@pytest.mark.parametrize('bonus, temperature, size', [
  (False, 1.0, None), (True, 0.7, 190), (True, 1.0, 70)], ids=str)
def test_values_and_gradients_in_float32(bonus, temperature, size):
  hidden, head, target, weight = make_inputs()
  target = target if size is None else target % size
  bonus = weight[::-1] - 0.3 if bonus else None
  inputs = hidden, head, target, weight, bonus, temperature, size
  got = jax.jit(in_kernels, static_argnums=(5, 6))(*inputs)
  compare(got, meaning(*inputs))
  if size is not None:
    assert (got[3][size:] == 0).all()
