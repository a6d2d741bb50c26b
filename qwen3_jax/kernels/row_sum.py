"""Sums of rows that belong to the same token, as a TPU kernel: a scatter-add that stays in VMEM.

XLA would gather every token's rows, those of choices that are elsewhere too, and write them to HBM
before it adds them. Here the sums are held in float32, and each row is read and added once.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import rows, target
from qwen3_jax.kernels.cost import cost

TILE = 256  # rows read at once
SPARE = 4 << 20  # bytes of VMEM left to the compiler


def choose(M, D, dtype):
  """The least number of parts of D for which VMEM has room, a multiple of this chip's cores.

  ValueError where there is none.
  """
  parts = target.cores()
  while D % (parts * rows.LANES) or needs(M, D // parts, dtype) > target.vmem() - SPARE:
    parts += target.cores()
    if parts > D // rows.LANES:
      raise ValueError(f'{M} tokens of width {D} have no room in VMEM: give it fewer at a time')
  return parts


def needs(M, part, dtype):
  """Bytes of VMEM for M tokens of one part of the width."""
  held = (M + rows.PIECE + 1) * rows.step(part // rows.LANES) * 4 * rows.LANES
  return held + (2 * TILE + 2 * rows.PIECE) * part * jnp.dtype(dtype).itemsize + 4 * TILE * part


def sum_rows(x_PD, token_P, M, interpret=None):
  """sum over the rows of each token, (M, D); a row whose `token_P` is M or more is nobody's.

  P is a multiple of 8. Eight rows from a multiple of eight on are different tokens', or nobody's.
  """
  (P, D), dtype = x_PD.shape, x_PD.dtype
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  parts, tiles = choose(M, D, dtype), pl.cdiv(P, TILE)
  part, high = D // parts, M + -M % rows.PIECE
  n = part // rows.LANES
  token_P = jnp.pad(jnp.minimum(token_P, high), (0, -P % TILE), constant_values=high)
  token_P = jnp.where(token_P < M, token_P, high)
  VMEM = pltpu.VMEM
  return pl.pallas_call(
      functools.partial(_kernel, tiles=tiles), name='experts_row_sum',
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(parts, tiles),
          in_specs=[pl.BlockSpec((TILE, part), lambda d, i, *_: (i, d))],
          out_specs=pl.BlockSpec(memory_space=pl.ANY),
          scratch_shapes=[VMEM(((high + 1) * rows.step(n), rows.LANES), jnp.float32),
                          VMEM((rows.pitch(TILE) * n, rows.LANES), jnp.float32),
                          VMEM((2, rows.PIECE, part), dtype), pltpu.SemaphoreType.DMA((2,))]),
      out_shape=jax.ShapeDtypeStruct((high, D), dtype),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                           vmem_limit_bytes=target.vmem() - SPARE // 2),
      interpret=interpret, cost_estimate=cost(0, (x_PD,), 0),
  )(token_P.astype(jnp.int32) * rows.step(n), x_PD)[:M]


def _kernel(place_s, x_ref, out_hbm, total, staged, buffer, semaphore, *, tiles):
  """Adds a tile of rows (grid axis 1) of one part of the width (axis 0)."""
  tile, part = pl.program_id(1), x_ref.shape[1]
  columns = pl.ds(pl.multiple_of(pl.program_id(0) * part, rows.LANES), part)

  @pl.when(tile == 0)
  def _():
    rows.clear(total)
  for b in range(part // rows.LANES):
    block = x_ref[:, pl.ds(b * rows.LANES, rows.LANES)]
    staged[pl.ds(b * rows.pitch(TILE), TILE)] = block.astype(jnp.float32)
  rows.add(total, staged, TILE, place_s, tile * TILE, (0, TILE))

  @pl.when(tile == tiles - 1)
  def _():
    rows.release(total, out_hbm, columns, buffer, semaphore)
