"""Grouped-query attention: the one place that chooses its form, by platform and shape.

TPU: the flash kernels on each device's rows and heads (`shard_map`), over a split context by
`ring_attention`. GPU: cuDNN. CPU, and where neither fits: blocks of plain JAX. What was chosen is
logged once (`target.report`). Meaning: `reference.attention`.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import (
  blocked_attention,
  flash_attention,
  flash_backward,
  ring_attention,
  target,
)

SHORTEST = 128  # tokens of one device below which a kernel's blocks would be mostly padding
WIDTHS = 64, 128  # of heads, in the kernels
OUT = 'attention_out'  # by this name a policy of recomputation keeps what attention gives
MASK = 8192 * 8192  # most entries of the mask that cuDNN reads for one row


def attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start=0, block=None, bound=None):
  """Causal grouped-query attention within segments; (B, T, N, H).

  `start` is the slot of the first query (0 in training; the cache's length in generation). `bound`
  is a float32 upper bound of |q k| / sqrt(H), where the caller knows one: the TPU's kernel then
  needs no running maximum. `block` forces the plain form with blocks of this many tokens.
  """
  own = isinstance(start, int) and start == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]
  split = _split(q_BTNH, k_BSKH, own)
  form, reason = choose(q_BTNH, k_BSKH, split)
  arrays = q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, jnp.int32(start)
  if block is None:
    target.report('attention', form, reason)
  if block is None and form == FLASH:
    return _flash(split, *arrays, bound)
  if block is None and form == CUDNN:
    taken, given = _specs(split)
    return _on_mesh(functools.partial(_cudnn, split), taken[:6], given[0])(*arrays)
  return blocked_attention.attention(*arrays[:5], start, block)


FLASH, CUDNN, BLOCKED = 'flash kernels', 'cuDNN', 'blocks of plain JAX'


def choose(q_BTNH, k_BSKH, split):
  """The form for these shapes on this platform, and why it is not the fast one (or None)."""
  platform, (_, T, _, H), S = target.platform(), q_BTNH.shape, k_BSKH.shape[1]
  if platform == 'tpu':
    if H not in WIDTHS:
      return BLOCKED, f'its heads are {H} wide, not {WIDTHS}'
    if min(T // split.parts, S) < SHORTEST:
      return f'{BLOCKED} below {SHORTEST} tokens', None
    return FLASH, None
  if platform == 'gpu':
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
      return BLOCKED, f'cuDNN wants bfloat16 or float16, not {q_BTNH.dtype}'
    if H % 8 or H > 128:
      return BLOCKED, f'cuDNN wants heads of a multiple of 8 up to 128, not {H}'
    if T % 2 or S % 2:
      return BLOCKED, f'cuDNN wants even lengths, not {T} and {S}'
    if split.parts > 1 or T * S > MASK:
      return BLOCKED, f'cuDNN would read a mask of {T} x {S}'
    return CUDNN, None
  return BLOCKED, None


class Split(NamedTuple):
  """Mesh axes over which a call's rows, queries, heads and kv heads lie; () or None: whole.

  `own`: the keys are the queries' own tokens, and split as these. `parts` is into how many.
  """
  own: bool
  rows: tuple | str | None = None
  time: str | None = None
  heads: str | None = None
  kv_heads: str | None = None
  parts: int = 1
  group: int = 1  # query heads of one kv head


def _split(q_BTNH, k_BSKH, own):
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  if alphabet.is_alone():
    return Split(own, group=N // K)
  mesh = jax.sharding.get_abstract_mesh()
  rows, time, heads, _ = alphabet.partition('BTNH', q_BTNH.shape, mesh)
  kv_heads = alphabet.partition('BSKH', k_BSKH.shape, mesh)[2]
  here, group = N // mesh.shape.get(heads, 1), N // K
  if kv_heads is None and here % group and group % here:
    heads = None  # a device's heads would need parts of two kv heads' groups
  parts = mesh.shape.get(time, 1)
  return Split(own, rows, time if parts > 1 else None, heads, kv_heads, parts, group)


def _specs(split):
  """PartitionSpecs of (q, k, v, segments, start, bound), and of (o, and what is saved)."""
  P = PartitionSpec
  rows, time, heads = split.rows, split.time, split.heads
  keys = time if split.own else None
  q, segment, k_segment = P(rows, time, heads), P(rows, time), P(rows, keys)
  k = P(rows, keys, split.kv_heads)
  own_k = P(rows, keys, heads)
  return ((q, k, k, segment, k_segment, P(), P()),
          (q, (q, own_k, own_k, segment, k_segment, q, P(rows, heads, time))))


def _on_mesh(local, taken, given):
  if alphabet.is_alone():
    return local
  return jax.shard_map(local, in_specs=taken, out_specs=given, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(split, q, k, v, segment_BT, segment_BS, start, bound):
  return _flash_forward(split, q, k, v, segment_BT, segment_BS, start, bound)[0]


def _flash_forward(split, q, k, v, segment_BT, segment_BS, start, bound):
  taken, given = _specs(split)
  o, saved = _on_mesh(functools.partial(_local_forward, split), taken, given)(
    q, k, v, segment_BT, segment_BS, start, bound)
  *inputs, own_o, lse = saved
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, OUT)
  own_o = checkpoint_name(own_o, OUT) if split.own and split.time else o  # in another order, or o
  return o, ((*inputs, own_o, lse), start)


def _flash_backward(split, saved, do):
  saved, start = saved
  (q, k, _, _, _, scalar, _), (_, residuals) = _specs(split)
  local = _on_mesh(functools.partial(_local_backward, split), (residuals, scalar, q), (q, k, k))
  return *local(saved, start, do), None, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _local_forward(split, q, k, v, segment_BT, segment_BS, start, bound):
  """One device's rows and heads: o, and all that the backward pass wants."""
  k, v = (_own_heads(split, x, q.shape[2]) for x in (k, v))
  if split.own and split.time:
    return ring_attention.forward(q, k, v, segment_BT, split.time, bound=bound,
                                  ring=ring_attention.uses_ring(k, split.time))
  o, lse = flash_attention.forward(q, k, v, segment_BT, segment_BS, *_starts(split, q, start),
                                   bound=bound)
  return o, (q, k, v, segment_BT, segment_BS, o, lse)


def _local_backward(split, saved, start, do):
  q, k = saved[:2]
  if split.own and split.time:
    dq, dk, dv = ring_attention.backward(saved, do, split.time,
                                         ring=ring_attention.uses_ring(k, split.time))
  else:
    *inputs, o, lse = saved
    dq, dk, dv = flash_backward.backward(*inputs, *_starts(split, q, start), o, lse, do)
    if split.time:
      dk, dv = jax.lax.psum((dk, dv), split.time)
  return dq, *(_all_heads(split, x, q.shape[2]) for x in (dk, dv))


def _starts(split, q, start):
  """Slots at which this device's queries and the keys begin, (1,) each."""
  if split.time:
    start = start + jax.lax.axis_index(split.time) * q.shape[1]
  return start[None], jnp.zeros(1, jnp.int32)


def _first_head(split, heads):
  """Of kv heads that lie whole on every device: the first of this one's, and how many it needs."""
  return jax.lax.axis_index(split.heads) * heads // split.group, max(1, heads // split.group)


def _own_heads(split, x_BSKH, heads):
  """The kv heads that this device's `heads` query heads see."""
  if split.heads is None or split.kv_heads is not None:
    return x_BSKH
  return jax.lax.dynamic_slice_in_dim(x_BSKH, *_first_head(split, heads), axis=2)


def _all_heads(split, dx_BSKH, heads):
  """The gradient of all kv heads from those of `_own_heads` on every device."""
  if split.heads is None or split.kv_heads is not None:
    return dx_BSKH
  first, _ = _first_head(split, heads)
  K = jax.lax.axis_size(split.heads) * heads // split.group
  whole = jnp.zeros((*dx_BSKH.shape[:2], K, dx_BSKH.shape[3]), jnp.float32)
  whole = jax.lax.dynamic_update_slice_in_dim(whole, dx_BSKH.astype(jnp.float32), first, axis=2)
  return jax.lax.psum(whole, split.heads).astype(dx_BSKH.dtype)


def _cudnn(split, q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start):
  """Segments as a boolean mask, causality by cuDNN itself where the keys are the queries' own."""
  mask_BTS = segment_BT[:, :, None] == segment_BS[:, None]
  if not split.own:
    slot_T = start + jnp.arange(q_BTNH.shape[1])
    mask_BTS &= jnp.arange(k_BSKH.shape[1]) <= slot_T[:, None]
  k, v = (_own_heads(split, x, q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
  o_BTNH = jax.nn.dot_product_attention(q_BTNH, k, v, mask=mask_BTS[:, None],
                                        is_causal=split.own, implementation='cudnn')
  return jnp.where((segment_BT > 0)[:, :, None, None], o_BTNH, 0)  # else a mean of what is masked
