"""Gradients of causal grouped-query attention on a TPU, all three in one kernel.

p is made again from the saved log-sum-exp, so no maximum is looked for (Dao 2023, FlashAttention-2,
algorithm 2): p = exp(s - lse), ds = p (dp - delta), delta = sum(o do). Rows of a step are some
hundred queries of the heads that share a key head. Scores and dp are queries x keys; the gradients
are made transposed, head_dim x tokens: p and ds are then the weights of a 256-wide matrix unit,
where head_dim 128 as its output would leave half of it empty. Only dq needs ds turned, which the
otherwise idle transpose unit does (weights pushed transposed take a v6e twice as long). Keys,
values and their float32 gradients stay in VMEM for all queries of a key head; dq is complete within
a step, so nothing is summed outside the kernel. The exponentials of a chunk of keys run beside the
products of the chunk before it, also across the ends of query blocks: step i of the grid completes
block i - 1. v5p's two cores share the rows and key heads. Meaning: `reference.partial_attention`.
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
from qwen3_jax.kernels.cost import cost

LOG2E = math.log2(math.e)
LANES = 128
NEVER = -(1 << 30)  # slots ahead, so that no key is seen


class Blocks(NamedTuple):
  """Sizes of a step."""
  queries: int  # slots of a query block
  heads: int  # query heads side by side; rows are heads x queries
  chunk: int  # keys of one round of matrix products
  units: int  # chunks visited at once where none needs a mask, a power of two
  resident: int  # keys of a head that stay in VMEM; more are visited in turns


class Plan(NamedTuple):
  """What the kernel's code is made for."""
  blocks: Blocks
  width: int
  scale: float
  window: int | None
  precision: jax.lax.Precision | None
  summed: bool = False  # dq is added to what other keys gave

  @property
  def rows(self):
    return self.blocks.heads * self.blocks.queries


class Scratch(NamedTuple):
  """What stays in VMEM; `turned` is head_dim (or keys) x tokens, columns are lane copies."""
  q: jax.Array  # times H^-1/2 log2(e)
  do: jax.Array
  q_turned: jax.Array
  do_turned: jax.Array
  k_turned: jax.Array
  lse: jax.Array  # times log2(e)
  delta: jax.Array
  segment: jax.Array
  bias: jax.Array
  p: jax.Array
  ds: jax.Array
  ds_turned: jax.Array
  dq_turned: jax.Array
  dk_turned: jax.Array
  dv_turned: jax.Array


def choose(N, K, H, S, dtype):
  """`Blocks` for some lengths: from the table, else about a thousand rows of few slots."""
  heads = max(d for d in range(1, 6) if N // K % d == 0)
  queries = LANES * round(1024 / heads / LANES)
  resident = target.vmem() // (8 * flash_blocks.MIB) * 1024 * 2 // jnp.dtype(dtype).itemsize
  default = dict(queries=queries, heads=heads, chunk=256, units=4, resident=resident)
  found = table.choose('flash_backward', N=N, K=K, H=H, S=S, dtype=jnp.dtype(dtype).name)
  if (N // K) % found.get('heads', 1):  # the table's are of another ratio of heads
    found = {}
  return Blocks(**default | found)


def _widen(x, width):
  """Lane copies of a column, (rows, lanes), as (rows, width)."""
  return x if x.shape[1] == width else jnp.concatenate([x] * (width // x.shape[1]), axis=1)


def _columns(rows):
  """Rows (n, m) as columns' lane copies, n x (m, LANES), exactly, by the matrix unit.

  Parts of 8 bits, as bfloat16 has them, add up to the float32.
  """
  parts, n = [], rows.shape[0]
  for _ in range(3):
    bits = jax.lax.bitcast_convert_type(rows, jnp.int32) & -65536
    parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
    rows = rows - parts[-1]
  parts = jnp.concatenate(parts, axis=0).astype(jnp.bfloat16)
  number = jax.lax.broadcasted_iota(jnp.int32, (3 * n, LANES), 0) % n
  pick = lambda i: jnp.where(number == i, 1.0, 0.0).astype(jnp.bfloat16)
  return [jax.lax.dot_general(parts, pick(i), (((0,), (0,)), ((), ())),
                              preferred_element_type=jnp.float32) for i in range(n)]


def _load(plan, q_segment_ref, lse_ref, q_ref, do_ref, o_ref, scr):
  """Makes the rows of a query block, their log-sum-exp and delta."""
  tq, H, lanes = plan.blocks.queries, plan.width, scr.lse.shape[1]
  lse = _columns(lse_ref[0, 0] * LOG2E)
  for head in range(plan.blocks.heads):
    rows, lane = slice(head * tq, (head + 1) * tq), slice(head * H, (head + 1) * H)
    q = q_ref[0, :, lane].astype(jnp.float32) * (plan.scale * LOG2E)
    scr.q[rows, :], scr.do[rows, :] = q.astype(scr.q.dtype), do_ref[0, :, lane]
    delta = do_ref[0, :, lane].astype(jnp.float32) * o_ref[0, :, lane].astype(jnp.float32)
    scr.delta[rows, :] = jnp.broadcast_to(delta.sum(1, keepdims=True), (tq, lanes))
    scr.lse[rows, :] = lse[head][:, :lanes]
  scr.segment[...] = jnp.broadcast_to(q_segment_ref[0], (lanes, tq)).T


def _exchange(plan, sum_ref, dq_ref, scr):
  """Writes dq of the query block that is complete, turns the rows of the one that follows.

  `sum_ref` has what other keys gave to dq.
  """
  tq, H = plan.blocks.queries, plan.width
  for head in range(plan.blocks.heads):
    lane = slice(head * H, (head + 1) * H)
    dq = scr.dq_turned[:, head * tq:(head + 1) * tq] * plan.scale
    dq = dq.astype(dq_ref.dtype).T
    dq_ref[0, :, lane] = dq if sum_ref is None else sum_ref[0, :, lane] + dq
  scr.q_turned[...], scr.do_turned[...] = scr.q[...].T, scr.do[...].T
  scr.dq_turned[...] = jnp.zeros_like(scr.dq_turned)


def _make_bias(plan, ahead, k_segment, scr):
  """Makes the scores' bias, (queries, chunk): -inf where a query does not see a key.

  The block's first query is `ahead` slots after the chunk's first key.
  """
  shape = scr.bias.shape
  behind = (jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            - jax.lax.broadcasted_iota(jnp.int32, shape, 1) + ahead)
  seen = (k_segment == _widen(scr.segment[...], shape[1])) & (behind >= 0)
  if plan.window is not None:
    seen &= behind < plan.window
  scr.bias[...] = jnp.where(seen, 0.0, -jnp.inf)


def _dot(plan, a, b, contract_b=0):
  return jax.lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), precision=plan.precision,
                             preferred_element_type=jnp.float32)


def _keys(plan, at):
  """Where the keys of chunk `at` are."""
  return pl.ds(pl.multiple_of(at * plan.blocks.chunk, plan.blocks.chunk), plan.blocks.chunk)


def _differentiate(plan, k_ref, v_ref, scr, at, bias):
  """p and ds of all rows and the keys of chunk `at`, in the inputs' type."""
  keys, chunk = _keys(plan, at), plan.blocks.chunk
  s = _dot(plan, scr.q[...], k_ref[0, keys, :], 1) - _widen(scr.lse[...], chunk)
  if bias is not None:
    s = s + jnp.concatenate([bias[...]] * plan.blocks.heads, axis=0)
  p = jnp.exp2(s)
  dp = _dot(plan, scr.do[...], v_ref[0, keys, :], 1) - _widen(scr.delta[...], chunk)
  return p.astype(scr.q.dtype), (p * dp).astype(scr.q.dtype)


def _add(plan, scr, at, p, ds, ds_turned):
  """Adds what chunk `at` of the keys gives to all three gradients."""
  keys = _keys(plan, at)
  scr.dv_turned[:, keys] += _dot(plan, scr.do_turned[...], p)
  scr.dq_turned[...] += _dot(plan, scr.k_turned[:, keys], ds_turned[...])
  scr.dk_turned[:, keys] += _dot(plan, scr.q_turned[...], ds)


def _visit(plan, k_ref, v_ref, scr, pending, visited, bias=None):
  """Makes p and ds of the chunks `visited`, and adds those of `pending` and all but the last.

  The exponentials of a chunk so run beside the products of the one before it, which has left p, ds
  and ds transposed in VMEM. Returns the new pending chunk.
  """
  p, ds = scr.p[...], scr.ds[...]
  for n, at in enumerate(visited):
    fresh = _differentiate(plan, k_ref, v_ref, scr, at, bias)
    _add(plan, scr, pending, p, ds, scr.ds_turned.at[n % 2])
    pending, (p, ds) = at, fresh
    scr.ds_turned[0 if n + 1 == len(visited) else (n + 1) % 2] = ds.T
  scr.p[...], scr.ds[...] = p, ds
  return pending


def _visit_rest(plan, extents, make_bias, k_ref, v_ref, scr, pending):
  """Visits the needed chunks but the last: several at once where none needs a mask, else one."""
  low, last, first, shut = extents
  first = jnp.clip(first, low, last)
  shut, lead = jnp.clip(shut, first, last), first - low
  visit = functools.partial(_visit, plan, k_ref, v_ref, scr)
  width = plan.blocks.units
  while width > 1:
    def several(n, pending, width=width, first=first):
      return visit(pending, [first + n * width + u for u in range(width)])
    rounds = (shut - first) // width
    pending = jax.lax.fori_loop(0, rounds, several, pending)
    first, width = first + rounds * width, width // 2

  def one(n, pending):
    at = jnp.where(n < lead, low + n, first + n - lead)
    make_bias(at)
    return visit(pending, [at], scr.bias)
  return jax.lax.fori_loop(0, lead + last - first, one, pending)


def _kernel(plan, low_ref, high_ref, open_ref, shut_ref, q_slot_ref, k_slot_ref, q_segment_ref,
            k_segment_ref, lse_ref, q_ref, do_ref, o_ref, k_ref, v_ref, *refs):
  sum_ref, refs = (refs[0], refs[1:]) if plan.summed else (None, refs)
  dq_ref, dk_ref, dv_ref, pending_ref, *scratch = refs
  scr = Scratch(*scratch)
  group, step, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  block = jnp.minimum(step, steps - 2)
  at = pl.program_id(0) * (steps - 1) + block
  low = low_ref[at]
  some = (high_ref[at] > low) & (step < steps - 1)
  last = jnp.where(some, high_ref[at] - 1, low)

  def make_bias(n):
    ahead = jnp.where(some, q_slot_ref[block] - k_slot_ref[n], NEVER)
    _make_bias(plan, ahead, k_segment_ref[0, pl.ds(n, 1), :], scr)

  @pl.when((group == 0) & (step == 0))
  def _():
    _start(plan, k_ref, scr)
    pending_ref[0] = -1

  alive = some | (pending_ref[0] >= 0)

  @pl.when(alive)
  def _():
    _add(plan, scr, jnp.maximum(pending_ref[0], 0), scr.p[...], scr.ds[...], scr.ds_turned.at[0])
    _load(plan, q_segment_ref, lse_ref, q_ref, do_ref, o_ref, scr)
    _exchange(plan, sum_ref, dq_ref, scr)
    make_bias(last)
    scr.p[...], ds = _differentiate(plan, k_ref, v_ref, scr, last, scr.bias)
    scr.ds[...], scr.ds_turned[0] = ds, ds.T
    extents = low, last, open_ref[at], shut_ref[at]
    pending = _visit_rest(plan, extents, make_bias, k_ref, v_ref, scr, last)
    pending_ref[0] = jnp.where(some, pending, -1)  # of none, p and ds are 0

  @pl.when(~alive)
  def _():
    dq_ref[...] = jnp.zeros_like(dq_ref) if sum_ref is None else sum_ref[...]

  @pl.when((group == pl.num_programs(2) - 1) & (step == steps - 1))
  def _():
    _finish(plan, dk_ref, dv_ref, scr)


def _in_parts(plan, keys, do):
  """Calls `do` with slices that make up all keys."""
  size = plan.blocks.chunk * math.gcd(plan.blocks.units, keys // plan.blocks.chunk)

  def run(n, _):
    do(pl.ds(pl.multiple_of(n * size, size), size))
  jax.lax.fori_loop(0, keys // size, run, None)


def _start(plan, k_ref, scr):
  """Prepares what all queries of a key head share."""
  for x in scr.p, scr.ds, scr.ds_turned, scr.q_turned, scr.do_turned, scr.dq_turned:
    x[...] = jnp.zeros_like(x)

  def turn(keys):
    scr.k_turned[:, keys] = k_ref[0, keys, :].T
    for x in scr.dk_turned, scr.dv_turned:
      x[:, keys] = jnp.zeros((plan.width, keys.size), jnp.float32)
  _in_parts(plan, k_ref.shape[1], turn)


def _finish(plan, dk_ref, dv_ref, scr):
  """Writes the gradients of a key head."""
  def write(keys):
    dk_ref[0, keys, :] = (scr.dk_turned[:, keys].T * (1 / LOG2E)).astype(dk_ref.dtype)
    dv_ref[0, keys, :] = scr.dv_turned[:, keys].T.astype(dv_ref.dtype)
  _in_parts(plan, dk_ref.shape[1], write)


def _specs(plan, groups, query_blocks, S):
  """Block specs of the inputs and of the outputs: dq is written a step after its queries came."""
  tq, chunk, heads, H = plan.blocks.queries, plan.blocks.chunk, plan.blocks.heads, plan.width

  def now(i):
    return jnp.minimum(i, query_blocks - 1)
  queries = pl.BlockSpec((1, tq, heads * H), lambda b, k, g, i, *_: (b, now(i), k * groups + g))
  done = pl.BlockSpec((1, tq, heads * H),
                      lambda b, k, g, i, *_: (b, jnp.maximum(i - 1, 0), k * groups + g))
  keys = pl.BlockSpec((1, S, H), lambda b, k, g, i, *_: (b, 0, k))
  inputs = [
    pl.BlockSpec((1, 1, tq), lambda b, k, g, i, *_: (b, 0, now(i))),
    pl.BlockSpec((1, S // chunk, chunk), lambda b, k, g, i, *_: (b, 0, 0)),
    pl.BlockSpec((1, 1, heads, tq), lambda b, k, g, i, *_: (b, k * groups + g, 0, now(i))),
    queries, queries, queries, keys, keys] + [done] * plan.summed
  return inputs, [done, keys, keys]


def _scratch(plan, S, dtype):
  """(shape, type) of every array of `Scratch`."""
  blocks, H, rows = plan.blocks, plan.width, plan.rows
  lanes = math.gcd(blocks.chunk, LANES)
  turned = (H, S), jnp.float32
  return Scratch(
    q=((rows, H), dtype), do=((rows, H), dtype), q_turned=((H, rows), dtype),
    do_turned=((H, rows), dtype), k_turned=((H, S), dtype), lse=((rows, lanes), jnp.float32),
    delta=((rows, lanes), jnp.float32), segment=((blocks.queries, lanes), jnp.int32),
    bias=((blocks.queries, blocks.chunk), jnp.float32),
    p=((rows, blocks.chunk), dtype),
    ds=((rows, blocks.chunk), dtype), ds_turned=((2, blocks.chunk, rows), dtype),
    dq_turned=((H, rows), jnp.float32), dk_turned=turned, dv_turned=turned)


def _require_vmem(plan, S, dtype, out_dtype):
  """Bytes of VMEM to allow the compiler; raises ValueError where a core has fewer than needed."""
  size, out_size = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize
  wide = lambda shape: math.prod(shape[:-1]) * max(shape[-1], LANES)
  parts = dict(keys_values=4 * wide((S, plan.width)) * size,
               their_gradients=4 * wide((S, plan.width)) * out_size,
               queries=wide((plan.rows, plan.width)) * (6 * size + 2 * (1 + plan.summed) * 4))
  for name, (shape, kept) in _scratch(plan, S, dtype)._asdict().items():
    parts[name] = wide(shape) * jnp.dtype(kept).itemsize
  capacity = target.vmem() * 15 // 16
  flash_blocks.require_vmem('flash_backward', parts, capacity - 8 * flash_blocks.MIB,
                            'lower blocks.resident (keys kept) or blocks.queries')
  return capacity


def _call(plan, scalars, arrays, dtype, interpret):
  """(dq, dk, dv) of padded inputs in the kernel's order, heads and head_dim as one axis.

  Where dq is `summed` it is in float32, as the sum given last, whose memory it takes.
  """
  _, k_segment, lse, q, _, _, k, v, *dq = arrays
  B, groups, heads, T = lse.shape
  S, K = k.shape[1], k.shape[2] // plan.width
  query_blocks = T // plan.blocks.queries
  inputs, outputs = _specs(plan, groups // K, query_blocks, S)
  scratch = [pltpu.SMEM((1,), jnp.int32)] + [pltpu.VMEM(*x) for x in _scratch(plan, S, q.dtype)]
  types = jnp.float32 if plan.summed else dtype, dtype, dtype
  return pl.pallas_call(
    functools.partial(_kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=(B, K, groups // K, query_blocks + 1),
      in_specs=inputs, out_specs=outputs, scratch_shapes=scratch),
    out_shape=[jax.ShapeDtypeStruct(x.shape, kept) for x, kept in zip((q, k, v), types)],
    input_output_aliases={len(scalars) + len(arrays) - 1: 0} if plan.summed else {},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=_require_vmem(plan, S, q.dtype, dtype)),
    cost_estimate=cost(  # as if half of the pairs were seen
      5 * B * T * q.shape[2] * S, (q, q, q, k, v, *dq, q, k, v), B * groups * heads * T * S // 2),
    interpret=interpret, name='flash_backward',
  )(*scalars, *arrays)


def _turns(blocks, Y, arrays, k_start_Y):
  """Arrays of keys cut into equal turns that fit VMEM, (turns, B, keys, ..), and their starts."""
  each = arrays[0].shape[1] // Y
  turns = -(-each // (blocks.resident // blocks.chunk * blocks.chunk))
  size = -(-each // turns // blocks.chunk) * blocks.chunk
  cut = lambda x: flash_blocks.pad(x, Y, size * turns).reshape(
    x.shape[0], Y * turns, size, *x.shape[2:]).swapaxes(0, 1)
  starts = k_start_Y[:, None] + size * jnp.arange(turns, dtype=jnp.int32)
  return [*map(cut, arrays), starts.reshape(-1, 1)]


def backward(q_BTNH, k_BSKH, v_BSKH, q_segment_BT, k_segment_BS, q_start_X, k_start_Y, o_BTNH,
             lse_BNT, do_BTNH, *, window=None, blocks=None, dtype=None, interpret=None):
  """(dq, dk, dv) of `flash_attention.forward` for the cotangent `do_BTNH` of its output.

  `o` and `lse` are of all keys that the queries see; those given here may be a part of them: the
  gradients of the parts then add up. `dtype` is what the gradients are returned in (the inputs').
  `blocks` is a dict that replaces sizes of `choose`. Raises ValueError if a core's VMEM is too
  small for them.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  X, Y, wide = q_start_X.shape[0], k_start_Y.shape[0], H + -H % LANES
  dtype = dtype or q_BTNH.dtype
  blocks = choose(N, K, H, S, q_BTNH.dtype)._replace(**blocks or {})
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  exact = q_BTNH.dtype == jnp.float32
  plan = Plan(blocks, wide, H ** -0.5, window, jax.lax.Precision.HIGHEST if exact else None)

  def flat(x):  # a head's width becomes whole lanes, and all heads one axis
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, wide - H)]) if wide > H else x
    return x.reshape(*x.shape[:2], -1)
  long = lambda x: flash_blocks.pad(x, X, blocks.queries)
  q_segment = long(q_segment_BT)
  lse = long(lse_BNT.swapaxes(1, 2)).swapaxes(1, 2)
  lse = lse.reshape(B, N // blocks.heads, blocks.heads, -1)
  queries = [long(flat(x)) for x in (q_BTNH, do_BTNH, o_BTNH)]

  def run(plan, k, v, k_segment, k_start_Y, *dq):
    scalars = _plan_visits(plan, q_segment, k_segment, q_start_X, k_start_Y)
    arrays = [jnp.where(q_segment > 0, q_segment, -1)[:, None],
              k_segment.reshape(B, -1, blocks.chunk), lse, *queries, k, v, *dq]
    return _call(plan, scalars, arrays, dtype, interpret)
  keys = [flash_blocks.pad(x, Y, blocks.chunk) for x in (flat(k_BSKH), flat(v_BSKH), k_segment_BS)]
  if keys[0].shape[1] <= blocks.resident:
    dq, *dkv = run(plan, *keys, k_start_Y)
  else:
    def turn(dq, part):
      dq, *dkv = run(plan._replace(summed=True), *part, dq)
      return dq, dkv
    dq, dkv = jax.lax.scan(turn, jnp.zeros(queries[0].shape, jnp.float32),
                           _turns(blocks, Y, (flat(k_BSKH), flat(v_BSKH), k_segment_BS), k_start_Y))
    dkv = [x.swapaxes(0, 1).reshape(B, -1, x.shape[-1]) for x in dkv]
  each = lambda x, heads, stretches, length: flash_blocks.unpad(
    x.reshape(*x.shape[:2], heads, wide)[..., :H], stretches, length)
  return each(dq, N, X, T).astype(dtype), *(each(x, K, Y, S) for x in dkv)


def _plan_visits(plan, q_segment, k_segment, q_start_X, k_start_Y):
  """The kernel's scalars: extents of every query block, slots of query blocks and of chunks."""
  queries, chunk = plan.blocks.queries, plan.blocks.chunk
  extents = flash_blocks.extents(*flash_blocks.pairs(
    q_segment, k_segment, q_start_X, k_start_Y, queries, chunk, plan.window))
  return [x.reshape(-1) for x in extents] + [
    flash_blocks.slots(q_start_X, q_segment.shape[1], queries),
    flash_blocks.slots(k_start_Y, k_segment.shape[1], chunk)]
