"""Measures models on benchmarks and generated problems, in both modes and with thinking budgets.

Benchmarks are files of yours: --list names them, and says where each is had. Answers are sampled as
the Qwen3 report does it (thinking: temperature 0.6, top-p 0.95, top-k 20; else 0.7, 0.8, 20 and a
presence penalty of 1.5). Every answer is kept with its score below --to; what is there is never
generated again, so an interrupted evaluation goes on where it was, and more models, samples or
benchmarks join the same table (index.html, table.md, table.json). Every rate has its 95 % interval;
several --samples a question give pass@k and maj@k.

With --tasks=tasks:... for one model, and --to left out or a .json file, generated problems are
measured without keeping answers; obedience to /think and /no_think then too.

Examples:
  python -m qwen3_jax evaluate --list
  python -m qwen3_jax evaluate --model=Qwen3-0.6B --tasks=gsm8k,math --data=DIR --limit=200
  python -m qwen3_jax evaluate --model=A,B --tasks=aime24 --data=DIR --samples=16 --to=runs/aime
  python -m qwen3_jax evaluate --tasks=gsm8k,math --data=DIR --rescore
  python -m qwen3_jax evaluate --model=runs/tiny --tasks=tasks:kinds=chain+coin+compass,difficulty=1
  python -m qwen3_jax evaluate --model=Qwen3-0.6B --limit=200 --budgets=0,128,512 --to=modes.json
"""
import json

from etils import epath

KEPT = 'runs/evaluation'  # where answers are kept if --to says nothing
QUICK = dict(limit=256, max_tokens=4096)  # of generated problems whose answers are not kept


def add_arguments(parser):
  parser.add_argument('--model', metavar='DIR,DIR',
                      help='runs, recipes or Hugging Face folders')
  parser.add_argument('--tasks', default='tasks', metavar='NAME,NAME',
                      help='benchmarks (see --list), or tasks:kinds=A+B,difficulty=1-5,seed=0')
  parser.add_argument('--data', metavar='DIR', help="folder of the benchmarks' files, or one file")
  parser.add_argument('--to', metavar='DIR',
                      help=f'where answers and tables go ({KEPT} if absent)')
  parser.add_argument('--modes', default='thinking,plain', metavar='MODE,MODE')
  parser.add_argument('--samples', type=int, metavar='N',
                      help='answers to each question (if absent as the report: 64 of AIME, else 1)')
  parser.add_argument('--limit', '--count', type=int, metavar='N',
                      help='questions of each benchmark, evenly spaced')
  parser.add_argument('--budgets', default='', metavar='N,N',
                      help='thinking tokens, each tried on all questions')
  parser.add_argument('--max-tokens', type=int, metavar='N',
                      help='of an answer (if absent as the report: 32,768, AIME 38,912)')
  parser.add_argument('--flags', type=int, default=128,
                      help='conversations with /think and /no_think, where answers are not kept')
  parser.add_argument('--rows', type=int, default=64, help='questions answered at once')
  parser.add_argument('--seed', type=int, default=0, help='of the draws')
  parser.add_argument('--judge', metavar='DIR|URL', help='a model for questions that want a judge')
  parser.add_argument('--rescore', action='store_true',
                      help='score what is kept anew, without a model')
  parser.add_argument('--list', action='store_true', help='say what benchmarks there are')


def main(args):
  budgets, models = read_budgets(args.budgets), [each for each in (args.model or '').split(',')
                                                 if each]
  for name in ('limit', 'samples', 'max_tokens', 'rows'):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise ValueError(f'--{name.replace("_", "-")} must be at least 1')
  if args.flags < 0:
    raise ValueError('--flags must not be negative')
  if args.list:
    from qwen3_jax.evaluation import benchmarks
    print(benchmarks.describe())
    return
  if not models and not args.rescore:
    raise ValueError('--model=DIR is missing: a run, a recipe or a Hugging Face folder')
  tasks = split_tasks(args.tasks)
  if is_quick(args, tasks, models):
    result = run(models[0], tasks[0], args.limit or QUICK['limit'], args.flags, budgets,
                 args.max_tokens or QUICK['max_tokens'], args.rows)
    if args.to:
      write(result, epath.Path(args.to))
  else:
    keep(args, tasks, models, budgets)


def read_budgets(text):
  try:
    budgets = [int(budget) for budget in text.split(',') if budget]
  except ValueError:
    raise ValueError(f'--budgets={text}: want whole numbers with commas, e.g. 0,128,512') from None
  if min([0, *budgets]) < 0:
    raise ValueError(f'--budgets={text}: want 0 or more')
  return budgets


def split_tasks(text):
  """['gsm8k', 'tasks:kinds=chain,difficulty=1']: commas also separate the options of generators."""
  found = []
  for part in filter(None, text.split(',')):
    if '=' in part and ':' not in part and found:
      found[-1] += f',{part}'
    else:
      found.append(part)
  return found


def is_quick(args, tasks, models):
  """Whether generated problems are measured without keeping the answers."""
  alone = len(tasks) == len(models) == 1 and tasks[0].partition(':')[0] == 'tasks'
  return alone and not args.samples and not args.rescore and (
    not args.to or args.to.endswith('.json'))


def keep(args, tasks, models, budgets):
  """Evaluates the models on benchmarks, or scores anew; shows and writes the table."""
  from rich.console import Console

  from qwen3_jax.evaluation import benchmarks, compare
  from qwen3_jax.evaluation import run as runner
  from qwen3_jax.evaluation.board import Board
  from qwen3_jax.stages import load
  console, to = Console(soft_wrap=True, highlight=False), epath.Path(args.to or KEPT)
  if to.suffix == '.json':
    raise ValueError(f'--to={to}: want a folder, in which answers and tables are kept')
  for model in models:
    load.find(model)
  opened = [benchmarks.open_benchmark(name, args.data, args.limit) for name in tasks]
  asks = runner.make_asks(opened, [mode for mode in args.modes.split(',') if mode], args.samples,
                          budgets, args.max_tokens, args.seed)
  try:
    router = benchmarks.open_router(opened, args.judge)
  except RuntimeError as error:
    raise ValueError(f'{error}. Nothing was run: benchmarks of code need the sandbox') from error
  try:
    if args.rescore:
      rescore(runner.rescore(opened, to, router), console)
    for model in models:
      console.print(f'== {model}')
      with Board(console) as board:
        runner.evaluate(model, asks, to, rows=args.rows, router=router, mesh=make_mesh(),
                        progress=board)
  except KeyboardInterrupt:
    console.print(f'\ninterrupted; what was answered is in {to}, the same command goes on from it')
    raise
  finally:
    router.close()
  show(compare.write(to), console)
  console.print(f'{to}/index.html, table.md, table.json')


def rescore(parts, console):
  for part in parts:
    changed = f'{part["changed"]} scores changed' if part['changed'] else 'all scores as kept'
    console.print(f'{part["model"]}, {part["part"]}: {part["count"]} answers, {changed}')


def make_mesh():
  """Rows and weights over all chips where there are several; None on CPU."""
  import jax

  from qwen3_jax import mesh
  devices = jax.local_devices()
  return mesh.make_mesh(devices=devices) if (
    len(devices) > 1 and jax.default_backend() != 'cpu') else None


def show(table, console):
  """The table in the terminal."""
  import rich.table

  from qwen3_jax.evaluation import compare
  columns, rows = compare.tabulate(table)
  shown = rich.table.Table(title='Shares in per cent, with 95 % intervals', title_justify='left')
  for i, column in enumerate(columns):
    shown.add_column(column, justify='left' if i < 3 else 'right', overflow='fold')
  for row in rows:
    shown.add_row(*row)
  console.print(shown)


def run(model, tasks, count, flags, budgets, max_tokens, rows=64, plain_penalty=1.5):
  """The result of `modes.measure`, shown as it comes."""
  import dataclasses

  import jax
  import jax.numpy as jnp

  from qwen3_jax.data import sources
  from qwen3_jax.evaluation import modes
  from qwen3_jax.generation.sampling import NON_THINKING, THINKING
  from qwen3_jax.stages import load
  if not tasks.startswith('tasks'):
    raise ValueError(f'{tasks!r}: want tasks, or tasks:kinds=...,difficulty=...')
  source = sources.open_source(tasks, 'heldout')
  dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
  opened, tokenizer = load.load_model(model, dtype=dtype)
  sampling = {True: dataclasses.replace(THINKING, max_tokens=max_tokens),
              False: dataclasses.replace(NON_THINKING, max_tokens=max_tokens,
                                         presence_penalty=plain_penalty)}
  return modes.measure(opened, tokenizer, source, count, sampling, budgets, flags, rows,
                       lambda text: print(f'  {text}', flush=True))


def write(result, path):
  """Writes the result whole or not at all."""
  new = path.parent / f'{path.name}.new'
  new.write_text(json.dumps(result, indent=2))
  new.replace(path)
