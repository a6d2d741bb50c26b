"""A recipe's plan: its stages by name, what each of them starts from, and what it costs.

A recipe's config has `seed` and `stages`, tuples (name, 'configs/FILE.py:ARG', links). `links` may
be left out; it maps a field of the stage's config to an earlier stage, or to something in that
stage's folder: {'init': 's3', 'teacher': 'general_rl', 'data.tokenizer': 's1/tokenizer'}. Without a
link a stage starts from the weights of the one before it; a link of None means from none.
"""
import json
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from qwen3_jax.spec import Spec
from qwen3_jax.stages import load
from qwen3_jax.training import checkpoint


class Stage(NamedTuple):
  """One stage of a plan; `origins` maps the fields that links filled to 'STAGE' or 'STAGE/PART'."""
  name: str
  config: ConfigDict
  folder: object
  origins: dict


class Cost(NamedTuple):
  """Tokens trained on and tokens drawn from the student, and all FLOPs, the teacher's included."""
  trained: float
  drawn: float
  flops: float


def make_plan(recipe, workdir, read, settings=(), start=None, until=None, init=None):
  """[Stage] of `recipe` from stage `start` to `until`, each with a folder in `workdir`.

  `read(file, overrides)` gives a stage's config. `settings` are texts 'STAGE.KEY=VALUE', which go
  before links. `init`, a folder, is what the first stage of the plan starts from. Raises ValueError
  for a stage that does not exist, FileNotFoundError where a link leads to a stage that was left out
  and has nothing in `workdir`.
  """
  entries = [(name, file, *(links or [{}])) for name, file, *links in recipe.stages]
  names = [name for name, *_ in entries]
  for flag, name in [('--from', start), ('--until', until),
                     *((f'--set {each}', each.partition('.')[0]) for each in settings)]:
    if name and name not in names:
      raise ValueError(f'{flag}: no stage {name!r}; there are {", ".join(names)}')
  first = names.index(start) if start else 0
  last = names.index(until) if until else len(names) - 1
  if last < first:
    raise ValueError(f'--from={start} comes after --until={until}; the order is {", ".join(names)}')
  plan = []
  for i, (name, file, links) in enumerate(entries[:last + 1]):
    if i < first:
      continue
    own = [each.removeprefix(f'{name}.') for each in settings if each.startswith(f'{name}.')]
    given = {each.partition('=')[0] for each in own}
    config = read(file, [f'--config.{each}' for each in own])
    links = ({'init': names[i - 1]} if i and not config.init else {}) | links
    with config.unlocked():
      config.seed = recipe.seed + i  # else every stage would read the same documents
      if i == first and init:
        config.init, given = init, given | {'init'}
      origins = {field: source for field, source in links.items() if field not in given}
      for field, source in origins.items():
        _set(config, field, _find(name, field, source, names[:i], names[:first], workdir))
    plan.append(Stage(name, config, workdir / name, origins))
  check_shapes(plan)
  return plan


def check_shapes(plan):
  """ValueError where a stage starts from one whose model is another, before either is trained."""
  models = {str(stage.folder): (stage.name, stage.config.model) for stage in plan}
  for stage in plan:
    name, before = models.get(stage.config.init, (None, stage.config.model))
    for field in ('layers', 'width', 'heads', 'kv_heads', 'head_width', 'mlp', 'vocab', 'experts'):
      old, new = before[field], stage.config.model[field]
      if old != new:
        raise ValueError(f'{stage.name} starts from {name}, whose config.model.{field} is {old}; '
                         f'its own is {new}')


def _find(name, field, source, earlier, skipped, workdir):
  """Path of what a link names."""
  if source is None:
    return None
  stage, _, part = source.partition('/')
  if stage not in earlier:
    raise ValueError(f'{name} takes its {field} from {source!r}, but the stages before it are '
                     f'{", ".join(earlier) or "none"}')
  folder = workdir / stage
  there = (folder / part).exists() if part else checkpoint.steps(folder / 'checkpoints')
  if stage in skipped and not there:
    instead = '--init=DIR' if field == 'init' else f'--set={name}.{field}=DIR'
    raise FileNotFoundError(f'{name} takes its {field} from {source}, which is not in {workdir}; '
                            f'start at {stage}, or give a folder with {instead}')
  return str(folder / part if part else folder)


def _set(config, field, value):
  *sections, field = field.split('.')
  for section in sections:
    config = config[section]
  config[field] = value


def teacher_spec(stage, plan):
  """Spec of the stage's first teacher, which is a stage of the plan or a folder; else None."""
  routes = [folder for _, folder in stage.config.get('teachers', ())]
  folder = stage.config.get('teacher') or (routes[0] if routes else None)
  if not folder:
    return None
  for other in plan:
    if str(other.folder) == str(folder):
      return load.spec_from(other.config.model)
  try:
    return read_spec(folder)
  except FileNotFoundError:
    return None


def read_spec(folder):
  """Spec of the model in a folder (see `load.find`)."""
  kind, folder = load.find(folder)
  if kind == 'hf':
    return Spec.from_hf(folder)
  return load.spec_from(json.loads((folder / 'config.json').read_text())['model'])


def foresee(config, teacher=None):
  """Cost of the stage of `config`, at most: every answer as long as `rollout.max_tokens` lets it.

  None where the number of steps depends on data that are not there yet. Making data, measuring and
  sampling are not counted.
  """
  if not config['steps']:
    return None
  rollout = config.get('rollout')
  if not rollout:
    trained = config['steps'] * config['data']['batch'] * config['data']['length']
    return _add_up(config, trained)
  rollouts = math.ceil(config['steps'] / rollout.get('updates', 1))
  trained = rollouts * rollout['prompts'] * rollout.get('samples', 1) * rollout['max_tokens']
  return _add_up(config, trained, trained * rollout.get('rounds', 1), teacher)


def spent(config, lines):
  """Cost of the steps in `lines`, those of a metrics.jsonl; `config` may be what JSON holds.

  Stages with rollouts have noted their FLOPs; of the others rows are counted, padding included.
  """
  if not config.get('rollout'):
    rows = config['data']['batch'] * config['data']['length']
    return _add_up(config, len(lines) * rows)
  answers = config['rollout'].get('samples', 1)
  drawn = sum(line['prompts'] * answers * line['answer_tokens'] for line in lines
              if line.get('prompts') and line.get('answer_tokens'))
  trained, flops = (sum(line.get(key) or 0 for line in lines) for key in ('tokens', 'flops'))
  return Cost(trained, drawn, flops)


def _add_up(config, trained, drawn=0, teacher=None):
  """A forward pass is a third of training; what is scored without a gradient costs one."""
  spec, length = load.spec_from(config['model']), config['data']['length']
  frozen = bool((config.get('lora') or {}).get('rank'))
  forward = spec.flops_per_token(length) / 3
  flops = trained * spec.flops_per_token(length, frozen) + drawn * forward
  scored = ((config.get('rollout') or {}).get('old') == 'trainer') + bool(
    (config.get('policy') or {}).get('beta'))
  flops += trained * (scored * forward + (teacher.flops_per_token(length) / 3 if teacher else 0))
  return Cost(trained, drawn, flops)


def keep(plan, recipe, workdir):
  """Writes `recipe.json`, the names of all stages, and `plan.json`, where each has its parts from.

  Of stages that `plan` leaves out plan.json keeps what was written before.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path, names = workdir / 'plan.json', [name for name, *_ in recipe.stages]
  known = json.loads(path.read_text()) if path.exists() else {}
  for stage in plan:
    init = stage.config.init
    known[stage.name] = {'init': init and str(init)} | stage.origins
  for file, value in (('recipe.json', names), ('plan.json', known)):
    new = workdir / f'{file}.new'
    new.write_text(json.dumps(value, indent=2))
    new.replace(workdir / file)
