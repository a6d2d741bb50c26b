"""Exchange with Hugging Face: every tensor comes back bit for bit, every fault is named."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import hf, tensorfile
from qwen3_jax.spec import Spec

FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures'
QWEN2, MIXED = FIXTURES / 'qwen2', FIXTURES / 'd_moe_mixed'


def read_all(folder):
  """Every tensor of a folder as bytes, by the library of the format."""
  found = {}
  for path in Path(folder).glob('*.safetensors'):
    with safetensors.safe_open(path, 'np') as file:
      for name in file.keys():
        found[name] = file.get_tensor(name)
  return found


def assert_same_tensors(folder, other):
  one, two = read_all(folder), read_all(other)
  assert one.keys() == two.keys() and one
  for name in one:
    assert one[name].dtype == two[name].dtype and one[name].shape == two[name].shape, name
    assert one[name].tobytes() == two[name].tobytes(), name


def test_qwen2_logits():
  """QKV bias, no QK-Norm: numbers of transformers' Qwen2ForCausalLM, rows padded on both sides."""
  numbers = np.load(QWEN2 / 'golden.npz')
  model = hf.load(QWEN2, dtype=jnp.float32)
  tokens, mask = numbers['right_input_ids'], numbers['right_attention_mask']
  logits = jax.jit(lambda m: m.logits(m(tokens, mask).hidden_BTD))(model)
  assert np.abs(logits - numbers['right_logits'])[mask == 1].max() <= 1e-4


@pytest.mark.parametrize('folder', [QWEN2, MIXED], ids=lambda p: p.name)
def test_export_equals_import(folder, tmp_path):
  """In one file and in many, with the same spec."""
  model = hf.load(folder, dtype=None)
  hf.save(model, tmp_path / 'one')
  assert_same_tensors(folder, tmp_path / 'one')
  hf.save(model, tmp_path / 'many', shard_bytes=50_000)
  assert_same_tensors(folder, tmp_path / 'many')
  assert Spec.from_hf(tmp_path / 'many') == Spec.from_hf(tmp_path / 'one') == model.spec
  files = sorted(p.name for p in (tmp_path / 'many').glob('*.safetensors'))
  assert files[0] == f'model-00001-of-{len(files):05d}.safetensors' and len(files) > 1
  index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
  assert set(index['weight_map'].values()) == set(files)
  assert index['metadata']['total_size'] == sum(x.nbytes for x in read_all(folder).values())
  again = hf.load(tmp_path / 'many', dtype=None)
  jax.tree.map(np.testing.assert_array_equal, again, model)


@pytest.mark.parametrize('name', ['a_dense_untied', 'b_dense_tied', 'c_moe', 'e_dense_yarn'])
def test_export_equals_import_of_goldens(golden, name, tmp_path):
  folder = golden / 'models' / name
  hf.save(hf.load(folder, dtype=None), tmp_path / 'out')
  assert_same_tensors(folder, tmp_path / 'out')
  assert Spec.from_hf(tmp_path / 'out') == Spec.from_hf(folder)


@pytest.mark.parametrize('shape', [dict(tensor=2, fsdp=2), dict(data=2, fsdp=2)], ids=str)
def test_on_a_mesh(shape, tmp_path, monkeypatch):
  """Each device gets its own part; tables pass in parts of a few rows; the export is the same."""
  monkeypatch.setattr(hf, 'ROWS_BYTES', 10_000)
  mesh = alphabet.make_mesh(shape)
  alone, model = hf.load(MIXED, dtype=None), hf.load(MIXED, mesh, dtype=None)
  jax.tree.map(np.testing.assert_array_equal, alone, model)
  wanted = alphabet.shardings(model, mesh)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, model, wanted)))
  assert model.head_VD[...].addressable_shards[0].data.size < model.head_VD[...].size
  hf.save(model, tmp_path / 'out')
  assert_same_tensors(MIXED, tmp_path / 'out')


def test_types(tmp_path):
  """bfloat16 leaves norms and routers in float32; a saved folder has one type throughout."""
  exact, low = hf.load(MIXED, dtype=None), hf.load(MIXED)
  assert low.embed_VD.dtype == low.stacks[1].mlp.gate_EDF.dtype == jnp.bfloat16
  assert low.stacks[1].mlp.router_DE.dtype == low.norm_D.dtype == jnp.float32
  np.testing.assert_array_equal(low.embed_VD[...], exact.embed_VD[...].astype(jnp.bfloat16))
  hf.save(low, tmp_path / 'low')
  stored = tensorfile.find_tensors(tmp_path / 'low')
  assert {each.dtype.name for each in stored.values()} == {'bfloat16'}
  assert json.loads((tmp_path / 'low' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  hf.save(exact, tmp_path / 'direct', dtype=jnp.bfloat16)
  assert_same_tensors(tmp_path / 'low', tmp_path / 'direct')
  with pytest.raises(ValueError, match='dtype int8 cannot be saved'):
    hf.save(low, tmp_path / 'int', dtype=jnp.int8)


@pytest.fixture
def folder(tmp_path):
  """A copy of a good model to spoil."""
  return Path(shutil.copytree(QWEN2, tmp_path / 'model'))


def rewrite(folder, change):
  """Applies `change` to the dict of the model's tensors."""
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


Q = 'model.layers.1.self_attn.q_proj.weight'
FAULTS = {
    'missing': (lambda t: t.pop(Q), rf'no tensor {Q} \(24, 24\)'),
    'extra': (lambda t: t.update({'model.eye.weight': t[Q]}), 'model.eye.weight has no place'),
    'shape': (lambda t: t.update({Q: t[Q][:12].copy()}), rf'{Q} has shape \(12, 24\).*\(24, 24\)'),
    'type': (lambda t: t.update({Q: t[Q].astype(np.int32)}), f'{Q} has type I32; want one of F32'),
    'layer': (lambda t: t.update({Q.replace('.1.', '.2.'): t[Q]}), 'layers.2.self_attn.q_proj'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faulty_tensors_are_named(folder, fault):
  change, message = FAULTS[fault]
  rewrite(folder, change)
  with pytest.raises(ValueError, match=message):
    hf.load(folder)


def test_a_file_cut_short_is_named(folder):
  path = folder / 'model.safetensors'
  raw = path.read_bytes()
  for size in (len(raw) - 1, 1000, 5, 0):
    path.write_bytes(raw[:size])
    with pytest.raises(ValueError, match=rf'model.safetensors (has|is cut short).*{size} bytes'):
      hf.load(folder)
  path.write_bytes(raw[:8] + b'x' * (len(raw) - 8))
  with pytest.raises(ValueError, match='its header cannot be read'):
    hf.load(folder)


def test_a_faulty_index_is_named(tmp_path):
  folder = tmp_path / 'many'
  hf.save(hf.load(QWEN2, dtype=None), folder, shard_bytes=20_000)
  index = folder / 'model.safetensors.index.json'
  good = json.loads(index.read_text())
  other = next(name for name in good['weight_map'].values() if name != good['weight_map'][Q])
  index.write_text(json.dumps({'weight_map': good['weight_map'] | {Q: other}}))
  with pytest.raises(ValueError, match=f'{other} has no tensor {Q}'):
    hf.load(folder)
  index.write_text(json.dumps(good)[:100])
  with pytest.raises(ValueError, match='index.json is not an index'):
    hf.load(folder)
  index.write_text(json.dumps(good))
  (folder / other).unlink()
  with pytest.raises(FileNotFoundError, match=f'{other} is missing'):
    hf.load(folder)
  index.unlink()
  with pytest.raises(FileNotFoundError, match='holds neither model.safetensors nor'):
    hf.load(folder)


def test_a_folder_that_is_no_model(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.*does not exist'):
    hf.load(tmp_path / 'nowhere')


class Tokenizer:
  """Saves one file; or fails half-way, as a full disk would."""

  def __init__(self, fails=False):
    self.fails = fails

  def save(self, folder):
    (folder / 'tokenizer.json').write_text('{}')
    if self.fails:
      raise OSError(28, 'No space left on device')


def test_save_is_all_or_nothing(tmp_path):
  model = hf.load(QWEN2, dtype=None)
  with pytest.raises(OSError, match='No space left'):
    hf.save(model, tmp_path / 'out', tokenizer=Tokenizer(fails=True))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'out').mkdir()
  hf.save(model, tmp_path / 'out', tokenizer=Tokenizer())
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
      'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json']
  before = (tmp_path / 'out' / 'model.safetensors').read_bytes()
  with pytest.raises(ValueError, match='out exists and is not an empty folder'):
    hf.save(model, tmp_path / 'out')
  assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == before


# Not ru_maxrss: a child inherits that of the process that forked it.
CHILD = r"""
import re, sys
import jax
from qwen3_jax.model import hf
from qwen3_jax.mesh import make_mesh
mesh = make_mesh(dict(tensor=2, fsdp=2)) if sys.argv[2] == 'mesh' else None
peak = lambda: 1024 * int(re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1])
model = hf.load(sys.argv[1], mesh)
jax.block_until_ready(model)
print(peak())
print(sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
hf.save(model, sys.argv[1] + '.saved')
print(peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['alone', 'mesh'])
def test_memory_of_the_host(tmp_path, kind):
  """Peak memory of loading and of saving 1.5 GB stays below the model, one tensor and 1 GiB."""
  spec = Spec(layers=3, width=2048, heads=16, kv_heads=4, mlp=4096, vocab=65_536, experts=32,
              chosen=4, expert_mlp=768)
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(spec.to_hf('bfloat16')))
  kind_ = np.dtype(jnp.bfloat16)
  tensors = {place.name: (kind_, place.shape_there) for place in hf.places(spec)}
  tensorfile.write(folder / 'model.safetensors', tensors,
                   ([np.zeros(shape, kind_)] for _, shape in tensors.values()))
  run = subprocess.run([sys.executable, '-c', CHILD, folder, kind], capture_output=True, text=True,
                       cwd=FIXTURES.parents[1])
  assert run.returncode == 0, run.stderr
  loaded, size, saved = map(int, run.stdout.split())
  largest = max(2 * np.prod(shape) for _, shape in tensors.values())
  print(f'{kind}: model {size / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB, '
        f'peak above the model {(loaded - size) / 2**20:.0f} (load), '
        f'{(saved - size) / 2**20:.0f} (save) MiB')
  assert size > 1.4e9
  assert loaded - size < largest + 2**30
  assert saved - size < largest + 2**30
