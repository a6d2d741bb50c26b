"""Rotary position embedding and its context extensions, as small pure functions.

All angles are float32 (bfloat16 cannot count past 256); the tables are cast where they are
applied. i = 0 .. H/2 - 1 numbers the rotated pairs; dimension i pairs with i + H/2 (halves, not
interleaved).
"""
import math

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_width, theta):
  """theta^(-2i/H), float64 numpy (H/2,).

  Adjusted base frequency (ABF, Xiong et al. 2023, 2309.16039) is this with a larger `theta`.
  """
  return float(theta) ** (-2.0 * np.arange(head_width // 2) / head_width)


def yarn_frequencies(head_width, theta, factor, original, beta_fast=32.0, beta_slow=1.0,
                     truncate=True):
  """NTK-by-parts interpolation of YaRN (Peng et al. 2023, Definition 2), (H/2,).

  Pairs that turn more than `beta_fast` times over the `original` length keep their frequency,
  those that turn less than `beta_slow` times are divided by `factor`, with a ramp between.
  The ramp is linear in the pair's index, as in the authors' code and every deployed checkpoint
  (the paper's formula is linear in the number of turns).
  """
  def index(turns):
    return head_width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
  low, high = index(beta_fast), index(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_width - 1)
  high = high + 0.001 if low == high else high
  ramp = np.clip((np.arange(head_width // 2) - low) / (high - low), 0, 1)
  base = frequencies(head_width, theta)
  return base / factor * ramp + base * (1 - ramp)


def yarn_scale(factor):
  """sqrt(1/t) = 0.1 ln s + 1, multiplied into both cos and sin (Peng et al. 2023, eq. 22)."""
  return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def ntk_theta(theta, head_width, scale):
  """NTK-aware base: theta * s^(H/(H-2)) (Peng et al. 2023, Definition 1)."""
  return theta * scale ** (head_width / (head_width - 2))


def dynamic_ntk_theta(theta, head_width, length, original, factor=None):
  """NTK-aware base for the current `length`; `theta` itself up to `original`.

  `factor` None: s = length / original (Peng et al. 2023, section 3.3). Else transformers' `dynamic`
  rope type: s = factor * length / original - (factor - 1).
  Keys must be cached before RoPE, since the base changes as the text grows.
  """
  if length <= original:
    return theta
  scale = length / original
  scale = scale if factor is None else factor * scale - (factor - 1)
  return ntk_theta(theta, head_width, scale)


def chunked_ntk_theta(theta, head_width, length, original):
  """Qwen1's dynamic NTK: s = max(1, 2^ceil(log2(length / original) + 1) - 1), in steps."""
  if length <= original:
    return theta
  scale = max(1, 2 ** math.ceil(math.log2(length / original) + 1) - 1)
  return ntk_theta(theta, head_width, scale)


def logn_scale(position, trained):
  """LogN query factor: ln(i) / ln(trained) for the i-th token (from 1) past `trained`, else 1.

  `position` counts from 0. Qwen1 multiplies the query by it at inference; 1/sqrt(H) stays.
  """
  i = jnp.asarray(position, jnp.float32) + 1
  return jnp.where(i > trained, jnp.log(i) / math.log(trained), 1.0)


def spec_frequencies(spec):
  """(frequencies (H/2,), scale of cos and sin) of a `Spec`."""
  if spec.yarn is None:
    return frequencies(spec.head_width, spec.rope_theta), 1.0
  y = spec.yarn
  freq = yarn_frequencies(spec.head_width, spec.rope_theta, y.factor, y.original, y.beta_fast,
                          y.beta_slow, y.truncate)
  return freq, yarn_scale(y.factor) if y.attention_factor is None else y.attention_factor


def rotation(position_BT, freq, scale=1.0):
  """cos and sin, each float32 (B, T, 1, H/2), of the angles position * frequency."""
  angle = position_BT.astype(jnp.float32)[..., None] * jnp.asarray(freq, jnp.float32)

  def tables(angle):
    return jnp.cos(angle)[:, :, None] * scale, jnp.sin(angle)[:, :, None] * scale
  # A branch never left, but not fused either: XLA:CPU would compute sines anew in every layer.
  return jax.lax.cond(position_BT[0, 0] >= 0, tables, tables, angle)


def rotate(x_BTNH, cos, sin):
  """Turns each pair (x_i, x_{i+H/2}) by its angle; computed in float32, returned in x's dtype."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
