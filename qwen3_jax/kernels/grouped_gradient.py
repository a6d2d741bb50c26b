"""Gradients of a mixture's experts on rows sorted by expert, as TPU kernels.

For each row of expert e: y = down(h), h = silu(g) * u, g = gate x, u = up x, and the row's weight
is w. Given dy, unweighted:

  dh = dy down^T     dw = sum_F dh h     du = w dh silu(g)     dg = w dh u silu'(g)
  dx = dg gate^T + du up^T     d_gate = x^T dg     d_up = x^T du     d_down = (w h)^T dy

`_weights_kernel` reads a tile of rows once and does all of it where an expert's three matrices
fit in VMEM whole. Where they do not, or where two cores share the work, it does everything but dx,
a part of F at a time, and `_inputs_kernel` does dx. An expert's gradients stay in VMEM in float32
over all its rows: HBM sees them once.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import blocks as table
from qwen3_jax.kernels import row_sum, target
from qwen3_jax.kernels.cost import cost

ALIGN = 64  # rows; every expert's group begins and ends at a multiple
SPARE = 10 << 20  # bytes of VMEM left to the compiler, which keeps products there
LANES = 128
NT = (((1,), (1,)), ((), ()))  # a b^T
NN = (((1,), (0,)), ((), ()))  # a b


class Blocks(NamedTuple):
  rows: int  # of a full tile; the last tile of an expert may have as many as the last height
  heights: tuple  # row counts that have code of their own, ascending
  columns: int  # of D in one turn of the inner loop
  hidden: int  # of F in one piece of the elementwise part
  splits: int  # parts of F; 1: dx in the same pass
  inputs: int  # parts of D in the pass for dx


def backward(residuals, dy_MD, *, load=None, blocks=None, interpret=None):
  """(dx_MD, dgate_MX, dgate_EDF, dup_EDF, ddown_EFD) from the forward pass's residuals.

  These are x_MD, gate_MX, the plan's slot_P, row_MX and count_E for groups of whole ALIGN rows, the
  three weights, and g_PF and u_PF, which may be anything after the last group. With `load`, of how
  many rows are expected to be some token's, the last is that of choices which are no expert's.
  """
  x_MD, gate_MX, slot_P, row_MX, count_E, *weights, g_PF, u_PF = residuals
  fill = dict(axis=0, mode='fill', fill_value=0)
  token_P = slot_P // gate_MX.shape[1]
  weight_P = jnp.take(gate_MX.reshape(-1).astype(jnp.float32), slot_P, **fill)
  dx_PD, dweight_P, *dweights = rows_gradient(
      jnp.take(x_MD, token_P, **fill), jnp.take(dy_MD, token_P, **fill), g_PF, u_PF, weight_P,
      count_E, *weights, load=load, blocks=blocks, interpret=interpret)
  if load is not None:
    dweight_P = dweight_P.at[-1].set(0)
    dx_MD = row_sum.sum_rows(dx_PD, token_P, len(x_MD), interpret)
  else:
    dx_MD = dx_PD[row_MX].astype(jnp.float32).sum(1).astype(x_MD.dtype)
  return dx_MD, dweight_P[row_MX].astype(gate_MX.dtype), *dweights


def rows_gradient(x_PD, dy_PD, g_PF, u_PF, weight_P, count_E, gate_EDF, up_EDF, down_EFD, *,
                  load=None, blocks=None, interpret=None):
  """(dx_PD, dweight_P float32, dgate_EDF, dup_EDF, ddown_EFD) of rows sorted by expert.

  Expert e has the rows from sum_{i<e} ceil(count_i / ALIGN) * ALIGN; after the last group x and dy
  are finite, g and u anything, and dx and dweight undefined. ValueError where VMEM is too small.
  """
  (P, D), (E, F, _) = x_PD.shape, down_EFD.shape
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  blocks = choose(P, D, F, E, x_PD.dtype) if blocks is None else blocks
  check(P, D, F, x_PD.dtype, blocks)
  load = P if load is None else load + E * ALIGN // 2
  rows_E = -(-count_E // ALIGN) * ALIGN
  scalars = (rows_E, _following(rows_E), jnp.cumsum(rows_E) - rows_E)
  scalars = tuple(s.astype(jnp.int32) for s in scalars)
  dx_PD, dg_PF, du_PF, dweight_P, *weights = _weights_gradient(
      scalars, x_PD, dy_PD, g_PF, u_PF, weight_P, gate_EDF, up_EDF, down_EFD, load, blocks,
      interpret)
  if blocks.splits > 1:
    dx_PD = _inputs_gradient(scalars, dg_PF, du_PF, gate_EDF, up_EDF, load, blocks, interpret)
  return dx_PD, dweight_P, *weights


def choose(P, D, F, E, dtype):
  """Blocks from the table, else the most rows in the fewest parts that this chip's VMEM holds."""
  known = table.choose('grouped_gradient', P=P, D=D, F=F, E=E, dtype=jnp.dtype(dtype).name)
  known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
  for rows in range(min(512, P, max(128, (P // E + 32) // 128 * 128)), 0, -128):
    blocks = _divide(D, F, dtype, rows)._replace(**known)
    if max(needs(D, F, dtype, blocks).values()) <= room():
      break
  return blocks


def _divide(D, F, dtype, rows):
  """Blocks with the fewest parts of F and of D that fit, or else with the most."""
  cores, narrow = target.cores(), target.kind() in ('v5e', 'v5p')  # matrix units of 128, not 256
  unit, columns, hidden = (128, 1024, 384) if narrow else (256, 512, 256)
  heights = *range(unit, rows, unit), rows, rows + ALIGN
  blocks = Blocks(rows, heights, columns, hidden, cores, cores)
  for name, width, kernel in (('splits', F, 'experts_backward'),
                              ('inputs', D, 'experts_backward_inputs')):
    for parts in range(cores, width // LANES + 1, cores):
      if width % (parts * LANES) == 0 and needs(D, F, dtype, blocks)[kernel] > room():
        blocks = blocks._replace(**{name: parts})

  def divisor(width, most):
    return max((n for n in range(LANES, most + 1, LANES) if width % n == 0), default=width)
  return blocks._replace(hidden=divisor(F // blocks.splits, hidden),
                         columns=divisor(D // blocks.inputs, columns))


def room():
  return target.vmem() - SPARE


def needs(D, F, dtype, blocks):
  """Bytes of VMEM that either kernel's arrays take: {'experts_backward': ..., ..._inputs: ...}."""
  size, tile, part = jnp.dtype(dtype).itemsize, blocks.heights[-1], F // blocks.splits
  whole = blocks.splits == 1
  weights = D * part * ((12 if whole else 8) * size + (12 if size < 4 else 0))
  tiles = tile * size * (4 * D + 4 * part + (2 * D + 3 * part if whole else 5 * part))
  inputs = size * (4 * D // blocks.inputs * F + tile * (4 * F + 2 * D // blocks.inputs))
  return {'experts_backward': weights + tiles + 4 * tile * LANES * 4,
          'experts_backward_inputs': 0 if whole else inputs}


def check(P, D, F, dtype, blocks):
  """Raises ValueError where blocks do not divide the shapes or VMEM does not hold them."""
  part = F // blocks.splits
  if (F % blocks.splits or part % blocks.hidden or D % (blocks.columns * blocks.inputs)
      or P < blocks.rows or any(n % ALIGN for n in (P, blocks.rows, *blocks.heights))):
    raise ValueError(f'{blocks} do not fit {P} rows, D={D}, F={F}: splits times hidden must divide '
                     f'F, columns times inputs D, and rows be multiples of {ALIGN}, at most {P}')
  for name, need in needs(D, F, dtype, blocks).items():
    if need > room():
      raise ValueError(
          f'{name} needs {need / 2**20:.1f} MiB of VMEM and {SPARE >> 20} to spare for D={D} and '
          f'F={F}, this chip has {target.vmem() / 2**20:.0f}: take more splits than '
          f'{blocks.splits} and inputs than {blocks.inputs}, or fewer rows than {blocks.rows}')


def _following(rows_E):
  """The rows of the first expert from e on that has any, for e from 0 to E; 0 if none has."""
  E = len(rows_E)
  index_E = jnp.where(rows_E > 0, jnp.arange(E), E)
  index_E = jnp.flip(jax.lax.cummin(jnp.flip(index_E)))
  return jnp.append(jnp.take(rows_E, index_E, mode='fill', fill_value=0), 0)


def _dot(a, b, dims):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _copy(pairs, semaphore, live, most, act):
  """Starts or waits for copies of `live` rows: whole pieces of `most`, then ALIGN rows at a time.

  `pairs(offset, size)` yields (source, target) of `size` rows from `offset`.
  """
  def copy(offset, size):
    for source, to in pairs(pl.multiple_of(offset, ALIGN), size):
      getattr(pltpu.make_async_copy(source, to, semaphore), act)()

  def piece(i, _):
    copy(whole + i * ALIGN, ALIGN)
    return 0
  whole = jnp.where(live >= most, most, 0)
  pl.when(live >= most)(lambda: copy(0, most))
  jax.lax.fori_loop(0, (live - whole) // ALIGN, piece, 0)


def _take(left, blocks):
  """Rows of the next tile of `left`: all where a tile has room, else the rows of a full one."""
  return jnp.where(left <= blocks.heights[-1], left, blocks.rows)


def _visit_tiles(rows_E, after_E, start_E, state, blocks, load, store, visit, least=0):
  """Runs visit(tile's number, slot, rows) on this grid step's expert, copying rows round it.

  An expert without rows has `least` tiles, of 0 rows.
  `state` in SMEM: tiles visited by this core, and the rows still being stored from either slot.
  """
  e = pl.program_id(1)
  start, total = start_E[e], rows_E[e]

  def begin(_, c):
    for i in range(3):
      state[i] = 0
    load(0, _take(after_E[0], blocks), 0, 'start')
    return c
  jax.lax.fori_loop(0, jnp.where(e == 0, 1, 0), begin, 0)

  def step(t, _):
    slot, left = state[0] & 1, total - t * blocks.rows
    here, n = start + t * blocks.rows, _take(left, blocks)
    following = jnp.where(left > n, left - n, jnp.where(total > 0, after_E[e + 1], 0))
    load(here + n, _take(following, blocks), 1 - slot, 'start')
    load(here, n, slot, 'wait')
    store(0, state[1 + slot], slot, 'wait')
    visit(t, slot, n)
    store(here, n, slot, 'start')
    state[1 + slot] = n
    state[0] += jnp.where(total > 0, 1, 0)
    return 0

  beyond = total - (blocks.heights[-1] - blocks.rows)  # what the last tile has more than others
  tiles = jnp.maximum(pl.cdiv(beyond, blocks.rows), jnp.where(total > 0, 1, least))
  jax.lax.fori_loop(0, tiles, step, 0)

  @pl.when(e == pl.num_programs(1) - 1)
  def _():
    for slot in range(2):
      store(0, state[1 + slot], slot, 'wait')


def _by_height(heights, rows, run):
  """Runs run(h) of the least height that has room for `rows`, 0 too."""
  for low, high in zip((-1, *heights), heights):
    pl.when((rows > low) & (rows <= high))(functools.partial(run, high))


def _hidden_gradient(h, rows, dy_ref, g_ref, u_ref, weight_ref, down_ref, dweight_ref, dg_ref,
                     du_ref, hidden_ref, width):
  """dg, du and (w h)^T of a tile's first h rows, zero beyond `rows`, and dw."""
  inside = jax.lax.broadcasted_iota(jnp.int32, (h, 1), 0) < rows
  weight = jnp.where(inside, weight_ref[:h], 0)
  dweight, dtype = 0, dg_ref.dtype
  for f in range(0, g_ref.shape[1], width):
    part = pl.ds(f, width)
    g, u = (ref[:h, part].astype(jnp.float32) for ref in (g_ref, u_ref))
    gated = 0.5 + 0.5 * jnp.tanh(0.5 * g)
    silu = g * gated
    hidden = silu * u
    hidden_ref[part, :h] = (hidden * weight).astype(dtype).T
    dh = _dot(dy_ref[:h], down_ref[part], NT)
    dweight += jnp.sum(dh * hidden, axis=1, keepdims=True)
    dh *= weight
    dg_ref[:h, part] = (dh * u * (gated + silu - silu * gated)).astype(dtype)
    du_ref[:h, part] = (dh * silu).astype(dtype)
  dweight_ref[:h] = dweight


class Refs(NamedTuple):
  """What the first kernel works on; `weights` is down alone where dx is left to the second."""
  rows_hbm: list  # x, dy, g, u, w
  weights: list  # gate, up, down
  out_hbm: list  # dw, then dx, or dg and du
  grads: list
  in_tiles: list  # two slots each
  out_tiles: list
  inner: list  # dg, du; none where they are out_tiles
  hidden: jax.Array  # (w h)^T
  state: jax.Array
  in_semaphore: jax.Array
  out_semaphore: jax.Array
  sums: list  # float32


def _group(refs, whole, own_sums):
  """(scalars, Refs) of the kernel's arguments."""
  refs = iter(refs)
  take = lambda n: [next(refs) for _ in range(n)]
  scalars, outs = take(3), 2 if whole else 3
  lists = [take(n) for n in (5, 3 if whole else 1, outs, 3, 5, outs, 2 if whole else 0)]
  return scalars, Refs(*lists, *take(4), take(3) if own_sums else lists[3])


def _weights_kernel(*refs, blocks, whole, own_sums):
  """One expert (grid axis 1) and one part of F (axis 0)."""
  scalars, refs = _group(refs, whole, own_sums)

  def visit(t, slot, rows):
    _by_height(blocks.heights, rows, functools.partial(_tile_gradient, refs, blocks, slot, rows,
                                                       t == 0))

  def clear(i, _):
    at = pl.ds(pl.multiple_of(i * ALIGN, ALIGN), ALIGN)
    for ref in refs.in_tiles[:4]:  # rows that no copy has reached meet zeros: no NaN there
      ref[:, at] = jnp.zeros((2, ALIGN, ref.shape[2]), ref.dtype)
    return 0
  tile = blocks.heights[-1]
  jax.lax.fori_loop(0, jnp.where(pl.program_id(1) == 0, tile // ALIGN, 0), clear, 0)
  load, store = _copies(refs, blocks, whole)
  # An expert without rows has one tile of 0 rows, which makes its gradients zero.
  _visit_tiles(*scalars, refs.state, blocks, load, store, visit, least=1)


def _copies(refs, blocks, whole):
  """The functions that start or wait for copies of a tile's rows in and out."""
  f, F = pl.program_id(0), refs.weights[-1].shape[0]
  lane = pl.ds(pl.multiple_of(f * F, F), F)

  def load(start, live, slot, act):
    def pairs(offset, size):
      at, to = pl.ds(pl.multiple_of(start + offset, ALIGN), size), pl.ds(offset, size)
      for i, (source, tile) in enumerate(zip(refs.rows_hbm, refs.in_tiles)):
        yield source.at[at, lane] if i in (2, 3) else source.at[at], tile.at[slot, to]
    _copy(pairs, refs.in_semaphore.at[slot], live, blocks.rows, act)

  def store(start, live, slot, act):
    def pairs(offset, size):
      at, of = pl.ds(pl.multiple_of(start + offset, ALIGN), size), pl.ds(offset, size)
      (dweight, *outs), (to_dweight, *to) = refs.out_tiles, refs.out_hbm
      yield dweight.at[slot, of], to_dweight.at[f, at]
      for tile, target_hbm in zip(outs, to):
        yield tile.at[slot, of], target_hbm.at[at] if whole else target_hbm.at[at, lane]
    _copy(pairs, refs.out_semaphore.at[slot], live, blocks.rows, act)
  return load, store


def _tile_gradient(refs, blocks, slot, rows, first, h):
  """All gradients of a tile of h rows, `rows` of them its own; `first` of its expert or not."""
  x_ref, dy_ref, g_ref, u_ref, weight_ref = (tile.at[slot] for tile in refs.in_tiles)
  dweight_ref, *outs = (tile.at[slot] for tile in refs.out_tiles)
  dg, du = refs.inner or outs
  *inputs, down_ref = refs.weights
  _hidden_gradient(h, rows, dy_ref, g_ref, u_ref, weight_ref, down_ref, dweight_ref, dg, du,
                   refs.hidden, blocks.hidden)

  def add(i, place, value):
    value += jnp.where(first, 0, refs.sums[i][place])
    refs.sums[i][place] = value
    if refs.grads[i] is not refs.sums[i]:
      refs.grads[i][place] = value.astype(refs.grads[i].dtype)

  def turn(i, _):
    at = pl.ds(pl.multiple_of(i * blocks.columns, blocks.columns), blocks.columns)
    add(2, (slice(None), at), _dot(refs.hidden[:, :h], dy_ref[:h, at], NN))
    if inputs:
      gate_ref, up_ref = inputs
      dx = _dot(dg[:h], gate_ref[at], NT) + _dot(du[:h], up_ref[at], NT)
      outs[0][:h, at] = dx.astype(outs[0].dtype)
    x_T = x_ref[:h, at].T
    add(0, (at, slice(None)), _dot(x_T, dg[:h], NN))
    add(1, (at, slice(None)), _dot(x_T, du[:h], NN))
    return 0
  turns = x_ref.shape[1] // blocks.columns
  jax.lax.fori_loop(0, turns, turn, 0, unroll=turns == 1)


def _weights_gradient(scalars, x_PD, dy_PD, g_PF, u_PF, weight_P, gate_EDF, up_EDF, down_EFD,
                      load, blocks, interpret):
  """(dx_PD or None, dg_PF and du_PF or None, dweight_P, the three weights' gradients)."""
  P, D = x_PD.shape
  E, F = down_EFD.shape[:2]
  tile, dtype = blocks.heights[-1], x_PD.dtype
  whole, part = blocks.splits == 1, F // blocks.splits
  own_sums = gate_EDF.dtype != jnp.float32
  S, VMEM, hbm = jax.ShapeDtypeStruct, pltpu.VMEM, pl.BlockSpec(memory_space=pl.ANY)
  wide = pl.BlockSpec((None, D, part), lambda f, e, *_: (e, 0, f))
  tall = pl.BlockSpec((None, part, D), lambda f, e, *_: (e, f, 0))
  tiles = [VMEM((2, tile, n), dtype) for n in (D, D, part, part)]
  column = VMEM((2, tile, 1), jnp.float32)
  out_rows = [D] if whole else [F, F]
  out_buffers = [VMEM((2, tile, D if whole else part), dtype) for _ in out_rows]
  scratch = [*tiles, column, column, *out_buffers,
             *([VMEM((tile, part), dtype)] * 2 if whole else []), VMEM((part, tile), dtype),
             pltpu.SMEM((3,), jnp.int32), pltpu.SemaphoreType.DMA((2,)),
             pltpu.SemaphoreType.DMA((2,)),
             *[VMEM(s, jnp.float32) for s in ((D, part), (D, part), (part, D)) if own_sums]]
  weights = (gate_EDF, up_EDF, down_EFD) if whole else (down_EFD,)
  dweight, *outs = pl.pallas_call(
      functools.partial(_weights_kernel, blocks=blocks, whole=whole, own_sums=own_sums),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(blocks.splits, E),
          in_specs=[hbm] * 5 + ([wide, wide] if whole else []) + [tall],
          out_specs=[hbm] * (1 + len(out_rows)) + [wide, wide, tall], scratch_shapes=scratch),
      out_shape=[S((blocks.splits, P, 1), jnp.float32), *(S((P, n), dtype) for n in out_rows),
                 *(S(w.shape, w.dtype) for w in (gate_EDF, up_EDF, down_EFD))],
      compiler_params=_params(), name='experts_backward', interpret=interpret,
      cost_estimate=cost((12 if whole else 8) * load * D * F, (
        x_PD, dy_PD, g_PF, u_PF, *weights, gate_EDF, up_EDF, down_EFD), load * F),
  )(*scalars, x_PD, dy_PD, g_PF, u_PF, weight_P[:, None], *weights)
  outs = [outs[0], None, None, *outs[1:]] if whole else [None, *outs]
  return *outs[:3], dweight.sum(0)[:, 0], *outs[3:]


def _inputs_kernel(rows_E, after_E, start_E, dg_hbm, du_hbm, gate_ref, up_ref, dx_hbm, dg_buf,
                   du_buf, dx_buf, state, in_sem, out_sem, *, blocks):
  """dx of one expert (grid axis 1) and one part of D (axis 0)."""
  columns, part = blocks.columns, gate_ref.shape[0]
  lane = pl.ds(pl.multiple_of(pl.program_id(0) * part, part), part)

  def load(start, live, slot, act):
    def pairs(offset, size):
      at = pl.ds(pl.multiple_of(start + offset, ALIGN), size)
      for source, to in ((dg_hbm, dg_buf), (du_hbm, du_buf)):
        yield source.at[at], to.at[slot, pl.ds(offset, size)]
    _copy(pairs, in_sem.at[slot], live, blocks.rows, act)

  def store(start, live, slot, act):
    def pairs(offset, size):
      at = pl.ds(pl.multiple_of(start + offset, ALIGN), size)
      yield dx_buf.at[slot, pl.ds(offset, size)], dx_hbm.at[at, lane]
    _copy(pairs, out_sem.at[slot], live, blocks.rows, act)

  def visit(t, slot, n):
    def run(h):
      def turn(i, _):
        at = pl.ds(pl.multiple_of(i * columns, columns), columns)
        dx = _dot(dg_buf[slot, :h], gate_ref[at], NT) + _dot(du_buf[slot, :h], up_ref[at], NT)
        dx_buf[slot, :h, at] = dx.astype(dx_buf.dtype)
        return 0
      jax.lax.fori_loop(0, part // columns, turn, 0, unroll=part == columns)
    _by_height(blocks.heights, n, run)

  _visit_tiles(rows_E, after_E, start_E, state, blocks, load, store, visit)


def _inputs_gradient(scalars, dg_PF, du_PF, gate_EDF, up_EDF, load, blocks, interpret):
  """dx_PD of the rows."""
  (P, F), dtype, (E, D, _) = dg_PF.shape, dg_PF.dtype, gate_EDF.shape
  tile, part, VMEM = blocks.heights[-1], D // blocks.inputs, pltpu.VMEM
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  weights = pl.BlockSpec((None, part, F), lambda d, e, *_: (e, d, 0))
  scratch = [*[VMEM((2, tile, F), dtype)] * 2, VMEM((2, tile, part), dtype),
             pltpu.SMEM((3,), jnp.int32), pltpu.SemaphoreType.DMA((2,)),
             pltpu.SemaphoreType.DMA((2,))]
  return pl.pallas_call(
      functools.partial(_inputs_kernel, blocks=blocks),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(blocks.inputs, E), in_specs=[hbm, hbm, weights, weights],
          out_specs=hbm, scratch_shapes=scratch),
      out_shape=jax.ShapeDtypeStruct((P, D), dtype), compiler_params=_params(),
      name='experts_backward_inputs', interpret=interpret,
      cost_estimate=cost(4 * load * D * F, (dg_PF, du_PF, gate_EDF, up_EDF)),
  )(*scalars, dg_PF, du_PF, gate_EDF, up_EDF)


def _params():
  return pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                              vmem_limit_bytes=target.vmem() - (2 << 20))
