"""Causal grouped-query attention on a TPU, forward: output and log-sum-exp of one device's tokens.

Scores are made transposed, keys x queries, and so is the output until it is written: maxima and
sums over keys are then sums of registers, no lane is crossed, and a 256-wide matrix unit is filled
by the weights where head_dim 128 would leave half of it empty. One step of the grid has some
hundred queries of the heads that share a key head side by side as columns; all keys of that head
stay in VMEM; a loop visits the units of keys that `flash_blocks.extents` names. An iteration takes
the exponentials of one unit while the matrix unit makes the scores of the next, across the ends of
query blocks too: step i of the grid writes block i - 1 and makes block i's first scores.

Where queries and keys are normalised, |score| has a bound that the caller knows. As long as two to
that power is a float32, softmax needs no running maximum (`LIMIT`); else the exact form runs.
Meaning: `reference.partial_attention`.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import blocks as table
from qwen3_jax.kernels import flash_blocks, target
from qwen3_jax.kernels.flash_blocks import MASKED

LOWEST = -1e29  # least running maximum: exp2(MASKED - LOWEST) is 0 also where all was masked so far
LIMIT = 55.0  # |score| up to which exp needs no maximum: sums of 2^79 x 2^17 keys x values to 2^30
LOG2E = math.log2(math.e)


class Blocks(NamedTuple):
  """Query slots, keys of a unit and query heads of one step; columns of one softmax; keys kept."""
  queries: int
  keys: int
  units: int  # visited at once where none needs a mask
  heads: int
  columns: int
  resident: int  # keys of a head that stay in VMEM; more are visited in turns that are merged


def choose(N, K, H, S, dtype):
  """`Blocks` for some lengths: from the table, else about a thousand columns of few slots."""
  G = N // K
  heads = max(d for d in range(1, min(G, 5) + 1) if G % d == 0)
  queries = 1 << (1280 // heads).bit_length() - 1
  resident = 32768 * 2 // jnp.dtype(dtype).itemsize
  default = dict(queries=min(queries, 1024), keys=256, units=4, heads=heads, columns=256, resident=resident)
  found = table.choose('flash_forward', N=N, K=K, H=H, S=S, dtype=jnp.dtype(dtype).name)
  return Blocks(**default | found)


class Plan(NamedTuple):
  """What the kernel's code is made for."""
  queries: int
  keys: int
  units: int
  heads: int
  columns: int
  query_blocks: int
  key_blocks: int
  width: int
  window: int | None
  running: bool  # maxima are kept
  precision: jax.lax.Precision | None


def _scores(plan, k_ref, q_scr, unit, columns):
  """Scores of a unit's keys and some queries, (keys, columns) float32, in powers of two."""
  k_SH = k_ref[0, 0, pl.ds(pl.multiple_of(unit * plan.keys, plan.keys), plan.keys), :]
  return jax.lax.dot_general(k_SH, q_scr[columns, :], (((1,), (1,)), ((), ())),
                             precision=plan.precision, preferred_element_type=jnp.float32)


def _seen(plan, ahead, q_segment_ref, k_segment_ref, unit):
  """(keys, queries) bool; the block's first query is `ahead` slots after the unit's first key."""
  shape = plan.keys, plan.queries
  k_segment = jnp.broadcast_to(k_segment_ref[0, pl.ds(unit, 1), :], (128, plan.keys)).T
  k_segment = jnp.concatenate([k_segment] * (plan.queries // 128), axis=1)
  behind = (jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            - jax.lax.broadcasted_iota(jnp.int32, shape, 1))
  seen = (k_segment == q_segment_ref[0]) & (behind <= ahead)
  return seen if plan.window is None else seen & (behind > ahead - plan.window)


def _visit(plan, unit, following, seen, k_ref, q_scr, vt_scr, s_scr, acc_scr, l_scr, m_scr, to=None):
  """Adds a unit to sums and output from its scores, which those of `following` replace."""
  for start in range(0, plan.heads * plan.queries, plan.columns):
    columns = pl.ds(start, plan.columns)
    s = s_scr[:, columns]
    s_scr[:, columns] = _scores(plan, k_ref, q_scr, following, columns)
    at = start % plan.queries
    mask = None if seen is None else seen[:, at:at + plan.columns]
    acc, l = acc_scr[:, columns], l_scr[:, columns]
    if plan.running:
      if mask is not None:
        s = jnp.where(mask, s, MASKED)
      m_old = m_scr[:1, columns]
      m = jnp.maximum(m_old, jnp.max(s, axis=0, keepdims=True))
      m_scr[:1, columns] = m
      p, keep = jnp.exp2(s - m), jnp.exp2(m_old - m)
      acc, l = acc * keep, l * keep
    else:
      p = jnp.exp2(s)
      if mask is not None:
        p = jnp.where(mask, p, 0)
    l = l + p.reshape(plan.keys // 8, 8, plan.columns).sum(0)
    acc = acc + jnp.dot(vt_scr[unit], p.astype(vt_scr.dtype), precision=plan.precision,
                        preferred_element_type=jnp.float32)
    if to is None:
      acc_scr[:, columns], l_scr[:, columns] = acc, l
    else:
      to[0][:, columns], to[1][:, columns] = acc, l
      if plan.running:
        to[2][:1, columns], m_scr[:1, columns] = m, jnp.full_like(m, LOWEST)
      acc_scr[:, columns], l_scr[:, columns] = jnp.zeros_like(acc), jnp.zeros_like(l)


def _write(plan, o_ref, lse_ref, acc_scr, l_scr, m_scr=None):
  """Writes a block of queries from its sums."""
  l = l_scr[...].sum(0, keepdims=True)
  some = jnp.where(l > 0, l, 1)
  o_HC = (acc_scr[...] / some).astype(o_ref.dtype)
  o_ref[0] = o_HC.T.reshape(plan.heads, plan.queries, plan.width)
  lse = jnp.log2(some) + (m_scr[:1] if plan.running else 0)
  lse = jnp.where(l > 0, lse / LOG2E, MASKED)
  for head in range(plan.heads):
    lse_ref[0, 0, head:head + 1, :] = lse[:, head * plan.queries:(head + 1) * plan.queries]


def _kernel(plan, low_ref, high_ref, open_ref, shut_ref, q_slot_ref, k_slot_ref, q_segment_ref,
            k_segment_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, q_scr, vt_scr, s_scr, acc_scr,
            l_scr, done_acc, done_l, m_scr=None, done_m=None):
  step = pl.program_id(3)
  block = jnp.clip(step - 1, 0, plan.query_blocks - 1)
  following = jnp.minimum(step, plan.query_blocks - 1)
  row = pl.program_id(0) * plan.query_blocks
  state = k_ref, q_scr, vt_scr, s_scr, acc_scr, l_scr, m_scr

  @pl.when(step == 0)
  def _():
    def turn(unit, _):
      start = pl.multiple_of(unit * plan.keys, plan.keys)
      vt_scr[unit] = v_ref[0, 0, pl.ds(start, plan.keys), :].T
    jax.lax.fori_loop(0, plan.key_blocks, turn, None)

  def seen(unit):
    ahead = q_slot_ref[block] - k_slot_ref[unit]
    return _seen(plan, ahead, q_segment_ref, k_segment_ref, unit)

  low = low_ref[row + block]
  idle = (step == 0) | (step > plan.query_blocks)
  last = jnp.where(idle, low, jnp.maximum(high_ref[row + block] - 1, low))
  first_open = jnp.minimum(open_ref[row + block], last)
  shut = jnp.minimum(shut_ref[row + block], last)
  many = (shut - first_open) // plan.units
  before = first_open - low

  def visit(turn, _):
    unit = low + turn + (plan.units - 1) * jnp.clip(turn - before, 0, many)
    whole = (unit >= first_open) & (unit < shut)
    wide = (turn >= before) & (turn < before + many)

    @pl.when(wide)
    def _():
      for u in range(plan.units):
        _visit(plan, unit + u, unit + u + 1, None, *state)

    @pl.when(whole & jnp.logical_not(wide))
    def _():
      _visit(plan, unit, unit + 1, None, *state)

    @pl.when(jnp.logical_not(whole))
    def _():
      _visit(plan, unit, unit + 1, seen(unit), *state)
  jax.lax.fori_loop(0, last - low - (plan.units - 1) * many, visit, None)
  q = q_ref[0].reshape(plan.heads * plan.queries, plan.width).astype(jnp.float32)
  q_scr[...] = (q * (plan.width ** -0.5 * LOG2E)).astype(q_scr.dtype)
  done = [done_acc, done_l] + ([done_m] if plan.running else [])
  _write(plan, o_ref, lse_ref, *done)
  _visit(plan, last, low_ref[row + following], seen(last), *state, to=done)


def _specs(plan, groups, S):
  """Block specs of the inputs and of the outputs."""
  tq, tk, heads, H = plan.queries, plan.keys, plan.heads, plan.width
  last = plan.query_blocks - 1

  def at_next(b, k, g, i, *_):
    return b, k * groups + g, jnp.minimum(i, last), 0

  def at_written(b, k, g, i, *_):
    return b, k * groups + g, jnp.maximum(i - 2, 0), 0
  keys = pl.BlockSpec((1, 1, S, H), lambda b, k, g, i, *_: (b, k, 0, 0))
  inputs = [
    pl.BlockSpec((1, 1, tq), lambda b, k, g, i, *_: (b, 0, jnp.clip(i - 1, 0, last))),
    pl.BlockSpec((1, S // tk, tk), lambda b, k, g, i, *_: (b, 0, 0)),
    pl.BlockSpec((1, heads, tq, H), at_next), keys, keys]
  outputs = [
    pl.BlockSpec((1, heads, tq, H), at_written),
    pl.BlockSpec((1, 1, heads, tq),
                 lambda b, k, g, i, *_: (b, k * groups + g, 0, jnp.maximum(i - 2, 0)))]
  return inputs, outputs


def _scratch(plan, dtype):
  """Shapes kept in VMEM beside the pipeline's buffers, by name."""
  C, H, S = plan.heads * plan.queries, plan.width, plan.key_blocks * plan.keys
  shapes = dict(scaled_queries=((C, H), dtype),
                values_turned=((S // plan.keys, H, plan.keys), dtype),
                scores=((plan.keys, C), jnp.float32), output=((H, C), jnp.float32),
                sums=((8, C), jnp.float32), done=((H, C), jnp.float32),
                done_sums=((8, C), jnp.float32))
  maxima = dict(maxima=((8, C), jnp.float32), done_maxima=((8, C), jnp.float32))
  return shapes | (maxima if plan.running else {})


def _require_vmem(plan, dtype, out_dtype):
  """Bytes of VMEM to allow the compiler; raises ValueError where a core has fewer than needed."""
  lanes, size = max(plan.width, 128), jnp.dtype(dtype).itemsize
  S, C = plan.key_blocks * plan.keys, plan.heads * plan.queries
  parts = dict(keys_values=4 * S * lanes * size, queries=2 * C * lanes * size,
               written=2 * C * lanes * jnp.dtype(out_dtype).itemsize)
  for name, (shape, kept) in _scratch(plan, dtype).items():
    parts[name] = math.prod(shape[:-1]) * max(shape[-1], 128) * jnp.dtype(kept).itemsize
  capacity = target.vmem() * 15 // 16
  flash_blocks.require_vmem('flash_forward', parts, capacity - 4 * flash_blocks.MIB,
                            'lower blocks.resident (keys kept) or blocks.queries')
  return capacity


def _call(plan, scalars, q_segment, k_segment, q_BNTH, k_BKSH, v_BKSH, out_dtype, interpret):
  """(o_BNTH, lse_BNT) of padded inputs."""
  B, N, T, H = q_BNTH.shape
  K, S = k_BKSH.shape[1:3]
  groups = N // K // plan.heads
  inputs, outputs = _specs(plan, groups, S)
  o, lse = pl.pallas_call(
    functools.partial(_kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=(B, K, groups, plan.query_blocks + 2),
      in_specs=inputs, out_specs=outputs,
      scratch_shapes=[pltpu.VMEM(*x) for x in _scratch(plan, q_BNTH.dtype).values()]),
    out_shape=[jax.ShapeDtypeStruct(q_BNTH.shape, out_dtype),
               jax.ShapeDtypeStruct((B, N // plan.heads, plan.heads, T), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=_require_vmem(plan, q_BNTH.dtype, out_dtype)),
    interpret=interpret, name='flash_forward' + ('_running' if plan.running else ''),
  )(*scalars, q_segment, k_segment, q_BNTH, k_BKSH, v_BKSH)
  return o, lse.reshape(B, N, T)


def merge(one, other):
  """(o_BTNH, lse_BNT) of the keys of both, from two (output, log-sum-exp) of different keys."""
  (o1, lse1), (o2, lse2) = one, other
  lse = jnp.logaddexp(lse1, lse2)
  lse = jnp.maximum(lse, MASKED)
  weigh = lambda o, part: o.astype(jnp.float32) * jnp.exp(part - lse).swapaxes(1, 2)[..., None]
  return weigh(o1, lse1) + weigh(o2, lse2), lse


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_BT, k_segment_BS, q_start_X, k_start_Y, *,
            window=None, bound=None, blocks=None, interpret=None):
  """(output (B, T, N, H), its log-sum-exp (B, N, T) float32) of queries over the keys they see.

  Query t sees key s if s's slot is not after t's, the segments are the same and above 0, and, with
  a `window`, the slots are less than it apart. Slots: see `flash_blocks`. A query that sees nothing
  has output 0 and log-sum-exp `MASKED`. Scale H^-1/2. `bound` is at least every |score|, known from
  normalised queries and keys: up to `LIMIT` no maxima are taken; without one they are. `blocks` is
  a dict that replaces sizes of `choose`. Raises ValueError if a core's VMEM is too small for them.
  """
  N, H = q_BTNH.shape[2:]
  S, K = k_BSKH.shape[1:3]
  Y = k_start_Y.shape[0]
  blocks = choose(N, K, H, S, q_BTNH.dtype)._replace(**blocks or {})
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  k, v, k_segment = (flash_blocks.pad(x, Y, blocks.keys) for x in (k_BSKH, v_BSKH, k_segment_BS))
  run = functools.partial(_run, blocks, window, bound, interpret, q_BTNH, q_segment_BT, q_start_X)
  if k.shape[1] <= blocks.resident:
    return run(k, v, k_segment, k_start_Y, q_BTNH.dtype)
  each = k.shape[1] // Y
  turns = -(-each // (blocks.resident // blocks.keys * blocks.keys))
  size = -(-each // turns // blocks.keys) * blocks.keys
  cut = lambda x: flash_blocks.pad(x, Y, size * turns).reshape(
    x.shape[0], Y * turns, size, *x.shape[2:]).swapaxes(0, 1)
  starts = k_start_Y[:, None] + size * jnp.arange(turns, dtype=jnp.int32)

  def turn(merged, part):
    *part, start = part
    return merge(merged, run(*part, start, jnp.float32)), None
  nothing = (jnp.zeros(q_BTNH.shape, jnp.float32),
             jnp.full((q_BTNH.shape[0], N, q_BTNH.shape[1]), MASKED))
  (o, lse), _ = jax.lax.scan(turn, nothing, (cut(k), cut(v), cut(k_segment), starts.reshape(-1, 1)))
  return o.astype(q_BTNH.dtype), lse


def _run(blocks, window, bound, interpret, q_BTNH, q_segment_BT, q_start_X, k_BSKH, v_BSKH,
         k_segment_BS, k_start_Y, out_dtype):
  """`forward` over keys that fit VMEM and are whole units."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  X = q_start_X.shape[0]
  q, q_segment = (flash_blocks.pad(x, X, blocks.queries) for x in (q_BTNH, q_segment_BT))
  n_q, n_k = q.shape[1] // blocks.queries, S // blocks.keys
  extents = flash_blocks.extents(*flash_blocks.pairs(
    q_segment, k_segment_BS, q_start_X, k_start_Y, blocks.queries, blocks.keys, window))
  scalars = [x.reshape(-1) for x in extents] + [
    flash_blocks.slots(q_start_X, q.shape[1], blocks.queries),
    flash_blocks.slots(k_start_Y, S, blocks.keys)]
  heads = math.gcd(blocks.heads, N // K)
  exact = q_BTNH.dtype == jnp.float32
  plan = Plan(blocks.queries, blocks.keys, blocks.units, heads, min(blocks.columns, blocks.queries),
              n_q, n_k, H, window, True, jax.lax.Precision.HIGHEST if exact else None)
  args = [scalars, jnp.where(q_segment > 0, q_segment, -1)[:, None],
          k_segment_BS.reshape(B, n_k, blocks.keys),
          *(x.swapaxes(1, 2) for x in (q, k_BSKH, v_BSKH)), out_dtype, interpret]

  def call(running):
    return _call(plan._replace(running=running), *args)
  if bound is None:
    o, lse = call(True)
  else:
    o, lse = jax.lax.cond(jnp.max(bound) <= LIMIT, lambda: call(False), lambda: call(True))
  return flash_blocks.unpad(o, X, T, 2).swapaxes(1, 2), flash_blocks.unpad(lse, X, T, 2)
