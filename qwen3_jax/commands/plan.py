"""Says whether a stage fits a TPU slice, how fast it can be at best, and why, before you pay.

The stage's own programs are compiled by the real TPU compiler, here, on any x86 Linux host (pip
install 'jax[tpu]'): their memory, collectives and FLOPs are not estimates. Times are a roofline,
not a measurement: its assumptions are printed with it. What cannot fit by arithmetic is refused
without compiling. What was compiled once is kept in ~/.cache/qwen3_jax (or $QWEN3_JAX_CACHE).

Exit codes: 0 it fits; 3 it does not; 2 it cannot be, or is asked for wrongly; 78 the config cannot
be read.

Examples:
  python -m qwen3_jax plan --config=configs/s1.py:8b --topology=v5p:4x4x2 --config.data.batch=128
  python -m qwen3_jax plan --config=configs/reasoning_rl.py:30b-a3b --topology=v5p:4x4x4
  python -m qwen3_jax plan --config=configs/s1.py:8b --topology=v5p:4x4x4 --search
  python -m qwen3_jax plan --config=configs/s1.py:8b --topology=v5e:16x16 --slices=2 --price=1.2
  python -m qwen3_jax plan --config=configs/s1.py:0.6b --topology=v6e:8x8 --json
"""
import json
import os
import sys

from qwen3_jax.commands import compiled
from qwen3_jax.commands import config as configs
from qwen3_jax.scaling import chips, flags

NO_ROOM = 3
INTERRUPTED = 130
ALONE = {  # the compiler without a TPU: nothing is asked of a cloud, nor complained about
  'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5p-8',
  # JAX cannot read back what it keeps of these; `verdict` does, whatever line a kernel stands in.
  'JAX_ENABLE_COMPILATION_CACHE': 'false', 'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0'}


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
  generation, chip = chips.find(args.topology)
  check(config, args)
  os.environ |= ALONE
  flags.use(config.xla, generation)
  from qwen3_jax.scaling import describe, plan, search
  folder = compiled.cache_folder() / 'plans'
  try:
    if args.search:
      found = find(config, args, folder)
    else:
      found = plan.run(config, args.topology, args.slices, args.teacher, say, folder)
  except KeyboardInterrupt:
    say('stopped; what was compiled before is kept')
    os._exit(INTERRUPTED)  # the compiler's thread cannot be asked to end
  if args.json:
    print(json.dumps([describe.as_json(each) for each in found], indent=1))
  else:
    devices = args.slices * chips.count(args.topology) * chip.devices
    print(f'{args.config} on {args.topology}{f" x {args.slices}" if args.slices > 1 else ""}, '
          f'{devices} devices; {describe.versions()}')
    rows = config.data.batch * config.data.length
    for each in found:
      budget = config.steps * rows if config.steps and each.name == 'update' else None
      print('\n'.join(describe.describe(each, chip, budget, devices, args.price)))
    if not found[0].fits and config.method in ('pretrain', 'sft') and config.lora.rank is None:
      print('  ' + search.advise(config, args.topology, devices, args.slices, found[0]))
    print(f'\n{describe.ASSUMED}')
  return 0 if all(each.fits for each in found) else NO_ROOM


def check(config, args):
  """ValueError for what is asked for in vain."""
  if args.slices < 1:
    raise ValueError(f'--slices is {args.slices}; want at least 1')
  if args.search is not None and args.search < 1:
    raise ValueError(f'--search is {args.search}; want how many settings to compile, at least 1')
  if args.search and config.method not in ('pretrain', 'sft'):
    raise ValueError(f'--search knows pretraining and fine-tuning, not {config.method}')
  if args.teacher and config.method != 'distill':
    raise ValueError(f'--teacher is of distillation, the config is of {config.method}')


def say(text):
  print(text, file=sys.stderr, flush=True)


def find(config, args, folder):
  """The best settings' estimate; all that were tried, and what to set, are printed."""
  from qwen3_jax.scaling import search
  tried = search.search(config, args.topology, args.slices, args.search, say, folder)
  text = '\n'.join(search.tabulate(tried))
  if args.json:
    say(text)
  else:
    print(text, end='\n\n')
  return [tried[0][1]]
