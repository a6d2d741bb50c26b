"""Adam whose second moment of a matrix is the product of a row and a column (1804.04235).

Two bytes a weight are kept, for the first moment, where Adam keeps eight.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

LEAST = 1e-30  # of a mean square that is divided by


class Factored(NamedTuple):
  """`rows` and `columns` have all axes of their weight, of size 1 where a mean was taken."""
  count: jax.Array
  mu: optax.Params
  rows: optax.Params
  columns: optax.Params


def scale(b1, b2, eps, sides):
  """Adam's direction m / (sqrt(v) + eps), both moments corrected for their start at 0.

  m of a matrix is kept in bfloat16. v is the mean square of its row times that of its column by
  that of all (Shazeer and Stern 2018, section 3): exact where the squares are of rank one.
  `sides(path)` gives a matrix's axes of inputs and of outputs, None for a vector, whose v is whole.
  """
  def means(path, w):
    square, found = jnp.square(w.astype(jnp.float32)), sides(path)
    if found is None:
      return square, jnp.zeros(())
    inputs, outputs = found
    return square.mean(outputs, keepdims=True), square.mean(inputs, keepdims=True)

  def init(params):
    def zeros(place):
      return _map(lambda path, w: jnp.zeros_like(means(path, w)[place]), params)
    mu = _map(lambda path, w: jnp.zeros(w.shape, jnp.bfloat16 if sides(path) else w.dtype), params)
    return Factored(jnp.zeros((), jnp.int32), mu, zeros(0), zeros(1))

  def update(updates, state, params=None):
    count = optax.safe_increment(state.count)
    mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mu, updates)
    rows, columns = (_map(lambda path, g, old, i=i: b2 * old + (1 - b2) * means(path, g)[i],
                          updates, kept) for i, kept in enumerate((state.rows, state.columns)))

    def direction(path, m, row, column):
      v, found = row, sides(path)
      if found is not None:
        v = row * column / jnp.maximum(row.mean(found[0], keepdims=True), LEAST)
      return m / (1 - b1 ** count) / (jnp.sqrt(v / (1 - b2 ** count)) + eps)
    updates = _map(direction, mu, rows, columns)
    mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
    return updates, Factored(count, mu, rows, columns)
  return optax.GradientTransformation(init, update)


_map = jax.tree_util.tree_map_with_path
