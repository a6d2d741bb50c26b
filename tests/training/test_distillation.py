"""Losses of distillation of whole models: gradients in expectation, packing, micro-batches."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.training import distillation, policy
from qwen3_jax.training import step as training

KINDS = ('reverse_kl', 'forward_kl', 'jsd', 'sampled', 'teacher_top', 'student_top')
DRAWN = dict(temperature=0.8, size=80)  # of 96 ids, those that the tokenizer has


@struct.dataclass
class Table:
  """A model whose logits are its weights (V,), the same at every place."""
  logits: jax.Array

  def __call__(self, tokens_BT, segment_BT, position_BT, routes=None, remat='none', dtype=None):
    return transformer.Output(jnp.broadcast_to(self.logits, (*tokens_BT.shape, len(self.logits))))

  def head(self):
    return jnp.eye(len(self.logits))


@pytest.fixture(scope='module')
def logits():
  """Of a student and a teacher over five ids."""
  return jnp.float32(np.random.default_rng(0).normal(0, 1, (2, 5)))


def enumerate_draws(student, teacher, drawn_by=None, **settings):
  """The expected gradient by the student's logits: every id drawn once, weighing its probability.
  """
  V = len(student)
  mu, logq = (jax.nn.log_softmax(x) for x in (student if drawn_by is None else drawn_by, teacher))
  at = np.stack([np.zeros(V, np.int32), np.arange(V, dtype=np.int32)], 1)  # prompt, draw
  def place(x):
    return jnp.stack([jnp.zeros(V), x], 1)
  top_ids = np.broadcast_to(np.arange(2, dtype=np.int32), (V, 2, 2))
  batch = dict(tokens_BT=at, segment_BT=np.ones_like(at), position_BT=np.arange(2) + 0 * at,
               weight_BT=place(jnp.exp(mu)), rollout_logp_BT=place(mu), teacher_logp_BT=place(logq),
               teacher_BTD=jnp.broadcast_to(teacher, (V, 2, V)), top_ids_BTX=top_ids,
               top_logp_BTX=logq[top_ids])
  run = functools.partial(distillation.loss, settings=distillation.Distillation(**settings))
  (_, sums), gradient = jax.value_and_grad(run, has_aux=True)(Table(student), batch, jnp.eye(V))
  return gradient.logits, distillation.report(sums)


def reverse_kl(student, teacher):
  """KL(student || teacher) and its gradient by the logits, p (log p - log q - KL)."""
  p, q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
  kl = jnp.sum(jnp.exp(p) * (p - q))
  return kl, jnp.exp(p) * (p - q - kl)


@pytest.mark.parametrize('kind', ['sampled', 'reverse_kl'])
def test_expected_gradient_is_that_of_the_reverse_kl(logits, kind):
  """The drawn token's log ratio as an advantage; as a loss it would have no teacher in it."""
  gradient, values = enumerate_draws(*logits, kind=kind)
  kl, want = reverse_kl(*logits)
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  np.testing.assert_allclose(values['kl'], kl, rtol=1e-5)


def test_expected_gradient_of_what_an_engine_drew_otherwise(logits):
  """Importance sampling, within its band, makes up for draws from another distribution."""
  other = logits[0] + jnp.array([0.2, -0.3, 0.0, 0.1, -0.2])
  gradient, _ = enumerate_draws(*logits, other, kind='sampled')
  np.testing.assert_allclose(gradient, reverse_kl(*logits)[1], atol=1e-6)
  uncorrected, _ = enumerate_draws(*logits, other, kind='sampled', correction=None)
  assert jnp.abs(uncorrected - gradient).max() > 0.01


@pytest.mark.parametrize('kind', ['student_top', 'teacher_top'])
def test_gradient_of_a_few_ids_is_of_their_divergence_and_not_zero(logits, kind):
  """By numeric differences in float64: ids 0, 1 and the tail, which learns as a whole."""
  student, teacher = np.float64(logits)

  def value(x):
    p, q = (np.exp(y) / np.exp(y).sum() for y in (x, teacher))
    p, q = (np.array([y[0], y[1], y[2:].sum()]) for y in (p, q))
    return (p * np.log(p / q)).sum() if kind == 'student_top' else (q * np.log(q / p)).sum()
  want = [(value(student + step) - value(student - step)) / 2e-5 for step in 1e-5 * np.eye(5)]
  gradient, _ = enumerate_draws(*logits, kind=kind)
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  assert np.abs(want).min() > 1e-3


@pytest.fixture(scope='module')
def pair(specs):
  """(students by name, a wider teacher), of one layer each."""
  def fill(spec, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(
      transformer.make, dataclasses.replace(spec, layers=1)))
    return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.1, x.shape), x.dtype), shapes)
  teacher = dataclasses.replace(specs['dense'], width=48, tied=False)
  return {name: fill(spec, 0) for name, spec in specs.items()}, fill(teacher, 1)


def draw_samples(count, seed=0, vocab=80):
  """(tokens, weight) of each: a prompt and an answer, some with a hole that no model drew."""
  rng, samples = np.random.default_rng(seed), []
  for i in range(count):
    prompt, n = rng.integers(2, 6), rng.integers(4, 10)
    weight = np.repeat(np.float32([0, 1]), [prompt, n])
    if i % 3 == 0:
      weight[prompt + 1:prompt + 3] = 0
    samples.append((rng.integers(0, vocab, prompt + n), weight))
  return samples


def pack(rows, length=32):
  """The batch of rows of samples, a list of lists."""
  names = ('tokens_BT', 'segment_BT', 'position_BT')
  batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
  batch['weight_BT'] = np.zeros((len(rows), length), np.float32)
  for b, row in enumerate(rows):
    start = 0
    for number, (tokens, weight) in enumerate(row, 1):
      at = b, slice(start, start + len(tokens))
      batch['tokens_BT'][at], batch['weight_BT'][at] = tokens, weight
      batch['segment_BT'][at], batch['position_BT'][at] = number, np.arange(len(tokens))
      start += len(tokens)
  return batch


@functools.partial(jax.jit, static_argnames=('kind', 'count'))
def ask(student, teacher, batch, kind, count=4):
  """The batch with what the teacher says of it."""
  if kind == 'sampled':
    logp = policy.token_values(student, batch, **DRAWN)[0]
    return batch | dict(rollout_logp_BT=logp + 0.1 * jnp.sin(batch['tokens_BT']),
                        teacher_logp_BT=distillation.teacher_logp(teacher, batch, **DRAWN))
  if kind.endswith('_top'):
    ids, logp = distillation.teacher_top(
      teacher if kind == 'teacher_top' else student, batch, count, **DRAWN)
    if kind == 'student_top':
      logp = distillation.teacher_at(teacher, batch, ids, **DRAWN)
    return batch | dict(top_ids_BTX=ids, top_logp_BTX=logp)
  return batch | dict(teacher_BTD=distillation.teacher_states(teacher, batch))


def one_step(model, batch, head_VD, kind, parts=1):
  """(gradients, values) of a step that the step's own machinery makes."""
  settings = distillation.Distillation(kind, temperature=0.8)
  def loss(params, batch, head_VD):
    return distillation.loss(params, batch, head_VD, settings, size=80)
  step = training.make_step(loss, optax.identity(), lambda step: 1.0, parts, distillation.report)
  new, values = jax.jit(step)(training.state_of(model, optax.identity()), batch, head_VD)
  return jax.tree.leaves(jax.tree.map(jnp.subtract, model, new.params)), values


def compare(got, want, rtol=1e-4):
  assert got[1].keys() == want[1].keys()
  for key in want[1]:
    np.testing.assert_allclose(got[1][key], want[1][key], rtol=rtol, atol=2e-6, err_msg=key)
  for a, b in zip(got[0], want[0], strict=True):
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b) + 1e-7


@pytest.mark.parametrize('kind', ['sampled', 'student_top'])
def test_packed_equals_separate(pair, kind):
  student, teacher = pair[0]['dense'], pair[1]
  samples = draw_samples(6)
  packed = ask(student, teacher, pack([samples[:2], samples[2:4], samples[4:]]), kind)
  separate = ask(student, teacher, pack([[s] for s in samples]), kind)
  got, want = (one_step(student, x, teacher.head(), kind) for x in (packed, separate))
  compare(got, want)
  assert want[1]['kl'] > 0.01 and want[1]['entropy'] > 1


@pytest.fixture(scope='module')
def step_alone(pair):
  """(batch, gradients and values of one step) of the dense student by the reverse KL."""
  samples = draw_samples(6, seed=1)
  rows = pack([samples[:2], samples[2:3], samples[3:5], samples[5:]])
  batch = ask(pair[0]['dense'], pair[1], rows, 'reverse_kl')
  return batch, one_step(pair[0]['dense'], batch, pair[1].head(), 'reverse_kl')


def test_micro_batches_add_up_to_one_batch(pair, step_alone):
  batch, want = step_alone
  compare(one_step(pair[0]['dense'], batch, pair[1].head(), 'reverse_kl', parts=2), want)


def test_on_a_mesh_equals_alone(pair, step_alone):
  batch, want = step_alone
  mesh = alphabet.make_mesh(dict(fsdp=2, tensor=2))
  tree = pair[0]['dense'], batch, dict(head_VD=pair[1].head())
  placed, there, head = jax.tree.map(jax.device_put, tree, alphabet.shardings(tree, mesh))
  with jax.set_mesh(mesh):
    compare(one_step(placed, there, head['head_VD'], 'reverse_kl'), want)


def test_terms_of_the_experts_are_added(pair):
  student, teacher = pair[0]['moe'], pair[1]
  rows = pack([[s] for s in draw_samples(4)])
  tokens = (rows['segment_BT'] > 0).sum()
  batch = ask(student, teacher, rows, 'reverse_kl') | dict(total_tokens=tokens)
  run = functools.partial(distillation.loss, student, batch, teacher.head(),
                          distillation.Distillation())
  (plain, sums), (more, _) = jax.jit(lambda: (run(), run(balance=0.5, router_z=0.25)))()
  share = sums['count_LE'][0] / sums['count_LE'][0].sum()
  balance = 8 * (share * sums['probability_LE'][0] / tokens).sum()
  np.testing.assert_allclose(more - plain, 0.5 * balance + 0.25 * sums['router_z'], rtol=1e-4)


def test_what_the_teacher_says_is_its_plain_softmax(pair):
  """At each token's own place: of the token, of the likeliest ids, of the ids asked for."""
  student, teacher = pair[0]['dense'], pair[1]
  batch = pack([[s] for s in draw_samples(3)])
  states = teacher(batch['tokens_BT'], batch['segment_BT'], batch['position_BT']).hidden_BTD
  logp = jax.nn.log_softmax(teacher.logits(states)[..., :80] / 0.8)[:, :-1]
  at = jnp.take_along_axis(logp, batch['tokens_BT'][:, 1:, None], -1)[..., 0]
  said = ask(student, teacher, batch, 'sampled')['teacher_logp_BT']
  np.testing.assert_allclose(said[:, 1:], at * batch['weight_BT'][:, 1:], atol=1e-5)
  for kind in 'teacher_top', 'student_top':
    batch = ask(student, teacher, batch, kind)
    ids = batch['top_ids_BTX'][:, 1:]
    np.testing.assert_allclose(batch['top_logp_BTX'][:, 1:], jnp.take_along_axis(logp, ids, -1),
                               atol=1e-5)
    best = (jax.lax.top_k(logp, 4)[1] == ids).all()
    assert best if kind == 'teacher_top' else not best


def test_a_teacher_equal_to_the_student_teaches_nothing(pair):
  student = pair[0]['dense']
  batch = ask(student, student, pack([[s] for s in draw_samples(3)]), 'reverse_kl')
  gradients, values = one_step(student, batch, student.head(), 'reverse_kl')
  assert abs(values['loss']) < 1e-6 and values['kl_max'] < 1e-5
  assert all(np.abs(g).max() < 1e-6 for g in gradients)


def test_no_logits_of_all_tokens(pair, monkeypatch):
  monkeypatch.setattr('qwen3_jax.kernels.head.TOKENS', 16)
  student, teacher = pair[0]['dense'], pair[1]
  batch = pack([[s] for s in draw_samples(4)])
  for kind in KINDS:
    def everything(student, teacher, batch, kind=kind):
      batch = ask.__wrapped__(student, teacher, batch, kind)  # not what was traced before
      return jax.value_and_grad(distillation.loss, has_aux=True)(
        student, batch, teacher.head(), distillation.Distillation(kind))
    text = str(jax.make_jaxpr(everything)(student, teacher, batch))
    assert '[16,96]' in text and '4,32,96' not in text and '[128,96]' not in text


@pytest.mark.parametrize('changes, words', [
  (dict(kind='kl'), "kind is 'kl'; it must be one of reverse_kl, forward_kl, jsd, sampled, teac"),
  (dict(kind='jsd', mix=0), 'mix is 0; it must be between'),
  (dict(few='reverse_kl'), "few is 'reverse_kl', but reverse_kl knows the teacher at no few ids"),
  (dict(kind='teacher_top', few='kl'), "divergence is 'kl'; want one of"),
  (dict(temperature=0), 'temperature is 0; it must be more than 0'),
  (dict(kind='sampled', correction='tis'), "correction is 'tis'; it must be one of")])
def test_settings_that_mean_nothing_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    distillation.Distillation(**changes)


def test_a_batch_that_lacks_the_teacher_is_refused(pair):
  batch = pack([[s] for s in draw_samples(2)])
  for kind, key in (('jsd', 'teacher_BTD'), ('sampled', 'teacher_logp_BT'),
                    ('student_top', 'top_ids_BTX')):
    with pytest.raises(ValueError, match=f'the loss is {kind}, and the batch has no {key}'):
      distillation.loss(pair[0]['dense'], batch, None, distillation.Distillation(kind))
