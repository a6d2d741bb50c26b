"""Attention of a few new tokens a row to keys and values in pages, as one Pallas TPU kernel.

All visits (a row and a block of its pages) form one flat loop. The copies of the next visits, of
this row or the next, are under way while one is computed, so memory never waits at a row's end. A
block that the rows after one share with it is read once and computed for all of them. The queries
of two kv heads with few each share one product, as the two blocks of a block-diagonal matrix: this
fills the 256 rows of a v6e's MXU and all 8 sublanes of the scores.
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
ROWS = 16 << 20  # bytes of VMEM for queries, outputs and state
PAGES, ALONE = 8, 16  # of a block by default; where a program has one kv head
DEFAULT = dict(depth=3, queries=128)


class Plan(NamedTuple):
  """Sizes of one call."""
  programs: tuple  # along heads and along rows
  rows: int  # of a program
  tiles: int  # rows that have one row of the table: stretches of its new tokens
  heads: int  # kv heads of a program
  joined: int  # kv heads in one product
  group: int  # G
  tokens: int  # new ones of a row of the kernel
  height: int  # rows of a product, whole sublanes
  width: int  # H
  size: int  # slots of a page, S
  columns: int  # of the table
  pages: int  # of a block
  depth: int  # blocks in VMEM
  vmem: int  # bytes

  @property
  def queries(self):
    """Rows of a product that are of one kv head."""
    return self.tokens * self.group


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


class _State(NamedTuple):
  """Of every row and product: greatest score, in every lane; sum of weights by lane; of values."""
  top: jax.Array
  total: jax.Array
  sum: jax.Array

  def begin(self, rows):
    def one(row, _):
      for ref, value in zip(self, (MASKED / 10, 0, 0)):
        ref[row] = jnp.full(ref.shape[1:], value, ref.dtype)
    jax.lax.fori_loop(0, rows, one, None)

  def output(self, row, j):
    total = jnp.sum(self.total[row, j], axis=1, keepdims=True)
    return self.sum[row, j] / jnp.where(total > 0, total, 1)


def _attend(plan, row, turn, length, q_ref, back_ref, k_buf, v_buf, state):
  """Adds a block, in `k_buf` and `v_buf`, to the state of a row."""
  products = range(plan.heads // plan.joined)
  shape = (q_ref.shape[2], plan.pages * plan.size)
  position_RS = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + turn * shape[1]
  seen_RS = position_RS + jnp.tile(back_ref[...], (1, shape[1] // LANES)) < length
  heads = [pl.ds(j * plan.joined, plan.joined) for j in products]
  scores = [_scores(plan, q_ref[row, j], [k_buf[p, heads[j]] for p in range(plan.pages)])
            for j in products]  # all before any other product: the compiler keeps their order
  for j, s_RS in zip(products, scores):
    scores[j], state.top[row, j], state.total[row, j], keep = _softmax(
      plan, jnp.where(seen_RS, s_RS, MASKED), state.top[row, j], state.total[row, j])
    state.sum[row, j] = state.sum[row, j] * keep[:, :plan.width]
  for j, p_RS in zip(products, scores):
    state.sum[row, j] += _sums(plan, p_RS, v_buf[:, heads[j]])


def _kernel(plan, length_ref, pages_ref, turns_ref, shared_ref, table_ref, q_ref, back_ref, k_hbm,
            v_hbm, o_ref, k_buf, v_buf, *scratch):
  *state, arrived = scratch
  state = _State(*state)
  first = pl.program_id(1) * plan.rows
  pages = _Pages(plan, first, pl.program_id(0) * plan.heads, pages_ref, table_ref, (k_hbm, v_hbm),
                 (k_buf, v_buf), arrived)

  def following(row, turn):
    more = turn + 1 < turns_ref[first + jnp.minimum(row, plan.rows - 1)]
    start = shared_ref[first + jnp.minimum(row + 1, plan.rows - 1)]
    return jnp.where(more, row, row + 1), jnp.where(more, turn + 1, start)

  def fetch(row, turn, place):
    pl.when(row < plan.rows)(lambda: pages.fetch(row, turn, place))
    return following(row, turn)

  def finish(row):
    for j in range(q_ref.shape[1]):
      o_ref[row, j] = state.output(row, j).astype(o_ref.dtype)

  def visit(carry):
    row, turn, place, *ahead = carry
    ahead = fetch(*ahead, jnp.where(place == 0, plan.depth, place) - 1)
    pages.wait(row, turn, place)
    end = jax.lax.while_loop(  # the rows after this one that read the same pages
      lambda r: (r < plan.rows) & (shared_ref[first + jnp.minimum(r, plan.rows - 1)] > turn),
      lambda r: r + 1, row + 1)

    def attend(r, _):
      _attend(plan, r, turn, length_ref[first + r], q_ref, back_ref, k_buf.at[place],
              v_buf.at[place], state)
    jax.lax.fori_loop(row, end, attend, None)
    row_next, turn_next = following(row, turn)
    pl.when(row_next > row)(lambda: finish(row))
    return row_next, turn_next, jnp.where(place == plan.depth - 1, 0, place + 1), *ahead

  state.begin(plan.rows)
  zero = jnp.int32(0)
  ahead = jax.lax.fori_loop(0, plan.depth - 1, lambda i, at: fetch(*at, i), (zero, zero))
  jax.lax.while_loop(lambda carry: carry[0] < plan.rows, visit, (zero, zero, zero, *ahead))


def _shared(plan, table_BC, length_B, turns_B):
  """Leading blocks of each row that are whole, and the same pages as the row's before; (B,).

  0 for a program's first row; less than a row's blocks, so that each row has a visit of its own.
  """
  B, C = table_BC.shape
  blocks = C // plan.pages
  same_BC = (table_BC == jnp.roll(table_BC, 1, 0))[:, :blocks * plan.pages]
  same_BX = same_BC.reshape(B, blocks, plan.pages).all(-1)
  whole_B = jnp.minimum(length_B, jnp.roll(length_B, 1)) // (plan.pages * plan.size)
  same_BX &= jnp.arange(blocks) < jnp.minimum(whole_B, turns_B - 1)[:, None]
  run_B = jnp.where(same_BX, blocks, jnp.arange(blocks)).min(-1, initial=blocks)
  return jnp.where(jnp.arange(B) % plan.rows, run_B, 0).astype(jnp.int32)


def plan(q_BQKGH, size, columns, blocks):
  """The `Plan` of a call; ValueError if it needs more VMEM than a core has."""
  B, Q, K, G, H = q_BQKGH.shape
  item, wide, cores = q_BQKGH.dtype.itemsize, max(H, LANES), target.cores()
  heads = K // cores if K % cores == 0 else K
  tokens = min(Q, max(1, blocks['queries'] // G))
  tiles = -(-Q // tokens)
  joined = 2 if 2 * tokens * G <= 8 and heads % 2 == 0 else 1
  height = -(-joined * tokens * G // 8) * 8
  row = heads // joined * height * (4 * wide * item + 4 * (2 * LANES + wide))  # q, o twice; state
  rows = -(-B * tiles // max(-(-B * tiles * row // ROWS), cores * heads // K))
  pages = min(blocks.get('pages', PAGES if heads > 1 else ALONE), columns)
  vmem = require_vmem('paged_flash', dict(
    pages=blocks['depth'] * pages * heads * size * (H + wide) * item, rows=rows * row,
    scores=16 * height * pages * size), target.vmem(), "lower blocks['pages'] or ['depth']")
  return Plan((K // heads, -(-B * tiles // rows)), rows, tiles, heads, joined, G, tokens, height, H,
              size, columns, pages, blocks['depth'], vmem)


def _rows(plan, q_BQKGH, table_BC, length_B):
  """A row of the kernel for each stretch of a row's tokens: (q, (length, pages, turns, shared))."""
  B, Q, K, G, H = q_BQKGH.shape
  tiles, tokens, rows = plan.tiles, plan.tokens, B * plan.tiles
  more = plan.rows * plan.programs[1] - rows  # rows of length 0
  q = jnp.pad(q_BQKGH, ((0, 0), (tiles * tokens - Q, 0), (0, 0), (0, 0), (0, 0)))
  q = q.reshape(rows, tokens, K, G, H).swapaxes(1, 2).reshape(rows, K // plan.joined, -1, H)
  q = jnp.pad(q, ((0, more), (0, 0), (0, plan.height - q.shape[2]), (0, 0)))
  later = tokens * jnp.arange(tiles - 1, -1, -1, dtype=jnp.int32)
  length = jnp.maximum((length_B[:, None] - later).reshape(-1), 0)
  length, table = (jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))
                   for x in (length, jnp.repeat(table_BC, tiles, 0)))
  pages = -(-length // plan.size)
  turns = jnp.maximum(-(-pages // plan.pages), 1)
  return q, (length, pages, turns, _shared(plan, table, length, turns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _paged_flash(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B, blocks, interpret):
  B, Q, K, G, H = q_BQKGH.shape
  sizes = plan(q_BQKGH, v_BKSH.shape[2], table_BC.shape[1], dict(blocks))
  table_BC = jnp.clip(table_BC.astype(jnp.int32), 0, len(k_BKHS) - 1)
  length_B = jnp.clip(length_B.astype(jnp.int32), 0, sizes.columns * sizes.size)
  q, scalars = _rows(sizes, q_BQKGH, table_BC, length_B)
  back = sizes.tokens - 1 - np.arange(sizes.height) % sizes.queries // G  # tokens to the last
  back = np.broadcast_to(back[:, None].astype(np.int32), (sizes.height, LANES))
  each = sizes.heads // sizes.joined, sizes.height
  mine = pl.BlockSpec((sizes.rows, *each, H), lambda h, b, *_: (b, h, 0, 0))
  pages = sizes.depth, sizes.pages, sizes.heads
  o = pl.pallas_call(
    functools.partial(_kernel, sizes), name='paged_flash', interpret=interpret,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5, grid=sizes.programs, out_specs=mine,
      in_specs=[mine, pl.BlockSpec(back.shape, lambda *_: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
      scratch_shapes=[pltpu.VMEM((*pages, H, sizes.size), k_BKHS.dtype),
                      pltpu.VMEM((*pages, sizes.size, H), v_BKSH.dtype),
                      *(pltpu.VMEM((sizes.rows, *each, x), jnp.float32) for x in (LANES, LANES, H)),
                      pltpu.SemaphoreType.DMA((2, sizes.depth))]),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'), disable_bounds_checks=True,  # pages are clipped
      vmem_limit_bytes=min(sizes.vmem + (8 << 20), target.vmem())),
  )(*scalars, table_BC.reshape(-1), q, back, k_BKHS, v_BKSH)
  o = o[:B * sizes.tiles, :, :sizes.joined * sizes.queries]
  o = o.reshape(B * sizes.tiles, K, sizes.tokens, G, H).swapaxes(1, 2)
  return o.reshape(B, -1, K, G, H)[:, -Q:]


def _forward(*args):
  return _paged_flash(*args), args[:5]


def _backward(blocks, interpret, saved, do_BQKGH):
  q, k, v, table_BC, length_B = saved
  def meaning(q, k, v):
    return reference.paged_attention(q, k, v, table_BC, length_B)
  return *jax.vjp(meaning, q, k, v)[1](do_BQKGH), None, None


_paged_flash.defvjp(_forward, _backward)


def refusal(q_BQKGH, k_BKHS, v_BKSH):
  """Why the kernel does not take these arrays, or None."""
  S, H = v_BKSH.shape[2:]
  if S % LANES:
    return f'pages have {S} slots, no multiple of {LANES}'
  if H not in (64, 128):
    return f'heads are {H} wide, not 64 or 128'
  if not q_BQKGH.dtype == k_BKHS.dtype == v_BKSH.dtype:
    return f'queries are {q_BQKGH.dtype}, keys {k_BKHS.dtype}, values {v_BKSH.dtype}'


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
  reason = refusal(q_BQKGH, k_BKHS, v_BKSH)
  if reason:
    raise ValueError(f'paged_flash: {reason}')
  if 4 * B * (C + 4) > SMEM:
    raise ValueError(f'paged_flash keeps the table in SMEM: {B} rows x {C} pages are '
                     f'{4 * B * (C + 4)} bytes, more than {SMEM}: take larger pages or fewer rows')
  chosen = table_of_blocks.choose('paged_flash', rows=B, tokens=Q, heads=K, group=G, width=H,
                                  slots=S, columns=C, dtype=q_BQKGH.dtype.name)
  blocks = tuple(sorted({**DEFAULT, **chosen, **(blocks or {})}.items()))
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  return _paged_flash(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B, blocks, interpret)
