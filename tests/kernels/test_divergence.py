"""Divergences of two heads: other implementations' numbers, analytic gradients, chunks, meshes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import divergence, head, reference

KINDS = divergence.KINDS


def make_inputs(B=4, T=10, D=8, wide=12, V=24, seed=0):
  """(hidden, head, teacher, teacher's head, weight), the teacher wider than the student."""
  keys = jax.random.split(jax.random.key(seed), 5)
  def normal(key, *shape):
    return jax.random.normal(key, shape) * shape[-1] ** -0.25
  weight = jax.random.uniform(keys[4], (B, T)) * (jnp.arange(T) % 3 > 0)
  return (normal(keys[0], B, T, D), normal(keys[1], V, D), normal(keys[2], B, T, wide),
          normal(keys[3], V, wide), weight)


def value_and_gradients(function, inputs, *settings):
  """(sum, values, gradients of 3 * sum by every input)."""
  def total(*inputs):
    total, values = function(*inputs, *settings)
    return 3 * total, values
  (value, values), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*inputs)
  return value, values, gradients


def compare(got, want, rtol=1e-5, atol=2e-6):
  np.testing.assert_allclose(got[0], want[0], rtol=rtol)
  np.testing.assert_allclose(got[1], want[1], rtol=rtol, atol=atol)
  for a, b in zip(got[2][:2], want[2]):
    assert a.dtype == b.dtype
    assert np.linalg.norm(np.float32(a) - np.float32(b)) <= rtol * np.linalg.norm(np.float32(b))
  assert all((g == 0).all() for g in got[2][2:])  # the teacher learns nothing


def golden_settings():
  """TRL's beta is the weight of the teacher in the mixture; its ends are the two KLs."""
  for beta, kind in ((0.0, 'forward_kl'), (0.1, 'jsd'), (0.5, 'jsd'), (0.9, 'jsd'),
                     (1.0, 'reverse_kl')):
    for temperature in (1.0, 2.0, 0.8):
      yield pytest.param(f'gkd_beta{beta}_T{temperature}', kind, beta or 0.5, temperature,
                         id=f'{kind}-{beta}-{temperature}')


@pytest.mark.parametrize('name, kind, mix, temperature', list(golden_settings()))
def test_values_and_gradients_are_trls(golden, name, kind, mix, temperature):
  """To 1e-6; a token's value above 1 to 1e-6 of itself (float32 at 4.6 has steps of 5e-7)."""
  numbers = np.load(golden / 'loss' / 'distill.npz')
  counted = numbers['labels'] != -100
  eye, mix = jnp.eye(24), 0.5 if kind != 'jsd' else mix

  def mean(logits):
    total, values = divergence.divergence(
      logits, eye, numbers['teacher_logits'], eye, jnp.float32(counted), kind, mix, temperature)
    return total / counted.sum(), values
  (value, values), gradient = jax.value_and_grad(mean, has_aux=True)(
    jnp.array(numbers['student_logits']))
  np.testing.assert_allclose(value, numbers[f'{name}/loss'], rtol=0, atol=1e-6)
  want = numbers[f'{name}/per_token']
  assert (np.abs(np.float64(values) - want) <= 1e-6 * np.maximum(want, 1)).all()
  np.testing.assert_allclose(gradient, numbers[f'{name}/grad_student_logits'], rtol=0, atol=1e-6)


def test_names_of_the_two_directions(golden):
  numbers = np.load(golden / 'loss' / 'distill.npz')
  eye = jnp.eye(24)
  for kind, name in (('reverse_kl', 'reverse_kl_student_teacher'),
                     ('forward_kl', 'forward_kl_teacher_student')):
    _, values, entropy = divergence.divergence_entropy(
      numbers['student_logits'], eye, numbers['teacher_logits'], eye, numbers['mask'] * 1.0, kind)
    want = numbers[name]
    assert (np.abs(np.float64(values) - want) <= 1e-6 * np.maximum(want, 1)).all()
    np.testing.assert_allclose(entropy, numbers['student_entropy'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_analytic_and_numeric_in_float64(kind):
  """By the logits: p (log p - log q - KL); p - q; (1 - mix) p (log p - log m - KL(p || m))."""
  mix, temperature, rng = 0.3, 0.7, np.random.default_rng(0)
  logits, teacher = rng.normal(0, 2, (2, 3, 7)).astype(np.float32).astype(np.float64)

  def log_softmax(x):
    x = x / temperature
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  def value(x):
    p, q = log_softmax(x), log_softmax(teacher)
    m = np.log(mix * np.exp(q) + (1 - mix) * np.exp(p))
    def kl(a, b):
      return (np.exp(a) * (a - b)).sum(-1, keepdims=True)
    if kind == 'reverse_kl':
      return kl(p, q), np.exp(p) * (p - q - kl(p, q)) / temperature
    if kind == 'forward_kl':
      return kl(q, p), (np.exp(p) - np.exp(q)) / temperature
    return (mix * kl(q, m) + (1 - mix) * kl(p, m),
            (1 - mix) * np.exp(p) * (p - m - kl(p, m)) / temperature)
  got = jax.grad(lambda x: divergence.divergence(
    x, jnp.eye(7), jnp.float32(teacher)[None], jnp.eye(7), jnp.ones((1, 3)), kind, mix,
    temperature)[0])(jnp.float32(logits)[None])[0]
  np.testing.assert_allclose(got, value(logits)[1], rtol=0, atol=1e-6)
  for v in range(7):
    step = 1e-5 * np.eye(7)[v]
    numeric = (value(logits + step)[0] - value(logits - step)[0])[:, 0] / 2e-5
    np.testing.assert_allclose(got[:, v], numeric, rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_from_itself_a_model_differs_by_exactly_nothing(kind):
  hidden, weights, *_, weight = make_inputs()
  inputs = hidden, weights, hidden, weights, weight
  total, values, gradients = value_and_gradients(divergence.divergence, inputs, kind)
  assert total == 0 and (values == 0).all() and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize('kind, tokens', [(kind, 12) for kind in KINDS] + [('jsd', 1000)])
def test_values_and_gradients_in_chunks(monkeypatch, kind, tokens):
  """Chunks of 3 and of all positions of 10, over 19 of 24 ids."""
  monkeypatch.setattr(head, 'TOKENS', tokens)
  inputs, settings = make_inputs(), (kind, 0.3, 0.7, 19)
  run = jax.jit(functools.partial(value_and_gradients, divergence.divergence),
                static_argnums=(1, 2, 3, 4))
  got = run(inputs, *settings)
  compare(got, value_and_gradients(reference.divergence, inputs, *settings))
  assert (got[2][1][19:] == 0).all()  # rows that nobody can draw learn nothing
  total, values = jax.jit(lambda *a: divergence.divergence(*a, *settings))(*inputs)
  np.testing.assert_allclose([3 * total, values.sum()], [got[0], got[1].sum()], rtol=1e-6)


def test_heads_of_different_lengths():
  """The ids of the tokenizer are in both; without their number nobody knows which those are."""
  hidden, weights, teacher, other, weight = make_inputs()
  for inputs in ((hidden, weights[:20], teacher, other, weight),
                 (hidden, weights, teacher, other[:20], weight)):
    got = value_and_gradients(divergence.divergence, inputs, 'reverse_kl', 0.5, 1.0, 19)
    compare(got, value_and_gradients(reference.divergence, inputs, 'reverse_kl', 0.5, 1.0, 19))
    for size in None, 21:
      with pytest.raises(ValueError, match=r'head has 2\d rows.*\(size\) is'):
        divergence.divergence(*inputs, 'reverse_kl', size=size)


def test_bfloat16_is_multiplied_into_float32():
  hidden, weights, teacher, other, weight = make_inputs()
  inputs = hidden.astype(jnp.bfloat16), weights, teacher.astype(jnp.bfloat16), other, weight
  got = value_and_gradients(divergence.divergence, inputs, 'reverse_kl')
  rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in inputs[:4]]
  want = value_and_gradients(reference.divergence, (*rounded, weight), 'reverse_kl')
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=2e-6)
  assert got[0].dtype == got[1].dtype == jnp.float32
  assert [g.dtype for g in got[2][:2]] == [jnp.bfloat16, jnp.float32]
  for a, b in zip(got[2][:2], want[2]):
    assert np.linalg.norm(np.float32(a) - b) <= 2 ** -7 * np.linalg.norm(b)


@pytest.mark.parametrize('kind', KINDS)
def test_distributions_with_nothing_in_common_stay_finite(kind):
  """Logits of 1e5, each model certain of another id than the other's."""
  eye, head_VD = jnp.eye(4)[:, None, None], 1e5 * jnp.eye(4)
  inputs = eye[0], head_VD, eye[1], head_VD, jnp.ones((1, 1))
  value, _, gradients = value_and_gradients(divergence.divergence, inputs, kind)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
  np.testing.assert_allclose(value, 3 * (np.log(2) if kind == 'jsd' else 1e5), rtol=1e-6)


def test_no_logits_of_all_tokens(monkeypatch):
  monkeypatch.setattr(head, 'TOKENS', 8)
  inputs = make_inputs(B=2, T=12, V=48)
  run = functools.partial(value_and_gradients, divergence.divergence)
  text = str(jax.make_jaxpr(run, static_argnums=1)(inputs, 'jsd'))
  assert '[8,48]' in text and '2,12,48' not in text and '24,48' not in text


@pytest.mark.parametrize('shape', [dict(fsdp=4), dict(tensor=2, fsdp=2),
                                   dict(context=2, tensor=2)], ids=str)
def test_on_a_mesh_equals_alone(monkeypatch, shape):
  """The teacher's width, 10, is not a multiple of 4: its head is then whole where ours is cut."""
  monkeypatch.setattr(head, 'TOKENS', 6)
  inputs, settings = make_inputs(wide=10), ('jsd', 0.3, 0.7, 19)
  mesh = alphabet.make_mesh(shape)
  named = dict(zip(('hidden_BTD', 'head_VD', 'teacher_BTD', 'other_VD', 'weight_BT'), inputs))
  layout = alphabet.shardings(named, mesh)
  placed = [jax.device_put(array, layout[name]) for name, array in named.items()]
  with jax.set_mesh(mesh):
    got = jax.jit(lambda *a: value_and_gradients(divergence.divergence, a, *settings))(*placed)
    total, _ = jax.jit(lambda *a: divergence.divergence(*a, *settings))(*placed)
  compare(got, value_and_gradients(reference.divergence, inputs, *settings))
  np.testing.assert_allclose(3 * total, got[0], rtol=1e-6)


@pytest.mark.parametrize('changes, words', [
  (dict(kind='kl'), "'kl'; want one of reverse_kl, forward_kl, jsd"),
  (dict(mix=1.0), 'mix is 1.0; it must be between 0 and 1'),
  (dict(temperature=0.0), 'temperature is 0.0; it must be more than 0')])
def test_what_is_no_divergence_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    divergence.divergence(*make_inputs(), **dict(kind='reverse_kl') | changes)
