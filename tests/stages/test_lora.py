"""A LoRA run: it learns, saves adapters alone, resumes exactly, loads and exports merged."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from qwen3_jax import mesh as alphabet
from qwen3_jax.__main__ import main
from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train
from qwen3_jax.model import hf, lora
from qwen3_jax.stages import load
from qwen3_jax.training import checkpoint, metrics

SETTINGS = dict(steps=12, save_every=6, evaluate_every=6, optim__peak_lr=0.02)
pytestmark = pytest.mark.usefixtures('quick_compilation')


def run(workdir, overrides, monkeypatch, devices=1):
  config = configs.load_config('configs/s1.py:tiny', overrides)
  with monkeypatch.context() as patch:
    patch.setattr(alphabet, 'make_mesh', functools.partial(
      alphabet.make_mesh, devices=jax.devices()[:devices]))
    assert train.train(config, epath.Path(workdir)) == 0


@pytest.fixture(scope='module')
def runs(smallest, tmp_path_factory):
  """(folder of a base, folder of a LoRA run of it, the LoRA run's overrides)."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    run(folder / 'base', smallest(**SETTINGS), patch)
    changes = smallest(**SETTINGS, init=str(folder / 'base'), lora__rank=4, micro_batches=2,
                       remat='full', data__sources=(('tasks:size=400', 1.0),),
                       data__heldout=('tasks:size=40',))
    run(folder / 'low', changes, patch)
  return folder / 'base', folder / 'low', changes


def arrays(workdir, step):
  """The arrays of a checkpoint by name."""
  import orbax.checkpoint as ocp
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    path = workdir / 'checkpoints' / str(step) / 'state'
    names = orbax.metadata(path).item_metadata.tree
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    return orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))


def logits(model):
  tokens_BT = jnp.arange(48).reshape(2, 24)
  return jax.jit(lambda model: model.logits(model(tokens_BT).hidden_BTD))(model)


def test_it_learns_and_saves_adapters_alone(runs):
  base, low, _ = runs
  before = metrics.read(base)[-1]['heldout_tasks']
  held = [line['heldout_loss'] for line in metrics.read(low) if 'heldout_loss' in line]
  assert held[1] < held[0] < before - 0.02
  saved = arrays(low, 12)
  weights = {name for name in saved if name.startswith('params.')}
  assert len(weights) == 14 and all('_' in name and 'U' in name for name in weights)
  spec = load.spec_from(json.loads((low / 'config.json').read_text())['model'])
  adapters = sum(saved[name].size for name in weights)
  assert adapters == 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
  assert sum(x.size for x in saved.values()) == 3 * adapters + 4 < spec.parameters()


def test_interrupted_run_ends_in_the_same_bits(runs, tmp_path, monkeypatch):
  base, low, changes = runs
  again = tmp_path / 'again'
  shutil.copytree(low, again)
  shutil.rmtree(again / 'checkpoints' / '12')
  run(again, changes, monkeypatch)
  want, got = arrays(low, 12), arrays(again, 12)
  assert want.keys() == got.keys()
  for name in want:
    assert want[name].tobytes() == got[name].tobytes()


def test_loads_and_exports_merged(runs, tmp_path, monkeypatch):
  """Logits of the merged model, of its export, and with adapters apart: float32, within 2e-5."""
  base, low, _ = runs
  frozen = load.load(base, dtype=jnp.float32)
  abstract = jax.eval_shape(lambda: lora.make(frozen.spec, 4, 32.0))
  local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local), abstract)
  adapters = checkpoint.restore_subtree(low / 'checkpoints', 'params', abstract)
  want = logits(jax.jit(lora.attach)(frozen, adapters))
  assert np.abs(want - logits(frozen)).max() > 0.1
  merged = load.load(low, dtype=jnp.float32)
  np.testing.assert_allclose(logits(merged), want, atol=2e-5)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  assert main(['convert', '--from', str(low), '--to', str(tmp_path / 'out')]) == 0
  exported = hf.load(tmp_path / 'out', dtype=jnp.float32)
  np.testing.assert_array_equal(logits(exported), logits(merged))
  assert load.load(low).embed_VD.dtype == jnp.bfloat16


def test_next_stage_starts_from_the_merged_model(runs):
  base, low, _ = runs
  spec = load.spec_from(json.loads((low / 'config.json').read_text())['model'])
  mesh = alphabet.make_mesh(dict(fsdp=4))
  params = load.load_params(low, dataclasses.replace(spec, rope_theta=1e6), mesh)
  merged = load.load(low, dtype=jnp.float32)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert params.spec.rope_theta == 1e6
  assert params.stacks[0].mlp.up_DF[...].sharding.mesh.shape['fsdp'] == 4


def test_base_that_is_gone_or_changed_is_named(runs, tmp_path, monkeypatch):
  base, low, changes = runs
  copy = tmp_path / 'low'
  shutil.copytree(low, copy)
  note = json.loads((copy / 'base.json').read_text())
  assert note['folder'] == str(base)
  (copy / 'base.json').write_text(json.dumps(note | dict(folder=str(tmp_path / 'moved'))))
  with pytest.raises(FileNotFoundError, match='holds LoRA adapters of .*moved.* put its new place'):
    load.load(copy)
  (copy / 'base.json').write_text(json.dumps(note | dict(fingerprint='00000000')))
  with pytest.raises(ValueError, match='fingerprint 00000000, .*base now has another'):
    load.load(copy)
  shutil.rmtree(copy / 'checkpoints' / '12')
  with pytest.raises(ValueError, match='fingerprint 00000000'):
    run(copy, changes, monkeypatch)


def test_bad_settings_are_told(smallest, tmp_path, capsys):
  command = ['train', '--config=configs/s1.py:tiny', f'--workdir={tmp_path}', *smallest()]
  assert main([*command, '--config.lora.rank=4']) == 2
  assert 'there is no model to adapt: give one with --init=DIR' in capsys.readouterr().err
  assert main([*command, '--config.lora.rank=4', "--config.lora.targets=('x',)"]) == 2
  assert "config.lora.targets has 'x'; want some of q, k" in capsys.readouterr().err
