"""One new token a row written to its page, as a Pallas TPU kernel that changes the pool in place.

XLA's own scatter wants heads and width last in memory, the attention kernel slots or width: left to
it, every step of decoding copies the whole pool from one order to the other.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import target
from qwen3_jax.kernels.flash_blocks import require_vmem

DEPTH = 4  # rows whose pages are in VMEM at once


class _Copies(NamedTuple):
  """Of a row's page, all of the keys' and the tile of the values' in which its slot lies."""
  heads: slice  # those of this program
  page_ref: jax.Array
  slot_ref: jax.Array
  hbm: tuple
  vmem: tuple
  read: jax.Array
  written: jax.Array

  def _ends(self, row):
    k_hbm, v_hbm = self.hbm
    k_buf, v_buf = (x.at[jax.lax.rem(row, DEPTH)] for x in self.vmem)
    page, tile = self.page_ref[row], v_buf.shape[1]
    first = pl.multiple_of(jax.lax.div(self.slot_ref[row], tile) * tile, tile)
    return ((k_hbm.at[page, self.heads], k_buf),
            (v_hbm.at[page, self.heads, pl.ds(first, tile)], v_buf))

  def inward(self, row):
    return [pltpu.make_async_copy(hbm, vmem, self.read.at[i, jax.lax.rem(row, DEPTH)])
            for i, (hbm, vmem) in enumerate(self._ends(row))]

  def outward(self, row):
    return [pltpu.make_async_copy(vmem, hbm, self.written.at[i, jax.lax.rem(row, DEPTH)])
            for i, (hbm, vmem) in enumerate(self._ends(row))]


def _insert(slot, k_KH, v_KH, k_buf, v_buf):
  """Puts one token of every head into its slot, a lane of `k_buf` and a sublane of `v_buf`."""
  k_HK = k_KH.T
  lane = jax.lax.broadcasted_iota(jnp.int32, k_buf.shape[1:], 1)
  sublane = jax.lax.broadcasted_iota(jnp.int32, v_buf.shape[1:], 0)
  mine = sublane == jax.lax.rem(slot, v_buf.shape[1])
  for h in range(k_buf.shape[0]):
    new, old = jnp.broadcast_to(k_HK[:, h:h + 1], lane.shape), k_buf[h].astype(jnp.float32)
    k_buf[h] = jnp.where(lane == slot, new, old).astype(k_buf.dtype)
    v_buf[h] = jnp.where(mine, v_KH[h:h + 1], v_buf[h].astype(jnp.float32)).astype(v_buf.dtype)


def _kernel(rows, page_ref, slot_ref, k_new_ref, v_new_ref, _k, _v, k_hbm, v_hbm, k_buf, v_buf,
            read, written):
  heads = k_buf.shape[1]
  copies = _Copies(pl.ds(pl.program_id(0) * heads, heads), page_ref, slot_ref, (k_hbm, v_hbm),
                   (k_buf, v_buf), read, written)

  def visit(row, _):
    ahead = row + DEPTH - 1

    @pl.when((ahead < rows) & (row > 0))
    def _():
      for copy in copies.outward(row - 1):  # it leaves the place that `ahead` takes
        copy.wait()

    @pl.when(ahead < rows)
    def _():
      for copy in copies.inward(ahead):
        copy.start()
    for copy in copies.inward(row):
      copy.wait()
    place = jax.lax.rem(row, DEPTH)
    _insert(slot_ref[row], k_new_ref[0, row], v_new_ref[0, row], k_buf.at[place], v_buf.at[place])
    for copy in copies.outward(row):
      copy.start()

  def start(row, _):
    for copy in copies.inward(row):
      copy.start()

  def finish(row, _):
    for copy in copies.outward(row):
      copy.wait()
  jax.lax.fori_loop(0, min(DEPTH - 1, rows), start, None)
  jax.lax.fori_loop(0, rows, visit, None)
  jax.lax.fori_loop(max(0, rows - DEPTH), rows, finish, None)


def paged_write(k_BKHS, v_BKSH, page_B, slot_B, k_BKH, v_BKH, *, interpret=None):
  """(k_BKHS, v_BKSH) with the keys and values of one token a row in slot `slot_B` of `page_B`.

  The first axis of the four-axis arrays is pages. Rows that write to one page at once may undo each
  other's writing, so pages that are held are written by one row; the pool's arrays are reused if
  donated. ValueError where the pages of `DEPTH` rows need more VMEM than a core has.
  """
  B, K, H = k_BKH.shape
  S, dtype, cores = v_BKSH.shape[2], k_BKHS.dtype, target.cores()
  heads = K // cores if K % cores == 0 else K
  tile = 32 // dtype.itemsize
  more = -heads % 8
  if S % tile:
    raise ValueError(f'paged_write takes pages of a multiple of {tile} slots, not {S}')
  vmem = require_vmem('paged_write', dict(
    pages=DEPTH * heads * (H * S + tile * max(H, 128)) * dtype.itemsize,
    tokens=4 * 4 * B * (heads + more) * max(H, 128)), target.vmem(),
    'run fewer rows or smaller pages')
  def split(x):
    x = x.astype(jnp.float32).reshape(B, K // heads, heads, H).swapaxes(0, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
  new = split(k_BKH), split(v_BKH)
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  mine = pl.BlockSpec((1, *new[0].shape[1:]), lambda i, *_: (i, 0, 0, 0))
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  return pl.pallas_call(
    functools.partial(_kernel, B), name='paged_write', interpret=interpret,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKHS, v_BKSH)],
    input_output_aliases={4: 0, 5: 1},
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(K // heads,), in_specs=[mine, mine, hbm, hbm],
      out_specs=[hbm, hbm],
      scratch_shapes=[pltpu.VMEM((DEPTH, heads, H, S), dtype),
                      pltpu.VMEM((DEPTH, heads, tile, H), dtype),
                      pltpu.SemaphoreType.DMA((2, DEPTH)), pltpu.SemaphoreType.DMA((2, DEPTH))]),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), disable_bounds_checks=True,  # both are clipped
      vmem_limit_bytes=min(vmem + (8 << 20), target.vmem())),
  )(jnp.clip(page_B.astype(jnp.int32), 0, len(k_BKHS) - 1),
    jnp.clip(slot_B.astype(jnp.int32), 0, S - 1), *new, k_BKHS, v_BKSH)
