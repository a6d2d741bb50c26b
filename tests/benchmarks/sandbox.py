"""Prints what a sandboxed run costs: python tests/benchmarks/sandbox.py [RUNS]

Milliseconds by the clock, one after another and with 2, 3 and 4 threads, of one program and of
judging answers in the three ways. A busy machine shows in them: the load is printed.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qwen3_jax.rewards import code, sandbox  # noqa: E402
from qwen3_jax.rewards.response import Response  # noqa: E402

SOLUTION = Response.read('```python\ndef f(x):\n  return x + 1\n```', 9)
PROGRAM = Response.read('```python\nprint(int(input()) + 1)\n```', 9)
FUNCTION = {'kind': 'function', 'entry_point': 'f', 'cases': [
  {'args': [n], 'expected': n + 1} for n in range(20)]}
ASSERTS = {'kind': 'asserts', 'setup': 'import math', 'asserts': [
  f'assert f({n}) == {n + 1}' for n in range(20)]}
STDIO = {'kind': 'stdio', 'cases': [{'input': f'{n}\n', 'output': f'{n + 1}\n'} for n in range(20)]}


def verify(tests, response):
  assert code.verify({'tests': tests}, response) == 1.0


def main(runs):
  box = sandbox.Sandbox()
  start = time.perf_counter()
  box.check()
  interpreter, _ = sandbox.find_interpreter()
  print(f'{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, uid {os.getuid()}, '
        f'{interpreter}; self-test {1000 * (time.perf_counter() - start):.0f} ms')
  works = {
    'the interpreter, bare': lambda: subprocess.run([interpreter, '-S', '-c', 'print(1)'],
                                                    capture_output=True, check=True),
    'one program': lambda: box.run('print(1)'),
    'function, 20 cases': lambda: verify(FUNCTION, SOLUTION),
    'asserts, 20, two sandboxes': lambda: verify(ASSERTS, SOLUTION),
    'stdio, 20 inputs': lambda: verify(STDIO, PROGRAM)}
  counts = (1, 2, 3, 4)
  print(f'{"ms a run":28}', *(f'{n} thread{"s" * (n > 1)}'.rjust(10) for n in counts))
  for name, work in works.items():
    figures = []
    for threads in counts:
      with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda _, work=work: work(), range(runs)))
        figures.append(1000 * (time.perf_counter() - start) / runs)
    print(f'{name:28}', *(f'{figure:10.1f}' for figure in figures))


if __name__ == '__main__':
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
