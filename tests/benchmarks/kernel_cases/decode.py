"""Decode attention over pages, for the static score: builders and cases."""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels.paged_flash import DEFAULT, paged_flash


def decode(B=64, K=8, G=4, H=128, context=4096, S=128, Q=1, blocks=None, cores=1, dtype='bfloat16'):
  """One decoding step's attention, all rows `context` tokens long; `cores` of a device."""
  def shape(*dims, dtype=dtype):
    return jax.ShapeDtypeStruct(dims, dtype)
  C = -(-context // S)
  args = [shape(B, Q, K, G, H), shape(B * C, K, H, S), shape(B * C, K, S, H),
          shape(B, C, dtype=jnp.int32), shape(B, dtype=jnp.int32)]
  blocks = {**DEFAULT, **(blocks or {})}

  def fn(*args):
    return paged_flash(*args, blocks=blocks, interpret=False)
  turns = -(-C // blocks['pages'])
  size = jnp.dtype(dtype).itemsize
  model = dict(flops=4 * B * Q * K * G * H * context, final=B * cores,
               hbm_bytes=(2 * B * C * K * H * S + 2 * B * Q * K * G * H) * size + 4 * B * (C + 3))
  return dict(fn=fn, args=args, models={'paged_flash': dict(model, trips={3: B * turns * cores})})
