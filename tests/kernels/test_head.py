"""The chunked head equals its plain meaning, alone and on meshes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import head, reference


def make_inputs(B=4, T=10, D=8, V=24, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  hidden = jax.random.normal(keys[0], (B, T, D))
  weights = jax.random.normal(keys[1], (V, D))
  target = jax.random.randint(keys[2], (B, T), 0, V)
  weight = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 3 > 0)
  return hidden, weights, target, weight


def value_and_gradients(function, hidden, weights, target, weight):
  def total(hidden, weights):
    return 3 * function(hidden, weights, target, weight)
  return jax.value_and_grad(total, (0, 1))(hidden, weights)


def logp_and_gradients(function, hidden, weights, target, weight):
  """Values, and the gradients of a function of them that is not linear."""
  def total(hidden, weights):
    logp = function(hidden, weights, target)
    return jnp.sum(jnp.tanh(weight * logp / 4)), logp
  gradients, logp = jax.grad(total, (0, 1), has_aux=True)(hidden, weights)
  return logp, gradients


def entropy_and_gradients(function, hidden, weights, target, weight):
  """Values at temperature 0.7 over 19 of 24 ids, and gradients of what is not linear in both."""
  target = jnp.minimum(target, 18)

  def total(hidden, weights):
    logp, entropy = function(hidden, weights, target, 0.7, 19)
    mixed = jnp.sum(jnp.tanh(weight * logp / 4) * jnp.sin(weight + entropy))
    return mixed, jnp.stack([logp, entropy])
  gradients, values = jax.grad(total, (0, 1), has_aux=True)(hidden, weights)
  return values, gradients


def compare(got, want, rtol=1e-5, atol=0):
  """`atol`: a log-probability near 0 is the difference of two logits, and has their rounding."""
  np.testing.assert_allclose(got[0], want[0], rtol=rtol, atol=atol)
  for a, b in zip(got[1], want[1]):
    assert a.dtype == b.dtype
    assert np.linalg.norm(np.float32(a) - np.float32(b)) <= rtol * np.linalg.norm(np.float32(b))


@pytest.mark.parametrize('tokens', [12, 16, 4, 1000])
def test_values_and_gradients_in_chunks(monkeypatch, tokens):
  """Chunks of 3, 4, 1 and all positions of 10: the first two do not divide the row."""
  monkeypatch.setattr(head, 'TOKENS', tokens)
  inputs = make_inputs()
  run = jax.jit(functools.partial(value_and_gradients, head.cross_entropy))
  compare(run(*inputs), value_and_gradients(reference.cross_entropy, *inputs))
  np.testing.assert_allclose(jax.jit(lambda *a: head.cross_entropy(*a))(*inputs),
                             reference.cross_entropy(*inputs), rtol=1e-5)


@pytest.mark.parametrize('tokens', [12, 16, 4, 1000])
def test_log_probabilities_in_chunks(monkeypatch, tokens):
  monkeypatch.setattr(head, 'TOKENS', tokens)
  inputs = make_inputs()
  got = jax.jit(functools.partial(logp_and_gradients, head.token_logp))(*inputs)
  compare(got, logp_and_gradients(reference.token_logp, *inputs), atol=2e-6)
  assert got[0].shape == (4, 10) and got[0].dtype == jnp.float32


@pytest.mark.parametrize('tokens', [12, 1000])
def test_entropies_in_chunks(monkeypatch, tokens):
  monkeypatch.setattr(head, 'TOKENS', tokens)
  inputs = make_inputs()
  got = jax.jit(functools.partial(entropy_and_gradients, head.token_entropy))(*inputs)
  compare(got, entropy_and_gradients(reference.token_entropy, *inputs), atol=2e-6)
  assert got[0].shape == (2, 4, 10) and got[0].dtype == jnp.float32
  assert (got[1][1][19:] == 0).all()  # rows that nobody can draw learn nothing


def test_temperature_divides_the_logits():
  hidden, weights, target, weight = make_inputs()
  def at(temperature):
    return functools.partial(head.token_logp, temperature=temperature)
  value, gradients = logp_and_gradients(at(0.5), hidden, weights, target, weight)
  doubled = logp_and_gradients(reference.token_logp, 2 * hidden, weights, target, weight)
  compare((value, gradients), (doubled[0], (2 * doubled[1][0], doubled[1][1])), atol=2e-6)
  assert np.abs(value - logp_and_gradients(at(1.0), hidden, weights, target, weight)[0]).max() > 0.1


def test_entropy_of_huge_logits_is_not_a_difference_of_them():
  """At logits around 1e5, a log-sum-exp less a mean logit would be off by 1e-2; this is log 2."""
  hidden, weights = jnp.ones((1, 1, 4)), jnp.full((6, 4), -3e4).at[:2].set(3e4)
  entropy = head.token_entropy(hidden, weights, jnp.zeros((1, 1), jnp.int32))[1]
  np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)


def test_an_entropy_only_looked_at_costs_no_gradient():
  """The backward pass has no second exponential where no gradient of the entropy is asked for."""
  hidden, weights, target, _ = make_inputs()

  def count(share):
    def total(hidden):
      logp, entropy = head.token_entropy(hidden, weights, target)
      return logp.sum() + share * (entropy if share else jax.lax.stop_gradient(entropy)).sum()
    text = jax.jit(jax.grad(total)).lower(hidden).compiler_ir('hlo').as_hlo_text()
    return text.count(' exponential(')
  def logp_only(hidden):
    return head.token_logp(hidden, weights, target).sum()
  text = jax.jit(jax.grad(logp_only)).lower(hidden).compiler_ir('hlo').as_hlo_text()
  assert count(0.0) == text.count(' exponential(') < count(1.0)


def test_log_probabilities_of_bfloat16():
  """Logits of products of bfloat16 are float32; gradients are rounded to the inputs' type."""
  hidden, weights, target, weight = make_inputs()
  inputs = hidden.astype(jnp.bfloat16), weights, target, weight
  got = logp_and_gradients(head.token_logp, *inputs)
  rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, weights)]
  logp, gradients = logp_and_gradients(reference.token_logp, *rounded, target, weight)
  np.testing.assert_allclose(got[0], logp, rtol=1e-5, atol=2e-6)
  assert [g.dtype for g in got[1]] == [jnp.bfloat16, jnp.float32]
  for a, b in zip(got[1], gradients):
    assert np.linalg.norm(np.float32(a) - b) <= 2 ** -7 * np.linalg.norm(b)


def test_large_logits_and_no_weight_stay_finite():
  hidden, weights, target, weight = make_inputs()
  inputs = hidden * 100, weights * 100, target, weight
  compare(value_and_gradients(head.cross_entropy, *inputs),
          value_and_gradients(reference.cross_entropy, *inputs))
  value, gradients = value_and_gradients(head.cross_entropy, hidden, weights, target, weight * 0)
  assert value == 0 and all((g == 0).all() for g in gradients)


def test_no_logits_of_all_tokens(monkeypatch):
  monkeypatch.setattr(head, 'TOKENS', 8)
  inputs = make_inputs(B=2, T=12, V=48)
  run = functools.partial(value_and_gradients, head.cross_entropy)
  for traced in (run, functools.partial(logp_and_gradients, head.token_logp),
                 functools.partial(entropy_and_gradients, head.token_entropy)):
    text = str(jax.make_jaxpr(traced)(*inputs))
    assert '[8,48]' in text and '2,12,48' not in text and '24,48' not in text


@pytest.mark.parametrize('shape', [dict(fsdp=4), dict(tensor=2, fsdp=2), dict(data=2, fsdp=2),
                                   dict(context=2, tensor=2)], ids=str)
def test_on_a_mesh_equals_alone(monkeypatch, shape):
  monkeypatch.setattr(head, 'TOKENS', 6)
  inputs = make_inputs()
  want = value_and_gradients(reference.cross_entropy, *inputs)
  mesh = alphabet.make_mesh(shape)
  named = dict(zip(('hidden_BTD', 'head_VD', 'target_BT', 'weight_BT'), inputs))
  layout = alphabet.shardings(named, mesh)
  placed = [jax.device_put(array, layout[name]) for name, array in named.items()]
  with jax.set_mesh(mesh):
    got = jax.jit(functools.partial(value_and_gradients, head.cross_entropy))(*placed)
    loss = jax.jit(lambda *a: head.cross_entropy(*a))(*placed)
    logp = jax.jit(functools.partial(logp_and_gradients, head.token_logp))(*placed)
    both = jax.jit(functools.partial(entropy_and_gradients, head.token_entropy))(*placed)
  compare(got, want)
  np.testing.assert_allclose(3 * loss, want[0], rtol=1e-5)
  compare(logp, logp_and_gradients(reference.token_logp, *inputs), atol=2e-6)
  compare(both, entropy_and_gradients(reference.token_entropy, *inputs), atol=2e-6)
