"""Generated problems are right: answers are worked out again from the words of the question."""

import re
from fractions import Fraction

import pytest

from qwen3_jax.data import tasks


def solve(kind, question):
  """The answer by another way than the generator's: from the text alone."""
  numbers = [int(x) for x in re.findall(r'(?<![\w.])-?\d+', question)]
  quoted = re.findall(r'"([^"]*)"', question)
  listed = re.search(r'\[(.*)\]', question)
  values = [int(x) for x in listed[1].split(', ')] if listed else []
  if kind == 'add':
    return str(sum(numbers))
  if kind == 'subtract':
    return str(max(numbers) - min(numbers))
  if kind == 'multiply':
    return str(numbers[0] * numbers[1])
  if kind == 'divide':
    a, b = max(numbers), min(numbers)
    if 'go into' in question or 'into' in question:
      b, a = numbers
    else:
      a, b = numbers
    return f'{a // b}, {a % b}'
  if kind == 'compare':
    pair = [x.rstrip('.') for x in re.findall(r'-?\d+(?:\.\d+)?', question)]
    return (max if 'larger' in question else min)(pair, key=Fraction)
  if kind == 'reverse':
    return ''.join(reversed(quoted[0]))
  if kind == 'count':
    letter, = (q for q in quoted if len(q) == 1)
    text, = (q for q in quoted if len(q) > 1)
    return str(sum(c == letter for c in text))
  if kind == 'alphabetize':
    words = question.split(': ')[1].rstrip('.').split(', ')
    return ', '.join(sorted(words))
  if kind == 'sort':
    order = sorted(values, reverse='from largest' in question)
    return ', '.join(map(str, order))
  if kind == 'extreme':
    return str(max(values) if 'largest' in question else min(values))
  if kind == 'sum':
    return str(sum(values))
  if kind == 'filter':
    bound = re.search(r'(greater|less) than (\d+)', question)
    if bound:
      kept = [x for x in values if (x > int(bound[2])) == (bound[1] == 'greater')
              and x != int(bound[2])]
    else:
      kept = [x for x in values if x % 2 == (' odd' in question)]
    return ', '.join(map(str, kept)) or 'none'
  if kind == 'sequence':
    a, b, c, d = numbers
    return str(d + d - c if b - a == d - c else d * d // c)
  if kind == 'story':
    total = 0
    for sentence in re.split(r'(?<=\.) ', question):
      n = [int(x) for x in re.findall(r'\d+', sentence)]
      if 'loses' in sentence or 'of them to' in sentence:
        total -= n[0]
      elif 'doubles' in sentence:
        total *= 2
      elif 'triples' in sentence:
        total *= 3
      elif n:
        total += n[0]
    return str(total)
  if kind == 'shopping':
    total = sum(int(a) * int(b) for a, b in re.findall(r'(\d+) \w+ at (\d+)', question))
    paid = re.search(r'pays with (\d+)', question)
    return str(int(paid[1]) - total if paid else total)
  if kind == 'chain':
    terms = re.findall(r'([+-]?) ?(\d+)', question)
    return str(sum(-int(n) if sign == '-' else int(n) for sign, n in terms))
  if kind == 'coin':
    sides = ('heads', 'tails')
    start = sides.index(re.search(r'heads|tails', question)[0])
    return sides[(start + question.count('turns it over')) % 2]
  if kind == 'compass':
    sides = ('north', 'east', 'south', 'west')
    turned = sum(dict(right=1, around=2, left=-1)[turn]
                 for turn in re.search(r'turn (.*?)\.', question)[1].split(', '))
    start = sides.index(re.search(r'face (\w+)', question)[1])
    return sides[(start + turned) % 4]
  if kind == 'path':
    roads = dict(re.findall(r'([A-Z]) to ([A-Z])', question))
    place = re.search(r'(?:Start at|get from) ([A-Z])', question)[1]
    for _ in range(numbers[-1]):
      place = roads[place]
    return place
  way = re.search(r'(\d+) km (?!per)', question)
  speed, hours = re.search(r'(\d+) km per hour', question), re.search(r'(\d+) hours', question)
  if not way:
    return str(int(speed[1]) * int(hours[1]))
  return str(int(way[1]) // int((speed or hours)[1]))


@pytest.mark.parametrize('kind', tasks.KINDS)
def test_answers(kind):
  for difficulty in range(1, 6):
    for seed in range(200):
      problem = tasks.task(kind, seed, difficulty)
      assert solve(kind, problem.question) == problem.answer, problem


@pytest.mark.parametrize('kind', tasks.KINDS)
def test_every_equation_of_the_steps_holds(kind):
  seen = 0
  for difficulty in range(1, 6):
    for seed in range(60):
      text = ' '.join(tasks.task(kind, seed, difficulty).steps)
      for left, right in re.findall(r'(?<![\d.])(-?\d[\d +*/-]*) = (-?\d+)', text):
        assert eval(left) == int(right), text  # only digits and operators get here
        seen += 1
  assert seen or kind in ('compare', 'reverse', 'count', 'alphabetize', 'sort', 'extreme', 'filter',
                          'coin', 'compass', 'path')


def test_pure_function_of_its_arguments():
  assert tasks.task('story', 5, 3) == tasks.task('story', 5, 3)
  assert tasks.task('story', 5, 3) != tasks.task('story', 6, 3)
  assert tasks.as_text(tasks.task('add', 1, 2)) == (
    'Question: Calculate 60 + 7.\nAdd digit by digit from the right.\n0 + 7 = 7: write 7.\n'
    '6 + 0 = 6: write 6.\n60 + 7 = 67.\nAnswer: 67')


def test_held_out_questions_are_in_no_training_source():
  train = {tasks.TaskSource(seed, 2000, split='train').task(i).question
           for seed in (0, 1) for i in range(2000)}
  held = {tasks.TaskSource(seed, 300, split='heldout').task(i).question
          for seed in (0, 1) for i in range(300)}
  assert not train & held and len(train) > 3000 and len(held) > 300


def test_difficulty_grows_documents_and_surface_forms_vary():
  size = lambda d: sum(len(tasks.as_text(tasks.task(kind, seed, d)))
                       for kind in tasks.KINDS for seed in range(30))
  assert size(1) < size(2) < size(3) < size(4) < size(5)
  forms = {re.sub(r'\d+', '#', tasks.task('add', seed, 3).question) for seed in range(100)}
  assert len(forms) >= 6


@pytest.mark.parametrize('answer, given, right', [
  ('1024', '1,024', True), ('1024', 'so the answer is 1024.', True), ('1024', '1024.0', True),
  ('1024', 'Answer: 1025', False), ('7', 'first 3\n7', True), ('7', '\\boxed{7}', True),
  ('7', '', False), ('3, 1, 2', '[3, 1, 2]', True), ('3, 1, 2', '3, 2, 1', False),
  ('pomz', 'Answer: "pomz"', True), ('none', 'None.', True), ('2.5', 'Answer: 2.50', True),
  ('7', 'The answer: 9\nno, the answer is 7', True), ('1, 234', '1,234', False),
])
def test_check(answer, given, right):
  assert tasks.check(tasks.Task('add', 0, 1, '', (), answer), given) == right


def test_check_accepts_every_own_solution_and_no_other():
  for kind in tasks.KINDS:
    for seed in range(50):
      problem = tasks.task(kind, seed, 3)
      assert tasks.check(problem, tasks.as_text(problem))
      assert tasks.check(problem, problem.answer)
      assert not tasks.check(problem, problem.answer + '1')


def test_options():
  source = tasks.open_tasks('kinds=add+sort,difficulty=2-3,size=50,seed=7', 'train')
  made = [source.task(i) for i in range(50)]
  assert len(source) == 50 and {m.kind for m in made} == {'add', 'sort'}
  assert {m.difficulty for m in made} == {2, 3}
  assert source[3] == tasks.as_text(made[3])
  for bad, message in (('kinds=ad', "no kind of task.*'ad'"), ('dificulty=2', 'dificulty=2'),
                       ('size=x', 'size=x'), ('difficulty=0-9', 'difficulty from 1 to 5')):
    with pytest.raises(ValueError, match=message):
      tasks.open_tasks(bad)
  with pytest.raises(ValueError, match='1 to 5'):
    tasks.task('add', 0, 6)
  with pytest.raises(ValueError, match='no kind'):
    tasks.task('guess', 0, 1)
  with pytest.raises(IndexError):
    source[50]
