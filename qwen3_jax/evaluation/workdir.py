"""What a run left in its workdir, as the report wants it."""
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from etils import epath

from qwen3_jax.stages import recipe
from qwen3_jax.training import metrics

ORDER = ('s1', 's2', 's3', 'cold_start', 'reasoning_rl', 'fusion', 'general_rl', 'student',
         'distill_off', 'distill_on')
TITLES = {'s1': 'S1 general', 's2': 'S2 reasoning', 's3': 'S3 long context',
          'cold_start': 'Cold start', 'reasoning_rl': 'Reasoning RL', 'fusion': 'Fusion',
          'general_rl': 'General RL', 'student': 'Student base', 'distill_off': 'Off-policy',
          'distill_on': 'On-policy', 'reward_model': 'Reward model', 'dpo': 'DPO'}
PARTS = 'config', 'samples', 'probe', 'modes', 'times', 'arrays'


def title(stage):
  return TITLES.get(stage['name'], str(stage['name']))


def read_stages(workdir):
  """The stages found in a recipe's workdir, in the recipe's order; a single run is one stage.

  A stage is a folder with metrics.jsonl; the files of PARTS are optional. Raises FileNotFoundError
  if there is none, ValueError naming a file that is not JSON.
  """
  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f'no folder {workdir}; give the workdir of a run')
  folders = [workdir, *(path for path in workdir.iterdir() if path.is_dir())]
  folders = [path for path in folders if (path / 'metrics.jsonl').exists()]
  if not folders:
    raise FileNotFoundError(f'no metrics.jsonl in {workdir} or in a folder below it; '
                            'give the workdir of a run that has begun')
  plan = read_json(workdir / 'plan.json') or {}
  stages = []
  for folder in folders:
    lines = metrics.read(folder)
    name = lines[0].get('stage', folder.name) if lines and folder == workdir else folder.name
    stage = {'name': name, 'workdir': str(folder), 'metrics': lines, **{
      part: read_json(folder / f'{part}.json') for part in PARTS},
      'filters': read_json(folder / 'data' / 'report.json')}
    stages.append(stage | {'origin': describe_origin(stage, plan.get(name)),
                           'cost': count_cost(stage)})
  names = [*(read_json(workdir / 'recipe.json') or ()), *ORDER]
  rank = {name: i for i, name in reversed(list(enumerate(names)))}
  return sorted(stages, key=lambda stage: (rank.get(stage['name'], len(names)), stage['name']))


def describe_origin(stage, planned):
  """Which weights a stage started from, and its teacher, in words; None where it is not known."""
  config = stage['config'] or {}
  if 'init' not in config:
    return None
  planned = planned or {}

  def name(field):
    path = planned.get(field) or config.get(field)
    short = path and Path(path).name
    return TITLES.get(short, short)
  teacher = config.get('teacher') and f', teacher {name("teacher")}'
  return (name('init') or 'random weights') + (teacher or '')


def count_cost(stage):
  """`recipe.Cost` of what the stage has done; None without its config."""
  config = stage['config'] or {}
  if 'model' not in config or 'data' not in config:
    return None
  return recipe.spent(config, stage['metrics'])


def read_json(path):
  """Content of a JSON file, None if it is not there; ValueError names a broken one."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); delete it or write it again') from None


def list_versions():
  """What the figures depend on: this machine, Python, the libraries, the commit of the code."""
  versions = {'machine': platform.platform(), 'cpu': f'{os.cpu_count()} x {_cpu()}',
              'python': platform.python_version()}
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  commit = _commit()
  return versions | ({'commit': commit} if commit else {})


def _cpu():
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
              platform.processor() or platform.machine())


def _commit():
  """Hash of the checked-out commit, with '+' where files differ from it; None where unknown."""
  folder = Path(__file__).resolve().parents[2]
  if not (folder / '.git').exists():
    return None
  try:
    commit, changed = (subprocess.run(
      ['git', '-C', folder, *words], capture_output=True, text=True, check=True, timeout=10).stdout
      for words in (('rev-parse', '--short=12', 'HEAD'), ('status', '--porcelain', '-uno')))
  except (OSError, subprocess.SubprocessError):
    return None
  return commit.strip() + '+' * bool(changed.strip())
