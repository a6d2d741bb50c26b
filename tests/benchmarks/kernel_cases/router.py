"""The router and its dispatch plan, for `tests/benchmarks/kernels.py`."""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import dispatch, routing


def route(M=8192, E=128, X=8, renormalise=True):
  """Logits, experts first as the product with the router writes them, to gates and sums."""
  def fn(logits_EM, real_M):
    return routing.route(logits_EM.T, real_M, X, renormalise)
  args = [jax.ShapeDtypeStruct((E, M), jnp.float32), jax.ShapeDtypeStruct((M,), jnp.float32)]
  turns = E // routing.UNROLL
  # Loops 3 and 4 run where logits are equal: none here. What a core does once (clearing the sums,
  # adding them up: 411 cycles on v6e) is counted for each block.
  trips = {1: turns, 2: turns, 3: 0, 4: 0, 5: turns}
  return dict(fn=fn, args=args, models={'router': dict(
      trips=trips, hbm_bytes=M * (E * 4 + X * 8 + 4))})


def plan(M=8192, E=128, X=8, rows=64):
  """Chosen experts to ranks and bit words, and those to rows and slots."""
  args = [jax.ShapeDtypeStruct((M, X), jnp.int32)]
  stretches = -(-M // dispatch.STRETCH)
  tables = M // 32 * E * 2 * 4 + 2 * (M // 8 * E * 4)
  trips = {0: stretches, 1: stretches * E // dispatch.GROUPS}  # no group over 384 rows a stretch
  return dict(fn=lambda chosen_MX: dispatch.plan(chosen_MX, E, rows), args=args, models={
      'dispatch_ranks': dict(steps=M // dispatch.TOKENS, hbm_bytes=M * X * 8 + tables),
      'dispatch_rows': dict(trips=trips, hbm_bytes=M * X * 16 + tables)})


FLAGS = '--xla_tpu_scoped_vmem_limit_kib={}'
CASES = [dict(label=f'{builder} 8192 x 128', builder=builder, kwargs={}, topology=topology,
              flags=FLAGS.format(limit), target_us=target, best_public_us=None)
         for topology, limit, target in (('v6e:2x2', 98304, 12), ('v5p:2x2x1', 61440, 20))
         for builder in ('route', 'plan')]
