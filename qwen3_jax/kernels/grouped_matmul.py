"""A mixture's experts on the rows of their tokens, as two TPU kernels; meaning `reference.experts`.

`experts_gate_up` holds all tokens in VMEM and gathers each tile's rows from there, so that no
permuted copy of them exists in HBM; it writes h = weight * silu(x gate) * (x up), sorted by expert.
`experts_down` holds all outputs in VMEM in float32 and adds each row of h down to its token's: the
rows of the product never reach HBM either. Both walk the experts in order, whose next weights
arrive meanwhile, and an expert's rows in tiles whose heights follow their number. While one tile is
multiplied, the next one's rows are gathered, or those of the one before added.
Splits of F (first) and of D (second) are the outermost grid axis: each core of a v5p takes some.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import blocks as table
from qwen3_jax.kernels import rows, target
from qwen3_jax.kernels.cost import cost

TAIL = 128  # rows of a product whose sums wait for the next tile
DEPTH = 256  # of D in one product
ALIGN = 64  # rows; every expert's group begins and ends at a multiple of it
SPARE = 5 << 20  # bytes of VMEM left to the compiler


class Blocks(NamedTuple):
  """Row counts that have code of their own, ascending, the last a whole tile's; and splits."""
  gate_heights: tuple = tuple(range(64, 577, 64))
  gate_splits: int = 1
  gate_columns: int = 256
  down_heights: tuple = tuple(range(64, 577, 64))
  down_splits: int = 1
  down_columns: int = 256


class Groups(NamedTuple):
  """Where rows sorted by expert lie: int32 scalars that the kernels walk by."""
  start_E: jax.Array
  rows_E: jax.Array  # with padding
  after_E: jax.Array  # E + 1: rows of the first expert from e on that has any


def swiglu_down(x_MD, token_P, weight_P, count_E, gate_EDF, up_EDF, down_EFD, *, save=False,
                load=None, blocks=None, interpret=None):
  """sum over a token's rows of weight * down(silu(gate x) * up x): (M, D), or (y_MD, g_PF, u_PF).

  Expert e has the rows from sum_{i<e} ceil(count_i / ALIGN) * ALIGN; `token_P` (M where a row is
  padding) and `weight_P` (float32) describe them. A token's rows are different experts'. With
  `save`, also x gate and x up of all rows, undefined after the last group. `load`: how many of the
  rows are expected to be some token's, for estimates; by default all.
  """
  M, D = x_MD.shape
  E, _, F = gate_EDF.shape
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  if blocks is None:
    blocks = Blocks() if interpret else choose(M, D, F, E, x_MD.dtype, save)
  check(M, D, F, x_MD.dtype, blocks, save, interpret)
  groups = _groups(count_E)
  load = len(token_P) if load is None else load + E * ALIGN // 2
  x_MD = jnp.pad(x_MD, ((0, -M % rows.PIECE), (0, 0)))
  token_P = jnp.where(token_P < M, token_P, len(x_MD)).astype(jnp.int32)
  h_PF, *saved = _gate_up(x_MD, token_P, weight_P, groups, gate_EDF, up_EDF, load, blocks, save,
                          interpret)
  y_MD = _down(h_PF, len(x_MD), token_P, groups, down_EFD, load, blocks, interpret)[:M]
  return (y_MD, *saved) if save else y_MD


def choose(M, D, F, E, dtype, save=False):
  """Blocks from the table, with as few splits as this chip has cores and VMEM allow; ValueError."""
  known = table.choose('grouped_matmul', M=M, D=D, F=F, E=E, dtype=jnp.dtype(dtype).name)
  blocks = Blocks(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
  for name in ('gate_heights', 'down_heights'):  # a group has at most M rows
    blocks = blocks._replace(**{name: tuple(h for h in getattr(blocks, name) if h < M + ALIGN)})
  for name, kernel, unit in (('gate_splits', 'experts_gate_up', F // rows.LANES),
                             ('down_splits', 'experts_down', D // 1024)):
    for splits in range(max(getattr(blocks, name), target.cores()), unit + 1, target.cores()):
      blocks = blocks._replace(**{name: splits})
      if unit % splits == 0 and needs(M, D, F, dtype, blocks, save)[kernel] <= room():
        break
  check(M, D, F, dtype, blocks, save)
  return blocks


def room():
  return target.vmem() - SPARE


def _groups(count_E):
  rows_E = -(-count_E // ALIGN) * ALIGN
  E = len(rows_E)
  index_E = jnp.where(rows_E > 0, jnp.arange(E), E)
  index_E = jnp.flip(jax.lax.cummin(jnp.flip(index_E)))
  after_E = jnp.append(jnp.take(rows_E, index_E, mode='fill', fill_value=0), 0)
  return Groups(*(a.astype(jnp.int32) for a in (jnp.cumsum(rows_E) - rows_E, rows_E, after_E)))


def needs(M, D, F, dtype, blocks, save=False):
  """Bytes of VMEM that either kernel's arrays take, by its name."""
  M, size = M + -M % rows.PIECE, jnp.dtype(dtype).itemsize
  part, height, wide = F // blocks.gate_splits, blocks.gate_heights[-1], D // blocks.down_splits
  gap = 4 * rows.LANES * (M + 1)  # a sublane after each held row
  gate_up = (M + 1 + 2 * height + 2 * rows.PIECE) * D + 4 * D * part + gap // size
  gate_up += (6 if save else 2) * height * part + 1024 * height
  height = blocks.down_heights[-1]
  down = 2 * (F * wide + height * F + rows.PIECE * wide) * size
  return {'experts_gate_up': gate_up * size,
          'experts_down': down + 4 * wide * (M + 1 + height + TAIL) + gap}


def check(M, D, F, dtype, blocks, save=False, interpret=False):
  """Raises ValueError where a shape or the VMEM of this chip does not allow the kernels."""
  tile = 4 // jnp.dtype(dtype).itemsize * 1024
  if not interpret and (D % tile or D // blocks.down_splits % 1024 or F % 128):
    raise ValueError(f'the expert kernels take widths of whole registers: D={D} must be a multiple '
                     f'of {tile} and F={F} of 128; use the plain form in kernels/experts.py')
  for name, n, splits in (('gate_splits of F', F, blocks.gate_splits),
                          ('down_splits of D', D, blocks.down_splits)):
    if n % (splits * rows.LANES):
      raise ValueError(f'{name}={n} by {splits} parts are no multiples of {rows.LANES}')
  for name, need in needs(M, D, F, dtype, blocks, save).items():
    if need > room():
      raise ValueError(
          f'{name} needs {need / 2**20:.1f} MiB of VMEM and {SPARE >> 20} to spare for {M} tokens '
          f'of width {D} and F={F}, this chip has {target.vmem() / 2**20:.0f}: take more splits '
          f'than {blocks.gate_splits} and {blocks.down_splits}, lower heights, or fewer tokens')


def _by_height(heights, live, run):
  """Runs run(h) of the least height that has room for `live` rows."""
  for low, high in zip((0, *heights), heights):
    pl.when((live > low) & (live <= high))(functools.partial(run, high))


def _dot(a, b):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _gate_up_kernel(place_s, start_s, rows_s, x_hbm, weight_ref, gate_ref, up_ref, *refs, blocks):
  """One part of F (grid axis 0) of one expert (axis 1)."""
  n = (len(refs) - 8) // 2
  outs_hbm, outs = refs[:n], refs[n:2 * n]
  held, staged, tile, weight, buffer, state, load_sem, out_sem = refs[2 * n:]
  e, height, (D, part) = pl.program_id(1), blocks.gate_heights[-1], gate_ref.shape
  columns = pl.ds(pl.multiple_of(pl.program_id(0) * part, rows.LANES), part)

  def store(first, slot, act):
    at = pl.ds(pl.multiple_of(first, ALIGN), height)
    for out, out_hbm in zip(outs, outs_hbm):
      copy = pltpu.make_async_copy(out.at[slot], out_hbm.at[at, columns], out_sem)
      getattr(copy, act)()

  @pl.when(e == 0)
  def _():
    rows.hold(x_hbm, held, buffer, load_sem)
    n = rows.sublanes(D, tile.dtype)
    held[pl.ds(held.shape[0] - rows.step(n), n)] = jnp.zeros((n, rows.LANES), held.dtype)
    rows.fetch(held, staged, place_s, 0, height, D, tile.dtype)
    state[0] = 0

  def visit(i, _):
    slot, first = state[0] & 1, start_s[e] + i * height
    live = jnp.minimum(rows_s[e] - i * height, height)

    def run(h):
      rows.unstage(staged, tile, h)
      _spread(weight_ref, first // ALIGN, weight, h)
      _multiply(tile, weight, gate_ref, up_ref, [out.at[slot] for out in outs], h,
                blocks.gate_columns, lambda span, after: rows.fetch(
                    held, staged, place_s, first + live + after, height, D, tile.dtype, span))
    _by_height(blocks.gate_heights, live, run)

    @pl.when(state[0] > 0)  # a whole tile is stored: the next one's rows overwrite what is too much
    def _():
      store(0, 1 - slot, 'wait')
    store(first, slot, 'start')
    state[0] += 1
    return 0
  jax.lax.fori_loop(0, pl.cdiv(rows_s[e], height), visit, 0)

  @pl.when((e == pl.num_programs(1) - 1) & (state[0] > 0))
  def _():
    store(0, 0, 'wait')


def _spread(weight_ref, first, weight, h):
  """Writes h rows' weights, ALIGN of them a row of `weight_ref`, across all lanes of `weight`."""
  for i in range(h // ALIGN):
    row = jnp.broadcast_to(weight_ref[pl.ds(first + i, 1)], (rows.LANES, ALIGN))
    weight[pl.ds(i * ALIGN, ALIGN)] = row.T


def _multiply(tile, weight, gate_ref, up_ref, outs, h, columns, fetch):
  """weight * silu(x gate) * (x up) of a tile's first h rows, and where wanted both factors.

  Meanwhile fetches the next tile, a few rows between products over DEPTH of D: the compiler cannot
  tell the weights' buffer from others, and leaves loads from it where they are among stores.
  """
  D, part = gate_ref.shape
  turns = [(f, k) for f in range(0, part, columns) for k in range(0, D, DEPTH)]
  after = g = u = 0
  for (f, k), span in zip(turns, _share(tile.shape[0], len(turns))):
    at, deep = pl.ds(f, min(columns, part - f)), pl.ds(k, min(DEPTH, D - k))
    x = tile[:h, deep]
    g = _dot(x, gate_ref[deep, at]) + (g if k else 0)
    u = _dot(x, up_ref[deep, at]) + (u if k else 0)
    fetch(span, after)
    after = _nothing(g)
    if k + DEPTH >= D:
      hidden = jax.nn.silu(g) * u * jnp.concatenate(
          [weight[:h]] * (at.size // rows.LANES), axis=1)
      for out, value in zip(outs, (hidden, g, u)):
        out[:h, at] = value.astype(out.dtype)


def _nothing(product):
  """0, known only when the product is: what uses it is not scheduled before.

  The compiler's scheduler takes what is ready first, and would gather the whole next tile before it
  has filled the matrix unit.
  """
  bit = jax.lax.bitcast_convert_type(product[0, 0], jnp.int32) & 1
  return bit * (bit ^ 1)


def _share(count, turns):
  """`count` rows in as many parts, as (first, end), in whole eights."""
  ends = [count * (i + 1) // turns // 8 * 8 for i in range(turns)]
  return list(zip([0, *ends], ends))


def _gate_up(x_MD, token_P, weight_P, groups, gate_EDF, up_EDF, load, blocks, save, interpret):
  (M, D), dtype, P = x_MD.shape, x_MD.dtype, len(token_P)
  E, _, F = gate_EDF.shape
  part, height, n = F // blocks.gate_splits, blocks.gate_heights[-1], 3 if save else 1
  sublanes, word, VMEM = rows.sublanes(D, dtype), rows.word(dtype), pltpu.VMEM
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  weights = pl.BlockSpec((None, D, part), lambda f, e, *_: (e, 0, f))
  step = rows.step(sublanes)
  scratch = [*[VMEM((2, height, part), dtype)] * n, VMEM(((M + 1) * step, rows.LANES), word),
             VMEM(((height + 2) * sublanes, rows.LANES), word), VMEM((height, D), dtype),
             VMEM((height, rows.LANES), jnp.float32), VMEM((2, rows.PIECE, D), dtype),
             pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA]
  more = max(height, blocks.down_heights[-1])  # rows read and written beyond the last tile
  place_P, weight_P = (jnp.append(a, jnp.full(more, fill, a.dtype))
                       for a, fill in ((token_P * step, M * step), (weight_P, 0)))
  return pl.pallas_call(
      functools.partial(_gate_up_kernel, blocks=blocks),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(blocks.gate_splits, E),
          in_specs=[hbm, pl.BlockSpec(memory_space=VMEM), weights, weights],
          out_specs=[hbm] * n, scratch_shapes=scratch),
      out_shape=[jax.ShapeDtypeStruct((P + more, F), dtype)] * n,
      compiler_params=_params(), name='experts_gate_up', interpret=interpret,
      cost_estimate=cost(4 * load * D * F, (x_MD, gate_EDF, up_EDF), load * F),
  )(place_P, groups.start_E, groups.rows_E, x_MD,
    weight_P.reshape(-1, ALIGN).astype(jnp.float32), gate_EDF, up_EDF)


def _params():
  return pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                              vmem_limit_bytes=target.vmem() - (2 << 20))


def _down_kernel(place_s, start_s, rows_s, after_s, h_hbm, down_ref, out_hbm, total, even, odd,
                 tail, h_tile, out_tile, state, h_sem, out_sem, *, blocks):
  """One part of D (grid axis 0) of one expert (axis 1). `state`: tiles done, where TAIL rows go."""
  e, height, part = pl.program_id(1), blocks.down_heights[-1], down_ref.shape[1]
  columns = pl.ds(pl.multiple_of(pl.program_id(0) * part, rows.LANES), part)

  def load(first, slot):
    at = pl.ds(pl.multiple_of(first, ALIGN), height)
    return pltpu.make_async_copy(h_hbm.at[at], h_tile.at[slot], h_sem.at[slot])

  @pl.when(e == 0)
  def _():
    rows.clear(total)
    tail[...] = jnp.zeros_like(tail)
    state[0] = state[1] = 0

    @pl.when(after_s[0] > 0)
    def _():
      load(0, 0).start()

  def visit(i, _):
    slot, first, left = state[0] & 1, start_s[e] + i * height, rows_s[e] - i * height
    live = jnp.minimum(left, height)

    @pl.when((left > live) | (after_s[e + 1] > 0))
    def _():
      load(first + live, 1 - slot).start()
    load(first, slot).wait()
    _blank(h_tile.at[slot], live, blocks.down_heights)

    def run(h):
      before, waiting, place, offset = tail, TAIL, state[1], 0
      for i, count in enumerate(_divide(h, height)):
        here = tail if offset + count == h else (even, odd)[i % 2]
        def add(span, after, before=before, place=place):
          rows.add(total, before, _room(before, tail, height), place_s, place + after, span)
        _multiply_down(h_tile.at[slot, pl.ds(offset, count)], down_ref, here,
                       _room(here, tail, height), blocks.down_columns, waiting, add, here is before)
        before, waiting, place, offset = here, count, first + offset, offset + count
      state[1] = place
    _by_height(blocks.down_heights, live, run)
    state[0] += 1
    return 0
  jax.lax.fori_loop(0, pl.cdiv(rows_s[e], height), visit, 0)

  @pl.when(e == pl.num_programs(1) - 1)
  def _():
    rows.add(total, tail, TAIL, place_s, state[1], (0, TAIL))
    rows.release(total, out_hbm, columns, out_tile, out_sem)


def _divide(h, height):
  """Rows of each turn: TAIL (or fewer) last, the others alike and at most half of a tile's rest."""
  if h <= TAIL:
    return (h,)
  turns = pl.cdiv(h - TAIL, _room(None, ..., height))
  count = -(-(h - TAIL) // turns // 16) * 16
  return (*[count] * (turns - 1), h - TAIL - (turns - 1) * count, TAIL)


def _room(ref, tail, height):
  """Rows that a buffer of products has room for."""
  return TAIL if ref is tail else max(-(-(height - TAIL) // 32) * 16, 16)


def _multiply_down(h_ref, down_ref, y, room, columns, waiting, add, same):
  """Writes h down to `y`, and meanwhile adds the `waiting` rows of the product before.

  Where these are in `y` themselves they go first. A short tail is filled up with zeros: the rows
  after it get them.
  """
  if same:
    add((0, waiting), 0)
  count, width, after = h_ref.shape[0], down_ref.shape[1], 0
  for c, span in zip(range(0, width, columns), _share(waiting, pl.cdiv(width, columns))):
    part = pl.ds(c, min(columns, width - c))
    product = _dot(h_ref[...], down_ref[:, part])
    for b in range(0, part.size, rows.LANES):
      start = (part.start + b) // rows.LANES * rows.pitch(room)
      y[pl.ds(start, count)] = product[:, b:b + rows.LANES]
      if count < TAIL == room:
        y[pl.ds(start + count, TAIL - count)] = jnp.zeros((TAIL - count, rows.LANES), y.dtype)
    if not same:
      add(span, after)
    after = _nothing(product)


def _blank(tile, live, heights):
  """Zeros the rows from `live` to the height that they are multiplied in: they are added too."""
  h = heights[-1]
  for height in heights[-2::-1]:
    h = jnp.where(live <= height, height, h)

  def turn(i, _):
    tile[pl.ds(pl.multiple_of(live + i * ALIGN, ALIGN), ALIGN)] = jnp.zeros(
        (ALIGN, tile.shape[1]), tile.dtype)
    return 0
  jax.lax.fori_loop(0, (h - live) // ALIGN, turn, 0)


def _down(h_PF, M, token_P, groups, down_EFD, load, blocks, interpret):
  dtype = h_PF.dtype
  E, F, D = down_EFD.shape
  part, height = D // blocks.down_splits, blocks.down_heights[-1]
  n, VMEM, hbm = part // rows.LANES, pltpu.VMEM, pl.BlockSpec(memory_space=pl.ANY)
  spread = _room(None, ..., height)
  scratch = [VMEM(((M + 1) * rows.step(n), rows.LANES), jnp.float32),
             *(VMEM((rows.pitch(room) * n, rows.LANES), jnp.float32)
               for room in (spread, spread, TAIL)),
             VMEM((2, height, F), dtype), VMEM((2, rows.PIECE, part), dtype),
             pltpu.SMEM((2,), jnp.int32),
             pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))]
  place_P = jnp.append(token_P, jnp.full(height, M, jnp.int32)) * rows.step(n)
  return pl.pallas_call(
      functools.partial(_down_kernel, blocks=blocks),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4, grid=(blocks.down_splits, E),
          in_specs=[hbm, pl.BlockSpec((None, F, part), lambda d, e, *_: (e, 0, d))],
          out_specs=hbm, scratch_shapes=scratch),
      out_shape=jax.ShapeDtypeStruct((M, D), dtype),
      compiler_params=_params(), name='experts_down', interpret=interpret,
      cost_estimate=cost(2 * load * F * D, (h_PF, down_EFD)),
  )(place_P, *groups, h_PF, down_EFD)
