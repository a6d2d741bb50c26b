"""Attention in blocks of plain JAX: no array of both full lengths, forward or backward.

Online softmax over key blocks (Milakov & Gimelshein 2018; Dao et al. 2022), recomputed in the
backward pass from the log-sum-exp. One scan visits the (query block, key block) pairs on or below
the diagonal, so causal work is half of the square's. Meaning: `reference.attention`.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite, so that no difference of two of them is NaN
LOWEST = -1e29  # least running maximum: exp(MASKED - LOWEST) is 0 also where all was masked so far
UNROLLED = 16  # block pairs; fewer are no loop (XLA:CPU runs a loop's body on one thread)


def attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start=0, block=None):
  """Causal grouped-query attention within segments; see `reference.attention`.

  `start` is the slot of the first query (0 in training; the cache's length in generation, where no
  gradient is needed). Lengths need not be multiples of `block`.
  """
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  block = block or (128 if T <= 512 else 512)
  if isinstance(start, int) and start == 0 and T == S:
    return _causal(q_BTNH, k_BSKH, v_BSKH, segment_BT, min(block, T))
  return _forward(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start, min(block, T),
                  min(block, S))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(q, k, v, segment, block):
  return _forward(q, k, v, segment, segment, 0, block, block)[0]


def _causal_forward(q, k, v, segment, block):
  o, lse = _forward(q, k, v, segment, segment, 0, block, block)
  return o, (q, k, v, segment, o, lse)


def _pairs(n_q, n_k, causal):
  every = ((i, j) for i in range(n_q) for j in range(n_k))
  return np.array([(i, j) for i, j in every if not causal or j <= i], np.int32)


def _pad(x, block):
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _query_blocks(x_BTNH, K, block):
  """(blocks, B, K, G * block, H): the G query heads of a kv head are rows of one matrix."""
  B, T, N, H = x_BTNH.shape
  x = x_BTNH.reshape(B, T // block, block, K, N // K, H)
  return x.transpose(1, 0, 3, 4, 2, 5).reshape(T // block, B, K, N // K * block, H)


def _from_query_blocks(x, N, T):
  n, B, K, rows, H = x.shape
  G = N // K
  x = x.reshape(n, B, K, G, rows // G, H).transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(B, n * rows // G, N, H)[:, :T]


def _key_blocks(x_BSKH, block):
  B, S, K, H = x_BSKH.shape
  return x_BSKH.reshape(B, S // block, block, K, H).transpose(1, 0, 3, 2, 4)


def _from_key_blocks(x, S):
  n, B, K, block, H = x.shape
  return x.transpose(1, 0, 3, 2, 4).reshape(B, n * block, K, H)[:, :S]


def _segment_blocks(segment_BT, block):
  B, T = segment_BT.shape
  return segment_BT.reshape(B, T // block, block).swapaxes(0, 1)


def _bias(i, j, q_segment, k_segment, start, block_q, block_k):
  """(B, block_q, block_k): 0 where a query of block i may see a key of block j, else MASKED.
  """
  q_slot = start + i * block_q + jnp.arange(block_q)
  k_slot = j * block_k + jnp.arange(block_k)
  same = (q_segment[:, :, None] == k_segment[:, None]) & (q_segment[:, :, None] > 0)
  return jnp.where(same & (k_slot <= q_slot[:, None]), 0.0, MASKED)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _run(visit, carry, owners, pairs):
  """Visits the block pairs (i, j); `visit(i, j, *own)` returns the new own blocks of the carry.

  Carry c is (blocks, ...) and its block of this pair is number pair[owners[c]]: 0 for a query's, 1
  for a key's.
  """
  if len(pairs) <= UNROLLED:
    blocks = [list(c) for c in carry]
    for pair in pairs.tolist():
      new = visit(*pair, *(c[pair[own]] for c, own in zip(blocks, owners)))
      for c, own, x in zip(blocks, owners, new):
        c[pair[own]] = x
    return [jnp.stack(c) for c in blocks]

  def step(carry, pair):
    new = visit(*pair, *(c[pair[own]] for c, own in zip(carry, owners)))
    return tuple(c.at[pair[own]].set(x) for c, own, x in zip(carry, owners, new)), None
  return jax.lax.scan(step, tuple(carry), pairs)[0]


def _forward(q, k, v, q_segment, k_segment, start, block_q, block_k):
  """Output (B, T, N, H) and log-sum-exp (blocks, B, K, rows) of attention with running maxima."""
  T, N, H, K = *q.shape[1:], k.shape[2]
  dtype = q.dtype
  causal = isinstance(start, int) and start == 0 and T == k.shape[1]
  q, q_segment = _query_blocks(_pad(q, block_q), K, block_q), _pad(q_segment, block_q)
  k, v, k_segment = (_pad(x, block_k) for x in (k, v, k_segment))
  k, v = _key_blocks(k, block_k), _key_blocks(v, block_k)
  q_segment = _segment_blocks(q_segment, block_q)
  k_segment = _segment_blocks(k_segment, block_k)

  def visit(i, j, o, m, l):
    bias = _bias(i, j, q_segment[i], k_segment[j], start, block_q, block_k)
    bias = jnp.tile(bias, (1, N // K, 1))[:, None]
    s = _dot('BKRH,BKSH->BKRS', q[i], k[j]) * H ** -0.5 + bias
    m_new = jnp.maximum(m, s.max(-1))
    p = jnp.exp(s - m_new[..., None])
    keep = jnp.exp(m - m_new)
    pv = _dot('BKRS,BKSH->BKRH', p.astype(v.dtype), v[j])
    return o * keep[..., None] + pv, m_new, l * keep + p.sum(-1)

  o, m, l = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], LOWEST), jnp.zeros(q.shape[:-1])
  o, m, l = _run(visit, (o, m, l), (0, 0, 0), _pairs(len(q), len(k), causal))
  o = o / jnp.where(l > 0, l, 1)[..., None]
  lse = jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1)), 0)
  return _from_query_blocks(o.astype(dtype), N, T), lse


def _causal_backward(block, saved, do):
  """Gradients of q, k, v. Scores are made transposed (keys x queries): two of the three products
  that end a pair then need no transposed operand."""
  q, k, v, segment, o, lse = saved
  T, N, H, K = *q.shape[1:], k.shape[2]
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
  q, do, delta = (_query_blocks(_pad(x, block), K, block) for x in (q, do, delta))
  k, v = (_key_blocks(_pad(x, block), block) for x in (k, v))
  segment = _pad(segment, block)
  segment = _segment_blocks(segment, block)

  def visit(i, j, dq, dk, dv):
    bias = _bias(i, j, segment[i], segment[j], 0, block, block).swapaxes(1, 2)
    bias = jnp.tile(bias, (1, 1, N // K))[:, None]
    s = _dot('BKSH,BKRH->BKSR', k[j], q[i]) * H ** -0.5 + bias
    p = jnp.exp(s - lse[i][:, :, None])
    dp = _dot('BKSH,BKRH->BKSR', v[j], do[i])
    ds = (p * (dp - delta[i].swapaxes(2, 3)) * H ** -0.5).astype(q.dtype)
    return (dq + _dot('BKSR,BKSH->BKRH', ds, k[j]), dk + _dot('BKSR,BKRH->BKSH', ds, q[i]),
            dv + _dot('BKSR,BKRH->BKSH', p.astype(do.dtype), do[i]))

  zero = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
  dq, dk, dv = _run(visit, zero, (0, 1, 1), _pairs(len(q), len(k), True))
  return (_from_query_blocks(dq.astype(q.dtype), N, T), _from_key_blocks(dk.astype(k.dtype), T),
          _from_key_blocks(dv.astype(v.dtype), T), None)


_causal.defvjp(_causal_forward, _causal_backward)
