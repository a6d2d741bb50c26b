"""Kills a recipe once in every stage with SIGKILL, and compares what it ends with to a whole run.

python tests/benchmarks/kill_recipe.py --whole runs/tiny --killed /tmp/killed [ARGUMENTS OF recipe]
The run in --whole is made first where it is not finished. Every stage of the other is killed at a
moment drawn for it, once so many of its updates are written; the same command then goes on. Printed
are the moments, and which of the final figures differ: none should, bit for bit, on one machine.
"""
import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time


def command(workdir, arguments):
  return [sys.executable, '-m', 'qwen3_jax', 'recipe', f'--workdir={workdir}', *arguments]


def count(folder):
  """Updates that a stage has written down."""
  path = folder / 'metrics.jsonl'
  return len({json.loads(line)['step'] for line in path.read_text().splitlines()
              if line.endswith('}')}) if path.exists() else 0


def kill_in(stage, moment, workdir, arguments):
  """Runs the recipe until `stage` has made `moment` updates; then it dies with all its children."""
  with subprocess.Popen(command(workdir, arguments), stdout=subprocess.DEVNULL,
                        start_new_session=True) as process:
    while process.poll() is None and count(workdir / stage) < moment:
      time.sleep(0.05)
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      print(f'{stage}: killed after {count(workdir / stage)} updates', flush=True)
    else:
      print(f'{stage}: ended before update {moment}', flush=True)


def results(workdir, stages):
  """The figures that a recipe ends with: of each stage its measurements and its last update."""
  found = {}
  for stage in stages:
    lines = {}
    for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines():
      line = json.loads(line)
      lines.setdefault(line['step'], {}).update(line)
    last = lines[max(lines)]
    found[stage] = {key: value for key, value in last.items() if key == 'loss' or 'heldout' in key}
    for name in ('modes.json', 'samples.json', 'probe.json'):
      path = workdir / stage / name
      if path.exists():
        found[stage][name] = json.loads(path.read_text())
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--whole', required=True, type=pathlib.Path)
  parser.add_argument('--killed', required=True, type=pathlib.Path)
  parser.add_argument('--seed', type=int, default=0)
  args, rest = parser.parse_known_args()
  subprocess.run(command(args.whole, rest), check=True, stdout=subprocess.DEVNULL)
  stages = [stage for stage in json.loads((args.whole / 'recipe.json').read_text())
            if (args.whole / stage).exists()]
  draw = random.Random(args.seed)
  for stage in stages:
    moment = draw.randint(1, max(1, count(args.whole / stage) - 1))
    kill_in(stage, moment, args.killed, rest)
  subprocess.run(command(args.killed, rest), check=True, stdout=subprocess.DEVNULL)
  one, other = (results(folder, stages) for folder in (args.whole, args.killed))
  for stage in stages:
    differing = [key for key in one[stage] if one[stage][key] != other[stage].get(key)]
    print(f'{stage}: {len(one[stage])} figures, '
          + (f'other: {", ".join(differing)}' if differing else 'all the same'), flush=True)
  sys.exit(one != other)


if __name__ == '__main__':
  main()
