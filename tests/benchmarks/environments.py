"""Episodes a second of each environment, its solutions being played without a model.

  python tests/benchmarks/environments.py [--seconds 2]
"""
import argparse
import time

from qwen3_jax.environments.records import ENVIRONMENTS, Episodes, open_environment, solve


def play(record):
  """The outcome of a record's own solution, and its turns."""
  environment, turns = open_environment(record), 0
  environment.reset(record)
  for message in solve(record):
    environment.step(message)
    turns += 1
  return environment.outcome(), turns


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=2.0, help='for each environment')
  wanted = parser.parse_args().seconds
  for name in ENVIRONMENTS:
    source, count, turns, reward, begin = Episodes([name]), 0, 0, 0.0, time.perf_counter()
    made = 0.0
    while time.perf_counter() - begin - made < wanted:
      before = time.perf_counter()
      record = source[count]
      made += time.perf_counter() - before
      outcome, taken = play(record)
      count, turns, reward = count + 1, turns + taken, reward + outcome['reward']
    spent = time.perf_counter() - begin - made
    print(f'{name:10} {count / spent:9.1f} episodes/s {turns / spent:9.1f} turns/s '
          f'{1e3 * made / count:6.2f} ms to make a record; reward {reward / count:.3f}')


if __name__ == '__main__':
  main()
