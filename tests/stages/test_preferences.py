"""Reward model and DPO end to end, the smallest: they learn, resume bit for bit, hand on."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from qwen3_jax import mesh as alphabet
from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train
from qwen3_jax.data import preferences
from qwen3_jax.model import lora, reward, transformer
from qwen3_jax.stages import dpo, load
from qwen3_jax.text import tokenizer as text
from qwen3_jax.training import metrics
from qwen3_jax.training.checkpoint import Checkpoints

CLOCK = {'seconds', 'tokens_per_s', 'mfu'}
pytestmark = pytest.mark.usefixtures('quick_compilation')
FILES = dict(reward='configs/reward_model.py:tiny', dpo='configs/dpo.py:tiny')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A language model of 30,000 random weights with a tokenizer, and a file of pairs."""
  folder = tmp_path_factory.mktemp('preferences')
  words = 'red green blue sea sky sun moon star'.split()
  rng, lines = np.random.default_rng(0), []
  for i in range(1000):
    asked, good, bad = (' '.join(rng.choice(words, n)) for n in (4, 3, 3))
    lines.append({'prompt': f'{asked} {i}', 'chosen': f'good {good}', 'rejected': f'bad {bad}'})
  (folder / 'pairs.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  texts = [' '.join(line.values()) for line in lines] + ['user assistant system'] * 50
  return folder, text.train(texts, 330, folder / 'model' / 'tokenizer')


@pytest.fixture(scope='module')
def overrides(folder, smallest):
  """Function from changed fields to the overrides of a run of 12 steps; writes the first model."""
  folder, _ = folder
  pairs = str(folder / 'pairs.jsonl')

  def override(**changes):
    own = dict(
      model__vocab=336, data__tokenizer_size=None, data__batch=4, data__length=192,
      data__sources=((pairs, 1.0),), data__heldout=(pairs,), data__tokenizer=None,
      init=str(folder / 'model'), steps=12, save_every=6, evaluate_every=6, optim__peak_lr=5e-3)
    return smallest(**own | changes)
  config = configs.load_config(FILES['dpo'], override())
  (folder / 'model' / 'config.json').write_text(configs.to_json(config))
  checkpoints = Checkpoints(folder / 'model' / 'checkpoints')
  checkpoints.save(0, dict(params=transformer.init(load.spec_from(config.model), 1)), {}, {})
  checkpoints.close()
  return override


def run(kind, workdir, settings, devices=1):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(alphabet, 'make_mesh', functools.partial(
      alphabet.make_mesh, devices=jax.devices()[:devices]))
    assert train.train(configs.load_config(FILES[kind], settings), epath.Path(workdir)) == 0
  return [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics.read(workdir)]


@pytest.fixture(scope='module', params=['reward', 'dpo'])
def straight(request, overrides, tmp_path_factory):
  """(kind, workdir, lines) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp(request.param)
  return request.param, workdir, run(request.param, workdir, overrides())


def half(straight, folder):
  shutil.copytree(straight[1], folder, dirs_exist_ok=True)
  shutil.rmtree(folder / 'checkpoints' / '12')
  return folder


def test_it_learns_what_tells_the_answers_apart(straight):
  kind, _, lines = straight
  assert abs(lines[0]['loss'] - np.log(2)) < 0.05
  assert lines[-1]['heldout_loss'] < 0.5 and lines[-1]['heldout_accuracy'] > 0.95
  assert lines[-1]['heldout_margin'] > lines[5]['heldout_margin'] > 0
  assert lines[-1]['pairs'] > 4  # packed: more than one a row
  if kind == 'dpo':
    assert lines[0]['margin'] == pytest.approx(0, abs=1e-4)  # it starts at the reference
    assert lines[0]['kl_k3'] == pytest.approx(0, abs=1e-6)
    assert 0 < lines[-1]['heldout_kl_k3'] and lines[-1]['heldout_kl_k1'] != 0
    assert lines[-1]['chosen_logp'] > lines[-1]['rejected_logp']


def test_resume_is_bit_exact(straight, overrides, tmp_path):
  kind, workdir, lines = straight
  again = half(straight, tmp_path)
  kept = {path.name: path.stat().st_mtime_ns for path in (again / 'reference').glob('*')}
  assert bool(kept) == (kind == 'dpo')
  assert run(kind, again, overrides()) == lines
  assert kept == {path.name: path.stat().st_mtime_ns for path in (again / 'reference').glob('*')}
  saved = [json.loads((folder / 'checkpoints' / '12' / 'MANIFEST.json').read_text())['files']
           for folder in (workdir, again)]
  assert saved[0]['data.json'] == saved[1]['data.json']
  ours, theirs = (load.load(folder, dtype=jnp.float32) for folder in (workdir, again))
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_on_four_devices_in_micro_batches(straight, overrides, tmp_path):
  """The same pairs, and the same losses but for rounding."""
  kind, _, want = straight
  got = run(kind, tmp_path, overrides(mesh__tensor=2, micro_batches=2, steps=12), 4)
  assert [line['pairs'] for line in got] == [line['pairs'] for line in want]
  np.testing.assert_allclose([line['loss'] for line in got[:6]],
                             [line['loss'] for line in want[:6]], rtol=2e-3)
  np.testing.assert_allclose(got[0]['loss'], want[0]['loss'], rtol=1e-5)


def test_a_trained_reward_model_loads_and_scores(straight, folder):
  kind, workdir, _ = straight
  if kind == 'reward':
    model, tokenizer = load.load_model(workdir, dtype=jnp.float32)
    assert isinstance(model, reward.RewardModel)
    def score(*answers):
      return reward.score(model, tokenizer, [{'messages': [
        {'role': 'user', 'content': 'sea sky'}, {'role': 'assistant', 'content': answer}]}
        for answer in answers])
    good, bad = score('good sun moon', 'bad sun moon')
    assert good > bad + 0.1
  else:
    assert type(load.load(workdir)) is transformer.Qwen3


def test_damaged_or_foreign_reference_is_computed_again(folder, overrides, tmp_path, caplog):
  place, tokenizer = folder
  config = configs.load_config(FILES['dpo'], overrides())
  spec, kept = load.spec_from(config.model), epath.Path(tmp_path) / 'reference'

  def attach():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(alphabet, 'make_mesh', functools.partial(
        alphabet.make_mesh, devices=jax.devices()[:1]))
      pairs = preferences.Pairs(preferences.read(str(place / 'pairs.jsonl')), tokenizer, 192)
      dpo.attach_reference(config, spec, kept, [pairs])
    return np.array(pairs.reference), pairs
  first, pairs = attach()
  model = load.load_params(config.init, spec, alphabet.make_mesh(dict(fsdp=1), jax.devices()[:1]))
  tokens = pairs[7]
  side = tokens[tokens['rejected'] == 1]
  logits = model.logits(model(jnp.array(side['id'])[None]).hidden_BTD)[0]
  logp = jax.nn.log_softmax(logits)[np.arange(len(side) - 1), side['id'][1:]]
  np.testing.assert_allclose(side['reference'][1:], logp * side['weight'][1:], rtol=1e-4)
  file, = kept.glob('*[!n]')
  file.write_bytes(file.read_bytes()[:-4])
  np.testing.assert_array_equal(attach()[0], first)
  assert 'is damaged; its log-probabilities are computed again' in caplog.text
  with config.unlocked():
    config.dtype = 'bfloat16'  # another computation: a file of its own
  other = attach()[0]
  assert len(list(kept.glob('*'))) == 4 and 0 < np.abs(other - first).max() < 0.2


def test_low_rank_adapters_of_a_reward_model(overrides, tmp_path):
  lines = run('reward', tmp_path, overrides(
    lora__rank=4, optim__peak_lr=3e-2, steps=8, save_every=8, evaluate_every=8))
  assert lines[-1]['heldout_accuracy'] > 0.9
  model = load.load(tmp_path, dtype=jnp.float32)
  assert isinstance(model, reward.RewardModel) and not hasattr(model, 'lora')
  assert lora.fingerprint(model)


def test_dpo_needs_a_model_and_config_a_method(overrides, tmp_path):
  with pytest.raises(ValueError, match='no tokenizer'):
    train.train(configs.load_config(FILES['dpo'], overrides(init=None)), epath.Path(tmp_path))
