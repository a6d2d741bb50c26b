"""The head's kernels at Qwen3's vocabulary, as cases for a static score.

Useful FLOPs: 2 M V D of a forward pass, 6 M V D of a backward pass (the logits again, d_hidden and
d_head). Of a loss with its gradient 6 M V D are useful and 8 M V D executed.
"""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import divergence, head_gradient, head_kept, head_pair, head_tpu
from qwen3_jax.kernels import target as chip

MODELS = {1024: '0.6b', 2048: '1.7b, 30b-a3b', 4096: '8b, 235b-a22b'}


def inputs(tokens, V, D):
  """(hidden_MD, head_VD, target_M) and a float32 row of tokens, as shapes."""
  of = jax.ShapeDtypeStruct
  return (of((tokens, D), jnp.bfloat16), of((V, D), jnp.bfloat16), of((tokens,), jnp.int32),
          of((tokens,), jnp.float32))


def forward(tokens=8192, V=151936, D=1024, entropy=False, blocks=None):
  """Log-probabilities of the targets, with `entropy` those of the distributions."""
  hidden, head, target, _ = inputs(tokens, V, D)
  sizes = head_tpu.choose('head_statistics', head_tpu.BLOCKS, hidden, head, blocks)
  turns, tiles = -(-tokens // sizes['tokens']), -(-(V + sizes['part']) // sizes['rows'])
  model = dict(steps=turns * tiles, executed=turns * tiles, init=turns,
               flops=2 * tokens * V * D, hbm_bytes=2 * D * (tokens + turns * V))
  return dict(fn=functools.partial(head_tpu.statistics, entropy=entropy, blocks=blocks),
              args=[hidden, head, target], models={'head_statistics': model})


def backward(tokens=8192, V=151936, D=1024, bonus=False, blocks=None):
  """Gradients of hidden states and head from the log-sum-exp, with `bonus` those of entropies."""
  hidden, head, target, row = inputs(tokens, V, D)
  sizes = head_tpu.choose('head_gradient', head_gradient.BLOCKS, hidden, head, blocks)
  cores = chip.cores()
  turns, tiles = -(-tokens // sizes['tokens']), -(-V // sizes['rows'])
  per_core = -(-tiles // cores)
  steps = cores * per_core * turns
  moved = 2 * 4 * tokens * D * (tiles - cores) + 4 * cores * tokens * D
  model = dict(steps=steps, executed=tiles * turns, init=tiles, flops=6 * tokens * V * D,
               hbm_bytes=moved + 2 * tokens * D * tiles + (2 + 4) * V * D)
  return dict(fn=functools.partial(head_gradient.gradient, blocks=blocks),
              args=[hidden, head, target, *[row] * (4 if bonus else 2)],
              models={'head_gradient': model})


def pair(tokens=8192, V=151936, D=1024, other=4096, kind='reverse_kl', gradient=False, blocks=None):
  """Divergence of two heads, or with `gradient` the gradient of its sum alone."""
  hidden, head, _, row = inputs(tokens, V, D)
  sides = [(hidden, head), inputs(tokens, V, other)[:2]]
  name = 'pair_gradient' if gradient else 'pair_statistics'
  sizes = head_pair.choose(name, head_pair.BLOCKS, sides, blocks)
  compare = functools.partial(divergence.compare, kind=kind, mix=0.5, expm1=divergence.expm1)
  turns, tiles = -(-tokens // sizes['tokens']), -(-V // sizes['rows'])
  options = dict(compare=compare, blocks=blocks)
  if gradient:
    def run(sides, row, other_row, weight, score):
      pair = head_pair.Pair(row, row, row, other_row, score)
      return head_pair.gradient(sides, pair, weight, **options)
    steps = chip.cores() * -(-tiles // chip.cores()) * turns
    width = 3 * D + other
    moved = 8 * tokens * D * (tiles - 1) + 2 * tokens * (D + other) * tiles
    model = dict(steps=steps, executed=tiles * turns, init=tiles,
                 hbm_bytes=moved + 2 * V * (D + other) + 4 * V * D)
    args = [sides, *[row] * 4]
  else:
    run = functools.partial(head_pair.statistics, kind=kind, **options)
    turns_tiles = turns * -(-(V + sizes['part']) // sizes['rows'])
    width = D + other
    model = dict(steps=turns_tiles, executed=turns_tiles, init=turns,
                 hbm_bytes=2 * width * (tokens + turns * V))
    args = [sides]
  return dict(fn=run, args=args, models={name: model | dict(flops=2 * tokens * V * width)})


def kept(V=151936, D=1024, tokens=None, blocks=None):
  """A group's forward pass and its share of the gradient; 8192 tokens take 8192 / tokens."""
  tokens = tokens or head_kept.TOKENS[chip.kind()]
  hidden, head, target, row = inputs(tokens, V, D)
  sizes = head_kept.BLOCKS | head_tpu.choose('head_kept', head_kept.BLOCKS, hidden, head, blocks)
  cores = chip.cores()
  turns = -(-tokens // min(sizes['tokens'], tokens // cores))
  steps = turns * -(-(V + sizes['part']) // sizes['rows'])
  tile = sizes['gradient']
  keep = waiting_rows = head_kept.rows_kept(tokens, D)
  keep = V if keep >= V else (keep - sizes['rows']) // tile * tile
  waiting, again = -(-keep // tile), -(-(V - keep) // tile)
  first = dict(steps=steps, executed=steps, init=turns, flops=2 * tokens * V * D,
               hbm_bytes=2 * D * (tokens + turns * V) + 2 * keep * tokens)
  second = dict(steps=cores * -(-(waiting + again) // cores), init=cores, final=cores,
                executed=[waiting, again] if again else waiting,
                flops=(4 * V + 2 * (V - keep)) * tokens * D,
                hbm_bytes=2 * keep * tokens + V * D * (2 + 8))
  def run(d_head, hidden, target, weight, head):
    return head_kept._group(d_head, hidden, target, weight, head_VD=head, limit=None,
                            temperature=1.0, vocab_axes=(), keep=waiting_rows, blocks=blocks,
                            interpret=None)
  d_head = jax.ShapeDtypeStruct((V, D), jnp.float32)
  return dict(fn=run, args=[d_head, hidden, target, row, head],
              models={'head_kept_gradient': second, 'head_kept': first})


def list_cases():
  """Targets: 0.8 of the MXU's peak of 2 M V D forward, 6 M V D backward and 6 M V D of a loss."""
  peak = {'v6e:2x2': 918e12, 'v5p:2x2x1': 459e12}
  for topology, flops in peak.items():
    limit = 98304 if topology.startswith('v6e') else 61440
    for D, models in MODELS.items():
      ideal = 2 * 8192 * 151936 * D / flops * 1e6
      for builder, kwargs, count in (('forward', {}, 1), ('backward', {}, 3)):
        yield dict(label=f'head {builder} {models}', builder=builder, kwargs=dict(D=D) | kwargs,
                   topology=topology, flags=f'--xla_tpu_scoped_vmem_limit_kib={limit}',
                   target_us=count * ideal / 0.8, best_public_us=None)
      group = head_kept.TOKENS[topology.split(':')[0]]
      yield dict(label=f'head loss and gradient, {group} tokens, {models}', builder='kept',
                 kwargs=dict(D=D), topology=topology,
                 flags=f'--xla_tpu_scoped_vmem_limit_kib={limit}',
                 target_us=3 * ideal / 0.8 * group / 8192, best_public_us=None)
    for gradient, count in (False, 1), (True, 7 / 5):
      yield dict(label='head divergence ' + ('gradient' if gradient else 'value') + ', 0.6b of 8b',
                 builder='pair', kwargs=dict(D=1024, other=4096, gradient=gradient),
                 topology=topology, flags=f'--xla_tpu_scoped_vmem_limit_kib={limit}',
                 target_us=count * 2 * 8192 * 151936 * 5120 / flops * 1e6 / 0.8,
                 best_public_us=None)


CASES = list(list_cases())
