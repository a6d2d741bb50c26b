"""Letters become layouts."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen3_jax import mesh as alphabet


@pytest.fixture(scope='module')
def mesh():
  return alphabet.make_mesh(dict(tensor=2, fsdp=2))


@pytest.mark.parametrize('shape, sizes', [
    (None, (1, 4, 1, 1, 1)), (dict(tensor=2), (1, 2, 1, 1, 2)), (dict(data=4), (4, 1, 1, 1, 1)),
    (dict(context=2, fsdp=2), (1, 2, 1, 2, 1)), (dict(expert=2), (1, 2, 2, 1, 1))])
def test_fsdp_takes_the_devices_that_remain(shape, sizes):
  made = alphabet.make_mesh(shape)
  assert tuple(made.shape.items()) == tuple(zip(alphabet.AXES, sizes))


def test_impossible_meshes_are_refused():
  with pytest.raises(ValueError, match=r"mesh axes \['experts'\] do not exist"):
    alphabet.make_mesh(dict(experts=2))
  with pytest.raises(ValueError, match='needs 3 devices, there are 4; change the sizes'):
    alphabet.make_mesh(dict(tensor=3))
  with pytest.raises(ValueError, match='needs 8 devices, there are 4'):
    alphabet.make_mesh(dict(data=2, fsdp=4))


@pytest.mark.parametrize('name, letters', [
    ('q_BTNH', 'BTNH'), ('gate_EDF', 'EDF'), ('tokens_BT', 'BT'), ('step', ''), ('v_proj', ''),
    ('q_bias_NH', 'NH')])
def test_letters_end_a_name(name, letters):
  assert alphabet.letters(name) == letters


@pytest.mark.parametrize('names, shape, spec', [
    ('BTD', (4, 8, 6), P('fsdp', None, None)),  # fsdp is taken by the rows
    ('DNH', (28, 6, 4, 8), P(None, 'fsdp', 'tensor', None)),  # stacked layers stay whole
    ('VD', (32, 6), P('tensor', 'fsdp')),
    ('EDF', (8, 6, 4), P('fsdp', None, 'tensor')),  # each axis once: D goes without
    ('VD', (31, 6), P(None, 'fsdp')),  # 31 does not divide
    ('BT', (3, 8), P(None, None)),  # 3 rows over 2
    ('D', (7,), P(None))])
def test_partition(mesh, names, shape, spec):
  assert alphabet.partition(names, shape, mesh) == spec


def test_experts_have_an_axis_of_their_own():
  mesh = alphabet.make_mesh(dict(expert=2, fsdp=2))
  for names, shape, spec in (
      ('BT', (4, 8), P(('fsdp', 'expert'), None)), ('DNH', (6, 4, 8), P('fsdp', None, None)),
      ('DF', (8, 4), P(('fsdp', 'expert'), None)),
      ('EDF', (8, 6, 4), P(('expert', 'fsdp'), None, None)),
      ('EDF', (2, 6, 4), P('expert', 'fsdp', None))):  # no more experts to split
    assert alphabet.partition(names, shape, mesh) == spec
  assert alphabet.count_row_ways(mesh) == 4


def test_rules_may_be_changed(mesh):
  rules = alphabet.RULES | dict(E=('tensor',))
  assert alphabet.partition('EDF', (8, 6, 4), mesh, rules) == P('tensor', 'fsdp', None)


def test_shardings_follow_names(mesh):
  tree = dict(tokens_BT=jnp.zeros((4, 8)), step=jnp.zeros(()), moments=dict(q_DNH=jnp.zeros(
      (3, 6, 4, 8))), plain=jnp.zeros((4, 4)))
  found = jax.tree.map(lambda s: s.spec, alphabet.shardings(tree, mesh))
  assert found['moments']['q_DNH'] == P(None, 'fsdp', 'tensor', None)
  assert found['tokens_BT'] == P('fsdp', None)
  assert not any(found['plain']) and not any(found['step'])


def test_constrain_without_a_mesh_changes_nothing(mesh):
  x_BTD = jnp.zeros((4, 8, 6))
  assert alphabet.constrain(x_BTD, 'BTD') is x_BTD
  with jax.set_mesh(mesh):
    y_BTD = jax.jit(lambda x: alphabet.constrain(x * 1, 'BTD'))(x_BTD)
  assert y_BTD.sharding.shard_shape(y_BTD.shape) == (2, 8, 6)


@pytest.mark.slow
def test_slices_split_the_data_axis():
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2',
                                         num_slices=2).devices
  for shape in ({}, dict(tensor=2), dict(data=4)):
    mesh = alphabet.make_mesh(shape, devices)
    halves = np.split(mesh.devices, 2)
    assert [{d.slice_index for d in half.flat} for half in halves] == [{0}, {1}]
  assert alphabet.make_mesh({}, devices).shape['data'] == 2
  with pytest.raises(ValueError, match='2 slices: want a multiple'):
    alphabet.make_mesh(dict(data=1), devices)
