"""Compares ways on from one student on the same prompts: reinforcement learning, distillation.

As Table 21 of the Qwen3 report. From the checkpoint that --init names, each way is trained in a
folder of its own, once for each of config.seeds, and all are measured on the same held-out problems
in both modes. The table is shown and written to WORKDIR/comparison.json, which the report draws.
Interrupted and run again, it continues; what is finished is not done again.

Examples:
  python -m qwen3_jax compare --config=configs/compare.py:tiny --workdir=runs/compared \\
    --init=runs/tiny/distill_off --teacher=runs/tiny/general_rl
"""
import json

from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train


def add_arguments(parser):
  parser.add_argument('--config', default='configs/compare.py:tiny', metavar='FILE:ARG',
                      help='the ways, the prompts, the seeds')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='a folder for each way and seed goes here')
  parser.add_argument('--init', metavar='DIR', help='the student that all ways start from')
  parser.add_argument('--teacher', metavar='DIR', help='of the ways that have one')


def main(args):
  config = configs.load_given(args)
  with config.unlocked():
    config.init = args.init or config.init
    config.teacher = args.teacher or config.teacher
  return compare(config, epath.Path(args.workdir).resolve())


def compare(config, workdir):
  """Trains and measures what is not there yet, then tabulates; returns the exit code."""
  from qwen3_jax.evaluation import comparison
  from qwen3_jax.stages import load, recipe
  if not config.init or not config.teacher:
    raise ValueError('a comparison starts from a student and asks a teacher: give them with '
                     '--init=DIR and --teacher=DIR')
  _, init = load.find(config.init)
  spec = recipe.read_spec(config.init)
  ways = {config.start: [(measured(config, init, workdir / 'start'), None)]}
  for name, file, settings in config.ways:
    ways[name] = []
    for seed in config.seeds:
      folder = workdir / f'{epath.Path(file.partition(":")[0]).stem}_{seed}'
      print(f'\n== {name}, seed {seed}', flush=True)
      way = configure(config, spec, file, settings, seed)
      if code := train.train(way, folder):
        return code
      ways[name].append((measured(config, folder, folder), folder))
  prompts = ', '.join(name for name, _ in config.sources)
  found = comparison.tabulate(ways, dict(folder=str(init), parameters=spec.parameters()), prompts)
  write(found, workdir / 'comparison.json')
  print('\n' + '\n'.join(comparison.describe(found)))
  return 0


def configure(config, spec, file, settings, seed):
  """The config of one way: its own file on the common student, prompts and held-out prompts."""
  import dataclasses
  way = configs.load_config(file, [f'--config.{each}' for each in settings])
  with way.unlocked():
    own = dataclasses.asdict(spec)
    way.model.update({key: own[key] for key in way.model if key not in ('mlp_only', 'stop_ids')})
    way.init, way.seed = config.init, seed
    way.data.sources, way.data.heldout = config.sources, config.heldout
    if 'teacher' in way:
      way.teacher = config.teacher
  return way


def measured(config, model, folder):
  """The marks of `model`, kept in `folder`/marks.json."""
  from qwen3_jax.evaluation import comparison
  path = folder / 'marks.json'
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write(comparison.mark(model, **config.measure), path)
  return json.loads(path.read_text())


def write(value, path):
  """Writes JSON whole or not at all."""
  new = path.parent / f'{path.name}.new'
  new.write_text(json.dumps(value, indent=1))
  new.replace(path)
