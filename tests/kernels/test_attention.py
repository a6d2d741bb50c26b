"""Block attention equals its plain meaning, values and gradients, on every awkward shape."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.kernels import reference
from qwen3_jax.kernels.attention import attention


def make_inputs(B, T, N, K, H=8, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, weight = (jax.random.normal(key, (B, T, heads, H))
                     for key, heads in zip(keys, (N, K, K, N)))
  return q, k, v, weight


def segments(kind, B, T):
  """Segment numbers (B, T) of one awkward kind."""
  t = np.arange(T)
  rows = {'whole': [t * 0 + 1],
          'padded': [np.where(t < T - 3, 1, 0), np.where(t < 3, 0, 1)],
          'packed': [1 + (t >= T // 3) + (t >= T // 2), np.where(t < T - 2, 1 + t // 4, 0)],
          'one token': [1 + t],
          'masked row': [t * 0, t * 0 + 1]}[kind]
  return jnp.asarray(np.stack([rows[b % len(rows)] for b in range(B)]), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, q, k, v, weight, segment):
  def total(q, k, v):
    o = function(q, k, v, segment, segment)
    return jnp.sum(o * weight), o
  (_, o), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
  return o, *gradients


@functools.cache  # so that one block length compiles once
def in_blocks(block):
  return functools.partial(attention, block=block)


@pytest.mark.parametrize('T, N, K, block, kinds', [
    (13, 4, 2, 5, ('whole', 'padded', 'packed', 'one token', 'masked row')),  # a ragged last block
    (33, 4, 2, 5, ('packed', 'padded', 'masked row')),  # more pairs of blocks than are unrolled
    (12, 4, 1, 6, ('packed', 'padded')),  # blocks divide the length; one kv head
    (12, 3, 3, 64, ('packed', 'one token')),  # a block longer than the row; as many kv heads
    (1, 2, 1, 4, ('whole',)),
])
def test_values_and_gradients(T, N, K, block, kinds):
  inputs = make_inputs(2, T, N, K)
  for kind in kinds:
    segment = segments(kind, 2, T)
    got = value_and_gradients(in_blocks(block), *inputs, segment)
    want = value_and_gradients(reference.attention, *inputs, segment)
    for name, a, b in zip(('output', 'dq', 'dk', 'dv'), got, want):
      np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f'{kind}: {name}')
    assert all(np.isfinite(a).all() for a in got)


def test_padding_gives_zero_and_takes_no_gradient():
  q, k, v, weight = make_inputs(2, 13, 4, 2)
  segment = segments('padded', 2, 13)
  for array in value_and_gradients(in_blocks(5), q, k, v, weight, segment):
    assert (array[segment == 0] == 0).all()


def test_new_tokens_over_a_cache():
  """Queries from slot `start` on see what is written up to themselves, in their own segment."""
  q, k, v, _ = make_inputs(2, 13, 4, 2)
  q = q[:, :5]
  segment_BS = segments('padded', 2, 13)
  run = jax.jit(functools.partial(attention, block=4))
  meaning = jax.jit(reference.attention)
  for start in (0, 3, 8):
    segment_BT = segment_BS[:, start:start + 5]
    got = run(q, k, v, segment_BT, segment_BS, jnp.int32(start))
    want = meaning(q, k, v, segment_BT, segment_BS, start)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_bfloat16_stays_near_float32():
  q, k, v, weight = make_inputs(2, 33, 4, 2, H=16)
  segment = segments('packed', 2, 33)
  low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  got = value_and_gradients(in_blocks(5), *low, weight, segment)
  exact = [x.astype(jnp.float32) for x in low]
  want = value_and_gradients(reference.attention, *exact, weight, segment)
  for a, b in zip(got, want):
    assert a.dtype == jnp.bfloat16
    assert np.linalg.norm(a.astype(np.float32) - b) <= 0.01 * np.linalg.norm(b)


def test_no_array_of_both_lengths():
  """Forward and backward of 64 x 64 tokens hold nothing of that size."""
  q, k, v, weight = make_inputs(1, 64, 2, 1, H=2)
  segment = segments('whole', 1, 64)
  text = str(jax.make_jaxpr(lambda *a: value_and_gradients.__wrapped__(in_blocks(8), *a))(
      q, k, v, weight, segment))
  assert '8' in text and '64,64' not in text.replace(' ', '')
