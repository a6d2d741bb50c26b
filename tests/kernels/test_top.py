"""Distributions known at a few ids: the tail keeps its mass, and its gradient."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import divergence, head, top

KINDS = divergence.KINDS


def make_inputs(B=2, T=6, D=8, V=24, X=4, seed=0):
  """(hidden, head, ids, teacher's log-probabilities, weight): the teacher's likeliest ids."""
  keys = jax.random.split(jax.random.key(seed), 4)
  teacher = jax.nn.log_softmax(2 * jax.random.normal(keys[2], (B, T, V)))
  logp, ids = jax.lax.top_k(teacher, X)
  weight = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 3 > 0)
  return (jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D)) / 2, ids, logp,
          weight)


def plain(hidden, weights, ids, logq, weight, kind, mix=0.5, temperature=1.0, size=None):
  """The divergence of two small distributions, the last outcome of each being any other id."""
  p = jax.nn.softmax(jnp.einsum('BTD,VD->BTV', hidden, weights[:size]) / temperature)
  chosen = jnp.take_along_axis(p, ids, -1)
  listed = (ids[..., None] == jnp.arange(p.shape[-1])).any(-2)
  rest = jnp.sum(jnp.where(listed, 0, p), -1, keepdims=True)
  p = jnp.concatenate([chosen, rest], -1)
  q = jnp.exp(logq)
  q = jnp.concatenate([q, 1 - q.sum(-1, keepdims=True)], -1)
  m = mix * q + (1 - mix) * p
  def kl(a, b):
    return jnp.sum(a * jnp.log(a / b), -1)
  values = dict(reverse_kl=kl(p, q), forward_kl=kl(q, p),
                jsd=mix * kl(q, m) + (1 - mix) * kl(p, m))[kind]
  return jnp.sum(weight * values), values


def value_and_gradients(function, inputs, *settings):
  def total(hidden, weights):
    total, values, *_ = function(hidden, weights, *inputs[2:], *settings)
    return 3 * total, values
  (value, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*inputs[:2])
  return value, values, gradients


def compare(got, want):
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=2e-6)
  for a, b in zip(got[2], want[2], strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize('kind', KINDS)
def test_values_and_gradients_are_those_of_the_small_distributions(monkeypatch, kind):
  """In chunks of 2 of 6 places, at a temperature, over 22 of 24 ids."""
  monkeypatch.setattr(head, 'TOKENS', 4)
  hidden, weights, ids, logq, weight = make_inputs()
  inputs = hidden, weights, jnp.minimum(ids, 17 + jnp.arange(4)), logq, weight
  settings = kind, 0.3, 0.7, 22
  got = jax.jit(lambda *a: value_and_gradients(top.tail_divergence, a, *settings))(*inputs)
  compare(got, value_and_gradients(plain, inputs, *settings))
  assert (got[2][1][22:] == 0).all()


@pytest.mark.parametrize('kind', KINDS)
def test_all_ids_make_the_whole_divergence_and_fewer_a_lower_bound(kind):
  eye, rng = jnp.eye(7), np.random.default_rng(0)
  student, teacher = jnp.float32(rng.normal(0, 2, (2, 1, 5, 7)))
  weight, logq = jnp.ones((1, 5)), jax.nn.log_softmax(teacher)
  def whole(hidden, weights):
    return divergence.divergence(hidden, weights, teacher, eye, weight, kind)[0]
  values = divergence.divergence(student, eye, teacher, eye, weight, kind)[1]
  want = jax.grad(whole)(student, eye)
  before = jnp.zeros((1, 5))
  for count in (2, 4, 7):
    logp, ids = jax.lax.top_k(logq, count)
    def few(hidden, ids=ids, logp=logp):
      return top.tail_divergence(hidden, eye, ids, logp, weight, kind)[:2]
    (_, got), gradient = jax.value_and_grad(few, has_aux=True)(student)
    assert (got <= values + 2e-6).all() and (got >= before - 2e-6).all()
    before = got
  np.testing.assert_allclose(got, values, atol=2e-6)
  np.testing.assert_allclose(gradient, want, atol=2e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_mass_outside_of_the_list_has_a_gradient(kind):
  """A student that agrees on the ratios of the listed ids, but believes in others."""
  teacher = jnp.log(jnp.array([0.6, 0.3, 0.05, 0.05]))[None, None]
  student = jnp.log(jnp.array([0.2, 0.1, 0.4, 0.3]))[None, None]
  gradient = jax.grad(lambda x: top.tail_divergence(
    x, jnp.eye(4), jnp.array([[[0, 1]]]), teacher[..., :2], jnp.ones((1, 1)), kind)[0])(student)
  assert (gradient[0, 0, :2] < -0.02).all() and (gradient[0, 0, 2:] > 0.02).all()
  np.testing.assert_allclose(gradient[0, 0, 2] / gradient[0, 0, 3], 4 / 3, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_an_absent_id_is_none(kind):
  hidden, weights, ids, logq, weight = make_inputs()
  inputs = hidden, weights, ids.at[..., 2:].set(-1), logq, weight
  short = hidden, weights, ids[..., :2], logq[..., :2], weight
  compare(value_and_gradients(top.tail_divergence, inputs, kind),
          value_and_gradients(top.tail_divergence, short, kind))


@pytest.mark.parametrize('shape', [dict(tensor=2, fsdp=2), dict(tensor=4)], ids=str)
def test_on_a_mesh_equals_alone(monkeypatch, shape):
  monkeypatch.setattr(head, 'TOKENS', 6)
  inputs = make_inputs(B=4)
  mesh = alphabet.make_mesh(shape)
  named = dict(zip(('hidden_BTD', 'head_VD', 'id_BTX', 'logp_BTX', 'weight_BT'), inputs))
  layout = alphabet.shardings(named, mesh)
  placed = [jax.device_put(array, layout[name]) for name, array in named.items()]
  with jax.set_mesh(mesh):
    got = jax.jit(lambda *a: value_and_gradients(top.tail_divergence, a, 'jsd'))(*placed)
    ids, logp = jax.jit(functools.partial(top.likeliest, count=8, size=21))(*placed[:2])
    at = jax.jit(lambda *a: top.logp_at(*a, size=21))(*placed[:2], ids)
  compare(got, value_and_gradients(plain, inputs, 'jsd'))
  logits = jnp.einsum('BTD,VD->BTV', *inputs[:2])[..., :21]
  want, order = jax.lax.top_k(jax.nn.log_softmax(logits), 8)
  np.testing.assert_array_equal(ids, order)
  np.testing.assert_allclose(logp, want, atol=2e-6)
  np.testing.assert_array_equal(at, logp)


def test_no_logits_of_all_tokens(monkeypatch):
  monkeypatch.setattr(head, 'TOKENS', 8)
  inputs = make_inputs(B=2, T=12, V=48)
  def everything(*inputs):
    ids, logp = top.likeliest(*inputs[:2], 4)
    value = value_and_gradients(top.tail_divergence, inputs, 'jsd')
    return ids, logp, top.logp_at(*inputs[:2], ids), value
  text = str(jax.make_jaxpr(everything)(*inputs))
  assert '[8,48]' in text and '2,12,48' not in text and '24,48' not in text
