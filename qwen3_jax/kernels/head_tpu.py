"""The head's statistics on one TPU device: logits exist as tiles in VMEM, never in HBM.

A tile is (vocabulary, tokens): what belongs to a token is a row of lanes, and its maxima and sums
over the vocabulary run down the sublanes, eight partial ones a token that `merge` brings together,
with those of other shards of the vocabulary. Logits are in units of log 2, so that `exp2` is all
that an exponential costs. The softmax of one part of a tile runs beside the product of the next:
its logits wait in VMEM, also from one grid step to the next. Meaning: `reference.token_entropy`;
the gradient is in `head_gradient`.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import blocks as table
from qwen3_jax.kernels import target as chip
from qwen3_jax.kernels.cost import cost

NEVER = -1e30 * math.log2(math.e)  # finite: the masked logit of `head`, in units of log 2
LOWEST = NEVER / 16  # where a running maximum starts: what is masked adds exp2(NEVER - it) = 0
NOWHERE = -1 << 30  # a target that is no row, nor one of those that a step has before the first
BITS = math.log2(math.e)  # a nat
LANES, SUBLANES = 128, 8
LEAST = 512  # rows of a head for which the kernels are worth their set-up
BLOCKS = dict(tokens=512, rows=512, part=256)  # where the table knows nothing


class Statistics(NamedTuple):
  """Of each token, float32 (M,): nats, but for `bits`, the log-sum-exp in units of log 2."""
  logp: jax.Array
  entropy: jax.Array | None
  bits: jax.Array


def serves(hidden_BTD, head_VD):
  """Whether the kernels run these shapes on the chip that the program is traced for."""
  if chip.platform() != 'tpu':
    return False
  reason = None
  if hidden_BTD.shape[-1] % LANES or len(head_VD) < LEAST:
    reason = (f'the head is {head_VD.shape}: its width must be a multiple of {LANES} and its rows '
              f'at least {LEAST}')
  elif hidden_BTD.dtype not in (jnp.bfloat16, jnp.float32):
    reason = f'the hidden states are {hidden_BTD.dtype}'
  chip.report('head', 'chunks of logits' if reason else 'kernels', reason)
  return reason is None


def statistics(hidden_MD, head_VD, target_M, limit=None, *, temperature=1.0, entropy=False,
               vocab_axes=(), blocks=None, interpret=None):
  """`Statistics` of softmax(head hidden / temperature) over the first `limit` rows of the head.

  `target_M` and `limit` (an int or an int32 scalar) count from this shard's first row; a target
  that is no row of it has no logit here, and gets it from the shards of `vocab_axes`. The pass
  over the vocabulary multiplies once, 2 M V D. Raises ValueError where the blocks exceed VMEM.
  """
  sizes = choose('head_statistics', BLOCKS, hidden_MD, head_VD, blocks)
  parts = _statistics(hidden_MD, head_VD, target_M, limit, BITS / temperature, entropy, sizes,
                      interpret)
  return merge(*parts, vocab_axes=vocab_axes)


def merge(top_8M, norm_8M, mean_8M, logit_8M, vocab_axes=()):
  """`Statistics` from the partial ones of every sublane and shard."""
  def total(x_8M):
    return jax.lax.psum(x_8M.sum(0), vocab_axes) if vocab_axes else x_8M.sum(0)
  top_M = top_8M.max(0)
  top_M = jax.lax.pmax(top_M, vocab_axes) if vocab_axes else top_M
  gap_8M = top_8M - top_M
  share_8M = jnp.exp2(gap_8M)
  norm_M = total(share_8M * norm_8M)
  entropy_M = None
  if mean_8M is not None:
    mean_M = total(share_8M * (mean_8M + norm_8M * gap_8M))
    entropy_M = jnp.log(norm_M) - mean_M / norm_M / BITS
  logp_M = (total(logit_8M) - top_M) / BITS - jnp.log(norm_M)
  return Statistics(logp_M, entropy_M, top_M + jnp.log2(norm_M))


def _statistics(hidden_MD, head_VD, target_M, limit, scale, entropy, sizes, interpret):
  """The (8, M) partial maxima, sums, sums of p log2 p (or None) and logits of the targets."""
  here_M = (target_M >= 0) & (target_M < len(head_VD))
  starts = [LOWEST, 0.0, 0.0] + [0.0] * entropy
  top, norm, logit, *mean = accumulate(
    'head_statistics', functools.partial(absorb, scale=scale), starts, [(hidden_MD, head_VD)],
    [jnp.where(here_M, target_M, NOWHERE)], limit, sizes, interpret)
  return top, norm, mean[0] if mean else None, logit


def absorb(logits, limit, first, target_ref, top_ref, norm_ref, logit_ref, mean_ref=None,
           kept_refs=(), *, scale):
  """Adds a part's logits to the partial statistics of each token.

  `kept_refs` receive exp2(logits - top) and the running maximum `top` of the time.
  """
  parts = in_bits(logits, limit, scale)
  top, shrink, gap = raise_top(parts, top_ref)
  norm, logit = norm_ref[...], logit_ref[...]
  mean = None if mean_ref is None else shrink * (mean_ref[...] + norm * gap)
  norm = shrink * norm
  target = target_ref[...] - first - place(top.shape)
  kept = []
  for at, bits in enumerate(parts):
    below = bits - top
    p = jnp.exp2(below)
    kept.append(p)
    norm += p
    mean = None if mean is None else mean + p * below
    logit = jnp.where(target == SUBLANES * at, bits, logit)
  norm_ref[...], logit_ref[...] = norm, logit
  if kept_refs:
    kept_refs[0][...], kept_refs[1][...] = jnp.concatenate(kept).astype(kept_refs[0].dtype), top
  if mean is not None:
    mean_ref[...] = mean


def raise_top(parts, top_ref):
  """The new running maximum, the old one's exp2 and distance below it (<= 0)."""
  top, old = functools.reduce(jnp.maximum, parts, top_ref[...]), top_ref[...]
  top_ref[...] = top
  return top, jnp.exp2(old - top), old - top


def accumulate(name, absorb, starts, sides, rows, limit, sizes, interpret, keep=None):
  """What `absorb` makes of all logits: (8, M) float32 arrays that begin as `starts`.

  `sides` are pairs (hidden_MD, head_VD) of one or two models, `rows` are (M,). `absorb(*logits,
  limit, first, *row_refs, *refs)` adds a part of a tile, (rows, tokens) of each side, whose first
  row is `first` and of which the first `limit` rows count, to the running results. A part is added
  beside the product of the next: the steps go on until the last one's is.

  With `keep`, (type, count), `absorb` also gets kept_refs=, to fill with a number for each logit,
  of that type, and eight a token: two more results, (rows, M) and (rows / part * 8, M), of the
  first `count` rows and some more. In them the heads' first row comes after a part of nothing.
  """
  M, V = len(sides[0][0]), len(sides[0][1])
  tokens, tile, part = sizes['tokens'], sizes['rows'], sizes['part']
  rows = [pad(tokens, sides[0][0], row[None])[1] for row in rows]
  sides = [(pad(tokens, hidden)[0], head) for hidden, head in sides]
  last = pl.cdiv(V, tile) - 1
  specs = [spec for hidden, head in sides for spec in (
    pl.BlockSpec((tokens, hidden.shape[1]), lambda t, v, _: (t, 0)),
    pl.BlockSpec((tile, head.shape[1]), lambda t, v, _: (jnp.minimum(v, last), 0)))]
  of_tokens = pl.BlockSpec((SUBLANES, tokens), lambda t, v, _: (0, t))
  total = len(sides[0][0])
  steps, results = pl.cdiv(V + part, tile), [(SUBLANES, jnp.float32)] * len(starts)
  out_specs = [of_tokens] * len(starts)
  if keep is not None:
    written = min(steps, pl.cdiv(keep[1] + part, tile) + 1)  # what is not wanted: into the last one
    for height, dtype in ((tile, keep[0]), (tile // part * SUBLANES, jnp.float32)):
      results.append((written * height, dtype))
      out_specs.append(pl.BlockSpec((height, tokens),
                                    lambda t, v, _: (jnp.minimum(v, written - 1), t)))
  found = pl.pallas_call(
    functools.partial(_kernel, absorb=absorb, starts=starts, sides=len(sides), part=part,
                      keep=keep is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(total // tokens, steps),
      in_specs=specs + [pl.BlockSpec((1, tokens), lambda t, v, _: (0, t))] * len(rows),
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM((part, tokens), jnp.float32)] * len(sides)),
    out_shape=[jax.ShapeDtypeStruct((height, total), dtype) for height, dtype in results],
    compiler_params=parameters(('parallel', 'arbitrary'), name, need(sides, sizes, keep)),
    cost_estimate=cost(2 * total * V * sum(x.shape[1] for x, _ in sides),
                       [x for side in sides for x in side], total * V * len(sides)),
    interpret=interpreted(interpret), name=name,
  )(first_rows(limit, V), *(x for side in sides for x in side), *rows)
  return [x[:, :M] for x in found]


def need(sides, sizes, keep=None):
  """Bytes of VMEM that `accumulate` takes, by what they are for."""
  tokens, tile, part = sizes['tokens'], sizes['rows'], sizes['part']
  width = sum(hidden.shape[1] for hidden, _ in sides) * sides[0][0].dtype.itemsize
  return {'tokens x width, twice': 2 * tokens * width, 'rows x width, twice': 2 * tile * width,
          'logits': 12 * part * tokens * len(sides), 'results': 64 * 6 * tokens,
          'kept logits': 0 if keep is None else 2 * tile * tokens * jnp.dtype(keep[0]).itemsize}


def _kernel(limit_ref, *refs, absorb, starts, sides, part, keep):
  pairs, rest = [refs[2 * i:2 * i + 2] for i in range(sides)], refs[2 * sides:]
  row_and_result_refs, waiting_refs = rest[:-sides], rest[-sides:]
  if keep:
    *row_and_result_refs, kept_ref, kept_top_ref = row_and_result_refs
  step, tile = pl.program_id(1), len(pairs[0][1])

  @pl.when(step == 0)
  def _():
    for ref in waiting_refs:
      ref[...] = jnp.full_like(ref, NEVER)
    for ref, start in zip(row_and_result_refs[-len(starts):], starts):
      ref[...] = jnp.full_like(ref, start)

  logits = [ref[...] for ref in waiting_refs]
  for at in range(0, tile, part):
    following = [product('vd,md->vm', head[at:at + part], hidden[...]) for hidden, head in pairs]
    first = step * tile + at - part
    more = {} if not keep else dict(kept_refs=(
      kept_ref.at[at:at + part], kept_top_ref.at[pl.ds(at // part * SUBLANES, SUBLANES)]))
    absorb(*logits, limit_ref[0] - first, first, *row_and_result_refs, **more)
    logits = following
  for ref, x in zip(waiting_refs, logits):
    ref[...] = x


def in_bits(logits, limit, scale):
  """Eight rows at a time: scaled to units of log 2, those from `limit` on masked."""
  row = place((SUBLANES, logits.shape[1]))
  return [jnp.where(row < limit - at, logits[at:at + SUBLANES] * scale, NEVER)
          for at in range(0, len(logits), SUBLANES)]


def place(shape):
  """The number of each sublane."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def product(letters, a, b):
  """An einsum of two letters' contraction in float32; of float32 it is one to all its digits."""
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  left, right, _ = letters.replace('->', ',').split(',')
  shared, = set(left) & set(right)
  dims = ((left.index(shared),), (right.index(shared),)), ((), ())
  return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def choose(kernel, default, hidden_MD, head_VD, given, **more):
  """Block sizes, those of the table and `given` before the default, clipped to the shapes."""
  (M, D), V = hidden_MD.shape, len(head_VD)
  shape = dict(M=M, V=V, D=D, dtype=hidden_MD.dtype.name, **more)
  sizes = default | table.choose(kernel, **shape) | (given or {})
  part = min(sizes['part'], round_up(V, SUBLANES * 2))
  return sizes | dict(part=part, rows=min(round_up(sizes['rows'], part), round_up(V, part)),
                      tokens=min(sizes['tokens'], round_up(M, LANES)))


def round_up(count, step):
  return -(-count // step) * step


def pad(tokens, x_MD, *x_1M, least=1):
  """Zero rows up to a whole number of blocks of `tokens`, at least `least`."""
  extra = max(round_up(len(x_MD), tokens), least * tokens) - len(x_MD)
  return jnp.pad(x_MD, ((0, extra), (0, 0))), *(jnp.pad(x, ((0, 0), (0, extra))) for x in x_1M)


def first_rows(limit, V):
  """How many of a shard's V rows count, int32 (1,)."""
  return jnp.clip(jnp.asarray(V if limit is None else limit, jnp.int32), 0, V).reshape(1)


def interpreted(interpret):
  """Whether to interpret: as asked, else wherever there is no TPU."""
  return chip.platform() != 'tpu' if interpret is None else interpret


def parameters(semantics, kernel, need):
  """Compiler parameters; raises ValueError if what a kernel keeps in VMEM exceeds it."""
  mib, have = 1 << 20, chip.vmem()
  if sum(need.values()) > 0.95 * have:
    parts = ', '.join(f'{name} {size / mib:.1f}' for name, size in need.items())
    raise ValueError(f'{kernel} needs {sum(need.values()) / mib:.1f} MiB of VMEM ({parts}) of the '
                     f'{have / mib:.0f} that {chip.kind()} has: lower blocks["rows"] or '
                     'blocks["tokens"]')
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=int(0.95 * have))
