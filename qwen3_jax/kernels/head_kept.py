"""A cross-entropy with its gradient on one TPU device that does not compute every logit twice.

`head_gradient` computes all logits a second time, because the normaliser is not known before the
last one. Here the tokens go in groups, so small that exp2(logit - running maximum) of a group can
wait in HBM as bfloat16 until its normaliser is known. Such a gradient is rounded twice where once
is needed, but at the target, where 1 is subtracted: there it is computed from the logit itself. The
price is HBM traffic: each group reads the head twice, and fetches and stores the sum of the head's
gradient. A chip whose bytes cost many FLOPs needs larger groups for that (`TOKENS`), and what
is then too much to wait, the last rows' share, is computed again.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import head_tpu
from qwen3_jax.kernels import target as chip
from qwen3_jax.kernels.cost import cost
from qwen3_jax.kernels.head_gradient import clear_beyond, cross_entropy_slope, multiply, recompute
from qwen3_jax.kernels.head_tpu import BITS, LANES, LOWEST, NOWHERE, SUBLANES, place

TOKENS = {'v5e': 768, 'v5p': 768, 'v6e': 1536, 'tpu7x': 1024}  # of a group
HELD = 252 << 20  # bytes of HBM that a group takes beside its results
BLOCKS = dict(tokens=768, rows=512, part=256, gradient=256)  # where the table knows nothing


def serves(hidden_MD, head_VD):
  """Whether this is the faster form on the chip that the program is traced for."""
  return hidden_MD.dtype == jnp.bfloat16 and len(hidden_MD) >= TOKENS.get(chip.kind(), math.inf)


def rows_kept(tokens, D):
  """Rows whose probabilities wait: two bytes a token, and its maximum for every part.

  Beside them are the group's hidden states, and their gradient from every core.
  """
  of_hidden = (2 + 4 * chip.cores()) * tokens * D
  return int((HELD - of_hidden) // (tokens * (2 + 4 * SUBLANES / BLOCKS['part'])))


def cross_entropy(hidden_MD, head_VD, target_M, weight_M, limit=None, *, temperature=1.0,
                  vocab_axes=(), tokens=None, keep=None, blocks=None, interpret=None):
  """(sum of weight * -logp, d_hidden (M, D), d_head (V, D) of this shard's rows in float32).

  Arguments as in `head_tpu.statistics` and `head_gradient.gradient`; `tokens` are a group's, whose
  probabilities wait for the first `keep` rows. Raises ValueError where the blocks exceed VMEM.
  """
  (M, D), V = hidden_MD.shape, len(head_VD)
  tokens = min(tokens or TOKENS[chip.kind()], head_tpu.round_up(M, LANES * chip.cores()))
  step = functools.partial(_group, head_VD=head_VD, limit=limit, temperature=temperature,
                           vocab_axes=vocab_axes, keep=keep or rows_kept(tokens, D), blocks=blocks,
                           interpret=interpret)

  def add(start, count, carry):
    loss, d_hidden, d_head = carry
    chunk = [jax.lax.dynamic_slice_in_dim(x, start, count)
             for x in (hidden_MD, target_M, weight_M)]
    more, d_chunk, d_head = step(d_head, *chunk)
    return loss + more, jax.lax.dynamic_update_slice_in_dim(d_hidden, d_chunk, start, 0), d_head
  groups, rest = divmod(M, tokens)
  carry = jnp.zeros(()), jnp.zeros_like(hidden_MD), jnp.zeros((V, D), jnp.float32)
  carry = jax.lax.fori_loop(0, groups, lambda i, c: add(i * tokens, tokens, c), carry)
  return add(M - rest, rest, carry) if rest else carry


def _group(d_head, hidden_MD, target_M, weight_M, *, head_VD, limit, temperature, vocab_axes, keep,
           blocks, interpret):
  """One group's loss and d_hidden, and the sum of the head's gradient with it."""
  M, V = len(hidden_MD), len(head_VD)
  sizes = head_tpu.choose('head_kept', BLOCKS, hidden_MD, head_VD, blocks)
  per_core = head_tpu.round_up(pl.cdiv(M, chip.cores()), LANES)
  tile = head_tpu.round_up(min(sizes['gradient'], V), sizes['part'])
  sizes |= dict(tokens=min(sizes['tokens'], per_core), gradient=tile)
  if keep < V:  # a tile of the forward pass is one for all the rest
    keep = max(keep - sizes['rows'], tile) // tile * tile
  keep = min(keep, V)
  here_M = (target_M >= 0) & (target_M < V)
  target_M = jnp.where(here_M, target_M, NOWHERE)
  scale = BITS / temperature
  top, norm, logit, *kept = head_tpu.accumulate(
    'head_kept', functools.partial(head_tpu.absorb, scale=scale), [LOWEST, 0.0, 0.0],
    [(hidden_MD, head_VD)], [target_M], limit, sizes, interpret, keep=(hidden_MD.dtype, keep))
  logp_M, _, bits_M = head_tpu.merge(top, norm, None, logit, vocab_axes)
  slope_M = weight_M / temperature
  rows = [target_M, bits_M, slope_M, slope_M * jnp.expm1(logp_M)]
  d_hidden, d_head = _gradient(hidden_MD, head_VD, kept, rows, d_head, limit, scale, keep, sizes,
                               interpret)
  d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
  return -jnp.sum(weight_M * logp_M), d_hidden[:M].astype(hidden_MD.dtype), d_head


def _gradient(hidden_MD, head_VD, kept, rows, d_head, limit, scale, keep, sizes, interpret):
  """d_hidden (M, D) of a group, and `d_head` with its share added, in place."""
  (M, D), V, tokens = hidden_MD.shape, len(head_VD), kept[0].shape[1]
  tile, part = sizes['gradient'], sizes['part']
  hidden_MD, *rows = head_tpu.pad(tokens, hidden_MD, *(row[None] for row in rows))
  tiles, parts = pl.cdiv(V, tile), tile // part
  cores = min(chip.cores(), tiles)
  share = pl.cdiv(tiles, cores)
  def at(c, v):
    return jnp.minimum(c * share + v, tiles - 1)
  def of_kept(height, i):
    last = len(kept[0]) // part - 1
    return pl.BlockSpec((height, tokens), lambda c, v, _: (
      jnp.minimum(at(c, v) * parts + i + 1, last), 0))
  of_head = pl.BlockSpec((tile, D), lambda c, v, _: (at(c, v), 0))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  row = pl.BlockSpec((1, tokens), lambda c, v, _: (0, 0))
  waiting = [of_kept(height, i) for i in range(parts) for height in (part, SUBLANES)]
  d_hidden, d_head = pl.pallas_call(
    functools.partial(_kernel, scale=scale, part=part, keep=keep, rows=V),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(cores, share), out_specs=[anywhere, of_head],
      in_specs=[anywhere, of_head, *[row] * len(rows), of_head, *waiting],
      scratch_shapes=[pltpu.VMEM((tokens, D), hidden_MD.dtype),
                      pltpu.VMEM((tokens, D), jnp.float32),
                      pltpu.VMEM((tile, tokens), hidden_MD.dtype), pltpu.SemaphoreType.DMA]),
    out_shape=[jax.ShapeDtypeStruct((cores, tokens, D), jnp.float32),
               jax.ShapeDtypeStruct((V, D), jnp.float32)],
    input_output_aliases={3 + len(rows): 1},
    compiler_params=head_tpu.parameters(('parallel', 'arbitrary'), 'head_kept_gradient',
                                        need(hidden_MD, sizes)),
    cost_estimate=cost(4 * M * V * D, (hidden_MD, head_VD, d_head, d_head, *kept), M * V),
    interpret=head_tpu.interpreted(interpret), name='head_kept_gradient',
  )(head_tpu.first_rows(limit, V), hidden_MD, head_VD, *rows, d_head, *kept * parts)
  return d_hidden.sum(0)[:M], d_head


def need(hidden_MD, sizes):
  """Bytes of VMEM that the gradient of a group takes, by what they are for."""
  (tokens, D), tile, size = hidden_MD.shape, sizes['gradient'], hidden_MD.dtype.itemsize
  return {'hidden states and their gradient': tokens * D * (4 + size),
          'rows x width, twice': 2 * tile * D * size, 'd_head in and out, twice': 16 * tile * D,
          'kept, its gradient and a part of logits': tokens * (3 * size * tile + 8 * sizes['part'])}


def _kernel(limit_ref, hidden_hbm_ref, head_ref, target_ref, bits_ref, weight_ref, at_target_ref,
            before_ref, *refs, scale, part, keep, rows):
  kept_refs = refs[:2 * (len(head_ref) // part)]
  d_hidden_hbm_ref, d_head_ref, hidden_ref, d_hidden_ref, d_ref, signal = refs[len(kept_refs):]
  core, step, share = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
  first, limit = (core * share + step) * len(head_ref), limit_ref[0]

  @pl.when(step == 0)
  def _():
    arrival = pltpu.make_async_copy(hidden_hbm_ref, hidden_ref, signal)
    arrival.start()
    d_hidden_ref[...] = jnp.zeros_like(d_hidden_ref)
    arrival.wait()
  clear_beyond(limit - first, head_ref)

  def slope(at, kept_ref, top_ref):
    return _slope(limit - first - at, first + at, kept_ref, top_ref, target_ref, bits_ref,
                  weight_ref, at_target_ref)
  def slope_again(logits, at):
    return cross_entropy_slope(*logits, limit - first - at, first + at, target_ref, bits_ref,
                               weight_ref, scale=scale)
  refs = d_ref, before_ref, d_head_ref, d_hidden_ref, hidden_ref, head_ref

  @pl.when(first < jnp.minimum(limit, keep))
  def _():
    multiply(((at, slope(at, *kept_refs[2 * (at // part):][:2]))
              for at in range(0, len(head_ref), part)), *refs)

  if keep < rows:
    @pl.when((first >= keep) & (first < limit))
    def _():
      multiply(recompute([(hidden_ref, head_ref)], slope_again, part), *refs)

  @pl.when((first >= limit) & (first < rows))  # beyond is no tile: its block is the last one's
  def _():
    d_head_ref[...] = before_ref[...]

  @pl.when(step == share - 1)
  def _():
    departure = pltpu.make_async_copy(d_hidden_ref, d_hidden_hbm_ref.at[core], signal)
    departure.start()
    departure.wait()


def _slope(limit, first, kept_ref, top_ref, target_ref, bits_ref, weight_ref, at_target_ref):
  """The gradient by a part's logits, from what waited; that at the targets is given."""
  scale = weight_ref[...] * jnp.exp2(top_ref[...] - bits_ref[...])
  row = place(scale.shape)
  target = target_ref[...] - first - row
  at_target = jnp.broadcast_to(at_target_ref[...], scale.shape)
  parts = []
  for at in range(0, len(kept_ref), SUBLANES):
    d = scale * kept_ref[at:at + SUBLANES].astype(jnp.float32)
    parts.append(jnp.where(row < limit - at, jnp.where(target == at, at_target, d), 0))
  return jnp.concatenate(parts)
