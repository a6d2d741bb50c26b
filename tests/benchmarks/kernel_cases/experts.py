"""Cases of the expert kernels' forward pass, scored from the compiler's schedule.

Rows are 8,192 tokens' 8 choices of 128 experts. Group sizes: 'even' is 512 rows each, 'balanced' a
multinomial draw with equal probabilities, 'skewed' one with Zipf's (1 / rank), at most one row a
token. Tiles are counted from these sizes, and so are the padding rows that they multiply.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.kernels import experts, target
from qwen3_jax.kernels import grouped_matmul as kernel
from qwen3_jax.kernels import rows as rows_of

FLAGS = {'v6e:2x2': '--xla_tpu_scoped_vmem_limit_kib=98304',
         'v5p:2x2x1': '--xla_tpu_scoped_vmem_limit_kib=61440'}


@functools.cache
def group_sizes(kind, tokens, chosen, experts):
  """Rows of each expert."""
  if kind == 'even':
    return np.full(experts, tokens * chosen // experts)
  weight = np.ones(experts) if kind == 'balanced' else 1 / np.arange(1, experts + 1)
  gumbel = np.random.default_rng(0).gumbel(size=(tokens, experts))
  chosen = np.argsort(-(np.log(weight) + gumbel), axis=1)[:, :chosen]
  return np.bincount(chosen.reshape(-1), minlength=experts)


def count_tiles(count_E, heights):
  """How often each height's code runs, and the tiles of all groups, for one part of the columns."""
  rows_E = -(-count_E // kernel.ALIGN) * kernel.ALIGN
  whole, left_E = (rows_E // heights[-1]).sum(), rows_E % heights[-1]
  uses = [int(((left_E > low) & (left_E <= high)).sum())
          for low, high in zip((0, *heights), heights)]
  uses[-1] += int(whole)
  return uses, sum(uses)


def forward(M=8192, X=8, E=128, D=2048, F=768, kind='balanced', save=False, dtype='bfloat16',
            blocks=None):
  """Both kernels on a plan's arrays."""
  dtype = jnp.dtype(dtype)
  P = experts.count_rows(M * X, E, kernel.ALIGN)
  sizes = kernel.choose(M, D, F, E, dtype, save)
  sizes = sizes._replace(**{k: tuple(v) if isinstance(v, list) else v
                            for k, v in (blocks or {}).items()})
  count_E = group_sizes(kind, M, X, E)
  S = jax.ShapeDtypeStruct
  args = [S((M, D), dtype), S((P,), jnp.int32), S((P,), jnp.float32), S((E,), jnp.int32),
          S((E, D, F), dtype), S((E, D, F), dtype), S((E, F, D), dtype)]
  fn = functools.partial(kernel.swiglu_down, save=save, blocks=sizes, interpret=False)
  return dict(fn=fn, args=args, models=models(M, X, D, F, count_E, sizes, save, dtype.itemsize))


def models(M, X, D, F, count_E, sizes, save, size):
  """What the scorer is told of either kernel; rows of h are copied in whole tiles."""
  E, used, result = len(count_E), int((count_E > 0).sum()), {}
  for name, heights, splits, flops, weights in (
      ('experts_gate_up', sizes.gate_heights, sizes.gate_splits, 4 * M * X * D * F, 2 * D * F),
      ('experts_down', sizes.down_heights, sizes.down_splits, 2 * M * X * F * D, F * D)):
    uses, tiles = count_tiles(count_E, heights)
    pieces = M // rows_of.PIECE * (target.cores() if splits == target.cores() else 1)
    hidden = tiles * heights[-1] * F
    first = name == 'experts_gate_up'
    copied = (splits * M * D + hidden * (3 if save else 1) if first else splits * hidden + M * D)
    result[name] = dict(
        steps=splits * E, executed=[splits * n for n in uses], init=splits, final=splits,
        trips={1: pieces, 2: tiles / E} if first else {2: tiles / E, 3: 0, 4: pieces},
        flops=flops, hbm_bytes=size * (used * weights + copied))
  return result


def gate_up(M=8192, X=8, E=128, D=2048, F=768, kind='balanced', save=False, dtype='bfloat16',
            blocks=None):
  """The first kernel alone."""
  built = forward(M, X, E, D, F, kind, save, dtype, blocks)
  args = built['args']
  sizes = built['fn'].keywords['blocks']
  fn = lambda x, token, weight, count, gate, up: kernel._gate_up(
      x, token, weight, kernel._groups(count), gate, up, sizes, save, False)
  return dict(fn=fn, args=args[:-1], models=built['models'])


def down(M=8192, X=8, E=128, D=2048, F=768, kind='balanced', dtype='bfloat16', blocks=None):
  """The second kernel alone."""
  built = forward(M, X, E, D, F, kind, False, dtype, blocks)
  _, token, _, count, *_, weights = built['args']
  sizes = built['fn'].keywords['blocks']
  more = max(sizes.gate_heights[-1], sizes.down_heights[-1])
  h_PF = jax.ShapeDtypeStruct((token.shape[0] + more, F), jnp.dtype(dtype))
  fn = lambda h, token, count, down: kernel._down(
      h, M, token, kernel._groups(count), down, sizes, False)
  return dict(fn=fn, args=[h_PF, token, count, weights], models=built['models'])


def _case(label, topology, target, public, **kwargs):
  return dict(label=label, builder='forward', kwargs=kwargs, topology=topology,
              flags=FLAGS[topology], target_us=target, best_public_us=public)


# Best public sums: gate/up + SwiGLU and down alone by the larger of schedule and HBM time (v6e:
# gmm_v2, 716 + 471 us; v5p: megablox gmm, 1247 + 754), and the HBM time of what is fused here and
# separate there: permuted copy, combine, and on v5p the activation (v6e 327 + 184, v5p 194 + 109 +
# 109). Wide: megablox gmm 6123 + 1677, and half of 7313 + 2770, for half of the tokens.
CASES = [
    _case('experts, balanced', 'v6e:2x2', 1273, 1698, kind='balanced'),
    _case('experts, Zipf', 'v6e:2x2', 1273, 1698, kind='skewed'),
    _case('experts, balanced', 'v5p:2x2x1', 1601, 2413, kind='balanced'),
    _case('experts, Zipf', 'v5p:2x2x1', 1601, 2413, kind='skewed'),
    _case('experts 4096/1536', 'v6e:2x2', 5850, 7800, D=4096, F=1536),
    _case('experts 4096/1536, 4096 tokens', 'v5p:2x2x1', 4033, 5041, M=4096, D=4096, F=1536),
]
