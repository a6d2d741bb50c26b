"""Blocks for generation on one device: weights that meet the same input are one matrix.

Fewer, larger products in one chain: XLA on CPU runs each over all cores, while it hands small
independent ones from core to core (measured at 16 rows of width 256: 17 % of a decoding step).
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from qwen3_jax.kernels import experts as kernel
from qwen3_jax.model import rope
from qwen3_jax.model.attention import rms_norm
from qwen3_jax.model.moe import Mlp, Moe


class FusedAttention(nnx.Module):
  """`Attention` with a cache, its heads J in one matrix: N of queries, K of keys, K of values."""

  def __init__(self, plain, spec):
    def join(axis, *weights):
      return nnx.Param(jnp.concatenate([w[...] for w in weights], axis))
    self.qkv_DJH, self.o_NHD = join(1, plain.q_DNH, plain.k_DKH, plain.v_DKH), plain.o_NHD
    if spec.qkv_bias:
      self.bias_JH = join(0, plain.q_bias_NH, plain.k_bias_KH, plain.v_bias_KH)
    if spec.qk_norm:
      scales = (jnp.tile(scale[...], (count, 1)) for scale, count in
                ((plain.q_norm_H, spec.heads), (plain.k_norm_H, spec.kv_heads)))
      self.norm_JH = nnx.Param(jnp.concatenate([*scales]))

  def __call__(self, x_BTD, spec, context, kv):
    dtype, N, turned = x_BTD.dtype, spec.heads, spec.heads + spec.kv_heads
    x_BTJH = jnp.tensordot(x_BTD, self.qkv_DJH[...].astype(dtype), 1)
    if spec.qkv_bias:
      x_BTJH = x_BTJH + self.bias_JH[...].astype(dtype)
    qk_BTJH, v_BTKH = x_BTJH[:, :, :turned], x_BTJH[:, :, turned:]
    if spec.qk_norm:
      qk_BTJH = rms_norm(qk_BTJH, self.norm_JH[...], spec.norm_eps)
    qk_BTJH = rope.rotate(qk_BTJH, *context.rotation)
    kv = kv.extend(qk_BTJH[:, :, N:], v_BTKH, context.start)
    o_BTNH = kv.attend(qk_BTJH[:, :, :N], context)
    return jnp.tensordot(o_BTNH, self.o_NHD[...].astype(dtype), 2), kv


class FusedMlp(nnx.Module):
  """`Mlp` with gate and up side by side."""

  def __init__(self, plain):
    self.gate_up_DF = nnx.Param(jnp.concatenate([plain.gate_DF[...], plain.up_DF[...]], 1))
    self.down_FD = plain.down_FD

  def __call__(self, x_BTD, spec, context, routes=None):
    gate_BTF, up_BTF = jnp.split(x_BTD @ self.gate_up_DF[...].astype(x_BTD.dtype), 2, -1)
    return (jax.nn.silu(gate_BTF) * up_BTF) @ self.down_FD[...].astype(x_BTD.dtype), None, None


class WideMoe(Moe):
  """`Moe` with gate and up weights as `kernels.experts.every` wants them, for few tokens."""

  def __init__(self, plain):
    self.router_DE, self.down_EFD = plain.router_DE, plain.down_EFD
    self.gate_DEF = nnx.Param(plain.gate_EDF[...].swapaxes(0, 1))
    self.up_DEF = nnx.Param(plain.up_EDF[...].swapaxes(0, 1))

  def _experts(self, x_BTD, routes_BTX, gate_BTX):
    gate, up, down_EFD = (w[...].astype(x_BTD.dtype)
                          for w in (self.gate_DEF, self.up_DEF, self.down_EFD))
    flat = [x.reshape(-1, x.shape[-1]) for x in (x_BTD, routes_BTX, gate_BTX)]
    if kernel.few(math.prod(x_BTD.shape[:2]), routes_BTX.shape[-1], len(down_EFD)):
      y_MD = kernel.every(*flat, gate, up, down_EFD)
    else:
      y_MD = kernel.experts(*flat, gate.swapaxes(0, 1), up.swapaxes(0, 1), down_EFD)
    return y_MD.reshape(x_BTD.shape)


def fuse(block, spec, rows):
  """The `Block` with fused weights, best where `rows` tokens are decoded at once.

  Raises ValueError for a block with LoRA adapters: decoding wants them merged.
  """
  if hasattr(block.attention, 'lora'):
    raise ValueError('fused weights would leave out LoRA: merge the adapters (`lora.merge`) before '
                     'generation')
  block.attention = FusedAttention(block.attention, spec)
  if isinstance(block.mlp, Mlp):
    block.mlp = FusedMlp(block.mlp)
  elif jax.default_backend() == 'cpu' and kernel.few(rows, spec.chosen, spec.experts):
    block.mlp = WideMoe(block.mlp)
  return block
