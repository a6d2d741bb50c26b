"""Causal grouped-query attention on a TPU, forward: output and log-sum-exp of one device's tokens.

Scores are made transposed, keys x queries, and so is the output until it is written: maxima and
sums over keys are then those of registers, no lane is crossed, and probabilities fill a 256-wide
matrix unit that a head width of 128 leaves half empty. The columns of one step of the grid are some
queries of all heads that share a key head. All keys of that head stay in VMEM; a loop visits the
units of them that `flash_blocks.extents` names, several at once where none needs a mask. While the
exponentials of a unit are taken, the matrix unit makes the scores of the next, also of the next
step's first: step i ends block i - 1 of the queries, and writes block i - 2.

Where queries and keys are normalised, |score| has a bound that the caller knows. As long as e to
that power is a moderate float32, softmax needs no running maximum; otherwise the exact form runs.
Meaning: `reference.partial_attention`.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import blocks as table
from qwen3_jax.kernels import flash_blocks, target
from qwen3_jax.kernels.cost import cost
from qwen3_jax.kernels.flash_blocks import MASKED, MIB

LIMIT = 55.0  # |score| up to which exp needs no maximum: sums of 2^79 x 2^17 keys x values to 2^30
LOWEST = -1e29  # least running maximum: exp2(MASKED - LOWEST) is 0 also where all was masked so far
HIGHEST = 3e38  # above every score
NEVER = -(1 << 31) + 1  # no distance of slots
LOG2E = math.log2(math.e)
SPARE = 8 * MIB  # VMEM for what the compiler spills


class Blocks(NamedTuple):
  """Sizes of one step, and what bounds it."""
  queries: int  # slots
  keys: int  # of a unit
  units: int  # at most visited at once
  heads: int  # of queries
  columns: int  # of queries x heads, for which scores and output are made at once
  resident: int  # keys of a head that stay in VMEM; more are visited in turns that are merged


class Plan(NamedTuple):
  """What the kernel's code is made for."""
  queries: int
  keys: int
  widths: tuple[int, ...]  # numbers of units visited at once, powers of two, falling
  heads: int
  columns: int
  query_blocks: int
  key_blocks: int
  width: int  # of a head
  window: int | None
  running: bool  # maxima are kept
  precision: jax.lax.Precision | None


class Scalars(NamedTuple):
  """Prefetched to SMEM: by row and block `flash_blocks.Extents`, slots, segments where only one."""
  low: Any
  high: Any
  open: Any
  shut: Any
  q_slot: Any
  k_slot: Any
  q_segment: Any
  k_segment: Any


class Kept(NamedTuple):
  """What stays in VMEM from step to step; C columns, S keys of U units."""
  q_CH: Any  # in powers of two
  v_UHS: Any
  s_SC: Any  # scores of the next unit to visit
  ceiling_ST: Any
  o_HC: Any
  l_8C: Any  # sums, of every eighth key
  done_HC: Any  # o, l, m of the block before, to be written
  done_8C: Any
  m_8C: Any = None
  top_8C: Any = None


def choose(N, K, H, T, S, dtype):
  """`Blocks` for stretches of T queries and S keys: the table's, else 1,000 or 2,000 columns."""
  heads = max(d for d in range(1, 6) if N // K % d == 0)
  queries = 1 << ((1280 if T < 16384 else 2560) // heads).bit_length() - 1
  keys = 256
  while queries > 128 and queries // 2 >= T:
    queries //= 2
  while keys > 128 and keys // 2 >= S:
    keys //= 2
  size = jnp.dtype(dtype).itemsize
  resident = (target.vmem() - 20 * MIB) // (5 * max(H, 128) * size)  # twice k and v, v turned
  default = dict(queries=queries, keys=keys, units=8 if size == 2 else 2, heads=heads, columns=256,
                 resident=1 << resident.bit_length() - 1)
  found = table.choose('flash_forward', N=N, K=K, H=H, T=T, S=S, dtype=jnp.dtype(dtype).name)
  return Blocks(**default | found)


def _make_scores(plan, k_ref, kept, unit, columns):
  """Scores of a unit's keys and some queries, (keys, columns) float32, in powers of two."""
  k_SH = k_ref[0, 0, pl.ds(pl.multiple_of(unit * plan.keys, plan.keys), plan.keys), :]
  return jax.lax.dot_general(k_SH, kept.q_CH[columns, :], (((1,), (1,)), ((), ())),
                             precision=plan.precision, preferred_element_type=jnp.float32)


def _make_ceiling(plan, ahead, q_segment_ref, k_segment_ref, block, unit, ceiling_ST):
  """Scores' upper limits, (keys, queries): `MASKED` where a query does not see a key.

  The block's first query is `ahead` slots after the unit's first key.
  """
  shape = plan.keys, plan.queries
  k_segment = jnp.broadcast_to(k_segment_ref[0, pl.ds(unit, 1), :], (128, plan.keys)).T
  k_segment = jnp.concatenate([k_segment] * (plan.queries // 128), axis=1)
  behind = (jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            - jax.lax.broadcasted_iota(jnp.int32, shape, 1))
  seen = (k_segment == q_segment_ref[0, pl.ds(block, 1), :]) & (behind <= ahead)
  if plan.window is not None:
    seen &= behind > ahead - plan.window
  ceiling_ST[...] = jnp.where(seen, HIGHEST, MASKED)


def _visit(plan, k_ref, kept, unit, following, limited, ends=False):
  """Adds a unit to sums and output by its scores, which those of unit `following` replace.

  With `limited`, scores are at most the ceiling. If it `ends` the block, what is complete goes to
  `done` and begins anew.
  """
  for start in range(0, plan.heads * plan.queries, plan.columns):
    columns = pl.ds(start, plan.columns)
    s = kept.s_SC[:, columns]
    kept.s_SC[:, columns] = _make_scores(plan, k_ref, kept, following, columns)
    if limited:
      s = jnp.minimum(s, kept.ceiling_ST[:, pl.ds(start % plan.queries, plan.columns)])
    o, l = kept.o_HC[:, columns], kept.l_8C[:, columns]
    if plan.running:
      m_old = kept.m_8C[:1, columns]
      m = jnp.maximum(m_old, jnp.max(s, axis=0, keepdims=True))
      (kept.top_8C if ends else kept.m_8C)[:1, columns] = m
      p, keep = jnp.exp2(s - m), jnp.exp2(m_old - m)
      o, l = o * keep, l * keep
    else:
      p = jnp.exp2(s)
    l = l + p.reshape(plan.keys // 8, 8, plan.columns).sum(0)
    o = o + jnp.dot(kept.v_UHS[unit], p.astype(kept.v_UHS.dtype), precision=plan.precision,
                    preferred_element_type=jnp.float32)
    (kept.done_HC if ends else kept.o_HC)[:, columns] = o
    (kept.done_8C if ends else kept.l_8C)[:, columns] = l
    if ends:
      kept.o_HC[:, columns], kept.l_8C[:, columns] = jnp.zeros_like(o), jnp.zeros_like(l)
      if plan.running:
        kept.m_8C[:1, columns] = jnp.full_like(m, LOWEST)


def _write(plan, o_ref, lse_ref, kept):
  """Writes the block of queries that is done."""
  l = kept.done_8C[...].sum(0, keepdims=True)
  some = jnp.where(l > 0, l, 1)
  o_HC = (kept.done_HC[...] * (1 / some)).astype(o_ref.dtype)
  lse = jnp.log2(some) + (kept.top_8C[:1] if plan.running else 0)
  lse = jnp.where(l > 0, lse / LOG2E, MASKED)
  for head in range(plan.heads):
    columns = slice(head * plan.queries, (head + 1) * plan.queries)
    o_ref[0, 0, :, head * plan.width:(head + 1) * plan.width] = o_HC[:, columns].T
    lse_ref[0, 0, head:head + 1, :] = lse[:, columns]


def _read(plan, q_ref, kept):
  """Keeps the queries of a block by head, with the scale and the logarithm's base in them."""
  for head in range(plan.heads):
    q_TH = q_ref[0, 0, :, head * plan.width:(head + 1) * plan.width].astype(jnp.float32)
    rows = slice(head * plan.queries, (head + 1) * plan.queries)
    kept.q_CH[rows, :] = (q_TH * (plan.width ** -0.5 * LOG2E)).astype(kept.q_CH.dtype)


def _turn_values(plan, v_ref, kept):
  """Keeps the values of a key head transposed."""
  def turn(unit, _):
    start = pl.multiple_of(unit * plan.keys, plan.keys)
    kept.v_UHS[unit] = v_ref[0, 0, pl.ds(start, plan.keys), :].T
  jax.lax.fori_loop(0, plan.key_blocks, turn, None)


def _visit_run(plan, visit, limit, low, first, shut, last):
  """Visits units `low` to `last` - 1, of which `first` to `shut` - 1 need no mask."""
  def some(unit):
    left = jnp.where(unit >= first, jnp.minimum(shut, last) - unit, 0)
    visited = jnp.int32(1)
    for width in plan.widths:
      fits = left >= width if width == plan.widths[0] else (left >= width) & (left < 2 * width)
      visited = jnp.where(fits, width, visited)

      @pl.when(fits)
      def _(width=width):
        for u in range(width):
          visit(unit + u, unit + u + 1, False)

    @pl.when(left <= 0)
    def _():
      limit(unit)
      visit(unit, unit + 1, True)
    return unit + visited
  jax.lax.while_loop(lambda unit: unit < last, some, low)


def _kernel(plan, *refs):
  scalars, refs = Scalars(*refs[:8]), refs[8:]
  q_segment_ref, k_segment_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, held_ref, *kept = refs
  kept = Kept(*kept)
  row, step = pl.program_id(0), pl.program_id(2)
  block = jnp.clip(step - 1, 0, plan.query_blocks - 1)
  ends = row * plan.query_blocks + block
  begins = row * plan.query_blocks + jnp.minimum(step, plan.query_blocks - 1)
  visit = functools.partial(_visit, plan, k_ref, kept)

  @pl.when(step == 0)
  def _():
    _turn_values(plan, v_ref, kept)
    held_ref[0] = NEVER

  def limit(unit):
    """Makes the ceiling, unless the one that is there is the same triangle."""
    ahead = scalars.q_slot[block] - scalars.k_slot[unit]
    k_segment = scalars.k_segment[row * plan.key_blocks + unit]
    holds = jnp.where(scalars.q_segment[ends] == k_segment, ahead, NEVER)

    @pl.when((holds == NEVER) | (holds != held_ref[0]))
    def _():
      _make_ceiling(plan, ahead, q_segment_ref, k_segment_ref, block, unit, kept.ceiling_ST)
      held_ref[0] = holds

  low = scalars.low[ends]
  idle = (step == 0) | (step > plan.query_blocks)
  last = jnp.where(idle, low, jnp.maximum(scalars.high[ends] - 1, low))
  _visit_run(plan, visit, limit, low, scalars.open[ends], scalars.shut[ends], last)
  limit(last)
  _read(plan, q_ref, kept)
  _write(plan, o_ref, lse_ref, kept)
  visit(last, scalars.low[begins], True, ends=True)


def _fold(x_BTNH, heads):
  """(array, block index of rows `t` and heads' group `n`): blocks (1, 1, rows, heads * H) of it.

  Whole tiles of lanes are cut from (B, 1, T, N * H), which a projection makes and takes as it is.
  """
  B, T, N, H = x_BTNH.shape
  if H % 128 == 0:
    return x_BTNH.reshape(B, 1, T, N * H), lambda b, t, n: (b, 0, t, n)
  x = x_BTNH.reshape(B, T, N // heads, heads * H).swapaxes(1, 2)
  return x, lambda b, t, n: (b, n, t, 0)


def _unfold(x, N, H):
  """(B, T, N, H) of what `_fold` gave."""
  B, _, T, _ = x.shape
  return x.swapaxes(1, 2).reshape(B, T, N, H)


def _specs(plan, groups, S, at_q, at_k):
  """Block specs of the inputs and of the outputs."""
  tq, tk, heads, H = plan.queries, plan.keys, plan.heads, plan.width
  last = plan.query_blocks - 1
  keys = pl.BlockSpec((1, 1, S, H), lambda b, n, i, *_: at_k(b, 0, n // groups))
  inputs = [
    pl.BlockSpec((1, plan.query_blocks, tq), lambda b, n, i, *_: (b, 0, 0)),
    pl.BlockSpec((1, plan.key_blocks, tk), lambda b, n, i, *_: (b, 0, 0)),
    pl.BlockSpec((1, 1, tq, heads * H), lambda b, n, i, *_: at_q(b, jnp.minimum(i, last), n)),
    keys, keys]
  outputs = [
    pl.BlockSpec((1, 1, tq, heads * H), lambda b, n, i, *_: at_q(b, jnp.maximum(i - 2, 0), n)),
    pl.BlockSpec((1, 1, heads, tq), lambda b, n, i, *_: (b, n, 0, jnp.maximum(i - 2, 0)))]
  return inputs, outputs


def _kept(plan, dtype):
  """`Kept` of (shape, dtype)."""
  C, H, f32 = plan.heads * plan.queries, plan.width, jnp.float32
  m = ((8, C), f32) if plan.running else None
  return Kept(((C, H), dtype), ((plan.key_blocks, H, plan.keys), dtype), ((plan.keys, C), f32),
              ((plan.keys, plan.queries), f32), ((H, C), f32), ((8, C), f32), ((H, C), f32),
              ((8, C), f32), m, m)


def _require_vmem(plan, dtype, out_dtype):
  """Bytes of VMEM to allow the compiler; ValueError where a core has fewer than are needed."""
  def size(shape, dtype):
    return math.prod(shape[:-1]) * max(shape[-1], 128) * jnp.dtype(dtype).itemsize
  C, H, S = plan.heads * plan.queries, plan.width, plan.key_blocks * plan.keys
  parts = {'keys and values': 4 * size((S, H), dtype), 'queries': 2 * size((C, H), dtype),
           'output': 2 * size((C, H), out_dtype), 'segments': 2 * 4 * (S + 8 * plan.queries)}
  parts |= {name: size(*x) for name, x in _kept(plan, dtype)._asdict().items() if x}
  return flash_blocks.require_vmem(
    'flash_forward', parts | {'spilled': SPARE}, target.vmem(),
    'lower resident (keys that stay) or queries of its blocks')


def _call(plan, scalars, q_segment, k_segment, q_BTNH, k_BSKH, v_BSKH, out_dtype, interpret):
  """(o_BTNH, lse_BNT) of whole blocks."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  groups = N // K // plan.heads
  q, at_q = _fold(q_BTNH, plan.heads)
  (k, at_k), (v, _) = _fold(k_BSKH, 1), _fold(v_BSKH, 1)
  inputs, outputs = _specs(plan, groups, S, at_q, at_k)
  kept = [pltpu.VMEM(*x) for x in _kept(plan, q.dtype) if x]
  o, lse = pl.pallas_call(
    functools.partial(_kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=(B, K * groups, plan.query_blocks + 2),
      in_specs=inputs, out_specs=outputs, scratch_shapes=[pltpu.SMEM((1,), jnp.int32), *kept]),
    out_shape=[jax.ShapeDtypeStruct(q.shape, out_dtype),
               jax.ShapeDtypeStruct((B, N // plan.heads, plan.heads, T), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=_require_vmem(plan, q.dtype, out_dtype)),
    cost_estimate=cost(  # as if half of the pairs were seen
      2 * B * N * T * S * H, (q, k, v, q), B * N * T * S // 2),
    interpret=interpret, name='flash_forward' + ('_running' if plan.running else ''),
  )(*scalars, q_segment, k_segment, q, k, v)
  return _unfold(o, N, H), lse.reshape(B, N, T)


def _run(blocks, window, bound, interpret, q_BTNH, q_segment_BT, q_start_X, k_BSKH, v_BSKH,
         k_segment_BS, k_start_Y, out_dtype):
  """`forward` over keys that VMEM holds, of whole units."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  X, tq, tk = q_start_X.shape[0], blocks.queries, blocks.keys
  q, q_segment = (flash_blocks.pad(x, X, tq) for x in (q_BTNH, q_segment_BT))
  scalars = Scalars(
    *flash_blocks.extents(*flash_blocks.pairs(
      q_segment, k_segment_BS, q_start_X, k_start_Y, tq, tk, window)),
    flash_blocks.slots(q_start_X, q.shape[1], tq), flash_blocks.slots(k_start_Y, S, tk),
    flash_blocks.segments(q_segment, tq, -1), flash_blocks.segments(k_segment_BS, tk, -2))
  widths = tuple(1 << n for n in reversed(range(blocks.units.bit_length())))
  exact = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
  plan = Plan(tq, tk, widths, math.gcd(blocks.heads, N // K), math.gcd(blocks.columns, tq),
              q.shape[1] // tq, S // tk, H, window, True, exact)
  unlike_keys = jnp.where(q_segment > 0, q_segment, -1)
  args = [[x.reshape(-1) for x in scalars], unlike_keys.reshape(B, -1, tq),
          k_segment_BS.reshape(B, -1, tk), q, k_BSKH, v_BSKH, out_dtype, interpret]

  def call(running):
    return _call(plan._replace(running=running), *args)
  if bound is None or isinstance(bound, float):
    o, lse = call(bound is None or bound > LIMIT)
  else:
    o, lse = jax.lax.cond(jnp.max(bound) <= LIMIT, lambda: call(False), lambda: call(True))
  return flash_blocks.unpad(o, X, T), flash_blocks.unpad(lse, X, T, 2)


def merge(one, other):
  """(output float32, log-sum-exp) over the keys of both, from two such pairs of different keys."""
  (o1, lse1), (o2, lse2) = one, other
  lse = jnp.maximum(jnp.logaddexp(lse1, lse2), MASKED)

  def weigh(o_BTNH, lse_BNT):
    return o_BTNH.astype(jnp.float32) * jnp.exp(lse_BNT - lse).swapaxes(1, 2)[..., None]
  return weigh(o1, lse1) + weigh(o2, lse2), lse


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_BT, k_segment_BS, q_start_X, k_start_Y, *,
            window=None, bound=None, blocks=None, interpret=None):
  """(output (B, T, N, H), its log-sum-exp (B, N, T) float32) of queries over the keys they see.

  Query t sees key s if s's slot is not after t's, the segments are the same and above 0, and, with
  a `window`, the slots are less than it apart. Slots: see `flash_blocks`. A query that sees nothing
  has output 0 and log-sum-exp `MASKED`. Scale H^-1/2. `bound` is at least every |score|, known from
  normalised queries and keys (a float, or traced): up to `LIMIT` no maxima are taken. `blocks` is
  a dict that replaces some of `choose`. Raises ValueError if a core's VMEM is too small for them.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  X, Y = q_start_X.shape[0], k_start_Y.shape[0]
  blocks = choose(N, K, H, T // X, S // Y, q_BTNH.dtype)._replace(**blocks or {})
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  run = functools.partial(_run, blocks, window, bound, interpret, q_BTNH, q_segment_BT, q_start_X)
  each = -(-S // Y // blocks.keys)
  most = max(blocks.resident // blocks.keys, 1)
  if Y * each <= most:
    keys = (flash_blocks.pad(x, Y, blocks.keys) for x in (k_BSKH, v_BSKH, k_segment_BS))
    return run(*keys, k_start_Y, q_BTNH.dtype)
  turns = -(-each // most)
  size = -(-each // turns) * blocks.keys

  def cut(x):
    x = flash_blocks.pad(x, Y, turns * size)
    return x.reshape(B, Y * turns, size, *x.shape[2:]).swapaxes(0, 1)

  def turn(merged, part):
    return merge(merged, run(*part, jnp.float32)), None
  start_XY = k_start_Y[:, None] + size * jnp.arange(turns, dtype=jnp.int32)
  nothing = jnp.zeros(q_BTNH.shape, jnp.float32), jnp.full((B, N, T), MASKED)
  parts = cut(k_BSKH), cut(v_BSKH), cut(k_segment_BS), start_XY.reshape(-1, 1)
  (o, lse), _ = jax.lax.scan(turn, nothing, parts)
  return o.astype(q_BTNH.dtype), lse
