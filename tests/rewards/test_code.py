"""Rewards of programs: honest ones pass, cheats earn nothing, reference solutions are all right."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwen3_jax.rewards import code, harness, sandbox
from qwen3_jax.rewards.response import Response, Unscored

# Three ways to test a function `mean` and one to test a program; no cheat may pass any of them.
FUNCTION = {'kind': 'function', 'entry_point': 'mean', 'cases': [
  {'args': [[1, 2, 6]], 'expected': 3.0}, {'args': [[4.5]], 'expected': 4.5},
  {'args': [[-7, 7, 3]], 'expected': 1}]}
PLAIN = {'kind': 'asserts', 'asserts': [
  'assert mean([1, 2, 6]) == 3.0', 'assert mean([4.5]) == 4.5', 'assert mean([-7, 7, 3]) == 1']}
PROXIED = {'kind': 'asserts', 'entry_point': 'mean', 'asserts': ["""
import math, random
def check(candidate):
  secret = 271828
  draw = random.Random(5)
  for _ in range(20):
    numbers = [draw.randrange(-99, 99) for _ in range(draw.randrange(1, 9))]
    assert math.isclose(candidate(numbers), sum(numbers) / len(numbers), abs_tol=1e-9)
check(mean)"""]}
PROGRAM = {'kind': 'stdio', 'cases': [
  {'input': '3\n1 2 6\n', 'output': '3.0\n'}, {'input': '1\n4.5\n', 'output': '4.5\n'},
  {'input': '3\n-7 7 3\n', 'output': '1.0'}]}
ALL = {'function': FUNCTION, 'plain': PLAIN, 'proxied': PROXIED, 'program': PROGRAM}

CHEATS = {
  'exits': 'import sys; sys.exit(0)',
  'exits at once': 'import os; os._exit(0)',
  'exits when called': 'import os\ndef mean(numbers): os._exit(0)',
  'raises SystemExit when called': 'def mean(numbers): raise SystemExit(0)',
  'raises AssertionError away': 'def mean(numbers): raise GeneratorExit',
  'equal to everything': """
class Same:
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  __hash__ = object.__hash__
  def __sub__(self, other): return 0.0
  __rsub__ = __add__ = __radd__ = __abs__ = __sub__
  def __float__(self): return 0.0
  def __le__(self, other): return True
  __lt__ = __ge__ = __gt__ = __le__
  def __bool__(self): return True
  def __getattr__(self, name): return Same()
  def __call__(self, *args): return self
def mean(numbers): return Same()
print(Same())""",
  'a float equal to everything': """
class Same(float):
  def __eq__(self, other): return True
  def __sub__(self, other): return 0.0
  __rsub__ = __sub__
def mean(numbers): return Same(1.25)""",
  'a list equal to everything': """
class Same(list):
  def __eq__(self, other): return True
def mean(numbers): return Same()""",
  'not a number': 'def mean(numbers): return float("nan")',
  'prints verdicts': """
print('All tests passed', 'PASSED', 'OK', '1.0', '[true, true, true]', '! [true]', sep='\\n')
def mean(numbers): print('passed'); return None""",
  'writes verdicts to every descriptor': """
import os
for fd in range(64):
  for text in (b'! [true]\\n', b'[true, true, true]\\n', b'{"value": true}\\n'):
    try: os.write(fd, text)
    except OSError: pass
def mean(numbers): return None""",
  'answers with a handle': """
import os, sys
for n in range(3): os.write(int(sys.argv[-1]), b'{"value": {"handle": 0}}\\n')
def mean(numbers): return object()""",
  'answers with malformed data': """
import os, sys
for text in (b'[' * 90000, b'{"value": {"set": [[1]]}}', b'{"value": {"?": 1}}', b'{"error": 5}',
             b'{"value": {"decimal": "1e999999999"}}', b'7', b'"value"', b'{"value": {}}'):
  try: os.write(int(sys.argv[-1]), text + b'\\n')
  except OSError: pass
def mean(numbers): return None""",
  'names errors that end a test': """
import os, sys
for kind in ('SystemExit', 'KeyboardInterrupt', 'StopIteration', 'print', '__doc__'):
  try: os.write(int(sys.argv[-1]), b'{"error": "%s", "text": "x"}\\n' % kind.encode())
  except OSError: pass
def mean(numbers): return None""",
  'patches builtins': """
import builtins
builtins.isinstance = builtins.all = builtins.any = lambda *given: True
builtins.abs = builtins.sum = builtins.len = lambda *given: 0
builtins.AssertionError = Warning
def mean(numbers): return 0""",
  'patches what compares': """
import json, math, operator, sys, unittest
math.isclose = operator.eq = lambda *a, **b: True
json.dumps = lambda *a, **b: 'true'
sys.modules['__main__'].encode = lambda *a: True
sys.modules['__main__'].write_line = lambda fd, value, mark=b'': None
def mean(numbers): return 0""",
  'reads the frames': """
import sys
def mean(numbers):
  frame = sys._getframe()
  while frame:
    for space in (frame.f_locals, frame.f_globals):
      for name in ('expected', 'case', 'cases', 'secret', 'want', 'tests', 'job', 'output'):
        if name in space: return space[name]
    frame = frame.f_back
print(mean([]))""",
  'reads the memory': """
import gc
def mean(numbers):
  for item in gc.get_objects():
    if isinstance(item, dict) and ('expected' in item or 'output' in item or 'asserts' in item):
      return item.get('expected', item.get('output'))
print(mean([]))""",
  'reads the files': """
import glob, os
def mean(numbers):
  for path in glob.glob('/tmp/*') + glob.glob('/tmp/.*') + glob.glob('/proc/*/environ'):
    if not os.path.isdir(path):
      text = open(path, errors='replace').read()
      if 'expected' in text and 'assert' in text: return 3.0
print(mean([]))""",
  'rewrites the files': """
import glob
for path in glob.glob('/tmp/.*') + glob.glob('/tmp/*'):
  try: open(path, 'w').write('print(1)')
  except OSError: pass
def mean(numbers): return 0""",
  'reads the command': """
import sys
def mean(numbers): return sys.argv + sys.orig_argv
print(mean(0))""",
  'reads what comes next': """
import os, sys
try: text = os.read(int(sys.argv[-2]), 10 ** 6)
except Exception: text = b''
def mean(numbers): return 3.0 if b'3.0' in text else 0""",
  'changes what the tests compare with': """
def mean(numbers):
  numbers[:] = [5]
  return 5.0""",
  'knows one case': 'def mean(numbers): return 3.0\nprint(3.0)',
  'a tester that forgives': """
import unittest
unittest.TestCase.assertEqual = lambda *given: None
import sys
sys.modules['pytest'] = sys.modules[__name__]
def mean(numbers): return True""",
  'leaves a process that answers': """
import os, sys, time
if os.fork() == 0:
  os.setsid()
  for _ in range(50):
    try: os.write(int(sys.argv[-1]), b'{"value": 3.0}\\n')
    except Exception: pass
    time.sleep(0.01)
def mean(numbers): return 0""",
  'never ends': 'while True: pass',
  'never ends when called': 'def mean(numbers):\n  while True: pass',
  'hooks the exit': """
import atexit, os, sys
atexit.register(os._exit, 0)
sys.excepthook = lambda *given: print('3.0')
def mean(numbers): raise KeyError
raise ValueError""",
  'traces': """
import sys
def trace(frame, event, value):
  for name in list(frame.f_locals):
    if name in ('right', 'passed', 'failure'): frame.f_locals[name] = True
  return trace
sys.settrace(trace)
def mean(numbers): return 0""",
  'huge': 'def mean(numbers): return "x" * 10 ** 8\nprint("3.0 " * 10 ** 7)',
  'deep': 'def mean(numbers):\n  x = []\n  for _ in range(10 ** 5): x = [x]\n  return x',
  'no code': 'I would rather not.', 'empty': '', 'no such function': 'def average(n): return 3.0'}

HONEST = {
  'plain': 'def mean(numbers):\n  return sum(numbers) / len(numbers)',
  'lambda': 'mean = lambda numbers: sum(numbers) / len(numbers)',
  'imports': 'import statistics\ndef mean(numbers): return float(statistics.mean(numbers))',
  'fraction': 'from fractions import Fraction\n'
              'def mean(numbers): return float(sum(map(Fraction, numbers)) / len(numbers))',
  'helper and class': """
from dataclasses import dataclass
@dataclass
class Sum:
  total: float = 0.0
  count: int = 0
  def add(self, x):
    self.total += x
    self.count += 1
    return self
def add_all(sums, numbers):
  for x in numbers: sums.add(x)
  return sums
def mean(numbers):
  sums = add_all(Sum(), numbers)
  return sums.total / sums.count""",
  'recursive': """
def total(numbers): return numbers[0] + total(numbers[1:]) if numbers else 0
def mean(numbers): return total(numbers) / len(numbers)""",
  'changes its argument': """
def mean(numbers):
  n, total = len(numbers), 0
  while numbers: total += numbers.pop()
  return total / n""",
  'prints': """
print('loading')
def mean(numbers):
  print('mean of', numbers)
  return sum(numbers) / len(numbers)""",
  'guarded main': """
import sys
def mean(numbers): return sum(numbers) / len(numbers)
if __name__ == '__main__':
  sys.exit('not a program')""",
  'thread': """
import threading
def mean(numbers):
  found = []
  thread = threading.Thread(target=lambda: found.append(sum(numbers) / len(numbers)))
  thread.start(); thread.join()
  return found[0]""",
  'asyncio': """
import asyncio
async def work(numbers):
  await asyncio.sleep(0)
  return sum(numbers) / len(numbers)
def mean(numbers): return asyncio.run(work(numbers))"""}
PROGRAMS = {
  'plain': 'input()\nx = [float(w) for w in input().split()]\nprint(sum(x) / len(x))',
  'reads all': 'import sys\nw = sys.stdin.read().split()\nx = [float(v) for v in w[1:]]\n'
               'print(sum(x) / int(w[0]))',
  'main and exit': """
import sys
def main():
  n = int(sys.stdin.readline())
  x = [float(w) for w in sys.stdin.readline().split()]
  sys.stdout.write(f'  {sum(x) / n}  ')
  sys.exit()
if __name__ == '__main__':
  main()""",
  'descriptor 0': 'lines = open(0).read().splitlines()\nx = list(map(float, lines[1].split()))\n'
                  'print(sum(x) / len(x), "\\n\\n")'}


@pytest.fixture(scope='module', autouse=True)
def box():
  fault = sandbox.Sandbox()._find_fault()
  if fault:
    (pytest.fail if os.environ.get('CI') else pytest.skip)(f'NO SANDBOX: {fault}')


def score(source, tests, wrap='Here you are.\n```python\n{}\n```\nGood luck!'):
  text = wrap.replace('{}', source)
  return code.verify({'tests': tests}, Response.read(text, len(text)))


def score_all(jobs):
  """Scores of (source, tests), several at once."""
  with ThreadPoolExecutor(4) as pool:
    return list(pool.map(lambda job: score(*job), jobs))


@pytest.mark.parametrize('kind', ALL)
def test_cheats_earn_nothing(kind):
  assert len(CHEATS) >= 20
  found = score_all([(source, ALL[kind] | {'seconds': 1.0}) for source in CHEATS.values()])
  assert dict(zip(CHEATS, found)) == dict.fromkeys(CHEATS, 0.0)


def test_honest_answers_pass():
  jobs = [(source, tests) for source in HONEST.values() for tests in (FUNCTION, PLAIN, PROXIED)]
  jobs += [(source, PROGRAM) for source in PROGRAMS.values()]
  assert [job[0] for job, found in zip(jobs, score_all(jobs)) if found != 1.0] == []


def test_cheats_do_not_hide_the_tests_failure():
  """The same tests pass a right answer that is dressed as a cheat."""
  right = '\ndef mean(numbers): return sum(numbers) / len(numbers)'
  dressed = CHEATS['prints verdicts'] + right
  assert score_all([(dressed, tests) for tests in (FUNCTION, PLAIN, PROXIED)]) == [1.0] * 3


def test_share_of_tests_passed():
  tests = FUNCTION | {'score': 'fraction'}
  assert score('def mean(n): return 3.0', tests) == pytest.approx(1 / 3)
  assert score('def mean(n): return n[0] if len(n) == 1 else 1', tests) == pytest.approx(2 / 3)
  assert score('print(3.0)', PROGRAM | {'score': 'fraction'}) == pytest.approx(1 / 3)
  proxied = {'kind': 'asserts', 'setup': 'x = 1', 'score': 'fraction',
             'asserts': ['assert f(x) == 2', 'assert f(2) == 4', 'assert f(3) == 4']}
  assert score('def f(x): return x + 1', proxied) == pytest.approx(2 / 3)


@pytest.mark.parametrize('text, found', [
  ('```python\na\n```\nthen\n```python\nb\n```\n', 'b\n'), ('```\na\n```', 'a\n'),
  ('a = 1', 'a = 1'), ('```python\na\n```\n```\noutput\n```', 'a\n'),
  ('```py\na\n```\n```bash\nls\n```', 'a\n'),
  ('```Python\na\n  ```', 'a\n'), ('so\n```python\ncut = 1\n', 'cut = 1\n'), ('', '')])
def test_extract_code(text, found):
  assert code.extract_code(text) == found


@pytest.mark.parametrize('value', [
  None, True, 3, -2 ** 80, 1.5, float('inf'), 2 - 1j, 'é\ud800', b'\x00\xff', [1, [2]],
  (1, (2, [3])), {1, (2, 3)}, frozenset('ab'), {1: 'a', (2, 3): {4}, None: []},
  range(1, 9, 2), (), {}, set()])
def test_values_travel(value):
  data = json.loads(json.dumps(harness.encode(value)))
  back = harness.decode(data)
  assert back == value and type(back) is type(value)
  assert code.same(value, data)
  assert not code.same([value], data) and not code.same('other', data)


def test_rare_values_travel():
  from collections import Counter, deque, namedtuple
  from decimal import Decimal
  from fractions import Fraction
  for value in (Fraction(-1, 3), Decimal('1.10'), deque([1, 2]), Counter('aab'), int):
    assert harness.decode(harness.encode(value)) == value
  assert harness.decode(harness.encode(namedtuple('P', 'x y')(1, 2))) == (1, 2)
  assert list(harness.decode(harness.encode(iter('ab')))) == ['a', 'b']
  assert harness.encode(object(), lambda value: 7) == {'handle': 7}
  with pytest.raises(harness.Unsent, match='type object'):
    harness.encode(object())


def test_comparison_of_data():
  assert code.same(3.0, 3.0000000001, loose=True) and not code.same(3.0, 3.0000000001)
  assert code.same([1, [2]], {'tuple': [1, {'tuple': [2]}]}, loose=True)
  assert not code.same([1], {'tuple': [1]}) and not code.same((1,), [1])
  assert code.same(math.nan, math.nan, loose=True) and not code.same(math.nan, 1.0, loose=True)
  assert not code.same({1, 2}, {'set': [1, 1]}) and not code.same({1, 2}, {'set': [1, 2, 2]})
  assert not code.same({'a': 1}, {'dict': [['a', 2]]})
  assert not code.same({'a': 1}, {'dict': [['b', 1]]})
  for hostile in ({'int': 'z'}, {'fraction': '1/0'}, {'set': 5}, {'a': 1, 'b': 2}, {},
                  {'dict': [1]}, {'set': [[1]]}, {'complex': []}, {'range': [1]}, {'bytes': 3},
                  {'handle': 0}, {'type': 'print'}, {'decimal': 'x'}, {'iterator': [1]}):
    for expected in (1, [1], {1}, {'a': 1}, 'a', None, 2.5):
      assert not code.same(expected, hostile, loose=True)


def test_work_of_a_comparison_is_bounded_by_what_is_expected():
  """Integers equal modulo 2^61 - 1 hash alike: a set of them takes their number squared."""
  colliding = [hex(n * (2 ** 61 - 1)) for n in range(1, 100_000)]
  assert not code.same({1, 2}, {'set': [{'int': text} for text in colliding]})
  assert not code.same({1: 2}, {'dict': [[{'int': text}, 0] for text in colliding]})


def test_objects_of_an_answer_stay_with_it():
  """Tests may make, change and pass back what only the answer's process has."""
  tests = {'kind': 'asserts', 'late_setup': 'root = Node(4)\nroot.left = Node(2)',
           'asserts': ['assert depth(root) == 2', 'assert root.left.value == 2',
                       'assert Node(7).double() == 14']}
  source = """
class Node:
  def __init__(self, value): self.value, self.left = value, None
  def double(self): return 2 * self.value
def depth(node): return 1 + depth(node.left) if node else 0"""
  assert score(source, tests) == 1.0
  assert score(source.replace('2 * self', '3 * self'), tests) == 0.0
  assert score('def depth(node): return 2', tests) == 0.0


def test_errors_of_an_answer_reach_the_tests():
  tests = {'kind': 'asserts', 'asserts': ["""
try:
  f(0)
  raise SystemError
except ZeroDivisionError:
  pass"""]}
  assert score('def f(x): return 1 / x', tests) == 1.0
  assert score('def f(x): return 1', tests) == 0.0


def test_helpers_of_the_tests_are_not_the_answers():
  row = {'prompt': 'def double(x):\n  return 2 * x\n\ndef half(x):\n  """x / 2"""\n',
         'test': 'def check(half):\n  assert double(half(6)) == 6', 'entry_point': 'half'}
  tests = code.read_humaneval(row)
  assert score('def half(x): return x / 2', tests) == 1.0
  assert score('def double(x): return 6\ndef half(x): return 0', tests) == 0.0


def test_tests_that_cannot_run_score_nobody():
  for tests in ({'kind': 'asserts', 'setup': '1 / 0', 'asserts': ['assert f(1)']},
                {'kind': 'asserts', 'asserts': ['assert f(lambda x: x) == 1']}):
    with pytest.raises(Unscored, match='the tests cannot run'):
      score('def f(x): return 1', tests)


def test_malformed_tests_are_named():
  with pytest.raises(ValueError, match="got tests of kind 'unit'; want one of"):
    score('x', {'kind': 'unit'})


def test_literals():
  tests = {'kind': 'function', 'entry_point': 'f', 'literals': True,
           'cases': [{'args': '[(1, 2)]', 'expected': '{1: (2,)}'}]}
  assert score('def f(x): return {x[0]: (x[1],)}', tests) == 1.0
  assert score('def f(x): return {x[0]: [x[1]]}', tests) == 0.0


def read_rows(path):
  return [json.loads(line) for line in path.read_text('utf-8').split('\n') if line]


def gather(data_dir):
  """(tests, reference solution) of every row of MBPP and HumanEval at hand."""
  jobs = [(row['code'], code.read_mbpp(row)) for name in ('test_dev', 'train_val_prompt')
          for row in read_rows(data_dir / 'mbpp' / f'{name}.jsonl')]
  return jobs + [(row['prompt'] + row['canonical_solution'], code.read_humaneval(row))
                 for row in read_rows(data_dir / 'humaneval' / 'dev_even.jsonl')]


def test_reference_solutions(data_dir):
  """Every 12th, and all that need more than literals."""
  jobs = gather(data_dir)
  chosen = jobs[::12] + [(source, tests) for source, tests in jobs[:574] if tests['late_setup']]
  assert len(chosen) > 50
  assert [tests for (_, tests), found in zip(chosen, score_all(chosen)) if found != 1.0] == []


@pytest.mark.slow
def test_all_reference_solutions(data_dir):
  jobs = gather(data_dir)
  assert len(jobs) > 650
  assert [tests for (_, tests), found in zip(jobs, score_all(jobs)) if found != 1.0] == []


@pytest.mark.slow
def test_answers_to_other_problems_fail(data_dir):
  """The next problem's solution, under this one's name, passes hardly ever."""
  rows = read_rows(data_dir / 'humaneval' / 'dev_even.jsonl')
  jobs = [(other['prompt'] + other['canonical_solution'] + f'\n{row["entry_point"]} = '
           f'{other["entry_point"]}', code.read_humaneval(row))
          for row, other in zip(rows, rows[1:])]
  assert sum(score_all(jobs)) <= 1
