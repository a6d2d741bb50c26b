"""Decode attention over pages, for the static score: builders and cases."""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels.paged_flash import DEFAULT, paged_flash
from qwen3_jax.kernels.paged_write import paged_write


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


def write(B=64, K=8, H=128, S=128, pages=2048, dtype='bfloat16'):
  """One token of every row written to its page."""
  def shape(*dims, dtype=dtype):
    return jax.ShapeDtypeStruct(dims, dtype)
  args = [shape(pages, K, H, S), shape(pages, K, S, H), shape(B, dtype=jnp.int32),
          shape(B, dtype=jnp.int32), shape(B, K, H), shape(B, K, H)]
  size = jnp.dtype(dtype).itemsize
  moved = B * K * H * (2 * (S + 32 // size) * size + 8)  # a page of keys and a tile of values
  fn = jax.jit(functools.partial(paged_write, interpret=False), donate_argnums=(0, 1))
  return dict(fn=fn, args=args, models={'paged_write': dict(hbm_bytes=moved)})
