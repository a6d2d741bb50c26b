"""A cross-entropy with its gradient on one TPU device that multiplies three times, not four.

`head_gradient` computes all logits a second time, because the normaliser is not known before the
last one. Here the tokens go in groups, so small that exp2(logit - running maximum) of a group can
wait in HBM as bfloat16 until its normaliser is known: of the two rounded once more than a bfloat16
gradient must be, except at the target, where 1 is subtracted, and which is computed anew from its
logit. The price is HBM traffic: each group reads the head twice, and the sum of the head's gradient
is fetched and stored. It pays where a byte costs few FLOPs (`CHIPS`; of v5e and v5p a group's
traffic takes less than two thirds of its products' time, of v6e all of it).
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import head_tpu
from qwen3_jax.kernels import target as chip
from qwen3_jax.kernels.head_tpu import BITS, LANES, LOWEST, NOWHERE, SUBLANES, place, product

CHIPS = ('v5e', 'v5p')
KEPT = 240 << 20  # bytes of HBM for a group's probabilities
TOKENS = 768  # of a group at most: with their gradient they stay in VMEM
BLOCKS = dict(tokens=TOKENS, rows=512, part=256)
GRADIENT_ROWS = 256  # of a tile of the gradient's pass, a divisor of `part` or more than it


def serves(hidden_MD, head_VD):
  """Whether this is the faster form on the chip that the program is traced for."""
  return (chip.kind() in CHIPS and hidden_MD.dtype == jnp.bfloat16
          and len(hidden_MD) >= TOKENS // 2)


def group(V, kept=KEPT):
  """Tokens of a group: of each two bytes a row, in whole blocks on every core."""
  step = LANES * chip.cores()
  return max(step, min(TOKENS, kept // (2 * V)) // step * step)


def cross_entropy(hidden_MD, head_VD, target_M, weight_M, limit=None, *, temperature=1.0,
                  vocab_axes=(), tokens=None, blocks=None, interpret=None):
  """(sum of weight * -logp, d_hidden (M, D) of this shard's rows, d_head (V, D)), float32.

  Arguments as in `head_tpu.statistics` and `head_gradient.gradient`; `tokens` are a group's.
  """
  (M, D), V = hidden_MD.shape, len(head_VD)
  tokens = min(tokens or group(V), head_tpu.round_up(M, LANES * chip.cores()))
  step = functools.partial(_group, head_VD=head_VD, limit=limit, temperature=temperature,
                           vocab_axes=vocab_axes, blocks=blocks, interpret=interpret)
  whole = M // tokens
  of_tokens = hidden_MD, target_M, weight_M

  def visit(d_head, chunk):
    loss, d_hidden, d_head = step(d_head, *chunk)
    return d_head, (loss, d_hidden)
  d_head, (loss, d_hidden) = jax.lax.scan(
    visit, jnp.zeros((V, D), jnp.float32),
    [x[:whole * tokens].reshape(whole, tokens, *x.shape[1:]) for x in of_tokens])
  loss, d_hidden = loss.sum(), d_hidden.reshape(-1, D)
  if whole * tokens < M:
    rest, d_rest, d_head = step(d_head, *(x[whole * tokens:] for x in of_tokens))
    loss, d_hidden = loss + rest, jnp.concatenate([d_hidden, d_rest])
  return loss, d_hidden, d_head


def _group(d_head, hidden_MD, target_M, weight_M, *, head_VD, limit, temperature, vocab_axes,
           blocks, interpret):
  """One group's loss and d_hidden, and the sum of the head's gradient with it."""
  M, V = len(hidden_MD), len(head_VD)
  sizes = head_tpu.choose('head_kept', BLOCKS, hidden_MD, head_VD, blocks)
  per_core = head_tpu.round_up(pl.cdiv(M, chip.cores()), LANES)
  sizes |= dict(tokens=min(sizes['tokens'], per_core))
  here_M = (target_M >= 0) & (target_M < V)
  target_M = jnp.where(here_M, target_M, NOWHERE)
  top, norm, logit, kept, kept_top = head_tpu.accumulate(
    'head_kept', functools.partial(head_tpu.absorb, scale=BITS / temperature),
    [LOWEST, 0.0, 0.0], [(hidden_MD, head_VD)], [target_M], limit, sizes, interpret,
    keep=hidden_MD.dtype)
  logp_M, _, bits_M = head_tpu.merge(top, norm, None, logit, vocab_axes)
  slope_M = weight_M / temperature
  rows = [target_M, bits_M, slope_M, slope_M * jnp.expm1(logp_M)]
  d_hidden, d_head = _gradient(hidden_MD, head_VD, kept, kept_top, rows, d_head, sizes['part'],
                               interpret)
  return -jnp.sum(weight_M * logp_M), d_hidden[:M], d_head


def _gradient(hidden_MD, head_VD, kept, kept_top, rows, d_head, part, interpret):
  """d_hidden (M, D) of a group, and `d_head` with its share added, in place."""
  (M, D), V, tokens = hidden_MD.shape, len(head_VD), kept.shape[1]
  tile = min(GRADIENT_ROWS, part)
  hidden_MD, *rows = head_tpu.pad(tokens, hidden_MD, *(row[None] for row in rows))
  tiles = pl.cdiv(V, tile)
  cores = min(chip.cores(), tiles)
  share = pl.cdiv(tiles, cores)
  def at(c, v):
    return jnp.minimum(c * share + v, tiles - 1)
  of_head = pl.BlockSpec((tile, D), lambda c, v, _: (at(c, v), 0))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  d_hidden, d_head = pl.pallas_call(
    _gradient_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(cores, share), out_specs=[anywhere, of_head],
      in_specs=[anywhere, of_head,
                pl.BlockSpec((tile, tokens), lambda c, v, _: (at(c, v) + part // tile, 0)),
                pl.BlockSpec((SUBLANES, tokens), lambda c, v, _: (at(c, v) * tile // part + 1, 0)),
                *[pl.BlockSpec((1, tokens), lambda c, v, _: (0, 0))] * len(rows), of_head],
      scratch_shapes=[pltpu.VMEM((tokens, D), hidden_MD.dtype),
                      pltpu.VMEM((tokens, D), jnp.float32),
                      pltpu.VMEM((tile, tokens), hidden_MD.dtype), pltpu.SemaphoreType.DMA]),
    out_shape=[jax.ShapeDtypeStruct((cores, tokens, D), jnp.float32),
               jax.ShapeDtypeStruct((V, D), jnp.float32)],
    input_output_aliases={5 + len(rows): 1},
    compiler_params=head_tpu.parameters(('parallel', 'arbitrary'), 'head_kept_gradient', {
      'hidden states and their gradient': tokens * D * (4 + hidden_MD.dtype.itemsize),
      'rows x width, twice': 2 * tile * D * head_VD.dtype.itemsize,
      'd_head in and out, twice': 4 * tile * D * 4, 'kept': 8 * tile * tokens}),
    interpret=head_tpu.interpreted(interpret), name='head_kept_gradient',
  )(jnp.full(1, V, jnp.int32), hidden_MD, head_VD, kept, kept_top, *rows, d_head)
  return d_hidden.sum(0)[:M], d_head


def _gradient_kernel(rows_ref, hidden_hbm_ref, head_ref, kept_ref, top_ref, target_ref, bits_ref,
                     slope_ref, at_target_ref, before_ref, d_hidden_hbm_ref, d_head_ref, hidden_ref,
                     d_hidden_ref, d_ref, signal):
  core, step, share = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
  first = (core * share + step) * len(head_ref)

  @pl.when(step == 0)
  def _():
    arrival = pltpu.make_async_copy(hidden_hbm_ref, hidden_ref, signal)
    arrival.start()
    d_hidden_ref[...] = jnp.zeros_like(d_hidden_ref)
    arrival.wait()

  @pl.when(first + len(head_ref) > rows_ref[0])
  def _():  # beyond the last row is anything, and 0 times it need not be 0
    row = jax.lax.broadcasted_iota(jnp.int32, head_ref.shape, 0)
    head_ref[...] = jnp.where(row < rows_ref[0] - first, head_ref[...], 0).astype(head_ref.dtype)

  @pl.when(first < rows_ref[0])
  def _():
    scale = slope_ref[...] * jnp.exp2(top_ref[...] - bits_ref[...])
    target = target_ref[...] - first - place(scale.shape)
    at_target = jnp.broadcast_to(at_target_ref[...], scale.shape)
    d_ref[...] = jnp.concatenate([
      jnp.where(target == at, at_target,
                scale * kept_ref[at:at + SUBLANES].astype(jnp.float32))
      for at in range(0, len(d_ref), SUBLANES)]).astype(d_ref.dtype)
    d_head_ref[...] = before_ref[...] + product('vm,md->vd', d_ref[...], hidden_ref[...])
    d_hidden_ref[...] += product('vm,vd->md', d_ref[...], head_ref[...])

  @pl.when(step == share - 1)
  def _():
    departure = pltpu.make_async_copy(d_hidden_ref, d_hidden_hbm_ref.at[core], signal)
    departure.start()
    departure.wait()
