"""What the compiler said is kept by what it was asked, and nothing damaged is believed."""
import gzip
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.scaling import traffic, verdict


@pytest.fixture
def lower():
  """(mesh, width -> lowered product, split so that it is summed over the mesh)."""
  mesh = alphabet.make_mesh(dict(fsdp=4))
  def place(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  def of(width):
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place(None, 'fsdp'))
    w = jax.ShapeDtypeStruct((16, width), jnp.float32, sharding=place('fsdp', None))
    return jax.jit(jnp.matmul, out_shardings=place()).lower(x, w)
  return mesh, of


def test_a_repeat_is_read_and_says_the_same(lower, tmp_path, monkeypatch):
  mesh, of = lower
  first = verdict.of(of(32), mesh, tmp_path)
  assert not first.kept
  (only,) = traffic.read(first.text, mesh)
  assert only[:4] == ('all-reduce', 'fsdp', 1, 2 * 4 * 8 * 32)
  assert first.memory['arguments'] == 4 * (8 * 16 + 16 * 32) / 4
  assert first.memory['outputs'] == 4 * 8 * 32
  again = of(32)
  monkeypatch.setattr(verdict, 'aside', lambda *_: pytest.fail('compiled again'))
  second = verdict.of(again, mesh, tmp_path)
  assert second == first._replace(kept=True)


def test_another_program_flag_or_version_is_another_question(lower, tmp_path, monkeypatch):
  mesh, of = lower
  known = {verdict.key_of(of(32), mesh), verdict.key_of(of(16), mesh)}
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_scoped_vmem_limit_kib=98304')
  known.add(verdict.key_of(of(32), mesh))
  monkeypatch.setattr(verdict, 'version', lambda name: '9.9')
  known.add(verdict.key_of(of(32), mesh))
  assert len(known) == 4


@pytest.mark.parametrize('damage', [
  lambda data: data[:-9], lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
  lambda data: b'', lambda data: gzip.compress(gzip.decompress(data).replace(b'2048', b'1048')),
  lambda data: gzip.compress(b'no checksum')])
def test_a_damaged_file_is_compiled_anew(lower, tmp_path, damage):
  mesh, of = lower
  lowered = of(64)
  good = verdict.of(lowered, mesh, tmp_path)
  (path,) = tmp_path.iterdir()
  data = path.read_bytes()
  path.write_bytes(damage(data))
  assert path.read_bytes() != data
  assert verdict.read(path) is None
  found = verdict.of(lowered, mesh, tmp_path)
  assert not found.kept and found.memory == good.memory
  assert verdict.of(lowered, mesh, tmp_path).kept and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_error(lower, tmp_path):
  mesh, of = lower
  (tmp_path / 'file').write_text('')
  assert not verdict.of(of(8), mesh, tmp_path / 'file' / 'below').kept


def test_signs_of_life_and_what_was_raised(monkeypatch):
  monkeypatch.setattr(verdict, 'BEAT', 0.01)
  said, wait = [], threading.Event()

  def say(text):
    said.append(text)
    wait.set()

  def work():
    assert wait.wait(60)
    raise ZeroDivisionError
  with pytest.raises(ZeroDivisionError):
    verdict.aside(work, say)
  assert said[0].endswith(' s ...')


@pytest.mark.parametrize('said', [
  'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.',
  'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
  'required for HLO temporaries (21.50G) exceeds available HBM (15.75G). HLO module: jit_step.'])
def test_no_room_is_read_from_the_compilers_words(said):
  found = verdict.without_room(jax.errors.JaxRuntimeError(said))
  assert found == (21.5 * 2**30, 15.75 * 2**30)


def test_another_error_is_said():
  with pytest.raises(ValueError, match='refuses this program: something else'):
    verdict.without_room(jax.errors.JaxRuntimeError('something else'))


def test_bodies_of_kernels_are_left_out():
  text = '{"config":{"body":"TUzv==","debug_locations":"UU","cost_estimate":{"flops":"9"}}}'
  assert verdict.strip(text) == (
    '{"config":{"body":"","debug_locations":"","cost_estimate":{"flops":"9"}}}')
