"""Which blocks of keys a block of queries needs, and which of them need no mask.

Slots order the tokens of a sequence. The T queries are X equal stretches of consecutive slots that
begin at `q_start_X`, the S keys Y stretches that begin at `k_start_Y`: one stretch in plain causal
attention, two in a zigzag shard of a context axis. Blocks never straddle a stretch: `pad` rounds
every stretch up to whole blocks, with segment 0.
"""
from typing import NamedTuple

import jax.numpy as jnp

MASKED = -1e30  # the log-sum-exp of nothing; finite, so that merging two of them is no NaN
MIB = 1 << 20


class Extents(NamedTuple):
  """For every block of one side, the blocks of the other: `low` <= j < `high`; int32 (B, blocks).

  Of these, `open` <= j < `shut` need no mask. `high` = `low` where there are none. Where the
  needed blocks are no run (stretches or segments out of order), the run that spans them is given.
  """
  low: jnp.ndarray
  high: jnp.ndarray
  open: jnp.ndarray
  shut: jnp.ndarray


def pad(x, stretches, block):
  """Axis 1 of `x`, that many equal stretches, each rounded up to whole blocks with zeros."""
  B, T, *rest = x.shape
  short = -(T // stretches) % block
  if not short:
    return x
  x = x.reshape(B, stretches, T // stretches, *rest)
  x = jnp.pad(x, [(0, 0), (0, 0), (0, short)] + [(0, 0)] * len(rest))
  return x.reshape(B, -1, *rest)


def unpad(x, stretches, length, axis=1):
  """The first `length` of `axis` of what `pad` rounded up, all stretches together."""
  if x.shape[axis] == length:
    return x
  shape = x.shape
  x = x.reshape(*shape[:axis], stretches, shape[axis] // stretches, *shape[axis + 1:])
  x = jnp.take(x, jnp.arange(length // stretches), axis + 1)
  return x.reshape(*shape[:axis], length, *shape[axis + 1:])


def slots(start_X, length, block):
  """The first slot of every block of a padded axis of `length`; int32 (blocks,)."""
  each = length // start_X.shape[0] // block
  slot_X1 = start_X.astype(jnp.int32)[:, None]
  return (slot_X1 + block * jnp.arange(each, dtype=jnp.int32)).reshape(-1)


def _segments(segment_BT, block):
  """(least above 0, greatest, whether all are one and above 0) of every block, (B, blocks)."""
  block_BQT = segment_BT.reshape(segment_BT.shape[0], -1, block)
  most = block_BQT.max(-1)
  least = jnp.where(block_BQT > 0, block_BQT, jnp.iinfo(jnp.int32).max).min(-1)
  return least, most, (block_BQT.min(-1) == most) & (most > 0)


def segments(segment_BT, block, mixed):
  """The segment of every block where it is one and above 0, else `mixed`; int32 (B, blocks)."""
  _, most, one = _segments(segment_BT, block)
  return jnp.where(one, most, mixed).astype(jnp.int32)


def pairs(q_segment_BT, k_segment_BS, q_start_X, k_start_Y, block_q, block_k, window=None):
  """(needed, whole) of every pair of blocks, bool (B, query blocks, key blocks).

  A pair is needed if, by the extremes of its slots and segments, some query may see some key, and
  whole if every query sees every key. Segments are padded (`pad`).
  """
  q_first = slots(q_start_X, q_segment_BT.shape[1], block_q)[None, :, None]
  k_first = slots(k_start_Y, k_segment_BS.shape[1], block_k)[None, None]
  q_last, k_last = q_first + block_q - 1, k_first + block_k - 1
  q_least, q_most, q_one = (x[:, :, None] for x in _segments(q_segment_BT, block_q))
  k_least, k_most, k_one = (x[:, None] for x in _segments(k_segment_BS, block_k))
  needed = (k_first <= q_last) & (k_least <= q_most) & (q_least <= k_most)
  whole = (k_last <= q_first) & q_one & k_one & (q_most == k_most)
  if window is not None:
    needed &= q_first - k_last < window
    whole &= q_last - k_first < window
  return needed, whole & needed


def extents(needed, whole):
  """The last axis of what `pairs` gives as `Extents`; swap the axes for those of key blocks."""
  n = needed.shape[-1]
  j = jnp.arange(n, dtype=jnp.int32)
  some = needed.any(-1)
  low = jnp.where(some, jnp.argmax(needed, -1), 0).astype(jnp.int32)
  high = jnp.where(needed, j + 1, 0).max(-1)
  first = jnp.where(whole, j, n).min(-1)
  ends = (j >= first[..., None]) & ~whole
  shut = jnp.where(ends, j, n).min(-1)
  return Extents(low, high, first, jnp.maximum(first, shut))


def require_vmem(name, parts, capacity, advice):
  """`sum(parts.values())` bytes of VMEM if a core has them, else ValueError with the numbers.

  `parts` names what is kept (buffers twice where the pipeline doubles them), `capacity` is what a
  core of the target has, `advice` which block size to lower.
  """
  total = sum(parts.values())
  if total > capacity:
    each = ', '.join(f'{part} {size / MIB:.1f}' for part, size in parts.items())
    raise ValueError(f'{name} needs {total / MIB:.1f} MiB of VMEM ({each}), a core has '
                     f'{capacity / MIB:.1f}: {advice}')
  return total
