"""The router and the plan of TPU, interpreted, equal their meanings; the compiler takes them.

Ties go to lower ids, and the plan is the one that sorting gives.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import dispatch, experts, reference, routing
from qwen3_jax.model import moe
from qwen3_jax.spec import Spec

M, E, X = 1100, 32, 8


def make_logits(kind):
  x = np.random.default_rng(0).normal(size=(M, E)).astype(np.float32)
  x = {'plain': x, 'huge': x * 1e30, 'ties': np.round(2 * x) / 2, 'all equal': x * 0,
       'one wins': x + 1e4 * (np.arange(E) == 3),
       'some excluded': np.where(np.arange(E) % 5 == np.arange(M)[:, None] % 5, -np.inf, x)}[kind]
  return jnp.asarray(x)


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_gradient(function, logits_ME, real_M, renormalise, weights):
  """All that `function` returns, and the gradient of a weighted sum of it."""
  def total(logits_ME):
    out = function(logits_ME, real_M, X, renormalise)
    return sum(jnp.sum(w * o) for w, o in zip(weights, (out[1], *out[3:]))), tuple(out)
  (_, out), gradient = jax.value_and_grad(total, has_aux=True)(logits_ME)
  return out, gradient


@pytest.mark.parametrize('renormalise', [True, False])
def test_route_equals_its_meaning(renormalise):
  real_M = jnp.asarray(np.arange(M) % 3 > 0, jnp.float32)
  rng = np.random.default_rng(1)
  weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((M, X), (E,), ())]
  for kind in ('plain', 'ties', 'all equal', 'one wins'):
    logits = make_logits(kind)
    got, d_got = value_and_gradient(routing.route, logits, real_M, renormalise, weights)
    want, d_want = value_and_gradient(reference.route, logits, real_M, renormalise, weights)
    np.testing.assert_array_equal(got[0], want[0], err_msg=kind)
    np.testing.assert_array_equal(got[2], want[2], err_msg=kind)
    for name, a, b in zip(('gate', 'probability', 'z', 'gradient'), (got[1], *got[3:], d_got),
                          (want[1], *want[3:], d_want)):
      scale = max(1, float(np.abs(b).max()))
      np.testing.assert_allclose(a, b, atol=1e-5 * scale, err_msg=f'{kind}: {name}')


def test_route_with_infinite_and_huge_logits():
  """Excluded experts come last, in the order of their ids; nothing is NaN."""
  real_M, route = jnp.ones(M), jax.jit(routing.route, static_argnums=(2, 3))
  for kind in ('some excluded', 'huge'):
    logits = make_logits(kind)
    got = route(logits, real_M, X, True)
    np.testing.assert_array_equal(got.chosen_MX, jax.lax.top_k(logits, X)[1])
    assert np.isfinite(got.gate_MX).all() and np.isfinite(got.probability_E).all()
  got = route(jnp.full((M, E), -jnp.inf).at[:, 5].set(jnp.nan), real_M, X, True)
  np.testing.assert_array_equal(got.chosen_MX, np.tile(np.arange(X), (M, 1)))


def test_no_real_token_counts_nothing():
  got = jax.jit(routing.route, static_argnums=(2, 3))(make_logits('plain'), jnp.zeros(M), X, True)
  assert not got.count_E.any() and not got.probability_E.any() and got.z == 0


def make_routes(kind, tokens, experts, chosen):
  """Different experts for each token."""
  x = np.random.default_rng(2).normal(size=(tokens, experts))
  x += {'even': 0, 'zipf': 4 * np.log(1 + np.arange(experts))[::-1],
        'all to one': 100 * (np.arange(experts) == experts - 1) + 50 * (np.arange(experts) < chosen)
        }[kind]
  return jnp.asarray(np.argsort(-x, -1)[:, :chosen], jnp.int32)


@pytest.mark.parametrize('kind, tokens, experts_, chosen, rows', [
    ('even', 1100, 32, 4, 16), ('all to one', 1100, 32, 4, 16), ('zipf', 4300, 16, 2, 64),
    ('even', 1, 16, 1, 8)])
def test_plan_equals_the_sorted_plan(kind, tokens, experts_, chosen, rows, monkeypatch):
  monkeypatch.setattr(dispatch, 'GROUPS', 8)  # compiles faster
  chosen_MX = make_routes(kind, tokens, experts_, chosen)
  got = jax.jit(dispatch.plan, static_argnums=(1, 2))(chosen_MX, experts_, rows)
  want = experts.plan(chosen_MX, experts_, rows)
  for name, a, b in zip(('slot_P', 'row_MX', 'count_E', 'expert_of_block'), got, want):
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_plan_leaves_out_choices_of_no_expert(monkeypatch):
  monkeypatch.setattr(dispatch, 'GROUPS', 8)
  chosen_MX = make_routes('even', 600, 48, 4) - 8  # a third are these 16's
  limit = int(((chosen_MX >= 0) & (chosen_MX < 16)).sum())
  got = jax.jit(dispatch.plan, static_argnums=(1, 2, 3))(chosen_MX, 16, 64, limit)
  want = experts.plan(chosen_MX, 16, 64, limit)
  for name, a, b in zip(('slot_P', 'row_MX', 'count_E', 'expert_of_block'), got, want):
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_what_does_not_fit_is_refused(monkeypatch):
  with pytest.raises(ValueError, match='9 of 32 experts: want at most 8 of a multiple of 8'):
    routing.route(make_logits('plain'), jnp.ones(M), 9, True)
  with pytest.raises(ValueError, match='2 of 24 experts: want at most 8 of a multiple of 16 up to'):
    dispatch.plan(jnp.zeros((4, 2), jnp.int32), 24, 1)
  monkeypatch.setattr(routing.target, 'vmem', lambda: 1 << 16)
  with pytest.raises(ValueError, match=r'needs \d+ bytes of VMEM .* this core has 65536'):
    routing.route(make_logits('plain'), jnp.ones(M), X, True)
  with pytest.raises(ValueError, match=r'plan of 4 tokens needs \d+ bytes of VMEM, this core'):
    dispatch.plan(jnp.zeros((4, 1), jnp.int32), 16, 1)


@pytest.mark.slow
def test_a_mixture_routes_by_the_kernel_on_a_mesh():
  """Each device routes its tokens; routes, gates, sums and gradients are the plain form's."""
  mesh = alphabet.make_mesh(dict(fsdp=2, tensor=2))
  spec = Spec(1, 64, 2, 1, 64, 64, 32, experts=16, chosen=4, expert_mlp=32)
  logits = jax.random.normal(jax.random.key(0), (4, 10, 16))
  segment = jnp.asarray(np.arange(40).reshape(4, 10) % 4 > 0, jnp.int32)

  def total(logits, route):
    routes, gate, balance = route(logits)
    return (jnp.sum(gate * jnp.arange(4.)) + jnp.sum(balance.probability_E * jnp.arange(16.))
            + balance.z), (routes, gate, balance)

  def plain(logits):
    flat = logits.reshape(-1, 16), (segment > 0).astype(jnp.float32).reshape(-1)
    routes, gate, *sums = reference.route(*flat, 4, spec.renormalise)
    return routes.reshape(4, 10, 4), gate.reshape(4, 10, 4), moe.Balance(*sums, flat[1].sum())
  want, d_want = jax.grad(total, has_aux=True)(logits, plain)[::-1]
  with jax.set_mesh(mesh):
    got, d_got = jax.jit(lambda x: jax.grad(total, has_aux=True)(
        x, lambda x: moe._route(x, segment, spec)))(logits)[::-1]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
               (got, d_got), (want, d_want))


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_the_compiler_takes_both(topology):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:
    if topology.startswith('tpu7x'):
      pytest.skip(f'this libtpu does not know tpu7x: {error}')
    raise
  mesh = Mesh(np.array(devices[:1]), ('one',))

  def both(logits_ME, real_M):
    out = routing.route(logits_ME, real_M, 8, True)
    return out, experts.plan(out.chosen_MX, 128, 64)
  args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
          for shape in ((8192, 128), (8192,))]
  with jax.set_mesh(mesh):
    text = jax.jit(both).lower(*args).compile().as_text()
  for name in ('router', 'dispatch_ranks', 'dispatch_rows'):
    assert name in text
  assert 'sort(' not in text and 'scatter(' not in text
