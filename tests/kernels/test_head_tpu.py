"""The head's TPU kernels, interpreted, equal the plain meaning; the real compiler takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import (
  divergence,
  head,
  head_gradient,
  head_kept,
  head_pair,
  head_tpu,
  reference,
)
from qwen3_jax.kernels import target as target_chip

SMALL = dict(tokens=128, rows=32, part=16)


def make_inputs(M=150, D=128, V=200, dtype=jnp.float32, scale=1.0, seed=0):
  """(hidden_MD, head_VD, target_M, weight_M): ragged in tokens and rows, a third without weight."""
  keys = jax.random.split(jax.random.key(seed), 4)
  hidden = scale * jax.random.normal(keys[0], (M, D)) * D ** -0.25
  head = scale * jax.random.normal(keys[1], (V, D)) * D ** -0.25
  weight = jax.random.uniform(keys[3], (M,)) * (jnp.arange(M) % 3 > 0)
  return (hidden.astype(dtype), head.astype(dtype), jax.random.randint(keys[2], (M,), 0, V), weight)


def in_kernels(hidden, weights, target, weight, bonus=None, temperature=1.0, size=None):
  """(logp_M, entropy_M, d_hidden, d_head) of sum(weight * -logp) + sum(bonus * entropy)."""
  options = dict(limit=size, temperature=temperature, blocks=SMALL)
  found = head_tpu.statistics(hidden, weights, target, entropy=True, **options)
  more = () if bonus is None else (bonus, found.entropy)
  gradients = head_gradient.gradient(hidden, weights, target, weight, found.bits, *more, **options)
  return found.logp, found.entropy, *gradients


def meaning(hidden, head, target, weight, bonus=None, temperature=1.0, size=None):
  def total(hidden, head):
    logp, entropy = reference.token_entropy(hidden[None], head, target[None], temperature, size)
    sum_ = -jnp.sum(weight * logp[0])
    return sum_ + (0 if bonus is None else jnp.sum(bonus * entropy[0])), (logp[0], entropy[0])
  hidden, head = (x.astype(jnp.float32) for x in (hidden, head))
  gradients, values = jax.grad(total, (0, 1), has_aux=True)(hidden, head)
  return *values, *gradients


def compare(got, want, rtol=1e-5, values=1e-5):
  for a, b in zip(got[:2], want[:2]):
    np.testing.assert_allclose(a, b, rtol=values, atol=5e-6)
  for a, b in zip(got[2:], want[2:]):
    assert a.dtype == jnp.float32 and np.isfinite(a).all()
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


@pytest.mark.parametrize('bonus, temperature, size', [
  (False, 1.0, None), (True, 0.7, 190), (True, 1.0, 70)], ids=str)
def test_values_and_gradients_in_float32(bonus, temperature, size):
  hidden, head, target, weight = make_inputs()
  target = target if size is None else target % size
  bonus = weight[::-1] - 0.3 if bonus else None
  inputs = hidden, head, target, weight, bonus, temperature, size
  got = jax.jit(in_kernels, static_argnums=(5, 6))(*inputs)
  compare(got, meaning(*inputs))
  if size is not None:
    assert (got[3][size:] == 0).all()


def pair_inputs(wide=256, **options):
  hidden, head, _, weight = make_inputs(**options)
  teacher, other, *_ = make_inputs(D=wide, seed=1, **options)
  return hidden, head, teacher, other, weight


def pair_in_kernels(hidden, head, teacher, other, weight, kind, mix, temperature, size):
  """(values_M, entropies_M, d_hidden, d_head) of the weighted sum of divergences."""
  sides = (hidden, head), (teacher, other)
  compare = functools.partial(divergence.compare, kind=kind, mix=mix, expm1=divergence.expm1)
  options = dict(limit=size, temperature=temperature, blocks=SMALL, compare=compare)
  pair = head_pair.statistics(sides, kind, **options)
  return pair.value, pair.entropy, *head_pair.gradient(sides, pair, weight, **options)


def pair_meaning(hidden, head, teacher, other, weight, kind, mix, temperature, size):
  teacher, other = (x.astype(jnp.float32) for x in (teacher, other))

  def total(hidden, head):
    total, values = reference.divergence(hidden[None], head, teacher[None], other, weight[None],
                                         kind, mix, temperature, size)
    return total, values[0]
  inputs = [x.astype(jnp.float32) for x in (hidden, head)]
  gradients, values = jax.grad(total, (0, 1), has_aux=True)(*inputs)
  ids = jnp.zeros((1, len(hidden)), jnp.int32)
  entropy = reference.token_entropy(inputs[0][None], inputs[1], ids, temperature, size)[1][0]
  return values, entropy, *gradients


@pytest.mark.parametrize('kind', divergence.KINDS)
def test_divergences_in_float32(kind):
  inputs = *pair_inputs(), kind, 0.3, 0.7, 190
  got = jax.jit(pair_in_kernels, static_argnums=(5, 6, 7, 8))(*inputs)
  compare(got, pair_meaning(*inputs))
  assert (got[3][190:] == 0).all()


@pytest.fixture
def small_kernels(monkeypatch):
  """The head's public functions take the kernels, interpreted, on CPU too."""
  monkeypatch.setattr(head_tpu, 'serves', lambda hidden, head: True)
  for module in (head_tpu, head_gradient, head_pair):
    monkeypatch.setattr(module, 'BLOCKS', SMALL)


def placed(mesh, **inputs):
  layout = alphabet.shardings(inputs, mesh)
  return [jax.device_put(x, layout[name]) for name, x in inputs.items()]


@pytest.mark.slow
def test_on_a_mesh_that_shards_the_vocabulary(small_kernels):
  """Values and gradients through `head`: statistics of both shards are merged, gradients summed."""
  hidden, weights, target, weight = make_inputs(M=80, V=104)
  hidden, target, weight = hidden.reshape(4, 20, -1), target.reshape(4, 20), weight.reshape(4, 20)
  size = 90
  target = target % size

  def total(function, cross, hidden, weights):
    logp, entropy = function(hidden, weights, target, 0.7, size)
    return jnp.sum(jnp.tanh(weight * logp / 4) * jnp.sin(weight + entropy)) + cross(
      hidden, weights, target, weight)
  run = functools.partial(jax.value_and_grad, argnums=(0, 1))
  want = run(functools.partial(total, reference.token_entropy, reference.cross_entropy))(
    hidden, weights)
  ours = functools.partial(total, head.token_entropy, head.cross_entropy)
  mesh = alphabet.make_mesh(dict(tensor=2, fsdp=2))
  with jax.set_mesh(mesh):
    got = jax.jit(run(ours))(*placed(mesh, hidden_BTD=hidden, head_VD=weights))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for a, b in zip(got[1], want[1]):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['forward_kl', 'jsd'])
def test_divergences_on_a_mesh(small_kernels, kind):
  *inputs, weight = pair_inputs(wide=128, M=80, V=104)
  named = dict(zip(('hidden_BTD', 'head_VD', 'teacher_BTD', 'other_VD'), inputs))
  named = {name: x.reshape(4, 20, -1) if 'B' in name else x for name, x in named.items()}
  weight, settings = weight.reshape(4, 20), (kind, 0.3, 0.7, 90)

  def run(function, hidden, *rest):
    def total(hidden, weights):
      return function(hidden, weights, *rest[1:], weight, *settings)
    return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, rest[0])
  (want, values), gradients = run(reference.divergence, *named.values())
  mesh = alphabet.make_mesh(dict(tensor=2, fsdp=2))
  with jax.set_mesh(mesh):
    (got, found), slopes = jax.jit(functools.partial(run, divergence.divergence))(
      *placed(mesh, **named))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(found, values, rtol=1e-5, atol=5e-6)
  for a, b in zip(slopes, gradients):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize('dtype, cores, keep, size', [
  (jnp.float32, 1, 128, 190), (jnp.bfloat16, 2, 200, 190), (jnp.float32, 2, 64, 100)],
  ids=['some', 'all', 'limited'])
def test_probabilities_that_wait_for_their_normaliser(monkeypatch, dtype, cores, keep, size):
  """Groups of 256 tokens and the rest; bfloat16 within twice what rounding the gradient costs."""
  monkeypatch.setattr(target_chip, 'cores', lambda: cores)
  hidden, weights, target, weight = make_inputs(M=300, dtype=dtype, scale=2.0)
  target = target % size
  run = jax.jit(functools.partial(head_kept.cross_entropy, limit=size, temperature=0.7, tokens=256,
                                  keep=keep, blocks=SMALL | dict(gradient=32)))
  loss, *gradients = run(hidden, weights, target, weight)
  logp, _, *want = meaning(hidden, weights, target, weight, None, 0.7, size)
  np.testing.assert_allclose(loss, -jnp.sum(weight * logp), rtol=1e-5)
  for a, b in zip(gradients, want):
    error = np.linalg.norm(np.float32(a) - b)
    assert error <= (1e-5 if dtype == jnp.float32 else 2 ** -8) * np.linalg.norm(b)


def test_two_cores_share_the_rows(monkeypatch):
  """Seven tiles: the second core's last one is none."""
  monkeypatch.setattr(target_chip, 'cores', lambda: 2)
  inputs = make_inputs()
  compare(jax.jit(in_kernels)(*inputs), meaning(*inputs))


def test_values_and_gradients_of_bfloat16():
  """Products of bfloat16 are exact in float32; each gradient by a logit is rounded once."""
  inputs = make_inputs(dtype=jnp.bfloat16)
  compare(jax.jit(in_kernels)(*inputs), meaning(*inputs), rtol=2 ** -9)


@pytest.mark.parametrize('scale', [40.0, 0.0])
def test_huge_and_equal_logits_of_few_tokens(scale):
  """Logits about 1e5, and logits that are all 0: two tokens, of which one counts for nothing."""
  hidden, weights, target, weight = make_inputs(M=2, V=40, scale=scale)
  inputs = hidden, weights, target, jnp.array([0.0, 1.0])
  got = jax.jit(in_kernels)(*inputs)
  compare(got, meaning(*inputs), rtol=1e-4 if scale else 1e-5)
  assert (got[2][0] == 0).all()


def test_a_shard_without_a_row_that_counts_changes_nothing():
  hidden, weights, target, _ = make_inputs(M=20, V=40)
  run = functools.partial(head_tpu._statistics, scale=head_tpu.BITS, entropy=True, sizes=SMALL,
                          interpret=True)
  shards = [run(hidden, weights, target - first, limit) for first, limit in ((0, 40), (40, 0))]
  both = head_tpu.merge(*(jnp.concatenate(pair) for pair in zip(*shards)))
  for a, b in zip(both, head_tpu.merge(*shards[0])):
    np.testing.assert_array_equal(a, b)


def test_blocks_that_exceed_memory_are_refused():
  hidden, weights, target, weight = make_inputs()
  blocks = dict(tokens=128, rows=200_000, part=16)
  big = jax.ShapeDtypeStruct((150_000, 4096), jnp.float32)
  wide = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
  message = r'needs [\d.]+ MiB of VMEM \(.*rows x width, twice [\d.]+.*lower blocks\["rows"\]'
  with pytest.raises(ValueError, match='head_statistics ' + message):
    jax.eval_shape(functools.partial(head_tpu.statistics, blocks=blocks), wide, big, target)
  with pytest.raises(ValueError, match='head_gradient ' + message):
    jax.eval_shape(functools.partial(head_gradient.gradient, blocks=blocks), wide, big, target,
                   weight, weight)


@pytest.mark.parametrize('kind', target_chip.CHIPS)
def test_chosen_blocks_fit_every_model(monkeypatch, kind):
  """At the widths of all models, and of teachers beside students."""
  monkeypatch.setattr(target_chip, 'kind', lambda: kind)
  room = 0.95 * target_chip.CHIPS[kind].vmem
  for D in (1024, 2048, 2560, 4096, 5120):
    for dtype in (jnp.bfloat16, jnp.float32):
      def side(D):
        return [jax.ShapeDtypeStruct((n, D), dtype) for n in (8192, 151_936)]  # noqa: B023
      for name, default, need in (('head_statistics', head_tpu.BLOCKS, head_tpu.need),
                                  ('head_gradient', head_gradient.BLOCKS, head_gradient.need)):
        sizes = head_tpu.choose(name, default, *side(D), None)
        assert sum(need([side(D)], sizes).values()) < room, (name, D, dtype, sizes)
      if dtype == jnp.float32:
        continue
      tokens = head_kept.TOKENS[kind]
      sizes = head_tpu.choose('head_kept', head_kept.BLOCKS, *side(D), None)
      group = jax.ShapeDtypeStruct((tokens, D), dtype), side(D)[1]
      for bytes_ in head_kept.need(group[0], sizes), head_tpu.need([group], sizes, (dtype, 0)):
        assert sum(bytes_.values()) < room, ('head_kept', D, sizes)
      for other in (4096, 5120):
        sides = side(D), side(other)
        for name, need in (('pair_statistics', head_tpu.need),
                           ('pair_gradient', head_gradient.need)):
          sizes = head_pair.choose(name, head_pair.BLOCKS, sides, None)
          assert sum(need(sides, sizes).values()) < room, (name, D, other, sizes)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32], ids=['bfloat16', 'float32'])
def test_the_compiler_takes_them(topology, dtype):
  """`head` and `divergence` with gradients, compiled by Mosaic for a described chip."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ('x',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  def of(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  T, V, D, wide = 2048, 5000, 1024, 1536
  target, weight = of((1, T), jnp.int32), of((1, T), jnp.float32)
  states, weights = of((1, T, D), dtype), of((V, D), dtype)
  teacher, other = of((1, T, wide), dtype), of((V, wide), dtype)

  def total(states, weights, teacher, other, target, weight):
    logp, entropy = head.token_entropy(states, weights, target, 0.9, V - 8)
    sums = [divergence.divergence(states, weights, teacher, other, weight, kind)[0]
            for kind in divergence.KINDS]
    return (logp * weight).sum() + (entropy ** 2).sum() + sum(sums) + head.cross_entropy(
      states, weights, target, weight)
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(
      states, weights, teacher, other, target, weight).compile()
  text = compiled.as_text()
  for name in ('head_statistics', 'head_gradient', 'pair_statistics', 'pair_terms',
               'pair_gradient'):
    assert name in text
  assert ('head_kept_gradient' in text) == (dtype == jnp.bfloat16)
  assert f'{T},{V}]' not in text and f'{V},{T}]' not in text
