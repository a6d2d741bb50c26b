"""Experts' backward pass at the shapes of the two mixtures, for the static score."""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import grouped_gradient as kernel

S = jax.ShapeDtypeStruct


def weights(P=65536, E=128, D=2048, F=768, rows=512, heights=(256, 512), columns=512, hidden=256, splits=1, inputs=1,
            dtype='bfloat16'):
  blocks = kernel.Blocks(rows, tuple(heights), columns, hidden, splits, inputs)
  t = jnp.dtype(dtype)
  P += E * 64
  args = [S((P, D), t), S((P, D), t), S((P, F), t), S((P, F), t), S((P,), jnp.float32),
          S((E,), jnp.int32), S((E, D, F), t), S((E, D, F), t), S((E, F, D), t)]
  fn = lambda *a: kernel.rows_gradient(*a, blocks=blocks, interpret=False)
  return dict(fn=fn, args=args, models={})
