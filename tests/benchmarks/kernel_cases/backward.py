"""Attention's gradients, for the static score: builder and cases."""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import flash_backward


def count_visits(S, queries, keys):
  """(two unmasked units, one, masked ones) of all query blocks of one head group, plain causal."""
  pairs = single = masked = 0
  for first in range(0, S, queries):
    whole = min(first + 1, S) // keys
    needed = -(-(first + queries) // keys)
    pairs, single, masked = pairs + whole // 2, single + whole % 2, masked + needed - whole
  return pairs, single, masked


def backward(N=32, K=8, S=4096, H=128, B=1, blocks=None, cores=1):
  """One sequence of one segment; a device with several `cores` splits rows and key heads."""
  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)
  chosen = flash_backward.choose(N, K, H, S, jnp.bfloat16)._replace(**blocks or {})
  segment, start = shape(B, S, dtype=jnp.int32), shape(1, dtype=jnp.int32)
  args = [shape(B, S, N, H), shape(B, S, K, H), shape(B, S, K, H), segment, segment, start, start,
          shape(B, S, N, H), shape(B, N, S, dtype=jnp.float32), shape(B, S, N, H)]

  def fn(*args):
    return flash_backward.backward(*args, blocks=blocks, interpret=False)
  steps = B * N // chosen.heads * (S // chosen.queries)
  visits = [n / (S // chosen.queries) for n in count_visits(S, chosen.queries, chosen.keys)]
  trips = dict(zip((2, 3, 4), visits))
  model = dict(steps=steps, init=B * K, final=B * K, trips=trips,
               flops=5 * B * N * S * (S + 1) * H, hbm_bytes=B * S * H * 2 * (4 * N + 4 * K))
  return dict(fn=fn, args=args, models={'flash_backward': model})
