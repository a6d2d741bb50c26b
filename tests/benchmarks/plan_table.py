"""Writes the table of launch/README.md: every size on the smallest slice that fits, stage S1.

By the planner's arithmetic (`scaling.search.candidates`); those in COMPILED by the TPU compiler,
which takes minutes each the first time (verdicts are kept, as those of `python -m qwen3_jax plan`).
Nothing runs on a TPU.

  python tests/benchmarks/plan_table.py --write
"""
import argparse
import math
import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from launch import shapes  # noqa: E402
from qwen3_jax.commands import compiled  # noqa: E402
from qwen3_jax.commands import config as configs  # noqa: E402
from qwen3_jax.commands import plan as command  # noqa: E402

os.environ |= command.ALONE  # before JAX is imported

from qwen3_jax.scaling import chips, describe, plan, search  # noqa: E402

README = REPO / 'launch/README.md'
BEGIN, END = '<!-- plans -->', '<!-- end of plans -->'
SIZES = '0.6b', '1.7b', '4b', '8b', '14b', '32b', '30b-a3b', '235b-a22b'
GENERATIONS = 'v5e', 'v5p', 'v6e'
COMPILED = ('1.7b', 'v6e'),


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--write', action='store_true', help=f'into {README.name}')
  args = parser.parse_args()
  text = '\n'.join(table())
  print(text)
  if args.write:
    head, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f'{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}')


def table():
  """Markdown lines."""
  yield '| size | slice | settings | GiB of HBM | s a step | days | chip-hours |'
  yield '|---|---|---|---|---|---|---|'
  for size in SIZES:
    for generation in GENERATIONS:
      yield row(size, generation)
  yield ''
  yield f'**Compiled** by {describe.versions()}; all others by arithmetic.'


def row(size, generation):
  """A line: the smallest slice that fits, and what it takes."""
  config = configs.load_config(f'configs/s1.py:{size}')
  topology, choice = smallest(config, generation)
  if choice is None:
    return f'| {size} | no slice of {generation}: take several, or another chip | | | | | |'
  hbm, seconds, mark = choice.bytes, choice.seconds, ''
  if (size, generation) in COMPILED:
    (found,) = plan.run(choice.apply(config), topology, say=say,
                        folder=compiled.cache_folder() / 'plans')
    hbm, seconds, mark = found.hbm, found.seconds, '**'
  room = chips.CHIPS[generation].usable / plan.GIB
  hours = seconds * config.steps / 3600
  settings = [f'{axis} {count}' for axis, count in choice.mesh if count > 1]
  settings += [choice.remat, f'{choice.micro_batches} micro-batches']
  return (f'| {size} | {topology} | {", ".join(settings)} | {mark}{hbm / plan.GIB:.1f}{mark} of '
          f'{room:.1f} | {mark}{seconds:.2f}{mark} | {hours / 24:,.0f} | '
          f'{hours * chips.count(topology):,.0f} |')


def smallest(config, generation):
  """(topology, the best Choice) of the slice with the fewest chips on which anything fits; or None.
  """
  known = shapes.GENERATIONS[generation]
  for shape in sorted((*known.hosts, *known.shapes), key=math.prod):
    topology = f'{generation}:{"x".join(map(str, shape))}'
    if found := search.candidates(config, topology, chips.count(topology)):
      return topology, found[0]
  return None, None


def say(text):
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  main()
