"""Rows of the embedding, whose width is cut over the devices that hold the tokens.

Each device looks its columns up for the tokens of all and sends every one its own; the gradient
comes back the same way. What moves are tokens, where the table would be gathered whole and its
gradient summed whole. The gradient is added in float32: a token's share may be a thousandth of what
is there, which bfloat16 would not see.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import exchange

LANES = 128  # of a register: the least width that a row takes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD, tokens_BT, dtype):
  """table[tokens] in `dtype`, (B, T, D). Tokens are from 0 to V - 1."""
  specs, local = _layout(table_VD, tokens_BT, _rows)
  local = functools.partial(local, dtype=dtype)
  if specs is None:
    return local(table_VD, tokens_BT)
  table, tokens, found = specs
  return jax.shard_map(local, in_specs=(table, tokens), out_specs=found, check_vma=False)(
    table_VD, tokens_BT)


def _forward(table_VD, tokens_BT, dtype):
  return look_up(table_VD, tokens_BT, dtype), (table_VD, tokens_BT)


def _backward(dtype, saved, d_BTD):
  table_VD, tokens_BT = saved
  specs, local = _layout(table_VD, tokens_BT, _gradient)
  if specs is None:
    return local(table_VD, tokens_BT, d_BTD), None
  return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(
    table_VD, tokens_BT, d_BTD), None


look_up.defvjp(_forward, _backward)


def _layout(table_VD, tokens_BT, local):
  """(PartitionSpecs of the table, the tokens and their rows; `local` with their axes)."""
  if alphabet.is_alone():
    return None, local
  mesh = jax.sharding.get_abstract_mesh()
  table = alphabet.partition('VD', table_VD.shape, mesh)
  rows = alphabet.partition('BT', tokens_BT.shape, mesh)
  vocab, width = map(exchange.axes_of, table)
  tokens = sum(map(exchange.axes_of, rows), ())
  if not set(tokens).issuperset(width):  # fewer rows than devices: each has the whole table
    width, table = (), PartitionSpec(table[0], None)
  ways = math.prod(mesh.shape[axis] for axis in width)
  here = tokens_BT.size // math.prod(mesh.shape[axis] for axis in tokens)
  columns = table_VD.shape[1] // ways
  exchanged = ways * here * max(columns, LANES) <= table_VD.size // math.prod(
    mesh.shape[axis] for axis in vocab)
  return (table, rows, PartitionSpec(*rows, None)), functools.partial(
    local, vocab=vocab, width=width, tokens=tokens, exchanged=bool(width) and exchanged)


def _rows(table_VD, tokens_BT, dtype, vocab=(), width=(), tokens=(), exchanged=False):
  """The rows (B, T, D) of a device's own tokens."""
  table_VD = table_VD.astype(dtype)
  if exchanged:
    tokens_BT = exchange.gather(tokens_BT, width, 0)
  else:
    table_VD = exchange.gather(table_VD, width, 1)
  index_BT, here_BT = _place(table_VD, tokens_BT, vocab)
  rows_BTD = table_VD[index_BT]
  if vocab:
    rows_BTD = jnp.where(here_BT[..., None], rows_BTD, 0)
  if exchanged:
    rows_BTD = jax.lax.all_to_all(rows_BTD, width, 0, 2, tiled=True)
  return jax.lax.psum(rows_BTD, vocab) if vocab else rows_BTD


def _gradient(table_VD, tokens_BT, d_BTD, vocab=(), width=(), tokens=(), exchanged=False):
  """That of a device's part of the table, in its type, by all devices' rows."""
  rest = tuple(axis for axis in tokens if axis not in width)
  if exchanged:
    tokens_BT = exchange.gather(tokens_BT, width, 0)
    d_BTD = jax.lax.all_to_all(d_BTD, width, 2, 0, tiled=True)
  index_BT, here_BT = _place(table_VD, tokens_BT, vocab)
  index_BT = jnp.where(here_BT, index_BT, len(table_VD))  # beyond the last row: dropped
  d_VD = jnp.zeros((len(table_VD), d_BTD.shape[2]), jnp.float32)
  d_VD = d_VD.at[index_BT].add(d_BTD.astype(jnp.float32), mode='drop')
  if width and not exchanged:
    d_VD = exchange.scatter_sum(d_VD.astype(table_VD.dtype), width, 1)
  return (jax.lax.psum(d_VD, rest) if rest else d_VD).astype(table_VD.dtype)


def _place(table_VD, tokens_BT, vocab):
  """The tokens' rows in this device's part of the table, and which of them are there."""
  index_BT = tokens_BT - (jax.lax.axis_index(vocab) * len(table_VD) if vocab else 0)
  here_BT = (index_BT >= 0) & (index_BT < len(table_VD))
  return jnp.where(here_BT, index_BT, 0) if vocab else index_BT, here_BT
