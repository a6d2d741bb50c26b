"""The target chip is read off the mesh at trace time, and block sizes off the committed table."""
import logging

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from qwen3_jax.kernels import blocks, target


def abstract_mesh(kind, platform='tpu', **sizes):
  """A mesh of devices that are not here."""
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  sizes = sizes or dict(data=1)
  return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=device)


@pytest.mark.parametrize('name, kind, vmem, cores', [
    ('TPU v5 lite', 'v5e', 128, 1), ('TPU v5', 'v5p', 64, 2), ('TPU v6 lite', 'v6e', 128, 1),
    ('TPU7x', 'tpu7x', 64, 1), ('TPU v99', 'TPU v99', 16, 1)])
def test_mesh_decides(name, kind, vmem, cores):
  with jax.sharding.use_abstract_mesh(abstract_mesh(name)):
    seen = jax.jit(lambda: (target.platform(), target.kind(), target.vmem(), target.cores()))
    got = []
    jax.eval_shape(lambda: got.append(seen.__wrapped__()))
    assert got == [('tpu', kind, vmem << 20, cores)]


def test_gpu_mesh():
  with jax.sharding.use_abstract_mesh(abstract_mesh('NVIDIA H100', 'gpu')):
    assert target.platform() == 'gpu' and target.kind() == 'NVIDIA H100'


def test_without_a_mesh_the_default_device_decides():
  assert target.platform() == target.kind() == 'cpu'
  with jax.default_device(jax.devices()[1]):
    assert target.device() == jax.devices()[1]
  with jax.set_mesh(jax.make_mesh((2,), ('data',), devices=jax.devices()[:2])):
    assert target.platform() == 'cpu'


def test_report_says_each_thing_once(caplog):
  caplog.set_level(logging.INFO)
  for _ in range(2):
    target.report('walking', 'on foot')
    with jax.sharding.use_abstract_mesh(abstract_mesh('TPU v6 lite')):
      target.report('walking', 'on foot', 'its bicycle is broken')
  assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
    ('INFO', 'walking on cpu: on foot'),
    ('WARNING', 'walking on tpu (v6e): on foot, because its bicycle is broken')]


TABLE = {'kernel': {
  'v6e': [dict(shape=dict(T=4096, dtype='bfloat16'), blocks=dict(q=1024)),
          dict(shape=dict(T=4096, dtype='float32'), blocks=dict(q=512)),
          dict(shape=dict(T=512, dtype='bfloat16'), blocks=dict(q=256))],
  'v5p': [dict(shape=dict(T=4096), blocks=dict(q=128))],
  'any': [dict(shape={}, blocks=dict(q=64))]}}


@pytest.mark.parametrize('kind, shape, q', [
    ('TPU v6 lite', dict(T=8192, dtype='bfloat16', N=32), 1024),  # names of one side say nothing
    ('TPU v6 lite', dict(T=1000, dtype='bfloat16'), 256),
    ('TPU v6 lite', dict(T=512, dtype='float32'), 512),
    ('TPU v6 lite', dict(T=0), 256),
    ('TPU v5 lite', dict(T=512), 128),  # as v5p
    ('TPU v99', dict(T=512), 64)])
def test_nearest_blocks(monkeypatch, kind, shape, q):
  monkeypatch.setattr(blocks, 'read', lambda: TABLE)
  with jax.sharding.use_abstract_mesh(abstract_mesh(kind)):
    chosen = blocks.choose('kernel', **shape)
    assert chosen == dict(q=q)
    chosen['q'] = 0  # a copy
    assert blocks.choose('kernel', **shape) == dict(q=q)
    assert blocks.choose('another kernel', **shape) == {}


def test_committed_table():
  for kernel, chips in blocks.read().items():
    assert set(chips) <= {*target.CHIPS, 'any'}, kernel
    for entry in (entry for entries in chips.values() for entry in entries):
      assert set(entry) == {'shape', 'blocks'} and entry['blocks'], kernel


@pytest.mark.slow
@pytest.mark.parametrize('topology, kind', [
    ('v5e:2x2', 'v5e'), ('v5p:2x2x1', 'v5p'), ('v6e:2x2', 'v6e'), ('tpu7x:2x2x1', 'tpu7x')])
def test_described_topologies(topology, kind):
  """The compiler's own names of the chips, and the mesh that is set for it."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  with jax.set_mesh(jax.sharding.Mesh(np.array(devices[:1]), ('data',))):
    assert (target.platform(), target.kind()) == ('tpu', kind)
