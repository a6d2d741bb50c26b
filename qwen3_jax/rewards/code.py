"""Rewards of written programs: their tests, judged outside the process that runs them.

A process that runs an answer is told inputs and calls, one at a time; it never sees what is
expected, and what it says back is data. So leaving early, printing verdicts, redefining `==` or
reading the tests earn nothing. Arguments are copies: what an answer does to them does not show.

`record['tests']` is one of
  {'kind': 'stdio', 'cases': [{'input': text, 'output': text}]}: a program; words are compared;
  {'kind': 'function', 'entry_point': name, 'cases': [{'args': [...], 'kwargs': {...}, 'expected':
   ...}]}: JSON values, a tuple as good as a list, floats to 1e-9; with 'literals': true, args and
   expected are Python literals as text, compared exactly;
  {'kind': 'asserts', 'asserts': [source, ...]}: tests in Python, each a unit, run in a sandbox of
   their own, where the answer's functions are proxies; 'setup' runs there before the proxies are
   made, 'late_setup' after, 'entry_point' names a function of the answer that setup also defines;
and may have 'prefix' (source put before the answer), 'seconds' (a program's input; all calls
together), 'memory_mb' and 'score': 'all' (the default: 1 or 0) or 'fraction'.
"""

import ast
import builtins
import dataclasses
import functools
import json
import math
import sys
import time

from qwen3_jax.rewards.harness import decode, encode
from qwen3_jax.rewards.response import Unscored
from qwen3_jax.rewards.sandbox import Sandbox, attempt

SANDBOX = Sandbox()
_DEATH = json.dumps({'error': 'RuntimeError', 'text': 'the answer ended'}).encode()
_LENGTH = 200_000  # characters of an answer
_CONTAINERS = ('tuple', 'set', 'frozenset', 'dict', 'sequence', 'iterator', 'handle')


def verify(record, response, sandbox=SANDBOX):
  """The share of a record's tests that the code in a response passes, or 1.0 or 0.0 for all.

  Raises Unscored where the machinery failed, or the tests themselves cannot run; RuntimeError where
  this machine has no sandbox; ValueError on malformed tests.
  """
  tests = record['tests']
  if tests.get('kind') not in _JUDGES:
    raise ValueError(f'got tests of kind {tests.get("kind")!r}; want one of {sorted(_JUDGES)}')
  sandbox.check()
  code = extract_code(response.content)
  if not code.strip() or len(code) > _LENGTH:
    return 0.0
  sandbox = dataclasses.replace(sandbox, **{name: tests[name] for name in ('seconds', 'memory_mb')
                                            if name in tests})
  files = {'answer.py': '\n\n'.join(filter(None, (tests.get('prefix'), code)))}
  every = tests.get('score', 'all') == 'all'
  passed, total = attempt(lambda: _JUDGES[tests['kind']](tests, files, sandbox, every))
  return float(passed == total) if every else passed / total


def extract_code(text):
  """The last fenced block marked as Python; else the last unmarked one; else the whole text."""
  found, mark, block = {}, None, []
  for line in text.splitlines(keepends=True):
    fence = line.strip()
    if not fence.startswith('```'):
      block.append(line)
    elif mark is None:
      mark, block = fence.strip('`').strip().lower(), []
    else:
      found[mark], mark = ''.join(block), None
  if mark is not None:  # cut off before its end
    found[mark] = ''.join(block)
  for name in ('python', 'python3', 'py', ''):
    if name in found:
      return found[name]
  return text


def _judge_programs(tests, files, sandbox, every):
  passed, cases = 0, tests['cases']
  with sandbox.open(files, sandbox.seconds, 'programs') as child:
    for case in cases:
      limit = sandbox.output_bytes + 4 * len(case['output'].encode('utf-8', 'replace'))
      request = json.dumps({'input': case['input'], 'limit': limit})
      reply = _read(child.ask(request.encode(), sandbox.seconds))
      right = (reply.get('code') == 0 and isinstance(reply.get('output'), str)
               and reply['output'].split() == case['output'].split())
      passed += right
      if child.result or every and not right:
        break
  return passed, len(cases)


def _judge_functions(tests, files, sandbox, every):
  """Calls one after another; a call that ends the process fails those after it."""
  literals = tests.get('literals', False)
  value = ast.literal_eval if literals else lambda data: data
  calls = [(tests['entry_point'], value(case['args']), case.get('kwargs', {}),
            value(case['expected'])) for case in tests['cases']]
  return _judge_calls(calls, not literals, files, sandbox, every)


def _judge_calls(calls, loose, files, sandbox, every):
  passed, end = 0, sandbox.seconds
  with sandbox.open(files, sandbox.seconds, 'functions') as child:
    for name, args, kwargs, expected in calls:
      request = {'call': name, 'args': [encode(arg) for arg in args],
                 'kwargs': {key: encode(item) for key, item in kwargs.items()}}
      start = time.monotonic()
      reply = _read(child.ask(json.dumps(request).encode(), max(0.01, end)))
      end -= time.monotonic() - start
      right = 'value' in reply and same(expected, reply['value'], loose)
      passed += right
      if child.result or every and not right:
        break
  return passed, len(calls)


def _read(line):
  """A reply as a dict; empty for one that is none."""
  try:
    reply = json.loads(line or b'{}')
  except (ValueError, RecursionError):
    return {}
  return reply if isinstance(reply, dict) else {}


def same(expected, data, loose=False):
  """Whether `data`, as harness.encode writes values, is `expected`.

  The work is bounded by the size of `expected`, for `data` is hostile. `loose`: a tuple is as good
  as a list and floats are compared to 1e-9, nan equals nan.
  """
  try:
    return _same(expected, data, loose)
  except (ValueError, TypeError, ArithmeticError, KeyError, RecursionError, AttributeError):
    return False


def _same(expected, data, loose):
  if isinstance(expected, (list, tuple)):
    kind = 'list'
    if isinstance(data, dict):
      (kind, data), = data.items()
    wanted = ('list', 'tuple') if loose else (type(expected).__name__,)
    return (kind in wanted and isinstance(data, list) and len(data) == len(expected)
            and all(_same(one, other, loose) for one, other in zip(expected, data)))
  kind, inner = None, None
  if isinstance(data, dict):
    (kind, inner), = data.items()
  if isinstance(expected, dict):
    if kind != 'dict' or len(inner) != len(expected):
      return False
    items = {decode(key): item for key, item in inner}
    return len(items) == len(expected) and all(
      key in items and _same(item, items[key], loose) for key, item in expected.items())
  if isinstance(expected, (set, frozenset)):
    return (kind in ('set', 'frozenset') and len(inner) == len(expected)
            and set(map(decode, inner)) == expected)
  if isinstance(data, list) or kind in _CONTAINERS:
    return False
  value = decode(data)
  if loose and isinstance(expected, float) and isinstance(value, (int, float)):
    return (math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
            or math.isnan(value) and math.isnan(expected))
  return bool(value == expected)


def _judge_asserts(tests, files, sandbox, every):
  job = _prepare(json.dumps({key: tests.get(key) for key in (
    'asserts', 'setup', 'late_setup', 'entry_point')}))
  if 'calls' in job:
    return _judge_calls(job['calls'], False, files, sandbox, every)
  left, total = sandbox.seconds, len(job['tests'])
  with (sandbox.open(files, sandbox.seconds, 'functions') as answer,
        sandbox.open({}, sandbox.seconds, 'tests') as judge):
    line = judge.ask(json.dumps({**job, 'all': every}).encode(), sandbox.seconds)
    while line and line[:1] == b'?':
      start = time.monotonic()
      reply = answer.ask(line[1:], max(0.01, left)) or _DEATH
      left -= time.monotonic() - start
      line = judge.ask(reply, sandbox.seconds)
  if not line:  # too long over what it was given, or too large
    return 0, total
  found = json.loads(line[1:])
  if isinstance(found, str):
    raise Unscored(f'the tests cannot run: {found}')
  return sum(found), total


@functools.lru_cache(4096)
def _prepare(text):
  """What both sandboxes need to know of tests in Python (their JSON).

  Tests that are all `assert name(literals) == literal` become {'calls': ...}, which one process
  answers and we compare; others {'tests', 'setup', 'late_setup', 'names'}.
  """
  tests = json.loads(text)
  sources, setup = tests['asserts'], tests['setup'] or ''
  late = tests['late_setup'] or ''
  if not setup and not late:
    calls = [_read_assert(source) for source in sources]
    if all(calls):
      return {'calls': calls}
  free, modules = _free_names('\n'.join([late, *sources]))
  bound = _bound_names(setup)
  for name in sorted(modules - bound):
    setup += f'\nimport {name}'
  names = (free - modules - bound) | {tests['entry_point']} - {None}
  return {'tests': sources, 'setup': setup, 'late_setup': late, 'names': sorted(names)}


def _read_assert(source):
  """(name, args, kwargs, expected) of `assert name(literals) == literal`, or None."""
  try:
    statement, = ast.parse(source.strip()).body
    compared = statement.test
    call, (expected,), (operator,) = compared.left, compared.comparators, compared.ops
    if not (isinstance(statement, ast.Assert) and isinstance(operator, ast.Eq)
            and isinstance(call.func, ast.Name)):
      return None
    args = [ast.literal_eval(arg) for arg in call.args]
    kwargs = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
    found = call.func.id, args, kwargs, ast.literal_eval(expected)
    encode([args, kwargs])
    return None if None in kwargs or hasattr(builtins, call.func.id) else found
  except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError):
    return None


def _free_names(source):
  """Names that a source wants from elsewhere, and those of them that are modules like `math.`."""
  nodes = list(ast.walk(ast.parse(source)))
  known = _bound_names(source) | set(dir(builtins))
  modules = {node.value.id for node in nodes
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
  free = {node.id for node in nodes if isinstance(node, ast.Name)} - known
  return free, free & modules & sys.stdlib_module_names


def _bound_names(source):
  bound = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
      bound.add(node.id)
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
      bound.add(node.name)
    elif isinstance(node, ast.arg):
      bound.add(node.arg)
    elif isinstance(node, ast.alias):
      bound.add((node.asname or node.name).partition('.')[0])
  return bound


def read_mbpp(row):
  """The tests of a row of MBPP."""
  return {'kind': 'asserts', 'asserts': row['test_list'], 'late_setup': row['test_setup_code']}


def read_humaneval(row):
  """The tests of a row of HumanEval; its prompt goes before the answer, which defines it anew."""
  return {'kind': 'asserts', 'asserts': [f'{row["test"]}\ncheck({row["entry_point"]})'],
          'setup': row['prompt'], 'prefix': row['prompt'], 'entry_point': row['entry_point']}


_JUDGES = {'stdio': _judge_programs, 'function': _judge_functions, 'asserts': _judge_asserts}
