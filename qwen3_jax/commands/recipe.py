"""Runs the stages in order, each from the weights of the one before, and writes a report.

Everything is kept in the workdir, a folder for each stage. Interrupted at any moment and run again,
it continues; what is finished is not done again. --config.seed=1 sets the seed of all stages;
--set s1.steps=500 sets one field of one stage.

Examples:
  python -m qwen3_jax recipe --config=configs/recipe.py:tiny --workdir=runs/tiny
  python -m qwen3_jax recipe --config=configs/recipe.py:tiny --workdir=runs/tiny --until=s1
  python -m qwen3_jax recipe --config=configs/recipe.py:8b --workdir=runs/8b --dry-run
"""
import json

from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import evaluate, report, train


def add_arguments(parser):
  parser.add_argument('--config', default='configs/recipe.py:tiny', metavar='FILE:ARG',
                      help='the stages and their sizes')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='a folder for each stage goes here')
  parser.add_argument('--until', metavar='STAGE', help='stop after this stage')
  parser.add_argument('--set', action='append', metavar='STAGE.KEY=VALUE',
                      help='set a field of one stage, e.g. s1.steps=500; may be repeated')
  parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')


def main(args):
  recipe = configs.load_given(args)
  workdir = epath.Path(args.workdir).resolve()
  plan = make_plan(recipe, workdir, args.set or [], args.until)
  describe(plan)
  if args.dry_run:
    return 0
  for name, config in plan:
    if not config.data.sources and not config.get('prepare'):
      raise ValueError(f'{name} has no data: set --set={name}.data.sources="((\'FILES\', 1.0),)"')
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'recipe.json').write_text(json.dumps([name for name, _ in plan]))
  for name, config in plan:
    print(f'\n== {name}', flush=True)
    code = train.train(config, workdir / name)
    if code:
      return code
    examine(config, workdir / name)
  return finish(plan, workdir)


def examine(config, folder):
  """What the stage's model writes and, where the config says how, what it can do in each mode."""
  from qwen3_jax.evaluation import samples
  if not (folder / 'samples.json').exists():
    (samples.write if config.method == 'pretrain' else samples.write_chats)(folder)
  wanted, path = config.get('measure'), folder / 'modes.json'
  if wanted and not path.exists():
    evaluate.write(evaluate.run(folder, **wanted), path)


def make_plan(recipe, workdir, settings, until):
  """[(stage, its config)], each initialised from the one before."""
  names = [name for name, _ in recipe.stages]
  for setting in settings:
    if setting.partition('.')[0] not in names:
      raise ValueError(f'--set {setting}: no such stage; there are {", ".join(names)}')
  if until and until not in names:
    raise ValueError(f'--until {until}: no such stage; there are {", ".join(names)}')
  plan = []
  for name, file in recipe.stages:
    own = [f'--config.{s.removeprefix(name + ".")}' for s in settings if s.startswith(f'{name}.')]
    config = configs.load_config(file, own)
    with config.unlocked():
      config.seed = recipe.seed + len(plan)  # else every stage would read the same documents
      config.init = config.init or (str(workdir / plan[-1][0]) if plan else None)
    plan.append((name, config))
    if name == until:
      break
  return plan


def describe(plan):
  """Prints the plan: tokens, FLOPs and where each stage's weights come from."""
  from qwen3_jax.stages import load
  spec = load.spec_from(plan[0][1].model)
  print(f'model: {spec.layers} layers, width {spec.width}, {spec.parameters():,} parameters'
        + (f' ({spec.parameters(active=True):,} active)' if spec.experts else ''))
  width = max(len(name) for name, _ in plan)
  for name, config in plan:
    made = f', data made by {config.prepare.by}' if config.get('prepare') else ''
    print(f'{name:>{width}}: {count(config)}{made}, RoPE base {config.model.rope_theta:,.0f}, from '
          f'{config.init or "random weights"}')


def count(config):
  """How much a stage does, in words."""
  from qwen3_jax.stages import load
  spec, data = load.spec_from(config.model), config.data
  if config.method == 'rl':
    r = config.rollout
    return (f'{config.steps:,} updates on {-(-config.steps // r.updates):,} rollouts of '
            f'{r.prompts:,} prompts x {r.samples} answers')
  tokens = (config.steps or 0) * data.batch * data.length
  if not tokens:
    return (f'{config.epochs} epochs of {data.sources or "data.sources, not set yet"} in rows of '
            f'{data.length:,}')
  flops = tokens * spec.flops_per_token(data.length)
  return (f'{config.steps:,} steps x {data.batch} x {data.length:,} = {tokens:,} tokens, '
          f'{flops:.2g} FLOPs')


def finish(plan, workdir):
  """The long-context probe, the report, and a summary on the screen."""
  from qwen3_jax.stages import load
  from qwen3_jax.training import metrics
  for before, after in zip(plan, plan[1:]):
    if after[1].method == 'pretrain' and not (workdir / after[0] / 'probe.json').exists():
      write_probe(before, after, workdir)
  spec = load.spec_from(plan[-1][1].model)
  (workdir / 'facts.json').write_text(json.dumps({
      'Parameters': f'{spec.parameters():,}', 'Layers': spec.layers, 'Width': spec.width}))
  print('\nheld-out loss by stage (text, then conversations), or reward')
  for name, _ in plan:
    lines = metrics.read(workdir / name)
    heldout = [line['heldout_loss'] for line in lines if 'heldout_loss' in line]
    seconds = sum(line['seconds'] for line in lines)
    if heldout:
      print(f'  {name}: {heldout[0]:.3f} -> {heldout[-1]:.3f} nats a token, {seconds:.0f} s')
    rewards = [line for line in lines if line.get('heldout_reward') is not None]
    if rewards:
      first, last = ('{heldout_reward:.3f} ({heldout_reward_low:.3f} to {heldout_reward_high:.3f})'
                     .format(**line) for line in (rewards[0], rewards[-1]))
      print(f'  {name}: held-out reward {first} -> {last}, {seconds:.0f} s')
    show(workdir / name)
  for sample in json.loads((workdir / plan[-1][0] / 'samples.json').read_text())[:2]:
    print(f'\n{sample["heading"]}: {sample["prompt"]}\n{sample["completion"][:400]}')
  print(f'\nreport: {report.write(workdir)}')
  raw = '--raw ' if plan[-1][1].method == 'pretrain' else ''
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


def write_probe(before, after, workdir):
  """Loss by position on long held-out rows, of the models before and after the longer stage."""
  import jax.numpy as jnp

  from qwen3_jax.evaluation import probe
  from qwen3_jax.stages import load
  old, new = before[1].data.length, after[1].data.length
  if new <= old:
    return
  tokenizer = load.load_model(workdir / after[0])[1]
  batches = probe.long_batches(after[1].data.heldout[0], tokenizer, 4, new, 16)
  models = {f'{when} {after[0].upper()}': load.load(workdir / name, dtype=jnp.float32)
            for when, name in (('before', before[0]), ('after', after[0]))}
  (workdir / after[0] / 'probe.json').write_text(json.dumps(probe.probe(models, batches, old)))
