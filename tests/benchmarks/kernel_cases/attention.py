"""Attention, forward, for the static score: builder and cases.

`flops` is that of the pairs that see each other: half of the square, as for the public kernels.
Visits are counted from the extents of the very segments and blocks.
"""
import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.kernels import flash_attention, flash_blocks


def count_visits(segment_BT, plan, window):
  """(visits of each width of unmasked units, single masked visits) of one head group."""
  start = jnp.zeros(1, jnp.int32)
  extents = flash_blocks.extents(*flash_blocks.pairs(
    segment_BT, segment_BT, start, start, plan.queries, plan.keys, window))
  low, high, first, shut = (np.asarray(x) for x in extents)
  last = np.maximum(high - 1, low)
  left = np.maximum(np.minimum(shut, last) - first, 0)
  masked, counts = int((last - low - left).sum()), []
  for exponent in reversed(range(plan.units.bit_length())):
    counts.append(int((left >> exponent).sum()))
    left = left % (1 << exponent)
  return counts, masked


def forward(N=32, K=8, S=4096, H=128, B=1, documents=1, running=False, window=None, blocks=None):
  """Packed rows of equal documents, with log-sum-exp; `running`: no bound of scores is known."""
  plan = flash_attention.choose(N, K, H, S, S, jnp.bfloat16)._replace(**blocks or {})
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    rows = jnp.asarray(np.sort(np.arange(B * S).reshape(B, S) % documents + 1), jnp.int32)
    counts, masked = count_visits(rows, plan, window)

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)

  def fn(q, k, v, segment):
    start = jnp.zeros(1, jnp.int32)
    heads = lambda x: x.reshape(B, S, -1, H)
    o, lse = flash_attention.forward(
      heads(q), heads(k), heads(v), segment, segment, start, start, window=window,
      bound=None if running else 16.0, blocks=blocks, interpret=False)
    return o.reshape(B, S, N * H), lse
  each = np.bincount(np.asarray(rows[0])).astype(float)
  pairs = int((each * (each + 1)).sum()) // 2
  calls = N // plan.heads  # of one row
  steps = B * calls * (S // plan.queries + 2)
  trips = (sum(counts) + masked) * calls / steps
  model = dict(
    steps=steps, init=B * calls * (S // plan.keys), trips={1: S // plan.keys, 2: trips},
    executed=[steps, *(n * calls for n in (*counts, masked))], flops=4 * B * N * pairs * H,
    hbm_bytes=B * S * (2 * H * (2 * N + 2 * K) + 4 * N))
  args = [shape(B, S, N * H), shape(B, S, K * H), shape(B, S, K * H),
          shape(B, S, dtype=jnp.int32)]
  return dict(fn=fn, args=args, models={'flash_forward': model})


# Targets scale with heads and with useful pairs: 515 and 470 us, and 736 and 549 of the best public
# kernels, at 4,096 tokens and 32 heads. None public was scored at 32,768 tokens on v5p.
TOPOLOGIES = {
  'v6e:2x2': ('--xla_tpu_scoped_vmem_limit_kib=98304', 515, 736),
  'v5p:2x2x1': ('--xla_tpu_scoped_vmem_limit_kib=61440', 470, 549)}
SHAPES = [('32/8 heads', {}, 1), ('32/8 heads, no bound', dict(running=True), 1),
          ('64/4 heads', dict(N=64, K=4), 2), ('16/8 heads', dict(N=16, K=8), 0.5),
          ('40/8 heads', dict(N=40, K=8), 1.25),
          ('32/8 heads, 6 documents', dict(documents=6), None),
          ('32/8 heads, S=32768', dict(S=32768), None)]
LONG = {'v6e:2x2': (515 / 736 * 42060, 42060), 'v5p:2x2x1': (470 / 549 * 60 * 549, None)}


def _case(label, kwargs, ratio, topology):
  flags, target, public = TOPOLOGIES[topology]
  if kwargs.get('S') == 32768:
    target, public = LONG[topology]
    ratio = 1
  scale = lambda us: us and ratio and round(us * ratio)
  return dict(label=f'attention forward, {label}', builder='forward', kwargs=kwargs,
              topology=topology, flags=flags, target_us=scale(target),
              best_public_us=scale(public))


CASES = [_case(*shape, topology) for shape in SHAPES for topology in TOPOLOGIES]
