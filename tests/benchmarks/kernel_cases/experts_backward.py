"""Cases of the expert kernels' backward pass, scored from the compiler's schedule.

Rows are 8,192 tokens' 8 choices of 128 experts: 'even' groups have 512 rows each, 'balanced' ones
are drawn with equal probabilities, 'skewed' ones with Zipf's (1 / rank), an expert at most once a
token. Runs of each height's code, pieces of copies and padding rows are counted from these sizes.

The best public sum takes megablox's kernels (JAX 0.12) with the best tiles that were found, or
tokamax's gmm_v2, whichever has the lesser maximum of schedule and HBM time: dh = dy down^T, XLA's
SwiGLU derivative at HBM speed (six arrays of rows times F), dx, and one tgmm for gate with up and
one for down.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from experts import FLAGS, group_sizes  # the file beside this one

from qwen3_jax.kernels import grouped_gradient as kernel

COLUMN = 512  # bytes that one float32 of a (rows, 1) array takes


def tiles_of(rows_E, blocks):
  """Rows of every tile, as the kernels take them."""
  tiles = []
  for left in rows_E:
    while left > blocks.heights[-1]:
      tiles.append(blocks.rows)
      left -= blocks.rows
    tiles.append(left)
  return np.array(tiles)


def models(M, X, E, D, F, size, kind, blocks):
  """What a schedule does not say of either kernel: how often its parts run, and its bytes."""
  rows_E = -(-group_sizes(kind, M, X, E) // kernel.ALIGN) * kernel.ALIGN
  tiles, R, splits = tiles_of(rows_E, blocks), int(rows_E.sum()), blocks.splits
  uses = [int(((tiles > low) & (tiles <= high)).sum())
          for low, high in zip((-1, *blocks.heights), blocks.heights)]
  pieces = float((np.where(tiles >= blocks.rows, tiles - blocks.rows, tiles) / kernel.ALIGN).mean())
  whole, product = splits == 1, 2 * M * X * D * F
  loops = [1] * (D > blocks.columns)  # after each height's own region the loop in it
  trips = {1: blocks.heights[-1] / kernel.ALIGN / E, 2: 1 / E, 3: pieces, 4: len(tiles) / E,
           **dict.fromkeys((5, 6, 7, 8 + len(loops) * len(uses)), pieces)}
  grads, rows = E * D * F * size, R * size
  first = dict(
      steps=splits * E, executed=[splits * n for n in uses for _ in (0, *loops)], trips=trips,
      flops=(6 if whole else 4) * product,
      hbm_bytes=splits * (2 * rows * D + 2 * R * COLUMN) + 2 * rows * F
      + (6 if whole else 4) * grads + (rows * D if whole else 2 * rows * F))
  second = dict(
      steps=blocks.inputs * E, executed=[blocks.inputs * n for n in uses], flops=2 * product,
      trips={1: 1 / E, 3: len(tiles) / E, **dict.fromkeys((2, 4, 5, 6, 7), pieces)},
      hbm_bytes=blocks.inputs * 2 * rows * F + 2 * grads + rows * D)
  turns = D // blocks.inputs // blocks.columns
  if turns > 1:  # every product is in a loop, which the tool enters for each tile and height
    del second['executed']
    second['trips'].update({7 + i: turns * n / len(tiles) for i, n in enumerate(uses)})
    second['trips'][7 + len(uses)] = pieces
  return {'experts_backward_inputs': second, 'experts_backward': first}


def backward(M=8192, X=8, E=128, D=2048, F=768, kind='balanced', dtype='bfloat16', blocks=None):
  """The kernels on gathered rows."""
  dtype, P = jnp.dtype(dtype), M * X + E * (kernel.ALIGN - 1) // kernel.ALIGN * kernel.ALIGN
  sizes = kernel.choose(P, D, F, E, dtype)._replace(
      **{k: tuple(v) if isinstance(v, list) else v for k, v in (blocks or {}).items()})
  S = jax.ShapeDtypeStruct
  args = [S((P, D), dtype), S((P, D), dtype), S((P, F), dtype), S((P, F), dtype),
          S((P,), jnp.float32), S((E,), jnp.int32),
          S((E, D, F), dtype), S((E, D, F), dtype), S((E, F, D), dtype)]
  fn = functools.partial(kernel.rows_gradient, blocks=sizes, interpret=False)
  return dict(fn=fn, args=args, models=models(M, X, E, D, F, dtype.itemsize, kind, sizes))


PUBLIC = {'v6e:2x2': 471 + 368 + 778 + 1004 + 571, 'v5p:2x2x1': 540 + 218 + 1045 + 1506 + 858}
CASES = [dict(label=f'experts backward, 65,536 rows, {kind}', builder='backward',
              kwargs=dict(kind=kind), topology=topology, flags=FLAGS[topology],
              target_us=0.75 * public, best_public_us=public)
         for topology, public in PUBLIC.items() for kind in ('balanced', 'skewed')]
