"""The head's kernels at Qwen3's vocabulary, as cases for a static score.

Useful FLOPs: 2 M V D of a forward pass, 6 M V D of a backward pass (the logits again, d_hidden and
d_head). Of a loss with its gradient 6 M V D are useful and 8 M V D executed.
"""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import head_gradient, head_tpu
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
  turns, tiles = -(-tokens // sizes['tokens']), -(-V // sizes['rows'])
  model = dict(steps=turns * tiles, executed=turns * tiles, init=turns, final=turns,
               flops=2 * tokens * V * D, hbm_bytes=2 * D * (tokens + turns * V))
  return dict(fn=functools.partial(head_tpu.statistics, entropy=entropy, blocks=blocks),
              args=[hidden, head, target], models={'head_statistics': model})


def backward(tokens=8192, V=151936, D=1024, bonus=False, blocks=None):
  """Gradients of hidden states and head from the log-sum-exp, with `bonus` those of entropies."""
  hidden, head, target, row = inputs(tokens, V, D)
  sizes = head_gradient.choose('head_gradient', hidden, head, blocks)
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
