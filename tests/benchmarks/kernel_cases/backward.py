"""Attention's gradients, for the static score: builder and cases."""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import flash_backward


def count_visits(S, blocks):
  """(rounds of several unmasked chunks, single chunks) of a head group's steps, plain causal.

  The last chunk of a query block is the first to be visited, outside these loops.
  """
  rounds = single = 0
  for first in range(0, S, blocks.queries):
    rest = -(-(first + blocks.queries) // blocks.chunk) - 1
    whole = min((first + 1) // blocks.chunk, rest) // blocks.units
    rounds, single = rounds + whole, single + rest - whole * blocks.units
  return rounds, single


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
  steps = S // chosen.queries + 1
  parts = B * K * -(-S // (chosen.chunk * chosen.units))  # of all keys, written in a loop
  calls = B * N // chosen.heads
  trips = {loop: n / steps for loop, n in zip((2, 3), count_visits(S, chosen))}
  model = dict(steps=calls * steps, init=B * K, final=parts, trips=trips,
               flops=5 * B * N * S * (S + 1) * H, hbm_bytes=B * S * H * 2 * (4 * N + 4 * K))
  return dict(fn=fn, args=args, models={'flash_backward': model})
