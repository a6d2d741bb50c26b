"""Sorted, dropless experts equal their plain meaning, however lopsided the routing."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.kernels import experts as kernel
from qwen3_jax.kernels import reference

M, X, E, D, F = 40, 2, 6, 8, 12


def make_weights():
  keys = jax.random.split(jax.random.key(1), 6)
  return (jax.random.normal(keys[0], (M, D)), jax.random.uniform(keys[1], (M, X)),
          *(jax.random.normal(key, shape) / 3 for key, shape in zip(
              keys[2:], ((E, D, F), (E, D, F), (E, F, D)))), jax.random.normal(keys[5], (M, D)))


def routes(kind):
  """Chosen experts (M, X), all different within a token."""
  m = np.arange(M)
  first, second = {
      'even': (m % E, (m + 1) % E),
      'all to one pair': (m * 0 + 4, m * 0 + 1),
      'some experts empty': (m * 0, 3 + m % 2),
      'one odd token': (np.where(m == 17, 5, 2), m * 0 + 3)}[kind]
  return jnp.asarray(np.stack([first, second], 1), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, chosen, x, gate, gate_EDF, up_EDF, down_EFD, weight):
  def total(x, gate, *weights):
    y = function(x, chosen, gate, *weights)
    return jnp.sum(y * weight), y
  (_, y), gradients = jax.value_and_grad(total, range(5), has_aux=True)(
      x, gate, gate_EDF, up_EDF, down_EFD)
  return y, *gradients


@pytest.mark.parametrize('function', [kernel._blocked, kernel._ragged])
def test_values_and_gradients(function):
  """The path of CPUs and that of accelerators."""
  x, gate, *weights, out = make_weights()
  for kind in ('even', 'all to one pair', 'some experts empty', 'one odd token'):
    got = value_and_gradients(function, routes(kind), x, gate, *weights, out)
    want = value_and_gradients(reference.experts, routes(kind), x, gate, *weights, out)
    for name, a, b in zip(('y', 'dx', 'dgate', 'dg', 'du', 'dd'), got, want):
      np.testing.assert_allclose(a, b, atol=5e-5, err_msg=f'{kind}: {name}')
  assert (np.asarray(got[3])[[0, 1, 4]] == 0).all()  # no token chose these


def test_more_rows_than_a_block(monkeypatch):
  monkeypatch.setattr(kernel, 'ROWS', 4)
  x, gate, *weights, _ = make_weights()
  chosen = routes('one odd token')
  got = jax.jit(kernel.experts)(x, chosen, gate, *weights)
  np.testing.assert_allclose(got, reference.experts(x, chosen, gate, *weights), atol=5e-5)


def test_one_token():
  x, gate, *weights, _ = make_weights()
  chosen = routes('even')
  got = kernel.experts(x[:1], chosen[:1], gate[:1], *weights)
  want = reference.experts(x[:1], chosen[:1], gate[:1], *weights)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_each_assignment_has_a_row_of_its_expert():
  chosen = routes('some experts empty')
  slot, row, count, of_block = map(np.asarray, kernel.plan(chosen, E, 4))
  np.testing.assert_array_equal(count, np.bincount(np.ravel(chosen), minlength=E))
  np.testing.assert_array_equal(slot[row], np.arange(M * X).reshape(M, X))
  assert (slot < M * X).sum() == M * X  # the other rows are padding
  np.testing.assert_array_equal(of_block[row // 4], chosen)


def elsewhere():
  """`routes('even')` where every third choice is no expert here, and how many are."""
  chosen = np.array(routes('even'))
  chosen.reshape(-1)[::3] = np.resize([E, -1, 5 * E], chosen.reshape(-1)[::3].shape)
  return jnp.asarray(chosen), int(((chosen >= 0) & (chosen < E)).sum())


@pytest.mark.parametrize('function', [kernel._blocked, kernel._ragged])
def test_choices_of_no_expert_cost_nothing(function):
  x, gate, *weights, out = make_weights()
  chosen, limit = elsewhere()
  here = (chosen >= 0) & (chosen < E)
  got = value_and_gradients(functools.partial(function, limit=limit), chosen, x, gate, *weights,
                            out)
  want = value_and_gradients(lambda x, _, gate, *w: reference.experts(
    x, jnp.where(here, chosen, 0), jnp.where(here, gate, 0), *w), chosen, x, gate, *weights, out)
  for name, a, b in zip(('y', 'dx', 'dgate', 'dg', 'du', 'dd'), got, want):
    np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)
  slot, row, count, _ = map(np.asarray, kernel.plan(chosen, E, 4, limit))
  assert len(slot) == kernel.count_rows(limit, E, 4) + 4 and count.sum() == limit
  assert (row[~np.asarray(here)] == len(slot) - 1).all() and slot[-1] == M * X
