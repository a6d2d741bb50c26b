"""The gradient kernels of a mixture's experts equal the gradients of its plain meaning."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from qwen3_jax.kernels import experts, reference
from qwen3_jax.kernels import grouped_gradient as kernel

M, X, E, D, F = 160, 2, 5, 128, 256
# One pass and two; tiles of 128 rows, the last of an expert with as many as 192.
ONE, TWO = (kernel.Blocks(128, (64, 192), 64 // parts, 128, parts, parts) for parts in (1, 2))
ROUTES = {
    'even': lambda m: (m % E, (m + 1) % E),
    'all to one pair': lambda m: (m * 0 + 3, m * 0 + 1),
    'some experts empty': lambda m: (m * 0 + 1, 3 + m % 2),
    'one odd token': lambda m: (np.where(m == 17, 0, 4), m * 0 + 2)}


def make(kind, dtype=jnp.float32, scale=1.0):
  """(chosen_MX, x_MD, gate_MX, the three weights, dy_MD)."""
  keys = jax.random.split(jax.random.key(1), 6)
  chosen = jnp.asarray(np.stack(ROUTES[kind](np.arange(M)), 1), jnp.int32)
  x, dy = (scale * jax.random.normal(key, (M, D)) for key in keys[:2])
  gate = jax.random.uniform(keys[2], (M, X))
  weights = (jax.random.normal(key, shape) / 16 for key, shape in zip(
      keys[3:], ((E, D, F), (E, D, F), (E, F, D))))
  return chosen, x.astype(dtype), gate, *(w.astype(dtype) for w in weights), dy.astype(dtype)


@jax.jit
def meaning(chosen, x, gate, gate_EDF, up_EDF, down_EFD, dy):
  function = lambda *args: reference.experts(args[0], chosen, *args[1:]).astype(x.dtype)
  return jax.vjp(function, x, gate, gate_EDF, up_EDF, down_EFD)[1](dy)


@functools.partial(jax.jit, static_argnames='blocks')
def kernels(chosen, x, gate, gate_EDF, up_EDF, down_EFD, dy, blocks):
  """`backward` on what the forward pass saves; NaN where no group has rows."""
  slot_P, row_MX, count_E, _ = experts.plan(chosen, E, kernel.ALIGN)
  x_PD = jnp.take(x, slot_P // X, axis=0, mode='fill', fill_value=0)
  rows_E = -(-count_E // kernel.ALIGN) * kernel.ALIGN
  of_P = jnp.searchsorted(jnp.cumsum(rows_E), jnp.arange(len(slot_P)), side='right')
  hit_PE = of_P[:, None] == jnp.arange(E)
  saved = (jnp.einsum('PD,EDF,PE->PF', x_PD, w, hit_PE.astype(x.dtype)) for w in (gate_EDF, up_EDF))
  saved = (jnp.where(of_P[:, None] < E, s, jnp.nan) for s in saved)
  residuals = (x, gate, slot_P, row_MX, count_E, gate_EDF, up_EDF, down_EFD, *saved)
  return kernel.backward(residuals, dy, blocks=blocks)


def assert_close(got, want, tolerance):
  """Within `tolerance` of the largest number that is wanted."""
  for name, a, b in zip(('dx', 'dgate', 'dgate_EDF', 'dup_EDF', 'ddown_EFD'), got, want):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize('blocks', [ONE, TWO], ids=['one pass', 'two'])
@pytest.mark.parametrize('kind', ROUTES)
def test_float32(kind, blocks):
  args = make(kind)
  got = kernels(*args, blocks=blocks)
  assert_close(got, meaning(*args), 1e-5)
  for unused in set(range(E)) - set(np.unique(args[0])):
    assert all((np.asarray(w[unused]) == 0).all() for w in got[2:])


@pytest.mark.slow
@pytest.mark.parametrize('blocks', [ONE, TWO], ids=['one pass', 'two'])
def test_bfloat16_within_the_error_of_plain_bfloat16(blocks):
  args = make('one odd token', jnp.bfloat16)
  exact = meaning(*(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args))
  plain, got = meaning(*args), kernels(*args, blocks=blocks)
  assert [a.dtype for a in got] == [a.dtype for a in plain]

  def error(a, b):
    return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
  for a, p, e in zip(got, plain, exact):
    assert error(a, e) <= max(1.2 * error(p, e), 4e-3)


def test_huge_norms_stay_finite():
  got = kernels(*make('even', scale=1e4), blocks=ONE)
  assert all(np.isfinite(np.asarray(a)).all() for a in got)


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r'experts_backward needs .* MiB .*more splits than 1'):
    kernel.check(65536, 4096, 1536, jnp.bfloat16, kernel.Blocks(512, (512,), 512, 256, 1, 1))
  with pytest.raises(ValueError, match='do not fit'):
    kernel.check(65536, 2048, 768, jnp.bfloat16, kernel.Blocks(512, (512,), 512, 512, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize('D, F', [(2048, 768), (4096, 1536)])
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_compiles_ahead_of_time(topology, D, F):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ('data',))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  P, experts, bf16 = 4096, 4, jnp.bfloat16
  shapes = [((P, D), bf16), ((P, D), bf16), ((P, F), bf16), ((P, F), bf16), ((P,), jnp.float32),
            ((experts,), jnp.int32), *[((experts, D, F), bf16)] * 2, ((experts, F, D), bf16)]
  args = [jax.ShapeDtypeStruct(*s, sharding=everywhere) for s in shapes]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    blocks = kernel.choose(P, D, F, experts, bf16)
    function = functools.partial(kernel.rows_gradient, blocks=blocks, interpret=False)
    text = jax.jit(function).lower(*args).compile().as_text()
  assert 'experts_backward' in text
