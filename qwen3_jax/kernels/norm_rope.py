"""QK-norm and rotary embedding of projected heads in one pass, forward and backward.

XLA makes five passes of these (squares, scale, two halves of the rotation, their join), some over
float32 arrays: twelve times the HBM time of reading and writing once. Here heads lie side by side
as the projection leaves them, (B, T, N * H), and one is a tile of lanes: turning it by half of H
gives each element the other of its pair. Meaning: `reference.norm_rope`.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import blocks as table
from qwen3_jax.kernels import target

WIDTH = 128  # of a head: the lanes of a register
BLOCKS = dict(tokens=256, heads=8)


def fits(x_BTNH):
  """Whether `norm_rope` is for these heads: on a TPU, 128 wide, and more than a few tokens."""
  return target.platform() == 'tpu' and x_BTNH.shape[3] == WIDTH and x_BTNH.shape[1] >= WIDTH


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def norm_rope(x_BTNH, scale_H, cos_BT1I, sin_BT1I, eps, blocks=None, interpret=None):
  """x / rms(x) * scale over H, then each pair (x_i, x_{i + H/2}) turned by its angle, (B, T, N, H).

  `cos_BT1I` and `sin_BT1I` (B, T, 1, H/2) float32 take no gradient. Computed in float32, returned
  in x's dtype. Under a mesh each device turns its own rows, tokens and heads. `blocks`: `tokens`
  and `heads` of one step. Raises ValueError where H is not 128 or a step's blocks are too large.
  """
  return _forward(x_BTNH, scale_H, cos_BT1I, sin_BT1I, eps, blocks, interpret)[0]


def _forward(x_BTNH, scale_H, cos, sin, eps, blocks, interpret):
  def local(axes, *arrays):
    return _call(_turn, 'norm_rope', *arrays, eps=eps, blocks=blocks, interpret=interpret)
  o, = _on_mesh(local, scale_H, cos, sin, x_BTNH)
  return o, (x_BTNH, scale_H, cos, sin)


def _backward(eps, blocks, interpret, saved, do_BTNH):
  x_BTNH, scale_H, cos, sin = saved

  def local(axes, *arrays):
    dx, d_scale = _call(_turn_back, 'norm_rope_backward', *arrays, eps=eps, blocks=blocks,
                        interpret=interpret)
    d_scale = d_scale.sum((0, 1))
    return dx, jax.lax.psum(d_scale, axes) if axes else d_scale
  dx, d_scale = _on_mesh(local, scale_H, cos, sin, x_BTNH, do_BTNH)
  return dx, d_scale.astype(scale_H.dtype), None, None


norm_rope.defvjp(_forward, _backward)


def _on_mesh(local, scale_H, cos, sin, *wide):
  """`local(axes, scale, cos, sin, *wide)` on each device's part of the (B, T, N, H) arrays `wide`.

  Gives one such array and, for two, what is the same on all devices. `axes` split the arrays.
  """
  if alphabet.is_alone():
    return local((), scale_H, cos, sin, *wide)
  spec = alphabet.partition('BTNH', wide[0].shape, jax.sharding.get_abstract_mesh())
  axes = tuple(jax.tree.leaves(tuple(spec)))
  P = PartitionSpec
  angles = P(*spec[:2])
  return jax.shard_map(
    functools.partial(local, axes), in_specs=(P(), angles, angles, *[spec] * len(wide)),
    out_specs=(spec, P())[:len(wide)], check_vma=False)(scale_H, cos, sin, *wide)


def _turn(x_ref, scale_ref, cos_ref, sin_ref, o_ref, *, eps, length):
  """One block of tokens and heads."""
  cos, sin = _tables(cos_ref, sin_ref)
  scale = scale_ref[...]
  cos, sin = cos * scale, sin * pltpu.roll(scale, WIDTH // 2, 1)
  for head in _heads(x_ref):
    x = x_ref[0, :, head].astype(jnp.float32)
    turned = x * cos + pltpu.roll(x, WIDTH // 2, 1) * sin
    o_ref[0, :, head] = (turned * _inverse_rms(x, eps)).astype(o_ref.dtype)


def _turn_back(x_ref, do_ref, scale_ref, cos_ref, sin_ref, dx_ref, d_scale_ref, *, eps, length):
  """With n = x / rms: dx = (dn - n mean(n dn)) / rms, and the block's sum of dy n for the scale.

  A head's two sums over lanes are waited for beside the arithmetic of the heads before it.
  """
  @pl.when(pl.program_id(2) == 0)
  def _():
    d_scale_ref[...] = jnp.zeros_like(d_scale_ref)
  cos, sin = _tables(cos_ref, sin_ref)
  scale, tokens = scale_ref[...], x_ref.shape[1]
  row = jax.lax.broadcasted_iota(jnp.int32, (tokens, WIDTH), 0)
  left = length - pl.program_id(1) * tokens

  def load(head):
    x, do = (ref[0, :, head].astype(jnp.float32) for ref in (x_ref, do_ref))
    return x, do, pltpu.roll(do, WIDTH // 2, 1), _inverse_rms(x, eps)

  def turn(x, do, other, inverse):
    normed, dy = x * inverse, do * cos - other * sin
    product = dy * normed
    if length % tokens:  # what lies past the end is anything
      product = jnp.where(row < left, product, 0)
    d_scale_ref[0] += product.reshape(-1, 8, WIDTH).sum(0)
    return normed, dy * scale, inverse, jnp.mean(product * scale, axis=1, keepdims=True)

  def store(head, normed, d_normed, inverse, mean):
    dx_ref[0, :, head] = ((d_normed - normed * mean) * inverse).astype(dx_ref.dtype)

  heads, loaded, turned = _heads(x_ref), {}, {}
  for i in range(len(heads) + 2):
    if i < len(heads):
      loaded[i] = load(heads[i])
    if i - 1 in loaded:
      turned[i - 1] = turn(*loaded.pop(i - 1))
    if i - 2 in turned:
      store(heads[i - 2], *turned.pop(i - 2))


def _heads(x_ref):
  return [pl.ds(start, WIDTH) for start in range(0, x_ref.shape[2], WIDTH)]


def _tables(cos_ref, sin_ref):
  """Cosine and sine over both halves of a head; the first half's partner is taken away."""
  cos, sin = cos_ref[0], sin_ref[0]
  return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)


def _inverse_rms(x, eps):
  return jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)


def _call(kernel, name, scale_H, cos, sin, *wide, eps, blocks, interpret):
  """Runs `kernel` over blocks of tokens and heads of `wide`: an array like these and, for two, sums
  (.., 8, H) over tokens and heads.
  """
  B, T, N, H = wide[0].shape
  if H != WIDTH:
    raise ValueError(f'norm_rope wants heads of {WIDTH}, got {H}: use rms_norm and rope.rotate')
  blocks = BLOCKS | (blocks or table.choose(name, T=T, N=N, dtype=str(wide[0].dtype)))
  tokens, heads = min(blocks['tokens'], -(-T // 16) * 16), math.gcd(blocks['heads'], N)
  _require_vmem(name, tokens, heads, wide[0].dtype, 1 + len(wide))
  interpret = target.platform() != 'tpu' if interpret is None else interpret
  steps = pl.cdiv(T, tokens)
  block = pl.BlockSpec((1, tokens, heads * H), lambda b, t, n: (b, t, n))
  angles = pl.BlockSpec((1, tokens, H // 2), lambda b, t, n: (b, t, 0))
  scale = pl.BlockSpec((1, H), lambda b, t, n: (0, 0))
  sums = pl.BlockSpec((1, 8, H), lambda b, t, n: (b * steps + t, 0, 0))
  shapes = [jax.ShapeDtypeStruct((B, T, N * H), wide[0].dtype),
            jax.ShapeDtypeStruct((B * steps, 8, H), jnp.float32)][:len(wide)]
  size = B * T * N * H
  out = pl.pallas_call(
    functools.partial(kernel, eps=eps, length=T), grid=(B, steps, N // heads), out_shape=shapes,
    in_specs=[block] * len(wide) + [scale, angles, angles], out_specs=[block, sums][:len(wide)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    cost_estimate=pl.CostEstimate(
      flops=12 * size, transcendentals=size // H,
      bytes_accessed=(1 + len(wide)) * size * wide[0].dtype.itemsize + 4 * B * T * H),
    interpret=interpret, name=name,
  )(*(x.reshape(B, T, N * H) for x in wide), scale_H[None].astype(jnp.float32),
    *(x.astype(jnp.float32).reshape(B, T, H // 2) for x in (cos, sin)))
  return out[0].reshape(wide[0].shape), *out[1:]


def _require_vmem(name, tokens, heads, dtype, arrays):
  """Raises ValueError where the blocks, twice each, are more than the compiler leaves a kernel."""
  size = jnp.dtype(dtype).itemsize
  wanted = 2 * tokens * WIDTH * (arrays * heads * size + 8) + 4 * tokens * WIDTH * 4
  room = min(16 << 20, target.vmem() // 2)
  if wanted > room:
    raise ValueError(f'{name} with {tokens} tokens and {heads} heads in a step needs '
                     f'{wanted / 2**20:.1f} MiB of VMEM, the compiler gives it '
                     f'{room / 2**20:.0f}: lower `tokens`')
