"""What each tool answers, and what it refuses."""
import random
import re
from fractions import Fraction

import pytest

from qwen3_jax.environments.calculator import evaluate, show
from qwen3_jax.environments.environment import Refused
from qwen3_jax.environments.records import make_record, open_environment
from qwen3_jax.environments.store import Store
from qwen3_jax.rewards.sandbox import Sandbox

needs_sandbox = pytest.mark.skipif(not Sandbox().available(),
                                   reason='needs hardware: a Linux that allows bubblewrap')


def start(name, **settings):
  record = make_record(name, 0, 1)
  record['environment'] |= settings
  environment = open_environment(record)
  environment.reset(record)
  return environment


def fraction(rng, depth):
  """A random expression as Python text with Fractions written out."""
  if not depth:
    return f'F({rng.randint(0, 20)})'
  sign = rng.choice(['+', '-', '*', '/', '//', '%', '**'])
  left = fraction(rng, depth - 1)
  right = f'F({rng.randint(0, 3)})' if sign == '**' else fraction(rng, depth - 1)
  return rng.choice(['{} {} {}', '({} {} {})', '-{} {} {}', '({}) {} ({})']).format(
    left, sign, right)


def test_calculator_has_the_precedence_of_python():
  rng, checked = random.Random(0), 0
  for _ in range(600):
    text = fraction(rng, rng.randint(1, 3))
    try:
      wanted = eval(text, {'F': Fraction})  # the test's own text
    except (ZeroDivisionError, OverflowError):
      wanted = None
    if isinstance(wanted, (float, complex)):
      continue  # a root
    try:
      given = evaluate(re.sub(r'F\((\d+)\)', r'\1', text))
    except Refused as reason:
      assert wanted is None or 'large' in str(reason) or 'integer' in str(reason), (text, reason)
      continue
    assert given == wanted, text
    checked += 1
  assert checked > 300


@pytest.mark.parametrize('text, shown', [
  ('1/3 + .5', '5/6 (0.8333333333)'), ('2 ^ 10', '1024'), ('-2 ** 2', '-4'),
  ('0.1 + 0.2', '3/10 (0.3)'), ('2 ** -2', '1/4 (0.25)'), ('(-1) ** 10000000001', '-1'),
  ('--3', '3'), ('7 // -2', '-4')])
def test_calculator_is_exact(text, shown):
  assert show(evaluate(text)) == shown


@pytest.mark.parametrize('text, words', [
  ('1 / 0', 'division by zero'), ('0 ** -1', 'division by zero'), ('9 ** 9 ** 9', 'too large'),
  ('2 ** 5000', 'too large'), ('(2 ** 4000) * (2 ** 4000)', 'too large'), ('1' * 501, '501 char'),
  ('(' * 60, 'nested'), ('2 ** -' * 60 + '1', 'nested'), ('__import__("os")', 'cannot read'),
  ('1 +', 'end of the expression'), ('1 2', 'cannot read'), ('(1', 'not closed'), ('', 'end of'),
  ('1e9', 'cannot read'), ('2 ** (1 / 2)', 'no integer'), ('٣ + 1', 'cannot read')])
def test_calculator_refuses(text, words):
  with pytest.raises(Refused, match=words):
    evaluate(text)


@pytest.mark.parametrize('answer, reward', [
  ('The answer is 206.', 1), ('206', 1), ('\\boxed{206}', 1), ('The answer is 206.0', 1),
  ('The answer is 205 or 206.', 0), ('', 0), ('206 apples or so', 0)])
def test_an_answer_is_compared_by_value(answer, reward):
  environment = start('calculator', answer='206')
  environment.step({'content': answer, 'tool_calls': []})
  assert environment.outcome()['reward'] == reward


def test_files_keep_a_tree():
  files = start('files', files={'a/b.txt': 'x', 'c.txt': 'y'}, goal={})

  def call(name, **arguments):
    return files.call(f'{name}_file', arguments)
  assert files.call('list_files', {}) == 'a/b.txt\nc.txt'
  assert files.call('list_files', {'path': './a/'}) == 'a/b.txt'
  assert files.call('list_files', {'path': 'b'}) == 'No files.'
  assert call('read', path='/a//b.txt') == 'x'
  call('move', source='a/b.txt', target='d/e/f.txt')
  assert files.call('list_files', {}) == 'c.txt\nd/e/f.txt'
  for name, arguments, words in [
      ('read', dict(path='a/b.txt'), 'no file'), ('write', dict(path='d', text=''), 'is a folder'),
      ('write', dict(path='c.txt/x', text=''), 'is a file, not'), ('delete', dict(path='d'), 'no'),
      ('move', dict(source='c.txt', target='d/e/f.txt'), 'exists already'),
      ('write', dict(path='../x', text=''), r'"\.\."'),
      ('write', dict(path='/', text=''), 'is a folder')]:
    with pytest.raises(Refused, match=words):
      call(name, **arguments)
  for k in range(98):
    call('write', path=f'n{k}', text='')
  with pytest.raises(Refused, match='no space'):
    call('write', path='one too many', text='')
  call('write', path='n0', text='again')
  assert call('read', path='n0') == 'again'


def test_spoilt_files_take_progress_away():
  files = start('files', files={'a': '1', 'b': '2'}, goal={'a': '1', 'b': '3\n'})
  files.call('write_file', {'path': 'b', 'text': '3'})
  assert files.outcome()['reward'] == 1
  files.call('delete_file', {'path': 'a'})
  assert files.outcome() | {'valid': 1} == {'goal': 0, 'progress': 0, 'reward': 0, 'valid': 1}


def test_store_searches_gets_and_puts():
  store = Store()
  documents = {'k2': {'title': 'Red fox', 'text': 'It eats mice.'},
               'k1': {'title': 'Blue mice', 'text': 'Small.'}, 'k3': {'title': 'Fox', 'text': 'A'}}
  store.reset({'environment': {'documents': documents, 'answer': 'red', 'stored': {'x': 'red'}}})
  assert store.call('search', {'query': 'MICE?'}) == 'k1: Blue mice\nk2: Red fox'
  assert store.call('search', {'query': 'fox'}) == 'k2: Red fox\nk3: Fox'
  assert store.call('search', {'query': 'whale'}) == 'Nothing found.'
  assert store.call('get', {'key': 'k3'}) == 'Fox\nA'
  for name, arguments in [('get', {'key': 'x'}), ('put', {'key': 'k1', 'value': ''})]:
    with pytest.raises(Refused):
      store.call(name, arguments)
  store.step({'content': 'The answer is Red.', 'tool_calls': []})
  assert store.outcome() == {'goal': 0, 'answer': 1, 'stored': 0, 'valid': 1, 'reward': 0}
  store.call('put', {'key': 'x', 'value': 'red '})
  assert store.outcome()['reward'] == 1 and store.call('get', {'key': 'x'}) == 'red '


@needs_sandbox
@pytest.mark.parametrize('code, said', [
  ('print(6 * 7)', '42'), ('x = 1', 'The program printed nothing.'),
  ('print(1)\nraise KeyError(5)', 'KeyError: 5\nError: the program ended with code 1'),
  ('import socket; socket.socket()', 'Error: the program ended with code 1'),
  ('print("a" * 10 ** 7)', 'Error: the program printed too much'),
  ('a = bytearray(2 ** 31)', 'Error: the program used too much memory')])
def test_python_runs_in_the_sandbox(code, said):
  assert start('python').call('python', {'code': code}).endswith(said)


@needs_sandbox
def test_python_keeps_nothing_between_calls():
  python = start('python')
  python.call('python', {'code': 'x = 1; open("/tmp/y", "w").write("1")'})
  assert 'NameError' in python.call('python', {'code': 'print(x)'})
  assert 'FileNotFoundError' in python.call('python', {'code': 'open("/tmp/y")'})
