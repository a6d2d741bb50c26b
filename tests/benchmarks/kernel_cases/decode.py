"""Decode attention over pages and the writing of a token, for the static score.

Loops of a dynamic length get their counts from here: those of the kernel in the order of its code,
after the one over programs where rows take several. What runs only where a row ends within a block
is scored as if it ran at every visit.
"""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import paged_flash, target
from qwen3_jax.kernels.paged_write import paged_write


def shape(*dims, dtype):
  return jax.ShapeDtypeStruct(dims, dtype)


def decode(B=64, K=8, G=4, H=128, context=4096, S=128, Q=1, prefix=0, group=1, blocks=None,
           dtype='bfloat16'):
  """The last `Q` of `context` tokens of all rows; `group` rows share the pages of `prefix`."""
  C = -(-context // S)
  args = [shape(B, Q, K, G, H, dtype=dtype), shape(B * C, K, H, S, dtype=dtype),
          shape(B * C, K, S, H, dtype=dtype), shape(B, C, dtype='int32'), shape(B, dtype='int32')]
  blocks = {**paged_flash.DEFAULT, **(blocks or {})}
  plan = paged_flash.plan(args[0], S, C, blocks)
  split, programs = plan.programs
  turns, shared = -(-C // plan.pages), prefix // (S * plan.pages)
  each = split * programs  # of which every core takes one, or a loop over programs is there
  looped = each > target.cores()
  if plan.tiles > 1 or programs > 1 and group > 1:
    raise ValueError(f'{Q} tokens of {B} rows are {programs} programs of {plan.tiles} tiles: '
                     'which of them share pages is not counted')
  read = B * turns - (B - -(-B // group)) * shared
  empty = programs * plan.rows - B  # rows, each one visit
  visits = (read + empty) / programs
  attended = (B * turns + empty) / programs
  trips = {4 + looped: visits * (1 if looped else each), 9 + looped: attended / visits}
  item = jnp.dtype(dtype).itemsize
  moved = 2 * item * (read * plan.pages * K * H * S + B * Q * K * G * H) + 4 * B * (C + 4)
  model = dict(flops=4 * B * Q * K * G * H * context, hbm_bytes=moved, trips=trips)
  model.update({'steps': each} if looped else {'final': B * split})
  fn = functools.partial(paged_flash.paged_flash, blocks=blocks, interpret=False)
  return dict(fn=fn, args=args, models={'paged_flash': model})


def write(B=64, K=8, H=128, S=128, pages=2048, dtype='bfloat16'):
  """One token of every row written to its page."""
  args = [shape(pages, K, H, S, dtype=dtype), shape(pages, K, S, H, dtype=dtype),
          shape(B, dtype='int32'), shape(B, dtype='int32'), shape(B, K, H, dtype=dtype),
          shape(B, K, H, dtype=dtype)]
  item = jnp.dtype(dtype).itemsize
  moved = B * K * H * (2 * (S + 32 // item) * item + 8)  # a page of keys and a tile of values
  fn = jax.jit(functools.partial(paged_write, interpret=False), donate_argnums=(0, 1))
  return dict(fn=fn, args=args, models={'paged_write': dict(hbm_bytes=moved)})


CHIPS = {'v6e': ('v6e:2x2', '--xla_tpu_scoped_vmem_limit_kib=98304'),
         'v5p': ('v5p:2x2x1', '--xla_tpu_scoped_vmem_limit_kib=61440')}


def case(label, chip, builder, target_us=None, best_public_us=None, **kwargs):
  topology, flags = CHIPS[chip]
  return dict(label=f'{label} ({chip})', builder=builder, kwargs=kwargs, topology=topology,
              flags=flags, target_us=target_us, best_public_us=best_public_us)


CASES = [
  case('decode 64 x 4096, 32/8 heads', 'v6e', 'decode', 721, 849),
  case('decode 64 x 4096, 32/8 heads', 'v5p', 'decode', 447, 708),
  *(case(f'{label}', chip, builder, **kwargs) for chip in CHIPS for label, builder, kwargs in (
    ('decode, 2048 shared by 8 rows', 'decode', dict(prefix=2048, group=8)),
    ('decode, 4 new tokens', 'decode', dict(Q=4)),
    ('decode, 32 new tokens', 'decode', dict(Q=32)),
    ('decode, 16/8 heads', 'decode', dict(G=2)),
    ('decode, 40/8 heads', 'decode', dict(G=5)),
    ('decode, 32/4 heads', 'decode', dict(K=4, G=8)),
    ('decode, 64/4 heads', 'decode', dict(K=4, G=16)),
    ('write a token, 64 x 8 heads', 'write', {})))]
