"""The language-model head inside the loss: logits exist one chunk at a time, never as (B, T, V).

The loss is a weighted sum, so its gradient is known as soon as a chunk's logits are: the forward
pass under differentiation computes both, and the backward pass only scales. Meaning:
`reference.cross_entropy`.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen3_jax import mesh as alphabet

TOKENS = 1024  # tokens of one chunk on one device


@jax.custom_vjp
def cross_entropy(hidden_BTD, head_VD, target_BT, weight_BT):
  """sum over tokens of weight * -log softmax(head hidden)[target]; float32 scalar.

  Under a mesh (`jax.set_mesh`) each device gathers its share of the head once, runs over its own
  tokens, and the head's gradient is reduce-scattered once.
  """
  return _sharded(hidden_BTD, head_VD, target_BT, weight_BT, gradients=False)


def _forward(hidden_BTD, head_VD, target_BT, weight_BT):
  return _sharded(hidden_BTD, head_VD, target_BT, weight_BT, gradients=True)


def _backward(saved, ct):
  d_hidden, d_head = saved
  return ((ct * d_hidden).astype(d_hidden.dtype), (ct * d_head).astype(d_head.dtype), None, None)


cross_entropy.defvjp(_forward, _backward)


def _sharded(hidden_BTD, head_VD, target_BT, weight_BT, gradients):
  mesh = jax.sharding.get_abstract_mesh()
  run = functools.partial(_local, gradients=gradients)
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return run(hidden_BTD, head_VD, target_BT, weight_BT)
  rows = alphabet.partition('BT', target_BT.shape, mesh)
  head = alphabet.partition('VD', head_VD.shape, mesh)
  def axes(entry):
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
  token_axes = axes(rows[0]) + axes(rows[1])
  body = functools.partial(run, vocab_axes=axes(head[0]), width_axes=axes(head[1]),
                           token_axes=token_axes)
  out = (PartitionSpec(), (PartitionSpec(*rows, None), head)) if gradients else PartitionSpec()
  return jax.shard_map(body, in_specs=(PartitionSpec(*rows, None), head, rows, rows), out_specs=out,
                       check_vma=False)(hidden_BTD, head_VD, target_BT, weight_BT)


def _local(hidden_BTD, head_VD, target_BT, weight_BT, gradients, vocab_axes=(), width_axes=(),
           token_axes=()):
  """One device's tokens against its rows of the head; sums over the named mesh axes.

  With `gradients`: (loss, (d_hidden, d_head)), else the loss.
  """
  B, T, D = hidden_BTD.shape
  dtype = head_VD.dtype
  if width_axes:
    head_VD = jax.lax.all_gather(head_VD, width_axes, axis=1, tiled=True)
  head_VD = head_VD.astype(hidden_BTD.dtype)
  first = jax.lax.axis_index(vocab_axes) * head_VD.shape[0] if vocab_axes else 0
  step = functools.partial(_chunk, head_VD=head_VD, first=first, vocab_axes=vocab_axes,
                           gradients=gradients)
  size = min(T, max(1, TOKENS // B))
  chunks = [_in_chunks(x, size) for x in (hidden_BTD, target_BT, weight_BT)]
  total = jnp.zeros((), jnp.float32)
  if not gradients:
    total, _ = jax.lax.scan(lambda t, c: (t + step(*c)[0], None), total, chunks)
    return jax.lax.psum(total, token_axes) if token_axes else total

  def visit(carry, chunk):
    total, d_head = carry
    loss, d_hidden, d_head_chunk = step(*chunk)
    return (total + loss, d_head + d_head_chunk), d_hidden
  (total, d_head), d_hidden = jax.lax.scan(visit, (total, jnp.zeros(head_VD.shape, jnp.float32)), chunks)
  d_hidden = d_hidden.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
  if width_axes:
    d_head = jax.lax.psum_scatter(d_head, width_axes, scatter_dimension=1, tiled=True)
  rest = tuple(axis for axis in token_axes if axis not in width_axes)
  d_head = jax.lax.psum(d_head, rest) if rest else d_head
  total = jax.lax.psum(total, token_axes) if token_axes else total
  return total, (d_hidden, d_head.astype(dtype))


def _in_chunks(x, size):
  """(B, T, ...) -> (chunks, B, size, ...), the last chunk padded with zeros (weight 0)."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _chunk(hidden_BTD, target_BT, weight_BT, *, head_VD, first, vocab_axes, gradients):
  """Loss of one chunk and, with `gradients`, its gradients; softmax over all shards of V."""
  logits = jnp.einsum('BTD,VD->BTV', hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  top = logits.max(-1)
  top = jax.lax.pmax(top, vocab_axes) if vocab_axes else top
  e = jnp.exp(logits - top[..., None])
  norm = e.sum(-1)
  here = (target_BT >= first) & (target_BT < first + head_VD.shape[0])
  index = jnp.where(here, target_BT - first, 0)[..., None]
  logit = jnp.where(here, jnp.take_along_axis(logits, index, -1)[..., 0], 0)
  if vocab_axes:
    norm, logit = jax.lax.psum((norm, logit), vocab_axes)
  loss = jnp.sum(weight_BT * (top + jnp.log(norm) - logit))
  if not gradients:
    return loss, None, None
  hit = (jnp.arange(head_VD.shape[0]) == index) & here[..., None]
  d_logits = (weight_BT / norm)[..., None] * e - jnp.where(hit, weight_BT[..., None], 0)
  d_logits = d_logits.astype(hidden_BTD.dtype)
  d_hidden = jnp.einsum('BTV,VD->BTD', d_logits, head_VD, preferred_element_type=jnp.float32)
  d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
  d_head = jnp.einsum('BTV,BTD->VD', d_logits, hidden_BTD, preferred_element_type=jnp.float32)
  return loss, d_hidden.astype(hidden_BTD.dtype), d_head
