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
UNROLLED = 4  # chunks; fewer are no loop (XLA:CPU runs a loop's body on one thread)


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
  chunks = [_in_chunks(x) for x in (hidden_BTD, target_BT, weight_BT)]
  scan = functools.partial(jax.lax.scan, unroll=len(chunks[0]) <= UNROLLED)
  total = jnp.zeros((), jnp.float32)
  if not gradients:
    total, _ = scan(lambda t, c: (t + step(*c)[0], None), total, chunks)
    return jax.lax.psum(total, token_axes) if token_axes else total

  def visit(carry, chunk):
    total, d_head = carry
    loss, d_hidden, d_head_chunk = step(*chunk)
    return (total + loss, d_head + d_head_chunk), d_hidden
  (total, d_head), d_hidden = scan(visit, (total, jnp.zeros(head_VD.shape, jnp.float32)), chunks)
  d_hidden = _from_chunks(d_hidden, B, T)
  if width_axes:
    d_head = jax.lax.psum_scatter(d_head, width_axes, scatter_dimension=1, tiled=True)
  rest = tuple(axis for axis in token_axes if axis not in width_axes)
  d_head = jax.lax.psum(d_head, rest) if rest else d_head
  total = jax.lax.psum(total, token_axes) if token_axes else total
  return total, (d_hidden, d_head.astype(dtype))


def _in_chunks(x_BT):
  """(B, T, ...) -> (chunks, M, ...) with about TOKENS rows M, padded with zeros (weight 0).

  Every chunk takes a stretch of T from all of B.
  """
  B, T = x_BT.shape[:2]
  size = min(T, max(1, TOKENS // B))
  x = jnp.pad(x_BT, [(0, 0), (0, -T % size)] + [(0, 0)] * (x_BT.ndim - 2))
  x = x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(len(x), B * size, *x.shape[3:])


def _from_chunks(x, B, T):
  x = x.reshape(len(x), B, -1, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(B, -1, *x.shape[3:])[:, :T]


def _chunk(hidden_MD, target_M, weight_M, *, head_VD, first, vocab_axes, gradients):
  """Loss of one chunk and, with `gradients`, its gradients; softmax over all shards of V."""
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits_MV = dot('MD,VD->MV', hidden_MD, head_VD)
  top_M = logits_MV.max(-1)
  top_M = jax.lax.pmax(top_M, vocab_axes) if vocab_axes else top_M
  norm_M = jnp.exp(logits_MV - top_M[:, None]).sum(-1)
  here_M = (target_M >= first) & (target_M < first + head_VD.shape[0])
  index_M1 = jnp.where(here_M, target_M - first, 0)[:, None]
  logit_M = jnp.where(here_M, jnp.take_along_axis(logits_MV, index_M1, 1)[:, 0], 0)
  if vocab_axes:
    norm_M, logit_M = jax.lax.psum((norm_M, logit_M), vocab_axes)
  lse_M = top_M + jnp.log(norm_M)
  loss = jnp.sum(weight_M * (lse_M - logit_M))
  if not gradients:
    return loss, None, None
  hit_MV = (jnp.arange(head_VD.shape[0]) == index_M1) & here_M[:, None]
  d_MV = weight_M[:, None] * (jnp.exp(logits_MV - lse_M[:, None]) - hit_MV)
  d_MV = d_MV.astype(hidden_MD.dtype)
  d_hidden = dot('MV,VD->MD', d_MV, head_VD)
  d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
  return loss, d_hidden.astype(hidden_MD.dtype), dot('MV,MD->VD', d_MV, hidden_MD)


def token_nll(hidden_BTD, head_VD, target_BT):
  """-log softmax(head hidden)[target] of every token, float32 (B, T), a chunk at a time.

  For evaluation: no gradient, and no mesh of its own (the partitioner decides).
  """
  head_VD = head_VD.astype(hidden_BTD.dtype)

  def one(chunk):
    hidden_MD, target_M = chunk
    logits_MV = jnp.einsum('MD,VD->MV', hidden_MD, head_VD, preferred_element_type=jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_MV), target_M[:, None], 1)[:, 0]
  nll = jax.lax.map(one, (_in_chunks(hidden_BTD), _in_chunks(target_BT)))
  return _from_chunks(nll, *target_BT.shape)
