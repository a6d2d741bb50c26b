"""The kernel over pages equals its plain meaning, interpreted; and the TPU compilers accept it."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.kernels import paged_attention, paged_flash, reference

S = 128


def draw(length_B, K=2, G=4, H=128, Q=1, C=4, dtype=jnp.float32, scale=1.0):
  """Arguments; every row has its own pages, in any order, and none lies past its length."""
  rng, B = np.random.default_rng(0), len(length_B)
  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) * scale, dtype)
  table_BC = rng.permutation(B * C).reshape(B, C)
  table_BC[np.arange(C) * S >= np.array(length_B)[:, None]] = 10 ** 6
  return (normal(B, Q, K, G, H), normal(B * C, K, H, S), normal(B * C, K, S, H),
          jnp.asarray(table_BC), jnp.asarray(length_B))


def check(args, interpret=True, atol=1e-5, **blocks):
  o = jax.jit(functools.partial(paged_flash.paged_flash, blocks=blocks, interpret=interpret))(*args)
  wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args]
  want = reference.paged_attention(*wide)
  assert o.dtype == args[0].dtype
  np.testing.assert_allclose(np.asarray(o, np.float32), want, atol=atol)
  return o


@pytest.mark.parametrize('pages, depth', [(1, 2), (2, 3), (3, 4), (9, 2)])
def test_ragged_rows_equal_the_meaning(pages, depth):
  o = check(draw([1, 0, 300, 512, 128, 129]), pages=pages, depth=depth)
  assert not np.asarray(o[1]).any()


@pytest.mark.parametrize('K, G, H', [(4, 2, 128), (1, 4, 128), (2, 5, 128), (2, 8, 128),
                                     (1, 16, 128), (2, 4, 64), (1, 3, 64)])
def test_heads_of_every_model(K, G, H):
  check(draw([200, 384], K, G, H))


@pytest.mark.parametrize('Q, queries', [(2, 128), (3, 128), (8, 128), (7, 8)])
def test_several_new_tokens_see_what_is_before_each(Q, queries):
  check(draw([1, 0, 5, 300, 512], Q=Q), queries=queries)


def test_rows_share_pages():
  q, k, v, table_BC, length_B = draw([300, 400, 512])
  check((q, k, v, table_BC.at[:, :2].set(table_BC[0, :2]), length_B))


def test_huge_norms_are_no_nan():
  o = check(draw([1, 300], scale=1e4), atol=1.0)  # values are up to 5e4, of which 1 is 2e-5
  assert np.isfinite(o).all()


def test_bfloat16_is_as_near_as_a_bfloat16_reference():
  args = draw([100, 512], dtype=jnp.bfloat16)
  o = check(args, atol=1e-2)
  exact = reference.paged_attention(*[x.astype(jnp.float32) for x in args[:3]], *args[3:])
  plain = paged_attention.paged_attention(*args[:3], jnp.minimum(args[3], 7), args[4])
  def error(x):
    return np.abs(np.asarray(x, np.float32) - exact).max()
  assert error(o) <= 1.1 * error(plain)


def test_copies_are_awaited_and_nothing_else_is_read():
  """Copies arrive only when awaited, all memory starts as NaN, and races are an error."""
  params = pltpu.InterpretParams(dma_execution_mode='on_wait', uninitialized_memory='nan',
                                 detect_races=True)
  check(draw([1, 300, 0, 512]), params, pages=2, depth=3)


def test_gradients_equal_the_meaning():
  args = draw([1, 300, 0], Q=2)
  def loss(f, q, k, v):
    return jnp.sum(jnp.sin(f(q, k, v, jnp.minimum(args[3], 5), args[4])))
  grads = [jax.grad(functools.partial(loss, f), (0, 1, 2))(*args[:3])
           for f in (paged_flash.paged_flash, paged_attention.paged_attention,
                     reference.paged_attention)[::2]]
  for got, want in zip(*grads):
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_does_not_fit_is_refused_with_the_numbers():
  args = draw([100, 512])
  with pytest.raises(ValueError, match=r"MiB of VMEM .*lower blocks\['pages'\]"):
    paged_flash.paged_flash(*args, blocks=dict(depth=10 ** 4))
  with pytest.raises(ValueError, match='SMEM'):
    paged_flash.paged_flash(*args[:3], jnp.zeros((2, 10 ** 6), jnp.int32), args[4])
  with pytest.raises(ValueError, match='64 slots'):
    paged_flash.paged_flash(args[0], args[1][..., :64], args[2][:, :, :64], *args[3:])


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('K, G, H, Q, dtype', [
  (8, 4, 128, 1, 'bfloat16'), (4, 16, 128, 4, 'bfloat16'), (1, 5, 128, 64, 'bfloat16'),
  (8, 2, 64, 1, 'bfloat16'), (8, 4, 128, 1, 'float32')])
def test_compiles_for_tpu(topology, K, G, H, Q, dtype):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices[:1]), 'x')
  def shape(*dims, dtype=dtype):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
  args = (shape(8, Q, K, G, H), shape(64, K, H, S), shape(64, K, S, H), shape(8, 16, dtype='int32'),
          shape(8, dtype='int32'))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(paged_attention.paged_attention).lower(*args).compile()
  assert 'paged_flash' in compiled.as_text()
