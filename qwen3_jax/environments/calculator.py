"""A calculator with exact rationals, and questions of several operations for it."""
import re
from fractions import Fraction

from qwen3_jax.environments.environment import Environment, Refused, tool
from qwen3_jax.rewards import final

LENGTH, DEPTH, BITS = 500, 50, 4096  # of an expression; of its nesting; of a value
_TOKEN = re.compile(r'\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(\*\*|//|[-+*/%^()]))')


class Calculator(Environment):
  """Settings: `answer`, the number asked for."""
  tools = (tool(
    'calculate', 'Evaluates an arithmetic expression exactly: numbers, + - * / // % ** and '
    'parentheses. The result is an integer or a fraction.', ['expression'],
    expression={'type': 'string'}),)

  def begin(self, settings):
    self.wanted = settings['answer']

  def call(self, name, arguments):
    return show(evaluate(arguments['expression']))

  def goal(self):
    return {'goal': float(final.agree(self.answer, self.wanted))}


def evaluate(expression):
  """The exact value of an expression as a Fraction, with Python's precedence; ^ is a power.

  Raises Refused where it is no expression, has no value, or is longer, deeper or larger than the
  limits above.
  """
  if len(expression) > LENGTH:
    raise Refused(f'the expression has {len(expression)} characters, at most {LENGTH} can be read')
  reader = _Reader(_split(expression))
  value = reader.sum()
  if reader.next is not None:
    raise Refused(f'cannot read the expression from {reader.next!s} on')
  return value


def show(value):
  """The value as text; a fraction with its decimals behind it."""
  if value.denominator == 1:
    return str(value.numerator)
  large = value.numerator.bit_length() - value.denominator.bit_length() > 1000
  return str(value) if large else f'{value} ({value.numerator / value.denominator:.10g})'


def _split(expression):
  """The tokens: Fractions and operators, and None at the end."""
  tokens, place, expression = [], 0, expression.rstrip()
  while place < len(expression):
    found = _TOKEN.match(expression, place)
    if not found:
      raise Refused(f'cannot read {expression[place:place + 20]!r}')
    tokens.append(Fraction(found[1]) if found[1] else '**' if found[2] == '^' else found[2])
    place = found.end()
  return [*tokens, None]


class _Reader:
  """Recursive descent over the tokens; every value it makes is bounded."""

  def __init__(self, tokens):
    self.tokens, self.place, self.depth = tokens, 0, 0

  @property
  def next(self):
    return self.tokens[self.place]

  def take(self):
    self.place += 1
    return self.tokens[self.place - 1]

  def sum(self):
    value = self.product()
    while self.next in ('+', '-'):
      sign, other = self.take(), self.product()
      value = _bound(value + other if sign == '+' else value - other)
    return value

  def product(self):
    value = self.signed()
    while self.next in ('*', '/', '//', '%'):
      value = _bound(_apply(self.take(), value, self.signed()))
    return value

  def signed(self):
    sign = 1
    while self.next in ('+', '-'):
      sign *= -1 if self.take() == '-' else 1
    return sign * self.power()

  def power(self):
    base = self.atom()
    if self.next != '**':
      return base
    self.take()
    self.deepen(1)
    exponent = self.signed()
    self.deepen(-1)
    return _raise(base, exponent)

  def atom(self):
    token = self.take()
    if isinstance(token, Fraction):
      return token
    if token != '(':
      raise Refused(f'wanted a number or "(", got {token or "the end of the expression"}')
    self.deepen(1)
    value = self.sum()
    if self.take() != ')':
      raise Refused('a "(" is not closed')
    self.deepen(-1)
    return value

  def deepen(self, by):
    self.depth += by
    if self.depth > DEPTH:
      raise Refused(f'the expression is nested more than {DEPTH} deep')


def _apply(operator, one, other):
  if operator == '*':
    return one * other
  if other == 0:
    raise Refused('division by zero')
  if operator == '/':
    return one / other
  return Fraction(one // other) if operator == '//' else one % other


def _raise(base, exponent):
  if exponent.denominator != 1:
    raise Refused(f'the exponent {show(exponent)} is no integer')
  if base == 0 and exponent < 0:
    raise Refused('division by zero')
  size = max(base.numerator.bit_length(), base.denominator.bit_length())
  if abs(base) != 1 and (size - 1) * abs(exponent) > BITS:
    raise Refused('the number is too large')
  return _bound(base ** (exponent.numerator % 2 if abs(base) == 1 else exponent.numerator))


def _bound(value):
  if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
    raise Refused('the number is too large')
  return value


# Questions.

def make(rng, difficulty):
  """(question, settings, plan): an expression of `difficulty` + 1 operations, one call for each."""
  expression, value, steps = _tree(rng, difficulty + 1, difficulty)
  question = rng.choice((
    'What is {}? Use the calculator for every operation.', 'Calculate {} with the calculator.',
    'Find the exact value of {}. Use the calculator, one operation at a time.'))
  final = str(value)
  plan = [(f'The next operation is {step}.', [{'name': 'calculate',
                                               'arguments': {'expression': step}}])
          for step in steps]
  plan.append((f'All operations are done, the result is {final}.', f'The answer is {final}.'))
  return question.format(expression), {'answer': final, 'turns': len(plan) + 3}, plan


def _tree(rng, count, difficulty):
  """(text, value, steps) of a random expression of `count` operations, inner ones first."""
  if not count:
    value = Fraction(rng.randint(2, 10 ** min(3, 1 + (difficulty + 1) // 2)))
    return str(value), value, []
  left = rng.randint(0, count - 1)
  (one, x, before), (other, y, then) = (_tree(rng, n, difficulty) for n in (left, count - 1 - left))
  signs = '+-*/' if difficulty > 3 and y != 0 else '+-*'
  sign = rng.choice(signs)
  value = {'+': x + y, '-': x - y, '*': x * y}[sign] if sign != '/' else x / y
  one, other = (f'({text})' if ' ' in text else text for text in (one, other))
  return f'{one} {sign} {other}', value, [*before, *then, f'{_operand(x)} {sign} {_operand(y)}']


def _operand(value):
  return f'({value})' if value < 0 or value.denominator > 1 else str(value)
