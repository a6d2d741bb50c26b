"""Attention takes the form that its platform and shapes allow, on each device's own part."""
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import attention as dispatch
from qwen3_jax.kernels import reference

TPU = 'TPU v6 lite', 'tpu'
SLOW = pytest.mark.slow  # interpreted kernels
GPU = 'NVIDIA H100 80GB HBM3', 'gpu'


def described(kind, platform, **sizes):
  """A mesh, with all of the alphabet's axes, of devices that are not here."""
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  sizes = tuple(sizes.get(axis, 1) for axis in alphabet.AXES)
  types = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.sharding.AbstractMesh(sizes, alphabet.AXES, axis_types=types, abstract_device=device)


def shapes(B, T, S, N, K, H, dtype=jnp.bfloat16):
  def one(shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype)
  q, k = one((B, T, N, H)), one((B, S, K, H))
  return q, k, k, one((B, T), jnp.int32), one((B, S), jnp.int32)


def traced(*arrays, **options):
  """The program of attention and, of training, its gradients."""
  def run(q, k, v, *segments):
    if 'start' in options:
      return dispatch.attention(q, k, v, *segments, **options)
    return jax.grad(lambda *x: dispatch.attention(*x, *segments, **options).sum().astype(float),
                    (0, 1, 2))(q, k, v)
  return str(jax.make_jaxpr(run)(*arrays))


def test_training_on_a_tpu_uses_the_kernels():
  with jax.sharding.use_abstract_mesh(described(*TPU)):
    text = traced(*shapes(2, 512, 512, 4, 2, 128))
  assert 'name=flash_forward' in text and 'name=flash_backward' in text
  assert 'shard_map' not in text  # one device


def test_sharded_training_gives_each_device_its_part():
  with jax.sharding.use_abstract_mesh(described(*TPU, fsdp=2, tensor=2)):
    text = traced(*shapes(4, 512, 512, 4, 2, 128))
  assert 'shard_map' in text and 'bf16[2,512,2,128]' in text and 'bf16[2,512,1,128]' in text
  assert 'name=flash_forward' in text and 'name=flash_backward' in text


def test_a_split_context_goes_through_the_ring():
  with jax.sharding.use_abstract_mesh(described(*TPU, context=4)):
    text = traced(*shapes(1, 4096, 4096, 4, 2, 128))
  assert 'ppermute' in text and 'name=flash_forward' in text and 'name=flash_backward' in text


@pytest.mark.parametrize('sizes', [{}, dict(fsdp=2, tensor=2), dict(context=4)], ids=str)
def test_prefill_over_a_cache_uses_the_kernel(sizes):
  def run(start, *arrays):
    return dispatch.attention(*arrays, start)
  with jax.sharding.use_abstract_mesh(described(*TPU, **sizes)):
    text = str(jax.make_jaxpr(run)(jnp.int32(3), *shapes(2, 512, 2048, 4, 2, 128)))
  assert 'name=flash_forward' in text and 'ppermute' not in text


@pytest.mark.parametrize('machine, arrays, warned', [
    (TPU, shapes(2, 64, 64, 4, 2, 128), None),  # short
    (TPU, shapes(2, 256, 256, 2, 1, 32), 'heads are 32 wide'),
    (GPU, shapes(2, 256, 256, 4, 2, 128, jnp.float32), 'not float32'),
    (GPU, shapes(2, 255, 255, 4, 2, 128), 'even lengths'),
    (GPU, shapes(1, 16384, 16384, 2, 1, 128), 'a mask of 16384 x 16384'),
    (('cpu', 'cpu'), shapes(2, 256, 256, 4, 2, 128), None)], ids=str)
def test_what_does_not_fit_is_said_and_runs_in_blocks(machine, arrays, warned, caplog):
  dispatch.target._log_once.cache_clear()
  caplog.set_level(logging.INFO)
  with jax.sharding.use_abstract_mesh(described(*machine)):
    text = traced(*arrays)
  assert 'pallas_call' not in text and 'cudnn' not in text
  [record] = caplog.records
  assert 'blocks of plain JAX' in record.getMessage()
  assert record.levelname == ('WARNING' if warned else 'INFO') and (warned or '') in record.message


def random(*arrays, seed=0):
  keys = jax.random.split(jax.random.key(seed), len(arrays))
  return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, arrays)]


def packed(B, T):
  t = np.arange(T)
  rows = [1 + (t >= T // 3) + (t >= T // 2), np.where(t < T - 9, 1, 0)]
  return jnp.asarray(np.stack([rows[b % 2] for b in range(B)]), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, q, k, v, do, segment):
  o, pull = jax.vjp(lambda q, k, v: function(q, k, v, segment, segment), q, k, v)
  return o, *pull(do)


@pytest.mark.parametrize('sizes, N, K', [
    (dict(fsdp=2, tensor=2), 4, 2),
    pytest.param(dict(fsdp=1, tensor=4), 8, 2, marks=SLOW),  # a kv head on two devices
    pytest.param(dict(fsdp=1, tensor=4), 4, 1, marks=SLOW),
    pytest.param(dict(fsdp=1, tensor=4), 6, 2, marks=SLOW),  # heads that cannot be split
    pytest.param(dict(fsdp=1, context=2, tensor=2), 4, 2, marks=SLOW),
    pytest.param(dict(fsdp=1, context=4), 2, 1, marks=SLOW)], ids=str)
def test_sharded_values_and_gradients(sizes, N, K, monkeypatch):
  """The kernels, interpreted, on four devices equal the meaning on one."""
  q, k, v, _, _ = shapes(2, 256, 256, N, K, 64, jnp.float32)
  q, k, v, do = random(q, k, v, q)
  segment = packed(2, 256)
  want = value_and_gradients(reference.attention, q, k, v, do, segment)
  monkeypatch.setattr(dispatch, 'choose', lambda *_: (dispatch.FLASH, None))
  with jax.set_mesh(alphabet.make_mesh(sizes)):
    got = jax.jit(value_and_gradients.__wrapped__, static_argnums=0)(
      dispatch.attention, q, k, v, do, segment)
  for name, a, b in zip(('output', 'dq', 'dk', 'dv'), got, want):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [dict(fsdp=1, context=4),
                                   pytest.param(dict(fsdp=2, tensor=2), marks=SLOW)], ids=str)
def test_sharded_prefill_over_a_cache(sizes, monkeypatch):
  monkeypatch.setattr(dispatch, 'choose', lambda *_: (dispatch.FLASH, None))
  q, k, v = random(*shapes(2, 128, 256, 2, 1, 64, jnp.float32)[:3])
  segment_BS = packed(2, 256)
  run = jax.jit(dispatch.attention)
  for start in (0, 77, 128):
    inputs = q, k, v, segment_BS[:, start:start + 128], segment_BS
    with jax.set_mesh(alphabet.make_mesh(sizes)):
      got = run(*inputs, jnp.int32(start))
    np.testing.assert_allclose(got, reference.attention(*inputs, start), atol=2e-5)


@pytest.fixture
def cudnn(monkeypatch):
  """JAX traces cuDNN's attention only where it finds cuDNN: say that it is there."""
  from jax._src.cudnn import fused_attention_stablehlo
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)


@pytest.mark.parametrize('sizes', [{}, dict(fsdp=2, tensor=2)], ids=str)
def test_gpu_lowers_to_cudnn(sizes, cudnn):
  """Lowered for CUDA, not run: forward and backward are cuDNN's calls."""
  def run(do, *arrays):
    segments = arrays[3:]
    _, pull = jax.vjp(lambda *x: dispatch.attention(*x, *segments), *arrays[:3])
    return pull(do)
  arrays = shapes(4, 512, 512, 4, 2, 128)
  with jax.sharding.use_abstract_mesh(described(*GPU, **sizes)):
    traced = jax.jit(run).trace(arrays[0], *arrays)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert '__cudnn$fmha' in text and '__cudnn$fmhaScaleBiasSoftmaxBackward' in text


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('sizes', [dict(fsdp=2, tensor=2), dict(fsdp=1, context=4)], ids=str)
def test_compiles_for_tpus(topology, sizes):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[:4]
  mesh = alphabet.make_mesh(sizes, devices)

  def run(q, k, v, segment):
    return jax.grad(lambda *x: dispatch.attention(*x, segment, segment).sum().astype(float),
                    (0, 1, 2))(q, k, v)
  q, k, v, segment, _ = shapes(4, 4096, 4096, 8, 4, 128)
  specs = dict(zip((4, 2), (alphabet.partition('BTNH', q.shape, mesh),
                            alphabet.partition('BT', segment.shape, mesh))))
  arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype,
                                 sharding=jax.sharding.NamedSharding(mesh, specs[len(x.shape)]))
            for x in (q, k, v, segment)]
  with jax.set_mesh(mesh):
    text = jax.jit(run).lower(*arrays).compile().as_text()
  assert 'flash_forward' in text and 'flash_backward' in text
