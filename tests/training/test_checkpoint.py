"""Checkpoints come back bit for bit, or not at all."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.training import checkpoint, optim, preemption
from qwen3_jax.training import step as training
from qwen3_jax.training.checkpoint import Checkpoints, find_fault, restore_subtree


class Mlp(nnx.Module):

  def __init__(self, rngs, F=64):
    self.gate_DF = nnx.Param(jax.random.normal(rngs.params(), (32, F)))
    self.norm_D = nnx.Param(jnp.ones(32, jnp.bfloat16) / 3)
    self.depth = 4


@struct.dataclass
class State:
  step: jax.Array
  params: Mlp
  opt: dict


def make_state(step=7, F=64):
  params = Mlp(nnx.Rngs(step), F)
  moments = jax.tree.map(lambda x: x * 0.1, params)
  return State(jnp.int32(step), params, {'mu': moments, 'nu': (moments, jnp.float32(0.5))})


def abstract(tree, sharding=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def fill(folder, steps=(1, 2)):
  checkpoints = Checkpoints(folder)
  for step in steps:
    checkpoints.save(step, make_state(step), {'cursor': step * 8}, {'size': 'tiny', 'at': step})
  checkpoints.close()


@pytest.fixture(scope='module')
def filled(tmp_path_factory):
  folder = tmp_path_factory.mktemp('filled') / 'checkpoints'
  fill(folder)
  return folder


@pytest.fixture
def copied(filled, tmp_path):
  return Path(shutil.copytree(filled, tmp_path / 'copy'))


def restore(folder, step=None):
  checkpoints = Checkpoints(folder)
  try:
    return checkpoints.restore(abstract(make_state()), step)
  finally:
    checkpoints.close()


def test_round_trip_is_bit_exact(filled):
  step, state, data = restore(filled)
  assert (step, data) == (2, {'cursor': 16})
  assert_equal(state, make_state(2))
  assert_equal(restore(filled, 1)[1], make_state(1))
  assert Checkpoints(filled).config() == {'size': 'tiny', 'at': 2}
  assert Checkpoints(filled).config(1) == {'size': 'tiny', 'at': 1}


def test_state_moves_to_another_mesh(tmp_path):
  x_DF = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
  meshes = [((4, 1), ('fsdp', 'tensor')), ((2, 2), ('fsdp', 'tensor')), ((2,), ('tensor',))]
  for i, (shape, axes) in enumerate(meshes):
    devices = jax.devices()[:int(np.prod(shape))]
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(shape, axes, axis_types=auto, devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    checkpoints = Checkpoints(tmp_path)
    if i:
      step, state, _ = checkpoints.restore({'x': jax.ShapeDtypeStruct((32, 64), jnp.float32,
                                                                      sharding=sharding)})
      assert step == i - 1
      assert state['x'].sharding == sharding
      np.testing.assert_array_equal(state['x'], x_DF)
    checkpoints.save(i, {'x': jax.device_put(x_DF, sharding)}, {}, {})
    checkpoints.close()


def test_a_mixture_moves_to_an_expert_axis(specs, models, tmp_path):
  """From fsdp=4 to expert=4 and back to one device: equal weights and moments, laid out anew."""
  state = training.state_of(models['moe'], optim.adamw())
  want = jax.tree.map(np.asarray, state)
  for step, shape in enumerate((dict(fsdp=4), dict(expert=4), None)):
    mesh = alphabet.make_mesh(shape or dict(fsdp=1), jax.devices()[:4 if shape else 1])
    layout = alphabet.shardings(state, mesh)
    checkpoints = Checkpoints(tmp_path)
    if step:
      _, state, _ = checkpoints.restore(jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout))
    else:
      state = jax.device_put(state, layout)
    assert_equal(jax.tree.map(np.asarray, state), want)
    checkpoints.save(step, state, {}, {})
    checkpoints.close()
    gate_EDF = state.params.stacks[0].mlp.gate_EDF[...]
    assert gate_EDF.sharding.spec == PartitionSpec(None, next(iter(shape or {}), None), None, None)


def test_subtree_is_restored_alone_and_cast(filled):
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_state().params)
  params = restore_subtree(filled, 'params', wanted)
  assert isinstance(params, Mlp)
  assert params.depth == 4
  assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(2).params))


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
  advance = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, keep=9)
  for step in range(3):
    state = {'x': jax.device_put(jnp.arange(1 << 20, dtype=jnp.float32) + step, sharding),
             'y': jnp.full(1 << 16, step, jnp.bfloat16)}
    want = jax.tree.map(np.array, state)
    state = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state)
    checkpoints.save(step, state, {}, {})
    for _ in range(4):
      state = advance(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert_equal(checkpoints.restore(abstract(want), step)[1], want)
  checkpoints.close()


def list_files(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def flip_bit(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def truncate(path, rng):
  path.write_bytes(path.read_bytes()[:-1])


def delete(path, rng):
  path.unlink()


@pytest.mark.parametrize('damage', [flip_bit, truncate, delete])
def test_damage_to_any_file_is_found_and_named(copied, damage):
  rng = random.Random(0)
  files = list_files(copied / '2')
  assert len(files) > 8
  for name in files:
    path = copied / '2' / name
    content = path.read_bytes()
    damage(path, rng)
    problem = find_fault(copied / '2')
    assert problem, f'{damage.__name__} in {name} is not noticed'
    assert name in problem or name == 'MANIFEST.json'
    path.write_bytes(content)
    assert find_fault(copied / '2') is None


def test_any_flipped_bit_of_a_manifest_is_found(copied):
  manifest = copied / '2' / 'MANIFEST.json'
  content = manifest.read_bytes()
  for i in random.Random(1).sample(range(len(content)), 40):
    for bit in range(8):
      manifest.write_bytes(content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1:])
      assert find_fault(copied / '2'), f'bit {bit} of byte {i}'


@pytest.mark.parametrize('damage', [flip_bit, truncate, delete])
@pytest.mark.parametrize('which', ['largest', 'MANIFEST.json', 'data.json'])
def test_restore_falls_back_to_the_older_step(copied, damage, which, caplog):
  path = copied / '2' / which
  if which == 'largest':
    path = max((p for p in (copied / '2').rglob('*') if p.is_file()), key=os.path.getsize)
  damage(path, random.Random(2))
  with caplog.at_level(logging.WARNING):
    step, state, data = restore(copied)
  assert (step, data) == (1, {'cursor': 8})
  assert_equal(state, make_state(1))
  assert sorted(os.listdir(copied)) == ['1', '2.corrupt']
  assert f'{copied}/2 is damaged' in caplog.text
  if path.name != 'MANIFEST.json':
    assert path.name in caplog.text


def test_no_undamaged_step_is_an_error(copied):
  for step in '12':
    flip_bit(copied / step / 'data.json', random.Random(3))
  with pytest.raises(FileNotFoundError, match='no undamaged checkpoint .*2: data.json .*1: data'):
    restore(copied)
  assert sorted(os.listdir(copied)) == ['1.corrupt', '2.corrupt']
  with pytest.raises(FileNotFoundError, match='it holds none'):
    restore(copied / 'nowhere')


def test_a_reader_of_a_damaged_step_changes_nothing(copied):
  flip_bit(copied / '2' / 'data.json', random.Random(4))
  flip_bit(copied / '2' / 'config.json', random.Random(4))
  params = restore_subtree(copied, 'params', abstract(make_state().params))
  assert_equal(params, make_state(1).params)
  assert Checkpoints(copied).config() == {'size': 'tiny', 'at': 1}
  assert sorted(os.listdir(copied)) == ['1', '2']


def test_another_model_is_refused_by_name(filled):
  checkpoints = Checkpoints(filled)
  with pytest.raises(ValueError, match=r'params\.gate_DF \(32, 64\), model wants \(32, 80\)'):
    checkpoints.restore(abstract(make_state(F=80)))
  state = abstract(make_state())
  with pytest.raises(ValueError, match=r'checkpoint has opt\.nu\.1 \(\), model has none'):
    checkpoints.restore(state.replace(opt={'mu': state.opt['mu'], 'nu': state.opt['nu'][:1]}))
  with pytest.raises(ValueError, match=r'model wants opt\.z \(\), checkpoint has none'):
    checkpoints.restore(state.replace(opt=state.opt | {'z': jax.ShapeDtypeStruct((), 'int32')}))
  with pytest.raises(ValueError, match=r'checkpoint has step int32, model wants float32'):
    checkpoints.restore(state.replace(step=jax.ShapeDtypeStruct((), jnp.float32)))
  with pytest.raises(ValueError, match=r'gate_DF \(32, 64\), model wants \(32, 80\)'):
    restore_subtree(filled, 'params', abstract(make_state(F=80).params))
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]


def test_old_steps_go_and_a_saved_step_stays(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest() is None
  for step in (3, 6, 9, 12):
    checkpoints.save(step, make_state(step), {}, {})
  checkpoints.save(12, make_state(0), {'other': 1}, {})
  checkpoints.wait()
  assert checkpoints.steps() == [9, 12]
  assert sorted(os.listdir(tmp_path)) == ['12', '9']
  assert checkpoints.restore(abstract(make_state()))[2] == {}
  checkpoints.save(12, make_state(0), {'other': 1}, {}, force=True)
  _, state, data = checkpoints.restore(abstract(make_state()))
  assert data == {'other': 1}
  assert_equal(state, make_state(0))
  checkpoints.close()


def test_leftovers_are_ignored_and_then_removed(copied):
  shutil.copytree(copied / '2', copied / '3')
  (copied / '3' / 'MANIFEST.json').rename(copied / '3' / 'MANIFEST.unfinished')
  (copied / '4' / 'state.orbax-checkpoint-tmp').mkdir(parents=True)
  (copied / '4' / 'MANIFEST.unfinished').touch()
  (copied / '5').mkdir()
  assert Checkpoints(copied).steps() == [1, 2]
  assert restore(copied)[0] == 2
  assert sorted(os.listdir(copied)) == ['1', '2']


def test_a_step_half_removed_is_gone(copied, monkeypatch):
  def stop(*_, **__):
    raise KeyboardInterrupt
  checkpoints = Checkpoints(copied, keep=1)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(type(checkpoints.folder), 'rmtree', stop)
    checkpoint._remove(checkpoints.folder / '2')
  assert (copied / '2' / 'state').exists()
  assert checkpoints.steps() == [1]
  checkpoints.close()
  assert restore(copied)[0] == 1
  assert os.listdir(copied) == ['1']


@pytest.fixture
def small_disk(tmp_path):
  """A folder that holds 3 MiB: a file system where we may mount one, else a limit on files."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(folder)]
  if shutil.which('mount') and not subprocess.run(command, capture_output=True).returncode:
    yield folder
    subprocess.run(['umount', str(folder)], check=True)
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
  yield folder
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_clear_error_and_costs_no_checkpoint(small_disk):
  make = lambda size: {'x': jax.random.normal(jax.random.key(size), (size,))}
  checkpoints = Checkpoints(small_disk / 'run')
  checkpoints.save(1, make(100_000), {}, {})
  checkpoints.save(2, make(900_000), {}, {})
  message = 'step 2 could not be saved in .*(No space left|too large).* intact: 1'
  with pytest.raises(OSError, match=message):
    checkpoints.save(3, make(100_000), {}, {})
  assert os.listdir(small_disk / 'run') == ['1']
  checkpoints.save(4, make(100_000), {}, {})
  assert_equal(checkpoints.restore(abstract(make(100_000)))[1], make(100_000))
  assert checkpoints.steps() == [1, 4]
  checkpoints.save(5, make(900_000), {}, {})
  with pytest.raises(OSError, match='step 5 could not be saved'):
    checkpoints.wait()
  checkpoints.close()


def test_unwritable_folder_is_one_clear_error(tmp_path):
  (tmp_path / 'file').write_text('')
  checkpoints = Checkpoints(tmp_path / 'file' / 'run')
  with pytest.raises(OSError, match='step 1 could not be saved in .*Not a directory'):
    checkpoints.save(1, make_state(), {}, {})
  checkpoints.close()


CHILD = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp
from qwen3_jax.training.checkpoint import Checkpoints

def run(folder):  # states are a function of the step: 1 MB of it and a counter
  checkpoints = Checkpoints(folder, keep=2)
  shape = {'x': jax.ShapeDtypeStruct((250_000,), jnp.float32),
           'n': jax.ShapeDtypeStruct((), jnp.int32)}
  start = 0
  if checkpoints.latest() is not None:
    start, state, data = checkpoints.restore(shape)
    assert data == {'n': start} and int(state['n']) == start
    assert bool((state['x'] == jnp.arange(250_000) + start).all())
  for step in range(start + 1, start + 1000):
    state = {'x': jnp.arange(250_000, dtype=jnp.float32) + step, 'n': jnp.int32(step)}
    checkpoints.save(step, state, {'n': step}, {})

folder, rng = sys.argv[1], random.Random(int(sys.argv[2]))
for kill in range(6):  # each child forks before JAX has started a thread
  child = os.fork()
  if not child:
    try:
      run(folder)
    finally:
      os._exit(1)
  time.sleep(0.5 + rng.random())
  os.kill(child, signal.SIGKILL)
  assert os.waitpid(child, 0)[1] == signal.SIGKILL, 'the child failed by itself'
  print(kill, sorted(os.listdir(folder)), flush=True)
"""


def test_killed_at_any_moment_the_next_start_continues(tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  repo = Path(checkpoint.__file__).parents[2]
  done = subprocess.run([sys.executable, '-c', CHILD, str(folder), '0'], cwd=repo, text=True,
                        capture_output=True, timeout=120)
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(done.stdout.splitlines()) == 6
  assert 'damaged' not in done.stderr
  checkpoints = Checkpoints(folder)
  latest = checkpoints.latest()
  assert latest > 1
  for step in checkpoints.steps():
    assert find_fault(folder / str(step)) is None
  abstract_state = {'x': jax.ShapeDtypeStruct((250_000,), jnp.float32),
                    'n': jax.ShapeDtypeStruct((), jnp.int32)}
  step, state, data = checkpoints.restore(abstract_state)
  checkpoints.close()
  assert step == latest == int(state['n']) == data['n']
  np.testing.assert_array_equal(state['x'], np.arange(250_000, dtype=np.float32) + step)
  assert sorted(os.listdir(folder)) == sorted(map(str, checkpoints.steps()))


def test_sigterm_is_noticed_and_the_handler_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Preemption() as run:
    assert not run.should_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.should_stop(2)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before


def test_manifest_lists_every_file(filled):
  listed = json.loads((filled / '2' / 'MANIFEST.json').read_text())['files']
  assert sorted([*listed, 'MANIFEST.json']) == list_files(filled / '2')


def test_keep_below_one_is_refused(tmp_path):
  with pytest.raises(ValueError, match='keep is 0'):
    Checkpoints(tmp_path, keep=0)
