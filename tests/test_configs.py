"""The files of configs/: each builds for each size, and each of their keys is read by someone."""

import ast
import dataclasses
import inspect
from pathlib import Path

import ml_collections
import pytest
from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import evaluate, train
from qwen3_jax.spec import RELEASED, Spec
from qwen3_jax.stages import load
from qwen3_jax.stages.defaults import RECIPES, STUDENTS
from qwen3_jax.training import metrics, optim

REPO = Path(configs.__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (REPO / 'configs').glob('*.py'))
PRETRAINING = 's1', 's2', 's3'
POST_TRAINING = 'cold_start', 'fusion', 'reward_model', 'dpo'
REINFORCEMENT = 'reasoning_rl', 'general_rl'
DISTILLATION = 'distill_off', 'distill_on'
SIZED = (*PRETRAINING, *POST_TRAINING, *REINFORCEMENT, 'recipe')
ARGUMENTS = dict(filter=('', 'cold_start', 'rl', 'text', 'chat', 'plain', 'rejection', 'synthetic',
                         'cold_start,tiny', 'rejection,tiny', 'plain,tiny'),
                 fuse=('', 'tiny', 'distill', 'distill,tiny'),
                 compare=('', 'tiny', 'tiny,moe', '8b'), mix=('', 'tiny', 'proxy'))
TOKENS = dict(s1=30e12, s2=5e12, s3=300e9)


def test_every_file_is_known_here():
  assert set(FILES) == {*SIZED, *ARGUMENTS, *DISTILLATION, 'student'}


@pytest.mark.parametrize('name, argument', [(n, a) for n in ARGUMENTS for a in ARGUMENTS[n]])
def test_files_of_other_commands_build(name, argument):
  assert configs.load_config(f'configs/{name}.py:{argument}')
  with pytest.raises(ValueError, match="config argument '.*nonsense.*': want "):
    configs.load_config(f'configs/{name}.py:nonsense')


@pytest.mark.parametrize('size', [*STUDENTS, 'tiny', 'tiny,moe', ''])
@pytest.mark.parametrize('name', DISTILLATION)
def test_distillation_builds_for_each_student(name, size):
  config = configs.load_config(f'configs/{name}.py:{size}')
  spec = load.spec_from(config.model)
  assert spec.parameters() < load.spec_from(configs.load_config(
    f'configs/fusion.py:{"32b" if size in STUDENTS else size}').model).parameters()
  with pytest.raises(ValueError, match='a larger model is a teacher'):
    configs.load_config(f'configs/{name}.py:32b')


@pytest.mark.parametrize('argument, names', [
  ('8b', []), ('32b,0.6b', ['distill_off', 'distill_on']),
  ('tiny', ['student', 'distill_off', 'distill_on']), ('tiny,moe', ['student', 'distill_off',
                                                                    'distill_on'])])
def test_a_recipe_ends_with_the_students_it_was_asked_for(argument, names):
  stages = configs.load_config(f'configs/recipe.py:{argument}').stages
  assert [name for name, *_ in stages[7:]] == names
  for name, file, links in stages[7:]:
    config = configs.load_config(file)
    assert config.model.layers <= (28 if argument == '32b,0.6b' else 3)
    assert name == 'student' or links['teacher'] == 'general_rl'


@pytest.mark.parametrize('size', [*RECIPES, 'tiny', 'tiny,moe', ''])
@pytest.mark.parametrize('name', SIZED)
def test_each_file_builds_for_each_size(name, size):
  config = configs.load_config(f'configs/{name}.py:{size}')
  if name == 'recipe':
    assert all(configs.load_config(file) for _, file, *_ in config.stages)
    return
  spec = load.spec_from(config.model)
  base = RELEASED.get(f'{size}-base')
  if base and name in PRETRAINING:
    theta = 1e6 if name == 's3' else 1e4
    assert spec == dataclasses.replace(base, rope_theta=theta)
    assert config.steps * config.data.batch * config.data.length == pytest.approx(
      TOKENS[name], rel=0.01)
  elif base:  # what a released, post-trained size is, but for the ids that end a text
    assert spec == dataclasses.replace(RELEASED[size], stop_ids=spec.stop_ids)
    assert name in REINFORCEMENT or config.epochs and not config.steps
  else:
    assert spec.parameters() < 4e6 and bool(spec.experts) == (size == 'tiny,moe')
  assert config.data.length <= spec.max_position
  routed = spec.experts and name not in REINFORCEMENT  # there routing is replayed, not taught
  assert (config.balance is None) == (config.router_z is None) == (not routed)
  o, steps = config.optim, config.steps or 1000
  rate = optim.schedule(o.schedule, o.peak_lr, steps, o.warmup, o.final, o.decay)
  assert 0 < rate(steps) <= rate(o.warmup) <= o.peak_lr * 1.001


def test_learning_rate_goes_down_from_stage_to_stage():
  rates = []
  for name in ('s1', 's2'):
    config = configs.load_config(f'configs/{name}.py:8b')
    o = config.optim
    rate = optim.schedule(o.schedule, o.peak_lr, config.steps, o.warmup, o.final, o.decay)
    rates.append((float(rate(o.warmup)), float(rate(config.steps))))
  assert rates[1][0] == pytest.approx(rates[0][1])  # S2 starts where S1 ended


@pytest.mark.parametrize('name', SIZED)
@pytest.mark.parametrize('size', ['7b', 'tiny,mow', '8b,moe'])
def test_unknown_size_is_refused(name, size):
  with pytest.raises(ValueError, match=f'config argument {size!r}: want 0.6b, .*, or tiny'):
    config = configs.load_config(f'configs/{name}.py:{size}')
    for _, file in getattr(config, 'stages', ()):
      configs.load_config(file)


class Recorded(ml_collections.ConfigDict):
  """A config that notes in `read` the dotted name of each field that is taken from it."""

  read = set()

  def __getitem__(self, name):
    Recorded.read.add(self.__dict__.get('_names', {}).get(name))
    return super().__getitem__(name)

  def to_dict(self, *args, **kwargs):
    """Writing a config down is not reading it."""
    before = set(Recorded.read)
    plain = super().to_dict(*args, **kwargs)
    Recorded.read.intersection_update(before)
    return plain


def record(config, prefix=''):
  copy = Recorded()
  for key, value in config.items():
    inner = isinstance(value, ml_collections.ConfigDict)
    copy[key] = record(value, f'{prefix}{key}.') if inner else value
  object.__setattr__(copy, '_names', {key: f'{prefix}{key}' for key in config})
  return copy


def test_each_key_is_read(smallest, tmp_path, quick_compilation):
  """A run of two steps takes every field of the config, and the code every field of the spec."""
  config = configs.load_config('configs/s1.py:tiny,moe', smallest(
    steps=3, data__tokenizer=None, data__heldout=('tasks:size=20',),
    model__experts=4, model__chosen=2, model__expert_mlp=16))
  keys = {key for key in configs.flatten(config.to_dict()) if not key.startswith('model.')}
  recorded = record(config)
  Recorded.read.clear()
  assert train.train(recorded, epath.Path(tmp_path)) == 0
  assert keys - Recorded.read == set()
  last = metrics.read(tmp_path)[-1]
  assert last['balance'] > 0 and last['router_z'] > 0 and last['expert_peak'] >= 1
  assert set(config.model) == {field.name for field in dataclasses.fields(Spec)}
  assert set(config.model) - attributes_read() == set()


def test_each_key_of_fine_tuning_is_read(smallest, tmp_path, quick_compilation):
  """The same for a supervised stage that makes its data; `measure` goes to `evaluate.run` whole."""
  tasks = 'tasks:kinds=chain,difficulty=1,size=40'
  config = configs.load_config('configs/cold_start.py:tiny', smallest(
    steps=None, epochs=1, data__sources=None, data__heldout=(tasks,), data__length=160,
    prepare__inputs__input=(tasks,), optim__warmup=1))
  assert set(config.measure) <= set(inspect.signature(evaluate.run).parameters)
  keys = {key for key in configs.flatten(config.to_dict())
          if not key.startswith(('model.', 'measure.'))}
  recorded = record(config)
  Recorded.read.clear()
  assert train.train(recorded, epath.Path(tmp_path)) == 0
  unused = {'data.tokenizer_size'}  # a tokenizer is given
  assert keys - Recorded.read - unused <= {'lora.alpha', 'lora.targets'}


@pytest.mark.slow
def test_each_key_of_reinforcement_is_read(smallest, tmp_path, quick_compilation):
  first = configs.load_config('configs/s1.py:tiny', smallest(
    steps=3, data__heldout=(), evaluate_every=None))
  assert train.train(first, epath.Path(tmp_path / 'init')) == 0
  short = 'length:difficulty=1,thinking=off'  # of which a random model gets a part
  config = configs.load_config('configs/general_rl.py:tiny', [
    each for each in smallest(
      init=str(tmp_path / 'init'), steps=2, data__sources=((short, 1.0),), data__heldout=(short,),
      data__length=160, rollout__prompts=4, rollout__samples=4, rollout__updates=1,
      rollout__max_tokens=48, engine__rows=8, engine__pages=64, measure_reward__prompts=4,
      lora__rank=4, optim__warmup=1) if 'heldout_batches' not in each])
  keys = {key for key in configs.flatten(config.to_dict()) if not key.startswith('model.')}
  recorded = record(config)
  Recorded.read.clear()
  assert train.train(recorded, epath.Path(tmp_path / 'rl')) == 0
  assert {key for key in keys - Recorded.read if not key.startswith('measure.')} == {
    'data.tokenizer_size'}  # a tokenizer is given; what a recipe measures goes to `evaluate.run`


@pytest.mark.slow
def test_each_key_of_distillation_is_read(smallest, tmp_path, quick_compilation):
  first = configs.load_config('configs/s1.py:tiny', smallest(
    steps=3, data__heldout=(), evaluate_every=None))
  assert train.train(first, epath.Path(tmp_path / 'init')) == 0
  source = 'tasks:kinds=chain,difficulty=1,thinking=mixed'
  config = configs.load_config('configs/distill_on.py:tiny', [
    each for each in smallest(
      init=str(tmp_path / 'init'), teacher=str(tmp_path / 'init'), steps=2,
      data__sources=((source, 1.0),), data__heldout=(source,), data__length=160, data__batch=2,
      rollout__prompts=8, rollout__updates=1, rollout__max_tokens=24, engine__rows=8,
      engine__pages=64, measure_reward__prompts=4, optim__warmup=1)
    if 'heldout_batches' not in each])
  keys = {key for key in configs.flatten(config.to_dict())
          if not key.startswith(('model.', 'measure.'))}
  recorded = record(config)
  Recorded.read.clear()
  assert train.train(recorded, epath.Path(tmp_path / 'on')) == 0
  assert keys - Recorded.read <= {'data.tokenizer_size', 'lora.alpha', 'lora.targets'}


def test_each_key_of_the_recipe_is_read():
  keys = set(configs.load_config('configs/recipe.py:tiny'))
  assert keys - attributes_read() == set()


def attributes_read():
  """Names of all attributes that the package's code reads from something."""
  trees = [ast.parse(path.read_text()) for path in (REPO / 'qwen3_jax').rglob('*.py')]
  return {node.attr for tree in trees for node in ast.walk(tree)
          if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
