"""The kinds of generated problems: (rng, difficulty 1 to 5) -> question, steps, answer."""

import string
from fractions import Fraction

NAMES = ('Ada', 'Ben', 'Chen', 'Dora', 'Emil', 'Fatima', 'Goran', 'Hana', 'Ivan', 'Jun', 'Kofi',
         'Lena', 'Maya', 'Noor', 'Omar', 'Priya', 'Rosa', 'Sven', 'Tara', 'Yusuf')
THINGS = ('apples', 'books', 'candles', 'cards', 'coins', 'eggs', 'flowers', 'marbles', 'nails',
          'oranges', 'pencils', 'shells', 'stamps', 'stickers', 'stones', 'tickets')
WORDS = ('anchor', 'apple', 'banana', 'basket', 'bridge', 'butter', 'candle', 'carrot', 'castle',
         'cheese', 'cherry', 'copper', 'cotton', 'desert', 'dragon', 'engine', 'falcon', 'feather',
         'forest', 'garden', 'ginger', 'hammer', 'harbor', 'island', 'jacket', 'kettle', 'ladder',
         'lantern', 'lemon', 'letter', 'marble', 'meadow', 'mirror', 'needle', 'orange', 'pepper',
         'pillow', 'planet', 'pocket', 'rabbit', 'ribbon', 'river', 'rocket', 'saddle', 'silver',
         'spider', 'summer', 'table', 'temple', 'ticket', 'tunnel', 'valley', 'velvet', 'violin',
         'walnut', 'window', 'winter', 'yellow', 'zebra', 'zipper')


def _number(rng, digits):
  return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits - 1)


def _list(rng, difficulty):
  """Distinct numbers; negative ones from difficulty 4 on."""
  low = -50 if difficulty > 3 else 1
  return rng.sample(range(low, 10 + 30 * difficulty), 2 + difficulty + rng.randint(0, 2))


def _show(values):
  return ', '.join(map(str, values))


def _add(rng, d):
  a, b = _number(rng, d), _number(rng, max(1, d - rng.randint(0, 1)))
  question = rng.choice((
    'What is {a} + {b}?', 'Add {a} and {b}.', 'Calculate {a} + {b}.',
    'Find the sum of {a} and {b}.', 'What do you get when you add {b} to {a}?',
    'How much is {a} plus {b}?'))
  steps, carry = ['Add digit by digit from the right.'], 0
  for k in range(max(len(str(a)), len(str(b)))):
    x, y = a // 10 ** k % 10, b // 10 ** k % 10
    total = x + y + carry
    also = f' + {carry}' if carry else ''
    carry, digit = divmod(total, 10)
    then = f', carry {carry}.' if carry else '.'
    steps.append(f'{x} + {y}{also} = {total}: write {digit}{then}')
  if carry:
    steps.append(f'Write the last carry {carry} in front.')
  return question.format(a=a, b=b), [*steps, f'{a} + {b} = {a + b}.'], a + b


def _subtract(rng, d):
  a, b = sorted((_number(rng, d), _number(rng, d)), reverse=True)
  question = rng.choice((
    'What is {a} - {b}?', 'Subtract {b} from {a}.', 'Calculate {a} - {b}.',
    'Take {b} away from {a}.', 'Find the difference between {a} and {b}.',
    'How much is {a} minus {b}?'))
  steps, borrow = ['Subtract digit by digit from the right.'], 0
  for k in range(len(str(a))):
    x, y = a // 10 ** k % 10, b // 10 ** k % 10
    also, top = (f' - {borrow}' if borrow else ''), x
    borrow = int(x - y - borrow < 0)
    top += 10 * borrow
    digit = (a - b) // 10 ** k % 10
    steps.append(f'{top} - {y}{also} = {digit}' + (', with 10 borrowed.' if borrow else '.'))
  return question.format(a=a, b=b), [*steps, f'{a} - {b} = {a - b}.'], a - b


def _multiply(rng, d):
  a, b = _number(rng, (d + 2) // 2), _number(rng, (d + 1) // 2)
  question = rng.choice((
    'What is {a} * {b}?', 'Multiply {a} by {b}.', 'Calculate {a} * {b}.',
    'How much is {a} times {b}?', 'Find the product of {a} and {b}.'))
  parts = [int(x) * 10 ** k for k, x in enumerate(reversed(str(b)))]
  steps = [f'Split {b} into {" + ".join(map(str, reversed(parts)))}.'] if len(parts) > 1 else []
  steps += [f'{a} * {part} = {a * part}.' for part in parts]
  if len(parts) > 1:
    steps.append(f'Add them: {" + ".join(str(a * part) for part in parts)} = {a * b}.')
  return question.format(a=a, b=b), steps, a * b


def _divide(rng, d):
  b, quotient = rng.randint(2, 9 + 10 * (d > 3)), _number(rng, d)
  a = b * quotient + rng.randrange(b)
  question = rng.choice((
    'Divide {a} by {b}. Give the quotient and the remainder, separated by a comma.',
    'What are the quotient and the remainder of {a} / {b}? Separate them by a comma.',
    'How many times does {b} go into {a}, and what is left? Give both, separated by a comma.'))
  steps, rest = ['Bring down one digit at a time.'], 0
  for digit in str(a):
    value = rest * 10 + int(digit)
    times, rest = divmod(value, b)
    steps.append(f'{b} goes into {value} {times} times; {value} - {times * b} = {rest}.')
  steps.append(f'The quotient is {a // b} and the remainder is {rest}.')
  return question.format(a=a, b=b), steps, f'{a // b}, {rest}'


def _compare(rng, d):
  whole = _number(rng, d)
  if rng.random() < 0.5:
    a, b = whole, whole + rng.choice((-1, 1)) * rng.randint(1, 10 ** max(1, d - 1))
    steps = [f'The difference {a} - {b} = {a - b} is {"positive" if a > b else "negative"}.']
  else:
    a, b = (f'{whole}.{rng.randint(1, 10 ** rng.randint(1, 3) - 1)}' for _ in range(2))
    while Fraction(a) == Fraction(b):
      b = f'{whole}.{rng.randint(1, 999)}'
    tails = [x.split('.')[1].ljust(3, '0') for x in (a, b)]
    steps = [f'Both have the whole part {whole}.',
             f'Written with three decimals the rest is {tails[0]} and {tails[1]}.']
  larger, smaller = (a, b) if Fraction(a) > Fraction(b) else (b, a)
  wants_larger = rng.random() < 0.5
  question = rng.choice((
    'Which is {w}, {a} or {b}?', 'Which number is {w}: {a} or {b}?',
    'Compare {a} with {b}. Which one is {w}?')).format(
      a=a, b=b, w='larger' if wants_larger else 'smaller')
  answer = larger if wants_larger else smaller
  return question, [*steps, f'So {larger} is larger than {smaller}.'], answer


def _reverse(rng, d):
  word = rng.choice(WORDS) if rng.random() < 0.3 else ''.join(
    rng.choice('abcdefghijklmnopqrstuvwxyz') for _ in range(2 + d + rng.randint(0, 3)))
  question = rng.choice((
    'Reverse the string "{}".', 'Write "{}" backwards.',
    'Spell "{}" from the last letter to the first.', 'What is "{}" reversed?')).format(word)
  steps = [f'The letters are: {" ".join(word)}.',
           f'From the last to the first: {" ".join(word[::-1])}.']
  return question, steps, word[::-1]


def _count(rng, d):
  text = ' '.join(rng.sample(WORDS, d))
  letter = rng.choice(text.replace(' ', '')) if rng.random() < 0.85 else rng.choice('aeiorst')
  question = rng.choice((
    'How many times does the letter "{1}" occur in "{0}"?', 'Count the letter "{1}" in "{0}".',
    'How many "{1}" are there in "{0}"?')).format(text, letter)
  steps, total = [], 0
  for word in text.split():
    total += word.count(letter)
    steps.append(f'{"-".join(word)} has {word.count(letter)}; that makes {total}.')
  return question, steps, total


def _alphabetize(rng, d):
  words = rng.sample(WORDS, 2 + d)
  question = rng.choice((
    'Sort these words alphabetically: {}.', 'Put the words in alphabetical order: {}.',
    'Arrange from A to Z: {}.')).format(_show(words))
  return question, _selection(words), _show(sorted(words))


def _sort(rng, d):
  values, down = _list(rng, d), rng.random() < 0.4
  question = rng.choice(('Sort the list [{}] {}.', 'Put the numbers [{}] in order, {}.',
                         'Arrange [{}] {}.')).format(
    _show(values), 'from largest to smallest' if down else 'from smallest to largest')
  return question, _selection(values, down), _show(sorted(values, reverse=down))


def _selection(values, down=False):
  """Steps of a selection sort."""
  left, steps = list(values), []
  while len(left) > 1:
    best = (max if down else min)(left)
    left.remove(best)
    steps.append(f'Take {best}; left: {_show(left)}.')
  return [*steps, f'Take {left[0]}.']


def _extreme(rng, d):
  values, name = _list(rng, d), rng.choice(('largest', 'smallest'))
  question = rng.choice(('What is the {1} number in [{0}]?', 'Find the {1} element of [{0}].',
                         'Which number in [{0}] is the {1}?')).format(_show(values), name)
  best, steps = values[0], [f'Start with {values[0]}.']
  for x in values[1:]:
    better = x > best if name == 'largest' else x < best
    steps.append(f'{x}: {"better" if better else "no"}, keep {x if better else best}.')
    best = x if better else best
  return question, steps, best


def _sum(rng, d):
  values = _list(rng, d)
  question = rng.choice(('What is the sum of [{}]?', 'Add up the numbers [{}].',
                         'Find the total of [{}].')).format(_show(values))
  steps, total = [], values[0]
  for x in values[1:]:
    steps.append(f'{total} {"-" if x < 0 else "+"} {abs(x)} = {total + x}.')
    total += x
  return question, steps, total


def _filter(rng, d):
  values, bound = _list(rng, d), rng.randint(5, 15 * d)
  name, keep = rng.choice((
    ('even', lambda x: x % 2 == 0), ('odd', lambda x: x % 2 == 1),
    (f'greater than {bound}', lambda x: x > bound), (f'less than {bound}', lambda x: x < bound)))
  question = rng.choice((
    'Which numbers in [{0}] are {1}? Keep their order; write "none" if there is none.',
    'From [{0}] keep only the numbers that are {1}, in order, or write "none".',
    'List the elements of [{0}] that are {1}, in order ("none" if there is none).')).format(
      _show(values), name)
  steps = [f'{x}: {"keep" if keep(x) else "drop"}.' for x in values]
  return question, steps, _show(x for x in values if keep(x)) or 'none'


def _sequence(rng, d):
  start, step, ratio = rng.randint(1, 10 * d), rng.randint(2, 3 + 4 * d), rng.randint(2, 3)
  if rng.random() < 0.6 or d == 1:
    values = [start + k * step for k in range(5)]
    steps = [f'{b} - {a} = {step}.' for a, b in zip(values, values[1:4])]
    steps.append(f'Each term is {step} more: {values[3]} + {step} = {values[4]}.')
  else:
    values = [start * ratio ** k for k in range(5)]
    steps = [f'{b} / {a} = {ratio}.' for a, b in zip(values, values[1:4])]
    steps.append(f'Each term is {ratio} times the last: {values[3]} * {ratio} = {values[4]}.')
  question = rng.choice((
    'What comes next: {}?', 'Find the next term of the sequence {}.',
    'A sequence begins {}. Which number follows?')).format(_show(values[:4]))
  return question, steps, values[4]


def _story(rng, d):
  """A count that changes d + 1 times."""
  (one, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
  total = rng.randint(2, 12 * d)
  sentences, steps = [f'{one} has {total} {thing}.'], [f'At first {one} has {total} {thing}.']
  for _ in range(d + 1):
    n, factor = rng.randint(1, 9 * d), rng.randint(2, 3)
    much = rng.randint(1, total) if total else 0
    event = rng.choice(('gets', 'finds', 'loses', 'gives', 'times'))
    if event in ('loses', 'gives') and much:
      new, sign = total - much, f'{total} - {much}'
      told = (f'{one} gives {much} of them to {other}.' if event == 'gives'
              else f'{one} loses {much} of them.')
    elif event == 'times' and total < 400:
      new, sign = total * factor, f'{total} * {factor}'
      told = f'Then the number {"doubles" if factor == 2 else "triples"}.'
    else:
      new, sign = total + n, f'{total} + {n}'
      told = rng.choice((f'{other} gives {one} {n} more.', f'{one} finds {n} more.',
                         f'{one} buys {n} more.'))
    sentences.append(told)
    steps.append(f'{told} {sign} = {new}.')
    total = new
  sentences.append(rng.choice((f'How many {thing} does {one} have now?',
                               f'How many {thing} does {one} have in the end?')))
  return ' '.join(sentences), steps, total


def _shopping(rng, d):
  name, items = rng.choice(NAMES), rng.sample(THINGS, 1 + (d + 1) // 2)
  counts = [rng.randint(2, 3 + 3 * d) for _ in items]
  prices = [rng.randint(1, 4 + 4 * d) for _ in items]
  total = sum(n * p for n, p in zip(counts, prices))
  bought = ' and '.join(f'{n} {x} at {p} {"coin" if p == 1 else "coins"} each'
                        for n, x, p in zip(counts, items, prices))
  steps = [f'The {x} cost {n} * {p} = {n * p}.' for n, x, p in zip(counts, items, prices)]
  if len(items) > 1:
    costs = ' + '.join(str(n * p) for n, p in zip(counts, prices))
    steps.append(f'Together: {costs} = {total}.')
  if rng.random() < 0.5:
    return f'{name} buys {bought}. How many coins does that cost in all?', steps, total
  paid = total + rng.randint(1, 20 * d)
  steps.append(f'The change is {paid} - {total} = {paid - total}.')
  return (f'{name} buys {bought} and pays with {paid} coins. How many coins come back?', steps,
          paid - total)


def _travel(rng, d):
  name, speed, hours = rng.choice(NAMES), rng.randint(2, 20 * d), rng.randint(2, 3 + 2 * d)
  way = speed * hours
  ask = rng.choice(('way', 'hours', 'speed'))
  if ask == 'way':
    return (f'{name} travels at {speed} km per hour for {hours} hours. How many km is that?',
            [f'Distance is speed times time: {speed} * {hours} = {way}.'], way)
  if ask == 'hours':
    return (f'{name} travels {way} km at {speed} km per hour. How many hours does it take?',
            [f'Time is distance divided by speed: {way} / {speed} = {hours}.'], hours)
  return (f'{name} travels {way} km in {hours} hours. How many km per hour is that?',
          [f'Speed is distance divided by time: {way} / {hours} = {speed}.'], speed)


def _chain(rng, d):
  """Small numbers added and taken off in a row; no total leaves 0 to 10 d."""
  total, terms, steps = rng.randint(1, 9), [], []
  first = total
  for _ in range(rng.randint(1, 1 + d) + 1):
    n = rng.randint(1, min(9, 4 + d))
    sign = rng.choice('+-')
    sign = '+' if n > total else '-' if total + n > 10 * d else sign
    new = total + n if sign == '+' else total - n
    steps.append(f'{total} {sign} {n} = {new}.')
    terms.append(f' {sign} {n}')
    total = new
  question = rng.choice(('What is {}?', 'Calculate {}.', 'How much is {}?'))
  return question.format(f'{first}{"".join(terms)}'), steps, total


def _coin(rng, d):
  """A coin that some turn over and some do not."""
  side, steps, told = rng.choice(('heads', 'tails')), [], []
  start = side
  for name in rng.sample(NAMES, rng.randint(2, 2 + d)):
    turns = rng.random() < 0.5
    side = {'heads': 'tails', 'tails': 'heads'}[side] if turns else side
    told.append(f'{name} {"turns it over" if turns else "leaves it"}')
    steps.append(f'{told[-1]}: {side}.')
  question = rng.choice(('What does it show?', 'Which side is up now?', 'What do you see?'))
  return f'A coin shows {start}. {". ".join(told)}. {question}', steps, side


def _compass(rng, d):
  """Turns to the left, to the right and around."""
  sides, turns = ('north', 'east', 'south', 'west'), {'right': 1, 'around': 2, 'left': 3}
  side = rng.randrange(4)
  start, steps, told = sides[side], [], []
  for _ in range(rng.randint(3, 4 + d)):
    turn = rng.choice(sorted(turns))
    side = (side + turns[turn]) % 4
    told.append(turn)
    steps.append(f'{turn}: {sides[side]}.')
  question = rng.choice(('Which way do you face now?', 'Where do you look then?',
                         'Which direction is it now?'))
  return f'You face {start}. You turn {", ".join(told)}. {question}', steps, sides[side]


def _path(rng, d):
  """Roads, in any order, of which some lead on from one another."""
  stops = rng.sample(string.ascii_uppercase, 2 * d + 4)
  hops = rng.randint(2, 2 + d)
  way, others = stops[:hops + 1], stops[hops + 1:]
  roads = [*zip(way, way[1:]), *zip(others[::2], others[1::2])]
  steps = [f'From {a} to {b}.' for a, b in zip(way, way[1:])]
  rng.shuffle(roads)
  question = rng.choice((
    'Roads lead from {}. Start at {} and take {} roads. Where are you?',
    'There are roads from {}. Where do you get from {} by {} roads?'))
  return question.format(', '.join(f'{a} to {b}' for a, b in roads), way[0], hops), steps, way[-1]


KINDS = {
  'add': _add, 'subtract': _subtract, 'multiply': _multiply, 'divide': _divide,
  'compare': _compare, 'reverse': _reverse, 'count': _count, 'alphabetize': _alphabetize,
  'sort': _sort, 'extreme': _extreme, 'sum': _sum, 'filter': _filter, 'sequence': _sequence,
  'story': _story, 'shopping': _shopping, 'travel': _travel, 'chain': _chain,
  'coin': _coin, 'compass': _compass, 'path': _path,
}
