"""Functions to write in Python, with tests that the question does not show."""
from qwen3_jax.data.problems import WORDS
from qwen3_jax.data.query import Query, by


def _numbers(rng):
  return [rng.randint(-20, 40) for _ in range(rng.randint(0, 7))]


def _words(rng):
  return rng.sample(WORDS, rng.randint(0, 6))


# Maps: (words, expression of x, function); of numbers to numbers.
def _map(rng):
  k, m = rng.randint(2, 9), rng.randint(1, 9)
  return rng.choice((
    (f'{k} times x plus {m}', f'{k} * x + {m}', lambda x: k * x + m),
    (f'x minus {m}', f'x - {m}', lambda x: x - m), ('the square of x', 'x * x', lambda x: x * x),
    (f'the remainder of x divided by {k}', f'x % {k}', lambda x: x % k),
    (f'the larger of x and {m}', f'max(x, {m})', lambda x: max(x, m)),
    (f'the distance of x from {m}', f'abs(x - {m})', lambda x: abs(x - m))))


def _keep(rng):
  k, m = rng.randint(2, 5), rng.randint(0, 20)
  return rng.choice((
    (f'greater than {m}', f'x > {m}', lambda x: x > m),
    ('even', 'x % 2 == 0', lambda x: x % 2 == 0),
    (f'divisible by {k}', f'x % {k} == 0', lambda x: x % k == 0),
    ('negative', 'x < 0', lambda x: x < 0)))


def _fold(rng):
  return rng.choice((('the sum of', 'sum({})', sum), ('the number of', 'len(list({}))', len),
                     ('the largest of', 'max({}, default=0)', lambda row: max(row, default=0)),
                     ('the list of', 'list({})', list)))


def _text(rng):
  n = rng.randint(1, 6)
  return rng.choice((
    ('the words with their letters reversed', '[w[::-1] for w in x]',
     lambda row: [w[::-1] for w in row]),
    ('the lengths of the words', '[len(w) for w in x]', lambda row: [len(w) for w in row]),
    (f'the words longer than {n}', f'[w for w in x if len(w) > {n}]',
     lambda row: [w for w in row if len(w) > n]),
    ('the words in alphabetical order', 'sorted(x)', sorted),
    ('the words joined by a dash', '"-".join(x)', '-'.join),
    ('the first letters of the words, as one text', '"".join(w[0] for w in x)',
     lambda row: ''.join(w[0] for w in row))))


def make_code(rng, d):
  """A number mapped, then a list folded, words, a list kept and folded, all of it with a map."""
  if d == 1:
    said, expression, function = _map(rng)
    inputs = [rng.randint(-50, 50) for _ in range(6)]
  elif d == 3:
    said, expression, function = _text(rng)
    said, inputs = f'of a list x of words {said}', [_words(rng) for _ in range(6)]
  else:
    said, expression, function = _make_list(rng, d)
    inputs = [_numbers(rng) for _ in range(6)]
  cases = [{'args': [x], 'expected': function(x)} for x in inputs]
  others = [0 if isinstance(case['expected'], int) else None for case in cases]
  if others == [case['expected'] for case in cases]:  # a test that a constant passes is none
    return make_code(rng, d)
  name = rng.choice(('f', 'g', 'solve', 'work'))
  write = '```python\ndef {}(x):\n  return {}\n```'.format
  tests = {'kind': 'function', 'entry_point': name, 'cases': cases}
  return Query(f'Write a Python function {name}(x) that returns {said}.', by('code'),
               {'tests': tests}, write(name, expression), write(name, repr(others[0])),
               (f'That is {expression}.',))


def _make_list(rng, d):
  keep_said, test, keep = _keep(rng)
  fold_said, outer, fold = _fold(rng)
  if d == 2:
    return (f'{fold_said} the numbers in a list x that are {keep_said}',
            outer.format(f'[x for x in x if {test}]'),
            lambda row: fold([x for x in row if keep(x)]))
  map_said, inner, change = _map(rng)
  mapped = f'"{map_said}"'
  if d == 4:
    return (f'{fold_said} the values of {mapped} for each x of a list x that is {keep_said}',
            outer.format(f'[{inner} for x in x if {test}]'),
            lambda row: fold([change(x) for x in row if keep(x)]))
  return (f'{fold_said} the values of {mapped} for each x of a list x, without repetition and in '
          f'rising order, that are {keep_said}',
          outer.format(f'[x for x in sorted({{{inner} for x in x}}) if {test}]'),
          lambda row: fold([x for x in sorted({change(x) for x in row}) if keep(x)]))
