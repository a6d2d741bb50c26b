"""Runs the stages in order, each from the weights that the plan says, and writes a report.

Everything is kept in the workdir, a folder for each stage. Interrupted at any moment and run again,
it continues; what is finished is not done again. After every stage its model writes samples and,
where the stage's config says how, is measured in both modes. --config.seed=1 sets the seed of all
stages; --set s1.steps=500 sets one field of one stage.

Examples:
  python -m qwen3_jax recipe --config=configs/recipe.py:tiny --workdir=runs/tiny
  python -m qwen3_jax recipe --config=configs/recipe.py:tiny --workdir=runs/tiny --until=s1
  python -m qwen3_jax recipe --config=configs/recipe.py:tiny,compare --workdir=runs/tiny
  python -m qwen3_jax recipe --config=configs/recipe.py:8b --workdir=runs/8b --dry-run
  python -m qwen3_jax recipe --config=configs/recipe.py:0.6b --workdir=runs/post \\
    --from=cold_start --init=Qwen3-0.6B-Base
"""
import contextlib
import json
import math
import sys
import time

from etils import epath

from qwen3_jax.commands import compare, evaluate, report, train
from qwen3_jax.commands import config as configs


def add_arguments(parser):
  parser.add_argument('--config', default='configs/recipe.py:tiny', metavar='FILE:ARG',
                      help='the stages and their sizes')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='a folder for each stage goes here')
  parser.add_argument('--from', dest='start', metavar='STAGE', help='begin with this stage')
  parser.add_argument('--init', metavar='DIR', help='what the first stage starts from: a run, a '
                      'recipe or a Hugging Face folder')
  parser.add_argument('--until', metavar='STAGE', help='stop after this stage')
  parser.add_argument('--set', action='append', metavar='STAGE.KEY=VALUE',
                      help='set a field of one stage, e.g. s1.steps=500; may be repeated')
  parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')


def main(args):
  from qwen3_jax.stages import recipe
  config = configs.load_given(args)
  workdir = epath.Path(args.workdir).resolve()
  plan = recipe.make_plan(config, workdir, configs.load_config, args.set or [], args.start,
                          args.until, args.init)
  print('\n'.join(describe(plan)), flush=True)
  if args.dry_run:
    return 0
  for stage in plan:
    if not stage.config.data.sources and not stage.config.get('prepare'):
      raise ValueError(f'{stage.name} has no data: set --set={stage.name}.data.sources="'
                       '((\'FILES\', 1.0),)"')
  recipe.keep(plan, config, workdir)
  begun = time.monotonic()
  for number, stage in enumerate(plan, 1):
    place = f'{stage.name} (stage {number} of {len(plan)})'
    print(f'\n== {place}, {elapsed(begun)} after the start', flush=True)
    with explained(place, stage, workdir):
      with timed(stage.folder, 'train'):
        code = advance(stage)
      if code:
        tell(place, stage, workdir, f'ended with exit code {code}')
        return code
      with timed(stage.folder, 'measure'):
        examine(stage.config, stage.folder)
  if config.compare and plan[-1].name == config.stages[-1][0]:
    print(f'\n== ways on from {config.compare.init}, {elapsed(begun)} after the start', flush=True)
    if code := compare_ways(config.compare, workdir):
      return code
  return finish(plan, workdir, begun)


def advance(stage):
  """Trains a stage to its last step, unless that one is saved and sound; returns the exit code."""
  from qwen3_jax.training import checkpoint
  saved = checkpoint.steps(stage.folder / 'checkpoints')
  if saved and is_last(stage, saved[-1]) and not checkpoint.find_fault(
      stage.folder / 'checkpoints' / str(saved[-1])):
    train.claim(stage.folder, stage.config)
    print('trained before', flush=True)
    return 0
  return train.train(stage.config, stage.folder)


def compare_ways(given, workdir):
  """Trains and tabulates what else the student of a stage could have learnt from."""
  config = configs.load_config(given.config)
  with config.unlocked():
    config.init, config.teacher = (str(workdir / given[field]) for field in ('init', 'teacher'))
  return compare.compare(config, workdir / 'compared')


def is_last(stage, step):
  """Whether the stage ends with `step`: by its config, or by a held-out loss that was enough."""
  from qwen3_jax.training import metrics
  enough = stage.config.get('stop_loss')
  return step == stage.config.steps or enough is not None and any(
    line['step'] == step and line.get('heldout_loss', math.inf) <= enough
    for line in metrics.read(stage.folder))


def elapsed(begun):
  from qwen3_jax.training.metrics import format_seconds
  return format_seconds(time.monotonic() - begun)


@contextlib.contextmanager
def explained(place, stage, workdir):
  """Says on the screen how to go on where what runs within raises."""
  try:
    yield
  except KeyboardInterrupt:
    tell(place, stage, workdir, 'was interrupted')
    raise
  except Exception as error:
    tell(place, stage, workdir, f'failed ({type(error).__name__})')
    raise


def tell(place, stage, workdir, what):
  print(f'\n{place} {what}. What is finished is kept in {workdir}: the same command goes on from '
        f'there. Fields that may differ then (steps, say): --set={stage.name}.KEY=VALUE. To begin '
        f'this stage anew, delete {stage.folder}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(folder, part):
  """Adds the seconds that what runs within takes to `folder`/times.json, over all tries."""
  begun = time.monotonic()
  try:
    yield
  finally:
    path = folder / 'times.json'
    times = json.loads(path.read_text()) if path.exists() else {}
    times[part] = round(times.get(part, 0) + time.monotonic() - begun, 1)
    if folder.exists():
      write(path, times)


def write(path, value):
  """Writes JSON whole or not at all."""
  new = path.parent / f'{path.name}.new'
  new.write_text(json.dumps(value, indent=2))
  new.replace(path)


def examine(config, folder):
  """What the stage's model writes and, where the config says how, what it can do in each mode.

  Done again only where `measure` asks for something else than it did.
  """
  from qwen3_jax.evaluation import samples
  if not (folder / 'samples.json').exists():
    (samples.write if config.method == 'pretrain' else samples.write_chats)(folder)
  wanted, path = config.get('measure'), folder / 'modes.json'
  if not wanted:
    return
  asked = json.loads(wanted.to_json())
  if not path.exists() or json.loads(path.read_text()).get('asked', asked) != asked:
    write(path, evaluate.run(folder, **wanted) | {'asked': asked})


def describe(plan):
  """Lines of the plan: what each stage does, at what cost, and where its parts come from."""
  from qwen3_jax.evaluation.chart import format_number
  from qwen3_jax.stages import load, recipe
  rows, total = [('stage', 'weights', 'RoPE base', 'work', 'tokens', 'FLOPs', 'starts from')], 0
  for stage in plan:
    config, spec = stage.config, load.spec_from(stage.config.model)
    cost = recipe.foresee(config, recipe.teacher_spec(stage, plan))
    sign = '<= ' if config.get('rollout') else ''
    total += cost.flops if cost else 0
    tokens, flops = (sign + format_number(cost.trained), f'{sign}{cost.flops:.2g}') if cost else (
      'by the data', 'by the data')
    rows.append((stage.name, format_number(spec.parameters()), f'{spec.rope_theta:,.0f}',
                 count(config), tokens, flops, '; '.join(origins(stage))))
  wide = [max(map(len, column)) for column in zip(*rows)]
  lines = ['  '.join(f'{cell:<{w}}' for cell, w in zip(row, wide)).rstrip() for row in rows]
  more = ', stages that go by their data' if any('by the data' in row for row in rows) else ''
  return lines + [f'together at most {total:.2g} FLOPs; not counted: making data, measuring{more}']


def origins(stage):
  """Where a stage's weights, teacher, data and other parts come from."""
  yield stage.origins.get('init') or stage.config.init or 'random weights'
  if stage.config.get('teacher'):
    yield f'teacher {stage.origins.get("teacher") or stage.config.teacher}'
  if stage.config.get('prepare'):
    yield f'data made by {stage.config.prepare.by}'
  for field, source in stage.origins.items():
    if field not in ('init', 'teacher'):
      yield f'{field} of {source}'


def count(config):
  """How much a stage does, in words."""
  data, rollout = config.data, config.get('rollout')
  if not config.steps:
    return f'{config.epochs} epochs in rows of {data.length:,}'
  if not rollout:
    return f'{config.steps:,} steps x {data.batch} x {data.length:,}'
  rollouts = -(-config.steps // rollout.get('updates', 1))
  return (f'{config.steps:,} updates, {rollouts:,} rollouts of {rollout.prompts:,} x '
          f'{rollout.get("samples", 1)}')


def finish(plan, workdir, begun):
  """The long-context probe, the report, and a summary on the screen."""
  from qwen3_jax.stages import load
  from qwen3_jax.training import metrics
  write_probes(plan, workdir)
  specs = {stage.name: load.spec_from(stage.config.model) for stage in plan}
  first, last = (specs[stage.name] for stage in (plan[0], plan[-1]))
  facts = {'Parameters': f'{first.parameters():,}', 'Layers': first.layers, 'Width': first.width}
  if last.parameters() != first.parameters():
    facts['Parameters of the student'] = f'{last.parameters():,}'
  write(workdir / 'facts.json', facts)
  print('\nheld-out loss by stage (text, then conversations), or reward')
  for stage in plan:
    lines = metrics.read(stage.folder)
    heldout = [line['heldout_loss'] for line in lines if 'heldout_loss' in line]
    seconds = sum(line['seconds'] for line in lines)
    if heldout:
      print(f'  {stage.name}: {heldout[0]:.3f} -> {heldout[-1]:.3f} nats a token, {seconds:.0f} s')
    rewards = [line for line in lines if line.get('heldout_reward') is not None]
    if rewards:
      first, last = ('{heldout_reward:.3f} ({heldout_reward_low:.3f} to {heldout_reward_high:.3f})'
                     .format(**line) for line in (rewards[0], rewards[-1]))
      print(f'  {stage.name}: held-out reward {first} -> {last}, {seconds:.0f} s')
    show(stage.folder)
  for sample in json.loads((plan[-1].folder / 'samples.json').read_text())[:2]:
    print(f'\n{sample["heading"]}: {sample["prompt"]}\n{sample["completion"][:400]}')
  print(f'\nall {len(plan)} stages done, {elapsed(begun)} after the start')
  print(f'report: {report.write(workdir)}')
  raw = '--raw ' if plan[-1].config.method == 'pretrain' else ''
  print(f'talk to it: python -m qwen3_jax chat {raw}--model={workdir}')
  return 0


def show(folder):
  """Prints what was measured of a stage beside its loss."""
  from qwen3_jax.evaluation.modes import describe
  if (folder / 'probe.json').exists():
    beyond = json.loads((folder / 'probe.json').read_text())
    for name, loss in beyond['beyond'].items():
      print(f'    beyond position {beyond["old_length"]}, {name}: {loss:.3f}')
  if (folder / 'modes.json').exists():
    measured = json.loads((folder / 'modes.json').read_text())
    for name, part in (('thinking', 'right when thinking'), ('plain', 'right without thinking'),
                       ('following', 'last flag obeyed')):
      if measured.get(name):
        print(f'    {part}: {describe(measured[name])}')


def write_probes(plan, workdir):
  """Loss by position on long held-out rows, before and after each stage that lengthens them."""
  import jax.numpy as jnp

  from qwen3_jax.evaluation import probe
  from qwen3_jax.stages import load
  pretrained = {str(stage.folder): stage for stage in plan if stage.config.method == 'pretrain'}
  for after in pretrained.values():
    before, path = pretrained.get(after.config.init), after.folder / 'probe.json'
    if not before or path.exists() or after.config.data.length <= before.config.data.length:
      continue
    tokenizer, new = load.load_model(after.folder)[1], after.config.data.length
    batches = probe.long_batches(after.config.data.heldout[0], tokenizer, 4, new, 16)
    models = {f'{when} {after.name.upper()}': load.load(stage.folder, dtype=jnp.float32)
              for when, stage in (('before', before), ('after', after))}
    write(path, probe.probe(models, batches, before.config.data.length))
