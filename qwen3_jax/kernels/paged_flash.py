"""Attention of a few new tokens a row to keys and values in pages, as one Pallas TPU kernel.

All visits (a row and a block of its pages) form one flat loop. The copies of the next visits, of
this row or the next, are under way while one is computed, so memory never waits at a row's end. The
queries of two kv heads with few each share one product, as the two blocks of a block-diagonal
matrix: this fills the 256 rows of a v6e's MXU and all 8 sublanes of the scores.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import blocks as table_of_blocks
from qwen3_jax.kernels import reference, target
from qwen3_jax.kernels.flash_blocks import require_vmem

MASKED = -1e30  # finite, so that no difference of two of them is NaN
LANES = 128
SMEM = 768 << 10  # bytes of page numbers and lengths, of 1 MiB
QUERIES = 8 << 20  # bytes of VMEM for queries and outputs
DEFAULT = dict(pages=4, depth=4, queries=128)


class Plan(NamedTuple):
  """Sizes of one call."""
  rows: int  # of a program
  tiles: int  # rows that have one row of the table: stretches of its new tokens
  heads: int  # kv heads of a program
  joined: int  # kv heads in one product
  queries: int  # of one kv head: new tokens x group
  width: int  # H
  size: int  # slots of a page, S
  columns: int  # of the table
  pages: int  # of a block
  depth: int  # blocks in VMEM


class _Pages:
  """Copies of a visit's pages, keys and values, from HBM to one of `depth` places in VMEM."""

  def __init__(self, plan, first, head, pages_ref, table_ref, hbm, vmem, arrived):
    self.plan, self.first, self.heads = plan, first, pl.ds(head, plan.heads)
    self.pages_ref, self.table_ref, self.arrived = pages_ref, table_ref, arrived
    self.hbm, self.vmem = hbm, vmem

  def _count(self, row, turn):
    """Pages that the visit needs."""
    return jnp.clip(self.pages_ref[self.first + row] - turn * self.plan.pages, 0, self.plan.pages)

  def _copies(self, place, page, p):
    for i, (hbm, vmem) in enumerate(zip(self.hbm, self.vmem)):
      yield pltpu.make_async_copy(hbm.at[page, self.heads], vmem.at[place, p],
                                  self.arrived.at[i, place])

  def fetch(self, row, turn, place):
    """Starts the copies; V of pages that are not needed becomes 0, for their weights are 0."""
    plan, count = self.plan, self._count(row, turn)
    text = self.first + row
    text = text if plan.tiles == 1 else jax.lax.div(text, plan.tiles)
    column = text * plan.columns + turn * plan.pages

    def start(p, _=None):
      for copy in self._copies(place, self.table_ref[column + p], p):
        copy.start()

    def clear(p, _):
      self.vmem[1][place, p] = jnp.zeros(self.vmem[1].shape[2:], self.vmem[1].dtype)

    @pl.when(count == plan.pages)
    def _():
      for p in range(plan.pages):
        start(p)

    @pl.when(count < plan.pages)
    def _():
      jax.lax.fori_loop(0, count, start, None)
      jax.lax.fori_loop(count, plan.pages, clear, None)

  def wait(self, row, turn, place):
    """Until all copies of the visit have arrived."""
    plan, count = self.plan, self._count(row, turn)

    @pl.when(count == plan.pages)
    def _():
      for i, vmem in enumerate(self.vmem):  # one wait for the bytes of all pages
        whole = vmem.at[place]
        pltpu.make_async_copy(whole, whole, self.arrived.at[i, place]).wait()

    @pl.when(count < plan.pages)
    def _():
      def one(p, _):
        for copy in self._copies(place, 0, p):
          copy.wait()
      jax.lax.fori_loop(0, count, one, None)


def _dot(a, b):
  precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _own(plan, parts):
  """Each joined head's rows, from its own of `parts`."""
  out = parts[0]
  for j, part in enumerate(parts[1:], 1):
    row = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
    out = jnp.where(row >= j * plan.queries, part, out)
  return out


def _spread(plan, q_RH):
  """Queries of the joined heads as a block-diagonal matrix (R, joined * H)."""
  zero = jnp.zeros_like(q_RH)
  return jnp.concatenate([_own(plan, [q_RH if i == j else zero for i in range(plan.joined)])
                          for j in range(plan.joined)], axis=1)


def _lanes(f, x):
  """`f` over the stretches of 128 lanes of `x`."""
  return functools.reduce(f, (x[:, i:i + LANES] for i in range(0, x.shape[1], LANES)))


def _scores(plan, q_RH, k_PKHS):
  """q k of one product's heads, times sqrt(H): (R, slots of the block)."""
  k = jnp.concatenate([k_KHS.reshape(-1, plan.size) for k_KHS in k_PKHS], axis=1)
  q = q_RH if plan.joined == 1 else _spread(plan, q_RH.astype(jnp.float32)).astype(k.dtype)
  return _dot(q, k)


def _softmax(plan, s_RS, top, total):
  """(weights, new top, new total, what to keep of sums so far); the last three (R, 128).

  `top` is the greatest score in every lane, `total` the sum of weights by lane.
  """
  new = jnp.maximum(top, jnp.max(_lanes(jnp.maximum, s_RS), axis=1, keepdims=True))
  scale = plan.width ** -0.5 * math.log2(math.e)
  p_RS = jnp.exp2((s_RS - jnp.tile(new, (1, s_RS.shape[1] // LANES))) * scale)
  keep = jnp.exp2((top - new) * scale)
  return p_RS, new, total * keep + _lanes(jnp.add, p_RS), keep


def _sums(plan, p_RS, v_PKSH):
  """Weighted sums of values (R, H)."""
  p, v = p_RS.astype(v_PKSH.dtype), [v_PKSH[:, j].reshape(-1, plan.width)
                                     for j in range(plan.joined)]
  if plan.width % LANES:
    return _own(plan, [_dot(p, v_SH) for v_SH in v])
  return _own(plan, jnp.split(_dot(p, jnp.concatenate(v, axis=1)), plan.joined, axis=1))


def _kernel(plan, length_ref, pages_ref, turns_ref, table_ref, q_ref, back_ref, k_hbm, v_hbm, o_ref,
            k_buf, v_buf, top_ref, total_ref, sum_ref, arrived):
  first = pl.program_id(1) * plan.rows
  pages = _Pages(plan, first, pl.program_id(0) * plan.heads, pages_ref, table_ref, (k_hbm, v_hbm),
                 (k_buf, v_buf), arrived)
  products = range(plan.heads // plan.joined)

  def following(row, turn):
    more = turn + 1 < turns_ref[first + jnp.minimum(row, plan.rows - 1)]
    return jnp.where(more, row, row + 1), jnp.where(more, turn + 1, 0)

  def fetch(row, turn, place):
    pl.when(row < plan.rows)(lambda: pages.fetch(row, turn, place))
    return following(row, turn)

  def begin():
    top_ref[...] = jnp.full(top_ref.shape, MASKED / 10, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  def attend(row, turn, place):
    shape = (q_ref.shape[2], plan.pages * plan.size)
    position = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + turn * shape[1]
    seen_RS = position + jnp.tile(back_ref[...], (1, shape[1] // LANES)) < length_ref[first + row]
    heads = [pl.ds(j * plan.joined, plan.joined) for j in products]
    scores = [_scores(plan, q_ref[row, j], [k_buf[place, p, heads[j]] for p in range(plan.pages)])
              for j in products]  # all before any other product: the order is the compiler's
    weights = [_softmax(plan, jnp.where(seen_RS, s_RS, MASKED), top_ref[j], total_ref[j])
               for j, s_RS in zip(products, scores)]
    for j, (p_RS, top_ref[j], total_ref[j], keep) in zip(products, weights):
      sum_ref[j] = sum_ref[j] * keep[:, :plan.width] + _sums(plan, p_RS, v_buf[place, :, heads[j]])

  def finish(row):
    for j in products:
      total = jnp.sum(total_ref[j], axis=1, keepdims=True)
      o_ref[row, j] = (sum_ref[j] / jnp.where(total > 0, total, 1)).astype(o_ref.dtype)
    begin()

  def visit(carry):
    row, turn, place, *ahead = carry
    ahead = fetch(*ahead, jnp.where(place == 0, plan.depth, place) - 1)
    pages.wait(row, turn, place)
    attend(row, turn, place)
    row_next, turn_next = following(row, turn)
    pl.when(row_next > row)(lambda: finish(row))
    return row_next, turn_next, jnp.where(place == plan.depth - 1, 0, place + 1), *ahead

  begin()
  zero = jnp.int32(0)
  ahead = jax.lax.fori_loop(0, plan.depth - 1, lambda i, at: fetch(*at, i), (zero, zero))
  jax.lax.while_loop(lambda carry: carry[0] < plan.rows, visit, (zero, zero, zero, *ahead))


def _plan(q_BQKGH, size, columns, blocks):
  """(Plan, programs along heads and rows, new tokens of a tile, rows of a product, VMEM bytes)."""
  B, Q, K, G, H = q_BQKGH.shape
  cores = target.cores()
  heads = K // cores if K % cores == 0 else K
  tokens = min(Q, max(1, blocks['queries'] // G))
  tiles = -(-Q // tokens)
  joined = 2 if 2 * tokens * G <= 8 and heads % 2 == 0 else 1
  R = -(-joined * tokens * G // 8) * 8
  item = q_BQKGH.dtype.itemsize
  row = heads // joined * R * max(H, LANES) * item * 4  # q and o, each twice
  parts = max(-(-B * tiles * row // QUERIES), cores * heads // K)
  rows = -(-B * tiles // parts)
  pages = min(blocks['pages'], columns)
  plan = Plan(rows, tiles, heads, joined, tokens * G, H, size, columns, pages, blocks['depth'])
  kv = plan.depth * pages * heads * size * (H + max(H, LANES)) * item
  scores = 4 * R * pages * size * 4
  bytes_ = require_vmem(
    'paged_flash', dict(pages=kv, queries=rows * row, state=heads // joined * R * LANES * 12,
                        scores=scores), target.vmem(), "lower blocks['pages'] or ['depth']")
  return plan, (K // heads, -(-B * tiles // rows)), tokens, R, bytes_


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _paged_flash(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B, blocks, interpret):
  B, Q, K, G, H = q_BQKGH.shape
  plan, programs, tokens, R, vmem = _plan(q_BQKGH, v_BKSH.shape[2], table_BC.shape[1], dict(blocks))
  tiles, joined = plan.tiles, plan.joined
  rows, more = B * tiles, plan.rows * programs[1] - B * tiles
  back = tokens - 1 - np.arange(joined * plan.queries) % plan.queries // G
  back = np.broadcast_to(np.pad(back, (0, R - len(back)))[:, None], (R, LANES)).astype(np.int32)
  q = jnp.pad(q_BQKGH, ((0, 0), (tiles * tokens - Q, 0), (0, 0), (0, 0), (0, 0)))
  q = q.reshape(rows, tokens, K, G, H).swapaxes(1, 2).reshape(rows, K // joined, -1, H)
  q = jnp.pad(q, ((0, more), (0, 0), (0, R - q.shape[2]), (0, 0)))
  later = tokens * jnp.arange(tiles - 1, -1, -1, dtype=jnp.int32)
  length = jnp.pad((length_B.astype(jnp.int32)[:, None] - later).reshape(-1), (0, more))
  pages = jnp.maximum(-(-length // plan.size), 0)
  turns = jnp.maximum(-(-pages // plan.pages), 1)
  products = plan.heads // joined
  mine = pl.BlockSpec((plan.rows, products, R, H), lambda h, b, *_: (b, h, 0, 0))
  state = pltpu.VMEM((products, R, LANES), jnp.float32)
  block = plan.depth, plan.pages, plan.heads
  o = pl.pallas_call(
    functools.partial(_kernel, plan), name='paged_flash', interpret=interpret,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=programs, out_specs=mine,
      in_specs=[mine, pl.BlockSpec((R, LANES), lambda *_: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
      scratch_shapes=[pltpu.VMEM((*block, H, plan.size), k_BKHS.dtype),
                      pltpu.VMEM((*block, plan.size, H), v_BKSH.dtype),
                      state, state, pltpu.VMEM((products, R, H), jnp.float32),
                      pltpu.SemaphoreType.DMA((2, plan.depth))]),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=min(vmem + (8 << 20), target.vmem())),
  )(length, pages, turns, table_BC.reshape(-1).astype(jnp.int32), q, back, k_BKHS, v_BKSH)
  o = o[:rows, :, :joined * plan.queries].reshape(rows, K, tokens, G, H).swapaxes(1, 2)
  return o.reshape(B, tiles * tokens, K, G, H)[:, tiles * tokens - Q:]


def _forward(*args):
  return _paged_flash(*args), args[:5]


def _backward(blocks, interpret, saved, do_BQKGH):
  q, k, v, table_BC, length_B = saved
  def meaning(q, k, v):
    return reference.paged_attention(q, k, v, table_BC, length_B)
  return *jax.vjp(meaning, q, k, v)[1](do_BQKGH), None, None


_paged_flash.defvjp(_forward, _backward)


def paged_flash(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B, *, blocks=None, interpret=None):
  """softmax(q k / sqrt(H)) v of each row's last Q tokens over its first `length_B`, as q_BQKGH.

  The first axis of `k_BKHS` and `v_BKSH` is pages, S the slots of one, a multiple of 128; column c
  of `table_BC` is the page of positions c * S .. c * S + S - 1. Rows may share pages. Query i of a
  row sees positions < length - (Q - 1 - i), none of which gives 0; no other page is read, but what
  slots past the length hold must be finite. Decoding is not trained: the gradient is the plain
  meaning's, through whole rows.

  `blocks`: `pages` of a visit, `depth` of them in VMEM, `queries` of a kv head in one product (more
  tokens make further rows). ValueError where they need more VMEM than a core has, or the table more
  SMEM.
  """
  B, Q, K, G, H = q_BQKGH.shape
  S, C = v_BKSH.shape[2], table_BC.shape[1]
  if S % LANES or k_BKHS.dtype != q_BQKGH.dtype or v_BKSH.dtype != q_BQKGH.dtype:
    raise ValueError(f'paged_flash takes pages of a multiple of {LANES} slots in the dtype of the '
                     f'queries, not {S} slots, {q_BQKGH.dtype}, {k_BKHS.dtype}, {v_BKSH.dtype}')
  if 4 * B * (C + 3) > SMEM:
    raise ValueError(f'paged_flash keeps the table in SMEM: {B} rows x {C} pages are '
                     f'{4 * B * (C + 3)} bytes, more than {SMEM}: take larger pages or fewer rows')
  chosen = table_of_blocks.choose('paged_flash', rows=B, tokens=Q, heads=K, group=G, width=H,
                                  slots=S, columns=C, dtype=q_BQKGH.dtype.name)
  blocks = tuple(sorted({**DEFAULT, **chosen, **(blocks or {})}.items()))
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  return _paged_flash(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B, blocks, interpret)
