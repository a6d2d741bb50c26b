"""The smallest reinforcement learning end to end: what it learns, resumes and refuses."""
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train
from qwen3_jax.generation import rollout
from qwen3_jax.stages import load
from qwen3_jax.stages.experience import Experience
from qwen3_jax.training import metrics

pytestmark = pytest.mark.usefixtures('quick_compilation')
STEPS = 8
MOE = dict(model__experts=4, model__chosen=2, model__expert_mlp=16)


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  """Questions of which a random model gets some right: a short answer is worth more."""
  folder = tmp_path_factory.mktemp('prompts')
  for name, numbers in (('prompts', range(60)), ('heldout', range(60, 72))):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(dict(
      messages=[dict(role='user', content=f'cat {i} sat on {i % 7} hills' + ' and ran' * (i % 5))],
      source='short', id=str(i), enable_thinking=False, verifiers=dict(length=1.0),
      limit=dict(unit='characters', max=20, slope=60))) + '\n' for i in numbers))
  return folder


@pytest.fixture(scope='module')
def settings(smallest, prompts, tmp_path_factory):
  """Function from changed fields to the overrides of a run; its model is made here once."""
  made = {}

  def one(moe=False, **changes):
    size = MOE if moe else {}
    if moe not in made:
      made[moe] = tmp_path_factory.mktemp('init')
      config = configs.load_config('configs/s1.py:tiny', smallest(
        steps=3, data__heldout=(), evaluate_every=None, **size))
      assert train.train(config, epath.Path(made[moe])) == 0
    own = dict(
      init=str(made[moe]), data__sources=((str(prompts / 'prompts.jsonl'), 1.0),),
      data__heldout=(str(prompts / 'heldout.jsonl'),),
      data__length=96, data__batch=8, rollout__prompts=6, rollout__samples=4, rollout__updates=2,
      rollout__max_tokens=32, engine__rows=16, measure_reward__prompts=8, steps=STEPS,
      save_every=4, evaluate_every=8, optim__peak_lr=0.003, optim__warmup=1, parity__every=2)
    unused = ('data__heldout_batches',)
    return [each for each in smallest(**(own | size | changes))
            if each.split('=')[0].removeprefix('--config.').replace('.', '__') not in unused]
  return one


def run(workdir, overrides, argument='tiny'):
  config = configs.load_config(f'configs/reasoning_rl.py:{argument}', overrides)
  return train.train(config, epath.Path(workdir))


def weights(workdir):
  return jax.tree.leaves(jax.tree.map(np.asarray, load.load(workdir, dtype=None)))


def logged(workdir):
  """The metrics without what the clock says."""
  timed = ('seconds', 'rollout_seconds', 'rollout_tokens_per_s', 'tokens_per_s', 'mfu')
  return [{key: value for key, value in line.items() if key not in timed}
          for line in metrics.read(workdir)]


@pytest.fixture(scope='module')
def straight(settings, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('straight')
  assert run(workdir, settings()) == 0
  return workdir


def test_each_rollout_serves_its_updates_and_the_first_of_them_is_on_policy(straight):
  lines = metrics.read(straight)
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert [line['step'] for line in lines if 'reward' in line] == [1, 3, 5, 7]
  for line in lines:
    first = line['step'] % 2 == 1
    assert (line['ratio'] == line['ratio_max'] == 1.0) == first
  assert 0 < lines[0]['reward'] < 1 and lines[0]['heldout_reward'] > 0
  assert lines[-1]['heldout_reward_low'] <= lines[-1]['heldout_reward']


def test_engine_and_trainer_agree(straight):
  measured = [line for line in metrics.read(straight) if 'parity_mean' in line]
  assert len(measured) == 2
  for line in measured:
    assert line['parity_mean'] <= 1e-6 and line['parity_max'] < 2e-5
    assert line['ratio_mean'] == pytest.approx(1, abs=1e-6) and line['parity_ess'] > 0.999999


def test_answers_are_kept_for_a_reader(straight):
  files = sorted((straight / 'rollouts').glob('*.jsonl'))
  assert [file.name for file in files] == [f'{step:08d}.jsonl' for step in (0, 2, 4, 6)]
  group = json.loads(files[0].read_text().splitlines()[0])
  assert len(group['answers']) == 4 and 0 <= group['answers'][0]['reward'] <= 1
  assert set(group['answers'][0]['components']) == {'length'}


@pytest.mark.parametrize('kept', [4])
def test_resume_ends_in_the_same_bits(straight, settings, tmp_path, kept):
  copy = tmp_path / 'copy'
  shutil.copytree(straight, copy)
  shutil.rmtree(copy / 'checkpoints' / '8')
  assert run(copy, settings()) == 0
  assert logged(copy) == logged(straight)
  for a, b in zip(weights(straight), weights(copy), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_stop_between_the_updates_of_a_rollout_loses_nothing(straight, settings, tmp_path,
                                                               monkeypatch):
  """Preempted after update 3, the first of the second rollout's two: the other one waits."""
  from qwen3_jax.training.preemption import Preemption
  monkeypatch.setattr(Preemption, 'should_stop', lambda self, step: step == 3)
  assert run(tmp_path, settings()) == 42
  monkeypatch.undo()
  assert list((tmp_path / 'rollouts').glob('ready-*.npz'))
  assert run(tmp_path, settings()) == 0
  assert logged(tmp_path) == logged(straight)
  for a, b in zip(weights(straight), weights(tmp_path), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_mixture_replays_the_engines_routes(settings, tmp_path):
  assert run(tmp_path, settings(moe=True, steps=4, save_every=None, optim__peak_lr=3e-4),
             'tiny,moe') == 0
  lines = metrics.read(tmp_path)
  assert lines[0]['ratio'] == lines[0]['ratio_max'] == 1.0
  assert lines[0]['parity_mean'] <= 1e-6
  assert all(np.isfinite(line['loss']) and line['grad_norm'] > 0 for line in lines)


def test_the_gate_shuts_when_the_engine_has_other_weights(settings, tmp_path, monkeypatch, capsys):
  load_weights = Experience.load

  def spoil(self, params, version):
    load_weights(self, jax.tree.map(lambda w: w * 1.03, params), version)
  monkeypatch.setattr(Experience, 'load', spoil)
  assert run(tmp_path, settings()) == train.STUCK
  assert 'engine and trainer disagree' in capsys.readouterr().err
  assert not (tmp_path / 'checkpoints').exists() or not list((tmp_path / 'checkpoints').iterdir())


@pytest.mark.slow
def test_equal_rewards_stop_the_run_with_the_reason(settings, tmp_path, capsys):
  """Sums that a random model never gets right."""
  sums = (('tasks:kinds=add,difficulty=3', 1.0),)
  assert run(tmp_path, settings(data__sources=sums, data__heldout=None)) == train.STUCK
  assert 'all samples of every prompt had the same reward (mean 0.00' in capsys.readouterr().err


def test_what_the_machinery_lost_is_missing_and_not_zero(settings, tmp_path, monkeypatch):
  """Every third answer has no score, every fifth a failed episode: the others are learnt from."""
  from qwen3_jax.rewards.router import Router
  score, play = Router.score, rollout.play

  def lossy(self, records, responses):
    found = score(self, records, responses)
    return [type(each)(None, {'length': None}, {'length': 'lost'}) if i % 3 == 0 else each
            for i, each in enumerate(found)]

  def failing(*args, **kwargs):
    episodes = play(*args, **kwargs)
    for episode in episodes[::5]:
      episode.response, episode.failure = None, 'the environment is gone'
    return episodes
  monkeypatch.setattr(Router, 'score', lossy)
  monkeypatch.setattr(rollout, 'play', failing)
  assert run(tmp_path, settings(steps=2, save_every=None)) == 0
  first = metrics.read(tmp_path)[0]
  assert first['missing'] >= 8 and first['reward'] > 0.05
  lines = (tmp_path / 'rollouts' / '00000000.jsonl').read_text().splitlines()
  answers = [answer for line in lines for answer in json.loads(line)['answers']]
  for answer in answers:
    lost = answer['failure'] or answer['missing']
    assert (answer['reward'] is None) == bool(lost)
    assert lost in (None, {}, 'the environment is gone', {'length': 'lost'})
  assert any(answer['failure'] for answer in answers) and any(a['missing'] for a in answers)


@pytest.mark.slow
def test_a_split_learns_what_one_mesh_learns(settings, tmp_path):
  """Prompts, rewards and losses are the same up to rounding; ahead, weights are a rollout old."""
  few = dict(steps=2, save_every=None, evaluate_every=None, data__heldout=None)
  apart = few | dict(placement__kind='split', placement__fraction=0.5)
  lines = []
  for name, changes in dict(together=few, split=apart,
                            ahead=apart | dict(steps=3, placement__ahead=True)).items():
    assert run(tmp_path / name, settings(**changes)) == 0
    lines.append(metrics.read(tmp_path / name))
  together, split, ahead = lines
  for name in ('reward', 'loss', 'entropy', 'ratio'):
    for one, other in zip(together, split, strict=True):
      assert one.get(name) == pytest.approx(other.get(name), abs=1e-6), name
    assert ahead[0][name] == pytest.approx(split[0][name], abs=1e-6)
  assert split[0]['staleness'] == 0 and [ahead[i]['staleness'] for i in (0, 2)] == [0, 2]


@pytest.mark.parametrize('changes, reason', [
  (dict(rollout__samples=1), 'samples is 1'), (dict(rollout__prompts=1), 'needs a prompt'),
  (dict(policy__temperature=0.7), 'must see the distribution'),
  (dict(rollout__replay='engine'), 'None for a dense model'),
  (dict(rollout__old='trainers'), "want 'trainer' or 'engine'"),
  (dict(policy__correction='token_tis'), 'nothing to correct'),
  (dict(save_every=3), 'a multiple of config.rollout.updates'),
  (dict(placement__ahead=True), 'chips of its own'), (dict(init=None), 'give one with --init'),
  (dict(policy__kind='ppo'), 'kind is')])
def test_settings_that_do_not_fit_are_refused(settings, tmp_path, changes, reason):
  with pytest.raises(ValueError, match=reason):
    run(tmp_path, settings(**changes))
