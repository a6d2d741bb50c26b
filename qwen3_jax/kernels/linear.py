"""Projections and SwiGLU with their own gradients.

Differentiating an einsum leaves XLA:CPU with transposed copies fused into the surrounding
arithmetic; written as plain two-dimensional products, a feed-forward block's gradient takes 0.44 of
the time. The weight's gradient is accumulated in float32 whatever the activations are.
"""
import functools
import math

import jax
import jax.numpy as jnp

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import exchange


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x, w, inner=1, names=''):
  """Contracts the last `inner` axes of `x` with the first `inner` axes of `w`, in x's type.

  x_BTD with q_DNH gives q_BTNH; x_BTNH with o_NHD and `inner` 2 gives x_BTD. The gradient of `w`
  has its type. With the letters of `w` as `names` it is summed over a mesh by
  `exchange.scatter_sum`, and that type is what is sent.
  """
  return jnp.tensordot(x, w.astype(x.dtype), inner)


def _forward(x, w, inner, names):
  return linear(x, w, inner, names), (x, w)


def _backward(inner, names, saved, dy):
  x, w = saved
  outer, tokens = w.ndim - inner, x.ndim - inner
  dx = jnp.tensordot(dy, w.astype(dy.dtype), (tuple(range(tokens, dy.ndim)),
                                              tuple(range(inner, inner + outer))))
  layout = _layout(x, w, dy, inner, names)
  if layout is None:
    dw = _over_tokens(x, dy, tokens).reshape(w.shape)
  else:
    body = functools.partial(_summed, layout=layout, dtype=w.dtype)
    dw = jax.shard_map(body, in_specs=layout[:2], out_specs=layout[2], check_vma=False)(x, dy)
  return dx.astype(x.dtype), dw.astype(w.dtype)


def _layout(x, w, dy, inner, names):
  """PartitionSpecs of x, dy, w; None where an axis of w is cut neither as theirs nor as tokens."""
  if not names or alphabet.is_alone():
    return None
  mesh = jax.sharding.get_abstract_mesh()
  specs = tuple(alphabet.partition(letters, array.shape, mesh) for letters, array in (
    ('BT' + names[:inner], x), ('BT' + names[inner:], dy), (names, w)))
  tokens = _token_axes(specs)
  for own, beside in zip(specs[2], (*specs[0][2:], *specs[1][2:]), strict=True):
    if own != beside and (beside or not tokens.issuperset(exchange.axes_of(own))):
      return None
  return specs


def _token_axes(specs):
  return {axis for entry in specs[0][:2] for axis in exchange.axes_of(entry)}


def _summed(x, dy, layout, dtype):
  """The gradient by all tokens of a device's part of a weight, from its own; float32."""
  rest = _token_axes(layout)
  dw = _flat_product(x, dy, 2).reshape(*x.shape[2:], *dy.shape[2:]).astype(dtype)
  for axis, axes in enumerate(map(exchange.axes_of, layout[2])):
    if axes and rest.issuperset(axes):
      dw, rest = exchange.scatter_sum(dw, axes, axis), rest.difference(axes)
  return jax.lax.psum(dw.astype(jnp.float32), tuple(sorted(rest)))


def _over_tokens(x, dy, tokens):
  """sum over tokens of x' dy. Flattened, unless that would mix two sharded token axes."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.shape.get('context', 1) > 1:
    over = tuple(range(tokens))
    return jnp.tensordot(x, dy, (over, over))
  return _flat_product(x, dy, tokens)


def _flat_product(x, dy, tokens):
  rows = math.prod(x.shape[:tokens])
  return jax.lax.dot_general(x.reshape(rows, -1), dy.reshape(rows, -1), (((0,), (0,)), ((), ())),
                             preferred_element_type=jnp.float32)


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def swiglu(gate, up):
  """silu(gate) * up; keeps only its two inputs for the backward pass."""
  return jax.nn.silu(gate) * up


def _swiglu_backward(saved, dy):
  gate, up = (x.astype(jnp.float32) for x in saved)
  s = jax.nn.sigmoid(gate)
  dy = dy.astype(jnp.float32)
  d_gate, d_up = dy * up * s * (1 + gate * (1 - s)), dy * gate * s
  return d_gate.astype(saved[0].dtype), d_up.astype(saved[1].dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
