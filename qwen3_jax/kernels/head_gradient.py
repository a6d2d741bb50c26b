"""The head's gradient on one TPU device, in one pass over the vocabulary: see `head_tpu`.

Each tile of logits is computed again, becomes a tile of their gradient and is multiplied twice. A
tile of the head and its gradient stay in VMEM while all tokens pass; the gradient of the tokens
comes and goes: its sums so far are fetched from HBM a step before they are wanted, in float32.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import head_tpu
from qwen3_jax.kernels import target as chip
from qwen3_jax.kernels.cost import cost
from qwen3_jax.kernels.head_tpu import BITS, NOWHERE, SUBLANES, pad, place, product

BLOCKS = dict(tokens=256, rows=512, part=256)  # where the table knows nothing
SLOTS = 3  # of tokens' sums in VMEM: one leaves, one is added to, one arrives


def gradient(hidden_MD, head_VD, target_M, weight_M, bits_M, bonus_M=None, entropy_M=None,
             limit=None, *, temperature=1.0, blocks=None, interpret=None):
  """Gradients (M, D) and (V, D), float32, of sum(weight * -logp) + sum(bonus * entropy).

  `bits_M` is the log-sum-exp over all shards in units of log 2 and `entropy_M` the entropy there
  (`head_tpu.Statistics`); `target_M` and `limit` as in `head_tpu.statistics`. Of a shard of the
  vocabulary the first is a part of the sum over shards. Multiplies three times, 6 M V D: the
  logits again, and each gradient. Raises ValueError where the blocks exceed VMEM.
  """
  sizes = head_tpu.choose('head_gradient', BLOCKS, hidden_MD, head_VD, blocks)
  here_M = (target_M >= 0) & (target_M < len(head_VD))
  rows = [jnp.where(here_M, target_M, NOWHERE), bits_M, weight_M / temperature]
  if bonus_M is not None:
    bonus_M = bonus_M / temperature
    rows += [bonus_M / BITS, bonus_M * entropy_M]
  slope = functools.partial(cross_entropy_slope, scale=BITS / temperature)
  return sweep('head_gradient', slope, [(hidden_MD, head_VD)], rows, limit, sizes, interpret)


def cross_entropy_slope(logits, limit, first, target_ref, bits_ref, weight_ref, bonus_ref=None,
                        level_ref=None, *, scale):
  """The gradient by a part's logits: weight (p - 1 at the target) - bonus p (log p + entropy)."""
  row = place((SUBLANES, logits.shape[1]))
  target = target_ref[...] - first - row
  bits, weight = (jnp.broadcast_to(ref[...], row.shape) for ref in (bits_ref, weight_ref))
  if bonus_ref is not None:
    bonus, level = (jnp.broadcast_to(ref[...], row.shape) for ref in (bonus_ref, level_ref))
  parts = []
  for at in range(0, len(logits), SUBLANES):
    log = logits[at:at + SUBLANES] * scale - bits
    p = jnp.exp2(log)
    d = weight * jnp.where(target == at, p - 1, p)
    if bonus_ref is not None:
      d -= p * (bonus * log + level)
    parts.append(jnp.where(row < limit - at, d, 0))
  return jnp.concatenate(parts)


def sweep(name, slope, sides, rows, limit, sizes, interpret):
  """(d_hidden, d_head) of the first of `sides`, pairs (hidden_MD, head_VD) of one or two models.

  `slope(*logits, limit, first, *row_refs)` is the gradient by the logits of a part of a tile,
  (rows, tokens), whose first row is `first` and of which the first `limit` rows count.
  """
  (M, D), (V, _) = (x.shape for x in sides[0])
  tokens, tile, part = clip(sizes['tokens'], M), sizes['rows'], sizes['part']
  sizes = sizes | dict(tokens=tokens)
  padded = [(pad(tokens, hidden, least=SLOTS)[0], head) for hidden, head in sides]
  rows = [pad(tokens, sides[0][0], row[None], least=SLOTS)[1] for row in rows]
  tiles, steps = pl.cdiv(V, tile), len(padded[0][0]) // tokens
  cores = min(chip.cores(), tiles)
  share = pl.cdiv(tiles, cores)  # a core's tiles; the last core's last ones may be none
  def of_head(c, v, t, _):
    return jnp.minimum(c * share + v, tiles - 1), 0
  specs = [spec for hidden, head in padded for spec in (
    pl.BlockSpec((tokens, hidden.shape[1]), lambda c, v, t, _: (t, 0)),
    pl.BlockSpec((tile, head.shape[1]), of_head))]
  specs += [pl.BlockSpec((1, tokens), lambda c, v, t, _: (0, t))] * len(rows)
  dtype = sides[0][0].dtype
  d_hidden, d_head = pl.pallas_call(
    functools.partial(_kernel, slope=slope, sides=len(sides), part=part, rows=V),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(cores, share, steps), in_specs=specs,
      out_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec((tile, D), of_head)],
      scratch_shapes=[pltpu.VMEM((SLOTS, tokens, D), jnp.float32),
                      pltpu.SemaphoreType.DMA((2, SLOTS)),
                      pltpu.VMEM((tile, tokens), dtype)]),
    out_shape=[jax.ShapeDtypeStruct((cores, steps * tokens, D), jnp.float32),
               jax.ShapeDtypeStruct((V, D), jnp.float32)],
    compiler_params=head_tpu.parameters(('parallel', 'arbitrary', 'arbitrary'), name,
                                        need(padded, sizes)),
    cost_estimate=cost(2 * M * V * (2 * D + sum(x.shape[1] for x, _ in sides)),
                       [x for side in padded for x in side], M * V * len(sides)),
    interpret=head_tpu.interpreted(interpret), name=name)(
      head_tpu.first_rows(limit, V), *(x for side in padded for x in side), *rows)
  return d_hidden.sum(0)[:M], d_head


def clip(tokens, M):
  """A block of tokens of which M take at least SLOTS."""
  return min(tokens, head_tpu.round_up(pl.cdiv(M, SLOTS), head_tpu.LANES))


def need(sides, sizes):
  """Bytes of VMEM by what they are for."""
  tokens, tile, D = sizes['tokens'], sizes['rows'], sides[0][0].shape[1]
  size, widths = sides[0][0].dtype.itemsize, sum(hidden.shape[1] for hidden, _ in sides)
  return {'tokens x width, twice': 2 * size * tokens * widths,
          'rows x width, twice': 2 * size * tile * widths,
          'd_head, twice': 2 * 4 * tile * D, 'd_hidden, thrice': SLOTS * 4 * tokens * D,
          'logits and their gradient': tile * tokens * (size + 4 * len(sides))}


def _kernel(limit_ref, *refs, slope, sides, part, rows):
  pairs = [refs[2 * i:2 * i + 2] for i in range(sides)]
  *row_refs, d_hidden_ref, d_head_ref, sums_ref, signals, d_ref = refs[2 * sides:]
  hidden_ref, head_ref = pairs[0]
  core, share = pl.program_id(0), pl.num_programs(1)
  tile, token = pl.program_id(1), pl.program_id(2)
  first = (core * share + tile) * len(head_ref)

  @pl.when((token == 0) & (first < rows))  # beyond is no tile: its block is still the last one's
  def _():
    d_head_ref[...] = jnp.zeros_like(d_head_ref)
    for _, ref in pairs:
      clear_beyond(limit_ref[0] - first, ref)
  slot = _exchange(sums_ref, d_hidden_ref.at[core], signals)

  @pl.when(first < limit_ref[0])
  def _():
    def at_part(logits, at):
      return slope(*logits, limit_ref[0] - first - at, first + at, *row_refs)
    multiply(recompute(pairs, at_part, part), d_ref, d_head_ref, d_head_ref, sums_ref.at[slot],
             hidden_ref, head_ref)
  _release(sums_ref, d_hidden_ref.at[core], signals)


def clear_beyond(limit, ref):
  """Zeroes a tile's rows from `limit` on: what is past the array's end may be no number."""
  @pl.when(limit < len(ref))
  def _():
    row = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
    ref[...] = jnp.where(row < limit, ref[...], jnp.zeros_like(ref))


def recompute(pairs, slope, part):
  """Yields the first row of each part of a tile and its gradient, `slope(logits, first)`.

  The next part's logits are asked for first: their product runs beside the slope.
  """
  rows = len(pairs[0][1])
  def logits(at):
    return [product('vd,md->vm', head[at:at + part], hidden[...]) for hidden, head in pairs]
  following = logits(0)
  for at in range(0, rows, part):
    current, following = following, logits(at + part) if at + part < rows else None
    yield at, slope(current, at)


def multiply(slopes, d_ref, before_ref, d_head_ref, sum_ref, hidden_ref, head_ref):
  """Both products of a tile's gradient: `d_head_ref` is `before_ref` and one, `sum_ref` grows."""
  for at, d in slopes:
    rows = slice(at, at + len(d))
    d_ref[rows] = d.astype(d_ref.dtype)
    d_head_ref[rows] = before_ref[rows] + product('vm,md->vd', d_ref[rows], hidden_ref[...])
  sum_ref[...] += product('vm,vd->md', d_ref[...], head_ref[...])


def _copies(sums_ref, d_hidden_ref, signals):
  """Functions of a step's number: its slot, the copy from HBM, the copy to HBM."""
  tokens, steps = sums_ref.shape[1], pl.num_programs(2)
  def ends(step):
    slot = jax.lax.rem(step, SLOTS)
    row = pl.multiple_of(jax.lax.rem(step, steps) * tokens, tokens)
    return slot, sums_ref.at[slot], d_hidden_ref.at[pl.ds(row, tokens)]
  def fetch(step):
    slot, here, there = ends(step)
    return pltpu.make_async_copy(there, here, signals.at[0, slot])
  def store(step):
    slot, here, there = ends(step)
    return pltpu.make_async_copy(here, there, signals.at[1, slot])
  return fetch, store


def _exchange(sums_ref, d_hidden_ref, signals):
  """The slot with this step's sums so far; those of the next step are on their way.

  At least SLOTS steps a tile: what is fetched was stored two steps ago or earlier.
  """
  fetch, store = _copies(sums_ref, d_hidden_ref, signals)
  tile, steps = pl.program_id(1), pl.num_programs(2)
  step, last = tile * steps + pl.program_id(2), pl.num_programs(1) * steps - 1
  slot = jax.lax.rem(step, SLOTS)

  @pl.when(step >= 2)
  def _():
    store(step - 2).wait()

  @pl.when((step + 1 >= steps) & (step < last))
  def _():
    fetch(step + 1).start()

  @pl.when(tile > 0)
  def _():
    fetch(step).wait()

  @pl.when(tile == 0)
  def _():
    sums_ref[slot] = jnp.zeros(sums_ref.shape[1:], jnp.float32)
  return slot


def _release(sums_ref, d_hidden_ref, signals):
  """Sends this step's sums to HBM; the last step waits for what is under way."""
  _, store = _copies(sums_ref, d_hidden_ref, signals)
  steps = pl.num_programs(2)
  step, last = pl.program_id(1) * steps + pl.program_id(2), pl.num_programs(1) * steps - 1
  store(step).start()

  @pl.when(step == last)
  def _():
    store(step - 1).wait()
    store(step).wait()
