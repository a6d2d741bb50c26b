"""Says whether a stage fits a TPU slice, how fast it can be at best, and why, before you pay.

The stage's own programs are compiled by the real TPU compiler, here, on any x86 Linux host (pip
install 'jax[tpu]'): their memory, collectives and FLOPs are not estimates. Times are a roofline at
published peaks, not a measurement. What cannot fit by arithmetic is refused without compiling.

Examples:
  python -m qwen3_jax plan --config=configs/s1.py:8b --topology=v5p:4x4x2 --config.data.batch=128
  python -m qwen3_jax plan --config=configs/reasoning_rl.py:30b-a3b --topology=v5p:4x4x4
  python -m qwen3_jax plan --config=configs/s1.py:8b --topology=v5p:4x4x4 --search
  python -m qwen3_jax plan --config=configs/s1.py:0.6b --topology=v6e:8x8 --json
"""
import json
import os
import sys

from qwen3_jax.commands import config as configs

NO_ROOM = 3


def add_arguments(parser):
  parser.add_argument('--config', required=True, metavar='FILE:ARG', help='e.g. configs/s1.py:8b')
  parser.add_argument('--topology', required=True, metavar='GENERATION:GRID',
                      help='of one slice, in chips: v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4')
  parser.add_argument('--slices', type=int, default=1, help='of that topology, joined by DCN')
  parser.add_argument('--teacher', metavar='SIZE', help='of distillation, e.g. 32b')
  parser.add_argument('--price', type=float, metavar='X', help='of a chip-hour')
  parser.add_argument('--search', type=int, nargs='?', const=3, metavar='N',
                      help='find mesh, recomputation and micro-batches: compile the N best of all '
                      'that seem to fit (default: 3), and print what to set')
  parser.add_argument('--json', action='store_true', help='print JSON instead of text')


def main(args):
  config = configs.load_given(args)
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
                 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  from qwen3_jax.scaling import chips, plan
  _, chip = chips.find(args.topology)
  if args.search:
    found = search(config, args)
  else:
    found = plan.run(config, args.topology, args.slices, args.teacher, say)
  count = args.slices
  for side in args.topology.partition(':')[2].split('x'):
    count *= int(side)
  if args.json:
    print(json.dumps([plan.as_json(each) for each in found], indent=1))
  else:
    rows = config.data.batch * config.data.length
    for each in found:
      budget = config.steps * rows if config.steps and each.name == 'update' else None
      print('\n'.join(plan.describe(each, chip, budget, count * chip.devices, args.price)))
  return 0 if all(each.fits for each in found) else NO_ROOM


def say(text):
  print(text, file=sys.stderr, flush=True)


def search(config, args):
  """The best settings' estimate; what to set is printed."""
  from qwen3_jax.scaling import search
  if config.method not in ('pretrain', 'sft'):
    raise ValueError(f'--search knows pretraining and fine-tuning, not {config.method}')
  tried = search.search(config, args.topology, args.slices, args.search, say)
  for choice, each in tried:
    verdict = 'fits' if each.fits else 'too large'
    say(f'{each.hbm / 2**30:6.1f} GiB {each.seconds:8.3f} s {verdict:9} '
        + ' '.join(choice.overrides))
  choice, best = tried[0]
  if not args.json:
    print(' '.join(choice.overrides))
  return [best]
