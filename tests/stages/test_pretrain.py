"""The smallest pretraining stage end to end: it learns, resumes bit for bit, hands on."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from qwen3_jax import mesh as alphabet
from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train
from qwen3_jax.data import sources
from qwen3_jax.model import transformer
from qwen3_jax.stages import load, pretrain
from qwen3_jax.stages.run import first_state
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.training import metrics, optim

STEPS = 24
SETTINGS = dict(steps=STEPS, save_every=STEPS // 2, evaluate_every=8, optim__peak_lr=0.02)
CLOCK = {'seconds', 'tokens_per_s', 'mfu'}
pytestmark = pytest.mark.usefixtures('quick_compilation')


def run(name, workdir, overrides, monkeypatch, devices=1):
  """Trains in `workdir` on the first `devices`; returns the tokens of every batch, as drawn."""
  drawn, place = [], alphabet.to_global

  def recorded(batch, *args):
    drawn.append(batch['tokens_BT'].copy())
    return place(batch, *args)
  with monkeypatch.context() as patch:
    patch.setattr(alphabet, 'to_global', recorded)
    patch.setattr(alphabet, 'make_mesh', functools.partial(
      alphabet.make_mesh, devices=jax.devices()[:devices]))
    config = configs.load_config(name, overrides)
    assert train.train(config, epath.Path(workdir)) == 0
  return drawn


@pytest.fixture(scope='module')
def straight(smallest, tmp_path_factory):
  """(workdir, batches) of an uninterrupted run on one device; held-out batches come first."""
  workdir = tmp_path_factory.mktemp('straight')
  with pytest.MonkeyPatch.context() as patch:
    return workdir, run('configs/s1.py:tiny', workdir, smallest(**SETTINGS), patch)


def read_arrays(workdir, step):
  """All arrays of a checkpoint by name, as numpy, and its data cursor."""
  import orbax.checkpoint as ocp
  folder = workdir / 'checkpoints' / str(step)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    names = orbax.metadata(folder / 'state').item_metadata.tree
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    arrays = orbax.restore(folder / 'state', args=ocp.args.PyTreeRestore(restore_args=how))
  return arrays, json.loads((folder / 'data.json').read_text())


def timeless(workdir):
  return [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics.read(workdir)]


def cut_in_half(straight, folder):
  """A copy of the straight run as it was after half of its steps."""
  shutil.copytree(straight[0], folder, dirs_exist_ok=True)
  shutil.rmtree(folder / 'checkpoints' / str(STEPS))
  return folder


def test_it_learns(straight):
  lines = metrics.read(straight[0])
  losses = [line['loss'] for line in lines]
  assert abs(losses[0] - np.log(320)) < 0.2
  assert np.mean(losses[-4:]) < losses[0] - 1.5
  held = [line for line in lines if 'heldout_loss' in line]
  assert [line['step'] for line in held] == [8, 16, 24]
  assert held[-1]['heldout_loss'] < held[0]['heldout_loss'] < losses[0] - 1.5
  assert held[-1]['heldout_tasks'] > held[-1]['heldout_loss']  # other text, by itself


def test_resume_is_bit_exact(straight, smallest, tmp_path, monkeypatch):
  """Weights, both Adam moments and counters, the data, and every line of the metrics."""
  drawn = run('configs/s1.py:tiny', cut_in_half(straight, tmp_path), smallest(**SETTINGS),
              monkeypatch)
  np.testing.assert_array_equal(drawn[-STEPS // 2:], straight[1][-STEPS // 2:])
  assert len(drawn) == len(straight[1]) - STEPS // 2
  (got, cursor), (want, cursor2) = (read_arrays(x, STEPS) for x in (tmp_path, straight[0]))
  assert got.keys() == want.keys() and any('nu' in name for name in want)
  for name in want:
    assert got[name].tobytes() == want[name].tobytes(), name
  assert cursor == cursor2
  assert timeless(tmp_path) == timeless(straight[0])


def test_resume_on_another_mesh(straight, smallest, tmp_path, monkeypatch):
  """From one device to four: the very same data, and the same losses but for rounding."""
  overrides = smallest(**SETTINGS, mesh__tensor=2, micro_batches=2)
  drawn = run('configs/s1.py:tiny', cut_in_half(straight, tmp_path), overrides, monkeypatch, 4)
  np.testing.assert_array_equal(drawn[-STEPS // 2:], straight[1][-STEPS // 2:])
  assert read_arrays(tmp_path, STEPS)[1] == read_arrays(straight[0], STEPS)[1]
  got, want = timeless(tmp_path), timeless(straight[0])
  assert [line['step'] for line in got] == list(range(1, STEPS + 1))
  for a, b in zip(got, want):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5), a['step']
    assert (a['tokens'], a['lr']) == (b['tokens'], b['lr'])


def test_next_stage_starts_from_the_weights_and_another_rope(straight, smallest):
  """S3 from an S1 run: equal weights, fresh Adam, RoPE's base 1,000,000 instead of 10,000."""
  config = configs.load_config('configs/s3.py:tiny', smallest(init=str(straight[0])))
  spec = load.spec_from(config.model)
  mesh = alphabet.make_mesh()
  state = first_state(config, spec, optim.adamw(), mesh, transformer.make, load.load_params)
  saved = read_arrays(straight[0], STEPS)[0]
  assert state.params.spec.rope_theta == 1e6
  assert configs.load_config('configs/s1.py:tiny').model.rope_theta == 1e4
  leaves = {jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
  assert {f'params.{name}' for name in leaves} == {n for n in saved if n.startswith('params.')}
  for name, leaf in leaves.items():
    assert np.asarray(leaf).tobytes() == saved[f'params.{name}'].tobytes()
  assert int(state.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt))
  hidden = jax.jit(lambda model: model(np.arange(64)[None]).hidden_BTD)
  old = hidden(load.load(straight[0], dtype=np.float32))
  assert np.abs(np.asarray(old) - hidden(state.params)).max() > 1e-2  # the angles did change


def test_held_out_batches_by_source(smallest):
  """The first source is the loss that compares stages, whatever the others are."""
  config = configs.load_config('configs/s2.py:tiny', smallest())
  tokenizer, mesh = Tokenizer(config.data.tokenizer), alphabet.make_mesh()
  both = pretrain.heldout_batches(config, tokenizer, mesh)
  assert list(both) == ['heldout_loss', 'heldout_tasks']
  with config.unlocked():
    config.data.heldout, config.seed = config.data.heldout[:1], 5
  alone = pretrain.heldout_batches(config, tokenizer, mesh)
  assert list(alone) == ['heldout_loss'] and 1 <= len(alone['heldout_loss']) <= 2
  for a, b in zip(alone['heldout_loss'], both['heldout_loss'], strict=True):
    np.testing.assert_array_equal(a['tokens_BT'], b['tokens_BT'])
  with config.unlocked():
    config.data.heldout = None
  assert pretrain.heldout_batches(config, tokenizer, mesh) == {}


@pytest.mark.parametrize('given, want', [
  ('stdlib', [('stdlib', 1.0)]), ((('a', 1), ('b', 0.5)), [('a', 1), ('b', 0.5)]),
  ([['a', 1]], [('a', 1)])])
def test_sources_may_be_one_name_or_pairs(given, want):
  config = configs.load_config('configs/s1.py:0.6b')
  with config.unlocked():
    config.data.sources = given
  assert pretrain.source_shares(config) == want


@pytest.mark.parametrize('given', [('/data/a.jsonl', 1.0), (('a', 'b'),), (('a',),), ((1.0, 'a'),)])
def test_sources_of_another_form_are_refused(given):
  config = configs.load_config('configs/s1.py:0.6b')
  with pytest.raises(ValueError, match='config.data.sources is None: say what to train on'):
    pretrain.source_shares(config)
  with config.unlocked():
    config.data.sources = given
  with pytest.raises(ValueError, match='want pairs of a source and its share'):
    pretrain.source_shares(config)


def test_weights_of_documents_set_how_often_they_come(smallest, tmp_path):
  """As `mix` writes them: a line a document, held-out ones too; the loader reads by weight."""
  config = configs.load_config('configs/s1.py:tiny', smallest())
  (spec, _), = pretrain.source_shares(config)
  whole = sources.open_source(spec)
  weights = [5.0 if i % 4 == 0 else 0.5 for i in range(len(whole))]
  path = tmp_path / 'weights.jsonl'
  path.write_text(''.join(json.dumps(dict(id=i, weight=w)) + '\n' for i, w in enumerate(weights)))
  config = configs.load_config('configs/s1.py:tiny', smallest(data__weights=((spec, str(path)),)))
  documents = pretrain.open_documents(config, Tokenizer(config.data.tokenizer), 'train')
  heavy = {whole[i] for i in range(0, len(whole), 4)}
  drawn = [documents[i][1] for i in range(4000)]
  train = sources.open_source(spec, 'train')
  share = sum(train[i] in heavy for i in range(len(train))) / len(train)
  want = share * 5 / (share * 5 + (1 - share) * 0.5)
  assert np.mean([text in heavy for text in drawn]) == pytest.approx(want, abs=0.02)
  path.write_text('{"weight": 1}\n')
  with pytest.raises(ValueError, match='has 1 weights, .* has 400 documents'):
    pretrain.open_documents(config, Tokenizer(config.data.tokenizer), 'train')
