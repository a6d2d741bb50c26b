"""Grouped-query attention with per-head QK-Norm before RoPE."""
import jax.numpy as jnp
from flax import nnx

from qwen3_jax.kernels.attention import attention
from qwen3_jax.mesh import constrain
from qwen3_jax.model import rope
from qwen3_jax.model.lora import project


def rms_norm(x, scale, eps):
  """x / rms(x) * scale over the last axis, computed in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jnp.reciprocal(jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps))
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
  """q, k, v projections, QK-Norm, RoPE, attention, output projection."""

  def __init__(self, spec, rngs):
    D, N, K, H = spec.width, spec.heads, spec.kv_heads, spec.head_width
    init = nnx.initializers.normal(0.02)
    def weight(*shape):
      return nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.q_DNH, self.k_DKH, self.v_DKH = weight(D, N, H), weight(D, K, H), weight(D, K, H)
    self.o_NHD = weight(N, H, D)
    if spec.qk_norm:
      self.q_norm_H, self.k_norm_H = nnx.Param(jnp.ones(H)), nnx.Param(jnp.ones(H))
    if spec.qkv_bias:
      self.q_bias_NH = nnx.Param(jnp.zeros((N, H)))
      self.k_bias_KH, self.v_bias_KH = nnx.Param(jnp.zeros((K, H))), nnx.Param(jnp.zeros((K, H)))

  def __call__(self, x_BTD, spec, context, kv=None):
    """The block's addition (B, T, D) and the layer's extended cache (None without a cache `kv`).

    `context` is the `Context` that all layers of a forward pass share.
    """
    dtype = x_BTD.dtype
    q_BTNH, k_BTKH, v_BTKH = (project(self, weight, x_BTD)
                              for weight in ('q_DNH', 'k_DKH', 'v_DKH'))
    if spec.qkv_bias:
      q_BTNH = q_BTNH + self.q_bias_NH[...].astype(dtype)
      k_BTKH = k_BTKH + self.k_bias_KH[...].astype(dtype)
      v_BTKH = v_BTKH + self.v_bias_KH[...].astype(dtype)
    if spec.qk_norm:
      q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...], spec.norm_eps)
      k_BTKH = rms_norm(k_BTKH, self.k_norm_H[...], spec.norm_eps)
    q_BTNH = constrain(rope.rotate(q_BTNH, *context.rotation), 'BTNH')
    k_BTKH = constrain(rope.rotate(k_BTKH, *context.rotation), 'BTKH')
    v_BTKH = constrain(v_BTKH, 'BTKH')
    if kv is None:
      o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, context.segment_BT, context.segment_BT)
    else:
      kv = kv.extend(k_BTKH, v_BTKH, context.start)
      o_BTNH = kv.attend(q_BTNH, context)
    return project(self, 'o_NHD', o_BTNH, 2), kv
