"""Grouped-query attention with per-head QK-Norm before RoPE."""
import jax
import jax.numpy as jnp
from flax import nnx

from qwen3_jax.kernels import norm_rope
from qwen3_jax.kernels.attention import attention
from qwen3_jax.mesh import constrain
from qwen3_jax.model import rope
from qwen3_jax.model.lora import project


def rms_norm(x, scale, eps):
  """x / rms(x) * scale over the last axis, computed in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jnp.reciprocal(jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps))
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def normed(x_BTNH, scale_H, eps, rotation):
  """QK-Norm, then RoPE; one kernel on a TPU."""
  if norm_rope.fits(x_BTNH):
    return norm_rope.norm_rope(x_BTNH, scale_H, *rotation, eps)
  return rope.rotate(rms_norm(x_BTNH, scale_H, eps), *rotation)


def bound_scores(q_scale_H, k_scale_H, spec):
  """A bound of |q k| / sqrt(H): a normed head is no longer than sqrt(H) times its largest scale.

  YaRN scales both; 1 % for rounding. Holds for rotations of the spec's own frequencies.
  """
  q, k = (jnp.abs(jax.lax.stop_gradient(scale)).max() for scale in (q_scale_H, k_scale_H))
  return 1.01 * spec.head_width ** 0.5 * rope.spec_frequencies(spec)[1] ** 2 * q * k


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
    bound = None
    if spec.qk_norm:
      q_scale, k_scale = self.q_norm_H[...], self.k_norm_H[...]
      q_BTNH, k_BTKH = (normed(x, scale, spec.norm_eps, context.rotation)
                        for x, scale in ((q_BTNH, q_scale), (k_BTKH, k_scale)))
      bound = bound_scores(q_scale, k_scale, spec)
    else:
      q_BTNH, k_BTKH = (rope.rotate(x, *context.rotation) for x in (q_BTNH, k_BTKH))
    q_BTNH, k_BTKH = constrain(q_BTNH, 'BTNH'), constrain(k_BTKH, 'BTKH')
    v_BTKH = constrain(v_BTKH, 'BTKH')
    if kv is None:
      o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, context.segment_BT, context.segment_BT,
                         bound=bound)
    else:
      kv = kv.extend(k_BTKH, v_BTKH, context.start)
      o_BTNH = kv.attend(q_BTNH, context)
    return project(self, 'o_NHD', o_BTNH, 2), kv
