"""Puzzles with one right answer, or any right expression: numbers, deduction, orders, words."""
import itertools
import string

from qwen3_jax.data import tasks
from qwen3_jax.data.problems import NAMES, THINGS, WORDS
from qwen3_jax.data.query import Query, by, exact


def make_countdown(rng, d):
  """Numbers, each used once, to make a target."""
  count = 3 + d // 2
  while True:
    numbers = [rng.randint(1, 9 + 4 * (d - 1)) for _ in range(count)]
    parts, steps = [(n, str(n)) for n in numbers], []
    while len(parts) > 1:
      rng.shuffle(parts)
      (a, one), (b, other), *parts = parts
      sign = rng.choice('++--*' if d < 4 else '+-*/')
      if sign == '-' and a < b or sign == '/' and (not b or a % b):
        sign = '+'
      value = {'+': a + b, '-': a - b, '*': a * b, '/': a // b if b else 0}[sign]
      steps.append(f'{a} {sign} {b} = {value}.')
      parts.append((value, f'({one} {sign} {other})'))
    (target, expression), = parts
    if 0 < target < 200 * d and target not in numbers:
      break
  question = rng.choice((
    'Make {} from {}, each used once, with + - * /.', 'Use {1} once each and + - * / to get {0}.',
    'Write {} with the numbers {}, each once, and + - * /.')).format(
      target, ', '.join(map(str, rng.sample(numbers, count))))
  return Query(question, by('math'), {
    'answer': str(target), 'kind': 'countdown', 'numbers': numbers},
    f'Answer: {expression[1:-1]}', f'Answer: {target}', tuple(steps))


def make_logic(rng, d):
  """Who has what, from clues that leave one way."""
  size = 2 + (d + 1) // 2
  people, things = rng.sample(NAMES, size), rng.sample(THINGS, size)
  owned = rng.sample(range(size), size)
  clues = [(p, t, owned[p] == t) for p in range(size) for t in range(size)]
  positive = rng.sample([c for c in clues if c[2]], max(0, size - 1 - d // 2 - (size > 3)))
  negative = [c for c in clues if not c[2]]
  rng.shuffle(negative)
  ways = list(itertools.permutations(range(size)))
  given = []
  for clue in [*positive, *negative]:
    left = [way for way in ways if (way[clue[0]] == clue[1]) == clue[2]]
    if len(left) < len(ways):
      given.append(clue)
      ways = left
  rng.shuffle(given)
  told = [f'{people[p]} has {"" if yes else "not "}the {things[t]}' if yes else
          f'{people[p]} does not have the {things[t]}' for p, t, yes in given]
  asked = rng.choice([p for p in range(size) if (p, owned[p], True) not in given])
  steps = [f'{people[p]}: {things[owned[p]]}.' for p in range(size)]
  question = (f'{", ".join(people[:-1])} and {people[-1]} each have one of: {", ".join(things)}. '
              f'{". ".join(told)}. Who has the {things[owned[asked]]}?')
  return exact(question, people[asked], steps,
               wrong=rng.choice([p for p in people if p != people[asked]]))


def make_sorting(rng, d):
  """Numbers or words in an order that is not the usual one."""
  count, down = 2 + d, rng.random() < 0.5
  name, draw, key = rng.choice((
    ('last digit', lambda: rng.randint(10, 99), lambda x: x % 10),
    ('distance from 20', lambda: rng.randint(1, 60), lambda x: abs(x - 20)),
    ('number of letters', lambda: _word(rng, rng.randint(1, 9)), len),
    ('last letter', lambda: rng.choice(WORDS), lambda x: x[-1]),
    ('second letter', lambda: rng.choice(WORDS), lambda x: x[1])))
  values = {}
  while len(values) < count:
    value = draw()
    values.setdefault(key(value), value)
  wanted = [values[k] for k in sorted(values, reverse=down)]
  shown = rng.sample(wanted, count)
  while shown == wanted:
    rng.shuffle(shown)
  show = lambda row: ', '.join(map(str, row))
  steps = [f'{value}: {key(value)}.' for value in shown]
  question = f'Sort by {name}, {"falling" if down else "rising"}: {show(shown)}.'
  return exact(question, show(wanted), steps, wrong=show(shown))


def make_strings(rng, d):
  """A word and what is done to it, one thing after another."""
  word = start = _word(rng, 3 + d)
  told, steps = [], []
  while len(told) < 1 + d // 2:
    how, new = _edit(rng, word)
    if len(new) > 1 and new != word:
      steps.append(f'{how}: {new}.')
      told.append(how)
      word = new
  if word == start:
    return make_strings(rng, d)
  return exact(f'Take the letters {start}; {", then ".join(told)}. What do you have?', word, steps,
               wrong=start)


def _edit(rng, word):
  letter, other = rng.choice(word), rng.choice(string.ascii_lowercase)
  k = rng.randint(1, max(1, min(3, len(word) - 1)))
  return rng.choice((
    (f'replace each {letter} by {other}', word.replace(letter, other)),
    (f'delete each {letter}', word.replace(letter, '')),
    (f'double each {letter}', word.replace(letter, 2 * letter)),
    ('swap the first and the last', word[-1] + word[1:-1] + word[0]),
    (f'move the first {k} to the end', word[k:] + word[:k]),
    ('keep every second, from the first on', word[::2]),
    ('write it backwards', word[::-1]),
    (f'put {other} in front', other + word)))


def _word(rng, length):
  return ''.join(rng.choice(string.ascii_lowercase) for _ in range(length))


def make_choice(rng, d):
  """A problem with numbers and four answers to choose from."""
  problem = tasks.task(rng.choice(('add', 'subtract', 'multiply', 'sum', 'chain', 'sequence')),
                       rng.getrandbits(48), d)
  value, options = int(problem.answer), {int(problem.answer)}
  while len(options) < 4:
    options.add(value + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)))
  options = rng.sample(sorted(options), 4)
  shown = ' '.join(f'({letter}) {option}' for letter, option in zip('ABCD', options))
  right = 'ABCD'[options.index(value)]
  return exact(f'{problem.question} {shown}', right, (*problem.steps, f'{value} is ({right}).'),
               wrong=rng.choice([x for x in 'ABCD' if x != right]), kind='choice')


NOUNS = ('cat', 'dog', 'bird', 'child', 'queen', 'fish', 'wolf', 'friend')
VERBS = ('sees', 'finds', 'likes', 'feeds', 'calls', 'hears')
QUALITIES = ('red', 'small', 'old', 'kind', 'quick', 'quiet')


def make_translate(rng, d):
  """A sentence into a language invented for it, whose words and rules are told."""
  nouns, verb = rng.sample(NOUNS, 2 + d // 2), rng.choice(VERBS)
  qualities = rng.sample(QUALITIES, d // 2)
  words = [*nouns, verb, *qualities]
  foreign, lexicon = set(), {}
  while len(foreign) < len(words):
    foreign.add(''.join(rng.choice('klmnprstvz') + rng.choice('aeiou') for _ in range(2)))
  for word, strange in zip(words, rng.sample(sorted(foreign), len(words))):
    lexicon[word] = strange
  one, other = rng.sample(nouns, 2)
  quality = qualities[0] if qualities else None
  verb_last, after = d > 2 and rng.random() < 0.7, d > 3 and rng.random() < 0.7
  subject = [one, quality] if after else [quality, one]
  order = [*subject, *((other, verb) if verb_last else (verb, other))]
  rules = ['The verb comes last.'] * verb_last + ['Adjectives follow their noun.'] * after
  sentence = ' '.join(filter(None, [quality, one, verb, other]))
  answer = ' '.join(lexicon[word] for word in order if word)
  told = ', '.join(f'{word} = {lexicon[word]}' for word in rng.sample(words, len(words)))
  question = ' '.join([f'A language has the words {told}.', *rules, f'Translate: {sentence}'])
  steps = [f'{word}: {lexicon[word]}.' for word in order if word]
  return exact(question, answer, steps, wrong=' '.join(answer.split()[::-1]))


def make_task(kind):
  """The generator of one kind of `problems`."""
  def make(rng, d):
    problem = tasks.task(kind, rng.getrandbits(48), d)
    return from_task(problem)
  return make


def from_task(problem):
  return exact(problem.question, problem.answer, problem.steps)
