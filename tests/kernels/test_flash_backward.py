"""Flash attention's gradients equal those of the plain meaning; the compilers of four TPUs take it.

Interpreted on a CPU; what a TPU's schedule says is in benchmarks/kernel_cases.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.kernels import flash_backward, reference

SMALL = dict(queries=8, heads=2, chunk=8, units=2, resident=512)


def make_inputs(B, T, S, N, K, H=8, seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def segments(kind, B, T):
  """Segment numbers (B, T) of one awkward kind."""
  t = np.arange(T)
  rows = {'whole': [t * 0 + 1],
          'padded': [np.where(t < T - 3, 1, 0), np.where(t < 3, 0, 1)],
          'packed': [1 + (t >= T // 3) + (t >= T // 2), np.where(t < T - 2, 1 + t // 4, 0)],
          'repeated': [1 + t // 5 % 2],
          'one token': [1 + t],
          'masked row': [t * 0, t * 0 + 1]}[kind]
  return jnp.asarray(np.stack([rows[b % len(rows)] for b in range(B)]), jnp.int32)


@functools.partial(jax.jit, static_argnames=('window',))
def differentiate(q, k, v, do, q_segment, k_segment, q_start, k_start, window=None):
  """((output, log-sum-exp), the meaning's gradients)."""
  def attend(q, k, v):
    return reference.partial_attention(q, k, v, q_segment, k_segment, q_start, k_start, window)
  (o, lse), pull = jax.vjp(attend, q, k, v)
  return (o, lse), pull((do, jnp.zeros_like(lse)))


@functools.partial(jax.jit, static_argnames=('window', 'dtype', 'sizes'))
def backward(*args, sizes, window=None, dtype=None):
  return flash_backward.backward(*args, window=window, dtype=dtype, blocks=SMALL | dict(sizes))


def check(inputs, q_segment, k_segment, q_start=(0,), k_start=(0,), window=None, tolerance=1e-5,
          **sizes):
  q, k, v, do = inputs
  place = [jnp.asarray(x, jnp.int32) for x in (q_segment, k_segment, q_start, k_start)]
  (o, lse), want = differentiate(q, k, v, do, *place, window=window)
  got = backward(q, k, v, *place, o, lse, do, window=window, sizes=tuple(sorted(sizes.items())))
  for name, a, b in zip(('dq', 'dk', 'dv'), got, want):
    assert a.dtype == q.dtype and np.isfinite(a).all()
    scale = max(1, float(np.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)
  return got


@pytest.mark.parametrize('kind', ['whole', 'padded', 'packed', 'repeated', 'one token',
                                  'masked row'])
def test_segments(kind):
  """A length that is no multiple of a block, all heads of a key head in two steps."""
  segment = segments(kind, 2, 45)
  got = check(make_inputs(2, 45, 45, 8, 2), segment, segment)
  for x in got:
    assert (x[segment == 0] == 0).all()
