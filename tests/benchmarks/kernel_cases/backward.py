"""Attention's gradients, for the static score: builder and cases."""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import flash_backward


def count_visits(S, blocks, turns):
  """(live steps, unmasked rounds of each width, single chunks) of a head group, plain causal.

  The last chunk of a query block is visited first, outside the loops. A step after a live one is
  live too: it completes that one's gradients.
  """
  widths = [1 << n for n in range(1, blocks.units.bit_length())][::-1]
  live, single, rounds = 0, 0, dict.fromkeys(widths, 0)
  for start in range(0, S, S // turns):
    before = False
    for first in [*range(0, S, blocks.queries), -S]:
      ahead = min(first + blocks.queries - start, S // turns)
      needed = max(-(-ahead // blocks.chunk), 0)
      live += needed > 0 or before
      before, rest = needed > 0, max(needed - 1, 0)
      whole = max(min((first + 1 - start) // blocks.chunk, rest), 0)
      for width in widths:
        rounds[width] += whole // width
        rest, whole = rest - whole // width * width, whole % width
      single += rest
  return live, [*rounds.values(), single]


def backward(N=32, K=8, S=4096, H=128, B=1, blocks=None):
  """Sequences of one segment. Where keys are visited in turns, counts are of all turns."""
  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)
  chosen = flash_backward.choose(N, K, H, S, jnp.bfloat16)._replace(**blocks or {})
  segment, start = shape(B, S, dtype=jnp.int32), shape(1, dtype=jnp.int32)
  args = [shape(B, S, N, H), shape(B, S, K, H), shape(B, S, K, H), segment, segment, start, start,
          shape(B, S, N, H), shape(B, N, S, dtype=jnp.float32), shape(B, S, N, H)]

  def fn(*args):
    return flash_backward.backward(*args, blocks=blocks, interpret=False)
  turns = -(-S // chosen.resident)
  groups = B * N // chosen.heads
  steps = turns * (S // chosen.queries + 1)
  live, visits = count_visits(S, chosen, turns)
  # loops: 0 the grid, 1 prepares a key head, then one of each width; the last writes a key head
  trips = {0: groups * steps + 2} | {2 + n: count / live for n, count in enumerate(visits)}
  rows = B * S * H
  dq_bytes = 2 if turns == 1 else 8 * turns + 6
  model = dict(steps=groups * steps, executed=[groups * count for count in (live, *visits)],
               init=turns * B * K, final=B * K * S // (chosen.chunk * chosen.units), trips=trips,
               flops=5 * B * N * S * (S + 1) * H,
               hbm_bytes=rows * (N * (6 * turns + dq_bytes) + 8 * K))
  return dict(fn=fn, args=args, models={'flash_backward': model})


V6E = dict(topology='v6e:2x2', flags='--xla_tpu_scoped_vmem_limit_kib=98304')
V5P = dict(topology='v5p:2x2x1', flags='--xla_tpu_scoped_vmem_limit_kib=61440')
CASES = [
  dict(label='backward 32/8 S4096', builder=backward, kwargs={}, target_us=900,
       best_public_us=1222, **V6E),
  dict(label='backward 32/8 S4096', builder=backward, kwargs={}, target_us=1150,
       best_public_us=2095, **V5P),
  dict(label='backward 64/4 S4096', builder=backward, kwargs=dict(N=64, K=4), target_us=1800,
       best_public_us=2444, **V6E),
  dict(label='backward 64/4 S4096', builder=backward, kwargs=dict(N=64, K=4), target_us=2300,
       best_public_us=4190, **V5P),
  dict(label='backward 32/8 S32768', builder=backward, kwargs=dict(S=32768), target_us=None,
       best_public_us=None, **V6E),
  dict(label='backward 32/8 S32768', builder=backward, kwargs=dict(S=32768), target_us=None,
       best_public_us=None, **V5P)]
