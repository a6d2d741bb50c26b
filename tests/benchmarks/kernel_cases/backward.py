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


FLAGS = '--xla_tpu_scoped_vmem_limit_kib={}'
LONG = 528 / 10  # 32,768 slots against 4,096: blocks of 1024 x 1024 on or below the diagonal
CASES = [
  dict(label=f'backward {N}/{K} S={S}', builder='backward', kwargs=dict(N=N, K=K, S=S),
       topology=topology, flags=FLAGS.format(limit), target_us=round(target * work),
       best_public_us=round(public * work))  # without its sum of dq over blocks of keys
  for topology, limit, target, public in (('v6e:2x2', 98304, 900, 1222),
                                          ('v5p:2x2x1', 61440, 1150, 2095))
  for N, K, S, work in ((32, 8, 4096, 1), (64, 4, 4096, 2), (32, 8, 32768, LONG))]
