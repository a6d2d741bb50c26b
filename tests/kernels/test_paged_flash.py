"""The kernels over pages equal their plain meaning, interpreted; the TPU compilers accept them."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.kernels import paged_attention, paged_flash, paged_write, reference

S = 128
meaning = jax.jit(reference.paged_attention)


def draw(length_B, K=2, G=4, H=128, Q=1, C=4, dtype=jnp.float32, scale=1.0):
  """Arguments; every row has its own pages, in any order, and none lies past its length."""
  rng, B = np.random.default_rng(0), len(length_B)
  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) * scale, dtype)
  table_BC = rng.permutation(B * C).reshape(B, C)
  table_BC[np.arange(C) * S >= np.array(length_B)[:, None]] = 10 ** 6
  return (normal(B, Q, K, G, H), normal(B * C, K, H, S), normal(B * C, K, S, H),
          jnp.asarray(table_BC), jnp.asarray(length_B))


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(args, blocks, interpret=True):
  return paged_flash.paged_flash(*args, blocks=dict(blocks), interpret=interpret)


def check(args, atol=1e-5, interpret=True, **blocks):
  o = run(args, tuple({**dict(pages=2, depth=2), **blocks}.items()), interpret)
  want = meaning(*[x.astype(jnp.float32) for x in args[:3]], *args[3:])
  assert o.dtype == args[0].dtype
  np.testing.assert_allclose(np.asarray(o, np.float32), want, atol=atol)
  return o


@pytest.mark.parametrize('pages, depth', [(2, 2), (9, 3)])
def test_ragged_rows_equal_the_meaning(pages, depth):
  o = check(draw([1, 0, 300, 512, 128, 129]), pages=pages, depth=depth)
  assert not np.asarray(o[1]).any()


@pytest.mark.parametrize('K, G, H', [(4, 2, 128), (1, 5, 128), (2, 8, 64)])
def test_heads_of_every_model(K, G, H):
  check(draw([200, 384], K, G, H))


@pytest.mark.parametrize('Q, queries', [(3, 128), (7, 8)])
def test_several_new_tokens_see_what_is_before_each(Q, queries):
  check(draw([1, 0, 5, 300, 512], Q=Q), queries=queries)


def test_rows_share_pages():
  q, k, v, table_BC, length_B = draw([300, 400, 512, 257, 500, 511])
  check((q, k, v, table_BC.at[:, :2].set(table_BC[0, :2]), length_B))


def test_blocks_of_whole_shared_pages_are_read_once():
  q, _, _, table_BC, _ = draw([0] * 6)
  plan = paged_flash.plan(q, S, 4, dict(pages=1, depth=2, queries=128))
  table_BC = jnp.arange(24).reshape(6, 4).at[1:, :3].set(jnp.arange(3)).at[0, :3].set(jnp.arange(3))
  table_BC = table_BC.at[5, 1].set(23)
  length_B = jnp.array([512, 300, 256, 257, 512, 512])
  shared_B = paged_flash._shared(plan, table_BC, length_B, -(-length_B // S))
  assert shared_B.tolist() == [0, 2, 1, 2, 2, 1]  # row 2 keeps the last of its two


def test_huge_norms_are_no_nan():
  o = check(draw([1, 300, 2, 512, 0, 4], scale=1e4), atol=1.0)  # of values of 5e4: float32's 2e-5
  assert np.isfinite(o).all()


def test_bfloat16_is_as_near_as_plain_bfloat16():
  args = draw([100, 512], dtype=jnp.bfloat16)
  exact = meaning(*[x.astype(jnp.float32) for x in args[:3]], *args[3:])
  plain = jax.jit(paged_attention.paged_attention)(*args[:3], jnp.minimum(args[3], 7), args[4])
  def error(x):
    return np.abs(np.asarray(x, np.float32) - exact).max()
  assert error(check(args, atol=1e-2)) <= 1.1 * error(plain)


def interpreter():
  """Copies arrive only when awaited, memory starts as NaN, and races are told."""
  return pltpu.InterpretParams(dma_execution_mode='on_wait', uninitialized_memory='nan',
                               detect_races=True)


def test_copies_are_awaited_and_nothing_else_is_read(capfd, caplog):
  check(draw([1, 300, 0]), interpret=interpreter())
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr()) + caplog.text


def test_gradients_equal_the_meaning():
  args = draw([1, 300, 0], Q=2)
  def grads(f):
    def loss(q, k, v):
      return jnp.sum(jnp.sin(f(q, k, v, jnp.minimum(args[3], 5), args[4])))
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*args[:3])
  kernel = functools.partial(paged_flash.paged_flash, blocks=dict(pages=2, depth=2))
  for got, want in zip(grads(kernel), grads(reference.paged_attention)):
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_plain_blocks_equal_the_meaning():
  *args, table_BC, length_B = draw([1, 0, 300, 512], Q=3)
  args = *args, jnp.minimum(table_BC, 7), length_B
  o = jax.jit(paged_attention.paged_attention)(*args)
  np.testing.assert_allclose(o, meaning(*args), atol=1e-5)


@pytest.mark.parametrize('dtype, rows, strict', [('float32', 2, True), ('bfloat16', 6, False)])
def test_writing_changes_one_slot_of_each_row(dtype, rows, strict, capfd, caplog):
  _, k, v, _, _ = draw([0, 0], dtype=dtype)
  new = draw([0] * rows, dtype=dtype)[0][:, 0, :, :2].swapaxes(0, 2)
  page_B, slot_B = jnp.array([3, 1, 6, 2, 5, 7])[:rows], jnp.array([0, 127, 5, 64, 17, 33])[:rows]
  new = new[0].swapaxes(0, 1), new[1].swapaxes(0, 1)
  got = paged_write.paged_write(k, v, page_B, slot_B, *new,
                                interpret=interpreter() if strict else True)
  for x, want in zip(got, paged_attention.write(k, v, page_B, slot_B, *new)):
    np.testing.assert_array_equal(x, want)
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr()) + caplog.text


def test_what_does_not_fit_is_refused_with_the_numbers():
  args = draw([100, 512])
  with pytest.raises(ValueError, match=r"MiB of VMEM .*lower blocks\['pages'\]"):
    paged_flash.paged_flash(*args, blocks=dict(depth=10 ** 4))
  with pytest.raises(ValueError, match='SMEM'):
    paged_flash.paged_flash(*args[:3], jnp.zeros((2, 10 ** 6), jnp.int32), args[4])
  with pytest.raises(ValueError, match='64 slots'):
    paged_flash.paged_flash(args[0], args[1][..., :64], args[2][:, :, :64], *args[3:])
  with pytest.raises(ValueError, match='MiB of VMEM'):
    new = jnp.zeros((2 ** 16, 2, 128))
    paged_write.paged_write(*args[1:3], jnp.zeros(2 ** 16), jnp.zeros(2 ** 16), new, new)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('K, G, H, Q, dtype', [
  (8, 4, 128, 1, 'bfloat16'), (4, 16, 128, 4, 'bfloat16'), (1, 5, 128, 64, 'bfloat16'),
  (8, 2, 64, 1, 'bfloat16'), (8, 4, 128, 1, 'float32')])
def test_compile_for_tpu_in_place(topology, K, G, H, Q, dtype):
  """Steps of writing and attending in a loop leave no copy of the pool.

  With values 64 wide there is one a call, from the form without padding to the kernels'.
  """
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices[:1]), 'x')

  def shape(*dims, dtype=dtype):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

  def steps(k_BKHS, v_BKSH, q_BQKGH, table_BC, length_B):
    def step(i, carry):
      k_BKHS, v_BKSH, o = carry
      new = o[:, 0, :, 0]
      pages = paged_attention.write(k_BKHS, v_BKSH, table_BC[:, 0], length_B + i, new, new)
      return *pages, paged_attention.paged_attention(o, *pages, table_BC, length_B + i)
    return jax.lax.fori_loop(0, 4, step, (k_BKHS, v_BKSH, q_BQKGH))
  args = (shape(512, K, H, S), shape(512, K, S, H), shape(8, Q, K, G, H),
          shape(8, 16, dtype='int32'), shape(8, dtype='int32'))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(steps, donate_argnums=(0, 1)).lower(*args).compile()
  assert 'paged_flash' in compiled.as_text() and 'paged_write' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < args[0].size or H == 64
