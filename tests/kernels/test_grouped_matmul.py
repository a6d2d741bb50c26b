"""The expert kernels for TPU, interpreted: values and gradients equal the plain meaning."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.kernels import experts, grouped_gradient, reference, row_sum
from qwen3_jax.kernels import grouped_matmul as kernel

M, E, X, D, F = 75, 5, 2, 512, 256
SMALL = kernel.Blocks(gate_heights=(16, 48), gate_columns=128, down_heights=(16, 48),
                      down_columns=128)
SPLIT = SMALL._replace(gate_splits=2, down_splits=2)
LARGE = SMALL._replace(gate_heights=(64, 256), down_heights=(64, 256))
KINDS = 'even', 'all to one pair', 'some experts empty', 'one odd token'


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
  """Groups and the rows that wait for the next tile, shrunk: interpreting takes a while a row."""
  if 'real_sizes' not in request.fixturenames:
    monkeypatch.setattr(kernel, 'ALIGN', 16)
    monkeypatch.setattr(grouped_gradient, 'ALIGN', 16)
    monkeypatch.setattr(kernel, 'TAIL', 16)


@pytest.fixture
def real_sizes():
  pass


def make(dtype):
  keys = jax.random.split(jax.random.key(1), 6)
  weights = [jax.random.normal(key, shape) / 16 for key, shape in zip(
      keys[2:], ((E, D, F), (E, D, F), (E, F, D)))]
  x = jax.random.normal(keys[0], (M, D))
  x, *weights = (a.astype(dtype) for a in (x, *weights))
  return x, jax.random.uniform(keys[1], (M, X)).astype(dtype), *weights


def routes(kind):
  m = np.arange(M)
  first, second = {
      'even': (m % E, (m + 1) % E),
      'all to one pair': (m * 0 + 4, m * 0 + 1),
      'some experts empty': (m * 0 + 1, 3 + m % 2),
      'one odd token': (np.where(m == 17, 0, 2), m * 0 + 3)}[kind]
  return jnp.asarray(np.stack([first, second], 1), jnp.int32)


@functools.partial(jax.jit, static_argnames='blocks')
def run(chosen, x, gate, *weights, blocks):
  """y (M, D), then x gate and x up of each assignment (M, X, F)."""
  slot_P, row_MX, count_E, _ = experts.plan(chosen, E, kernel.ALIGN)
  weight_P = jnp.take(gate.reshape(-1), slot_P, mode='fill', fill_value=0)
  y_MD, g_PF, u_PF = kernel.swiglu_down(x, slot_P // X, weight_P, count_E, *weights, save=True,
                                        blocks=blocks, interpret=True)
  return y_MD, g_PF[row_MX], u_PF[row_MX]


def compare(blocks):
  x, gate, *weights = make(jnp.float32)
  for kind in KINDS:
    chosen = routes(kind)
    got, g_MXF, u_MXF = run(chosen, x, gate, *weights, blocks=blocks)
    want = reference.experts(x, chosen, gate, *weights)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=kind)
    for factor_MXF, weight_EDF in ((g_MXF, weights[0]), (u_MXF, weights[1])):
      want = jnp.einsum('MD,MXDF->MXF', x, weight_EDF[chosen])
      np.testing.assert_allclose(factor_MXF, want, atol=1e-5 * np.abs(want).max(), err_msg=kind)


@pytest.mark.slow
def test_values():
  """Tokens no multiple of anything; groups of nothing, of one row, and of several tiles."""
  compare(SPLIT)


@pytest.mark.slow
def test_values_in_real_tiles(real_sizes):
  compare(LARGE)


@pytest.mark.slow
def test_bfloat16():
  """As near to the exact result as the meaning in bfloat16 is."""
  x, gate, *weights = make(jnp.bfloat16)
  chosen = routes('one odd token')
  args = [a.astype(jnp.float32) for a in (x, gate, *weights)]
  exact = reference.experts(args[0], chosen, *args[1:])
  plain = reference.experts(x, chosen, gate, *weights).astype(jnp.float32)
  got = run(chosen, x, gate, *weights, blocks=SPLIT)[0].astype(jnp.float32)
  assert np.abs(got - exact).max() <= np.abs(plain - exact).max()


@pytest.mark.slow
def test_huge_norms_and_overflow():
  """Finite where the meaning is; a row that is not stays with its token."""
  x, gate, *weights = make(jnp.float32)
  chosen = routes('some experts empty')
  x = 1e8 * x
  want = reference.experts(x, chosen, gate, *weights)
  assert np.isfinite(want).all()
  got = run(chosen, x, gate, *weights, blocks=SPLIT)[0]
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  got = np.asarray(run(chosen, x.at[3].set(jnp.inf), gate, *weights, blocks=SPLIT)[0])
  assert np.isfinite(np.delete(got, 3, 0)).all() and not np.isfinite(got[3]).any()


@pytest.mark.slow
def test_one_token():
  x, gate, *weights = (a[:1] if i < 2 else a for i, a in enumerate(make(jnp.float32)))
  chosen = routes('even')[:1]
  got = run(chosen, x, gate, *weights, blocks=SMALL)[0]
  want = reference.experts(x, chosen, gate, *weights)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_gradients(monkeypatch):
  monkeypatch.setattr(kernel, 'Blocks', lambda: SPLIT)
  x, gate, *weights = make(jnp.float32)
  out = jax.random.normal(jax.random.key(3), x.shape)

  def gradients(function):
    def total(x, gate, *weights, chosen):
      return jnp.sum(out * function(x, chosen, gate, *weights))
    return jax.jit(jax.grad(total, range(5)))
  fast, plain = gradients(experts._grouped), gradients(reference.experts)
  for kind in KINDS:
    got, want = (g(x, gate, *weights, chosen=routes(kind)) for g in (fast, plain))
    for name, a, b in zip(('dx', 'dgate', 'dg', 'du', 'dd'), got, want):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=f'{kind}: {name}')


@pytest.mark.slow
def test_choices_of_no_expert_cost_nothing(monkeypatch):
  monkeypatch.setattr(kernel, 'Blocks', lambda: SPLIT)
  monkeypatch.setattr(row_sum, 'TILE', 16)
  x, gate, *weights = make(jnp.float32)
  out = jax.random.normal(jax.random.key(3), x.shape)
  chosen = routes('even')
  here = chosen != 2
  chosen, limit = jnp.where(here, chosen, E), int(here.sum())

  def plain(x, chosen, gate, *weights):
    return reference.experts(x, jnp.where(here, chosen, 0), jnp.where(here, gate, 0), *weights)
  got, want = (jax.jit(jax.grad(lambda x, gate, *weights, f=f: jnp.sum(
    out * f(x, chosen, gate, *weights)), range(5)))(x, gate, *weights)
               for f in (functools.partial(experts._grouped, limit=limit), plain))
  for name, a, b in zip(('dx', 'dgate', 'dg', 'du', 'dd'), got, want):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=name)


def test_vmem_is_refused_with_the_numbers():
  with pytest.raises(ValueError, match='experts_gate_up needs .* MiB .* 65536 tokens .* splits'):
    kernel.check(65536, 2048, 768, jnp.bfloat16, kernel.Blocks(gate_splits=6))
  with pytest.raises(ValueError, match='D=1536'):
    kernel.check(256, 1536, 768, jnp.bfloat16, kernel.Blocks())


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('shape', [(8192, 2048, 768), (4096, 4096, 1536)])
def test_compiles_for_tpu(topology, shape):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: the TPU compiler is not installed')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh, (M, D, F) = Mesh(np.array(devices[:1]), ('one',)), shape
  S = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
  weights = [S(s, jnp.bfloat16) for s in ((128, D, F), (128, D, F), (128, F, D))]
  with jax.set_mesh(mesh):
    text = jax.jit(experts.experts).lower(
        S((M, D), jnp.bfloat16), S((M, 8), jnp.int32), S((M, 8), jnp.bfloat16), *weights,
    ).compile().as_text()
  assert 'experts_gate_up' in text and 'experts_down' in text
