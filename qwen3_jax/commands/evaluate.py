"""Measures a model in both modes on generated problems: accuracy, obedience to flags, budgets.

Problems are drawn from the held-out part of --tasks, which no training source contains. Thinking is
sampled as the Qwen3 report does it (temperature 0.6, top-p 0.95, top-k 20), the rest at 0.7 and
0.8; each accuracy has its 95 % interval. The result is shown, and written as JSON where --to says.

Examples:
  python -m qwen3_jax evaluate --model=runs/tiny --tasks=tasks:kinds=chain+coin+compass,difficulty=1
  python -m qwen3_jax evaluate --model=Qwen3-0.6B --count=200 --budgets=0,128,512 --to=modes.json
"""
import json

from etils import epath


def add_arguments(parser):
  parser.add_argument('--model', required=True, metavar='DIR',
                      help='a run, a recipe or a Hugging Face folder')
  parser.add_argument('--tasks', default='tasks', metavar='tasks:OPTIONS',
                      help='kinds=A+B,difficulty=1-5,seed=0: which problems')
  parser.add_argument('--count', type=int, default=256, help='problems')
  parser.add_argument('--flags', type=int, default=128,
                      help='conversations with /think and /no_think; 0 for none')
  parser.add_argument('--budgets', default='', metavar='N,N',
                      help='thinking tokens, each tried on all problems')
  parser.add_argument('--max-tokens', type=int, default=4096, help='of an answer')
  parser.add_argument('--rows', type=int, default=64, help='problems answered at once')
  parser.add_argument('--to', metavar='FILE', help='write the result here, as JSON')


def main(args):
  try:
    budgets = [int(budget) for budget in args.budgets.split(',') if budget]
  except ValueError:
    raise ValueError(f'--budgets={args.budgets}: want whole numbers with commas, e.g. 0,128,512'
                     ) from None
  if args.count < 1 or min([0, *budgets]) < 0 or args.flags < 0:
    raise ValueError('--count must be at least 1, --budgets and --flags not negative')
  result = run(args.model, args.tasks, args.count, args.flags, budgets, args.max_tokens, args.rows)
  if args.to:
    write(result, epath.Path(args.to))


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
