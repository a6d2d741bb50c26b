"""Exact values of short mathematical answers: rational polynomials, roots, tuples, sets, text.

A number or expression becomes a sum of terms `coefficient * sqrt(n) * product of symbol^power` with
rational coefficients, as a dict from (n, ((symbol, power), ...)) to Fraction: equal dicts are equal
values, for n is squarefree and pi, e and i (i^2 = -1) are symbols like x. What cannot be written so
(sines, logarithms, quotients of sums) raises Unknown. Input may be hostile: nothing is evaluated,
and text, integers, exponents and the number of terms are bounded (Unknown beyond).
"""

import re
from fractions import Fraction
from math import comb, factorial

LENGTH, DIGITS, BITS, TERMS, DEPTH = 1000, 1200, 8192, 64, 40
_TOKEN = re.compile(r'\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\*\*|\S')
_SYMBOLS = {'\\pi': 'pi', 'π': 'pi', '\\infty': 'oo', '∞': 'oo', '\\theta': 'theta',
            '\\alpha': 'alpha', '\\beta': 'beta', '\\lambda': 'lambda', '\\phi': 'phi',
            '\\omega': 'omega', '\\mu': 'mu', '\\gamma': 'gamma', '\\epsilon': 'epsilon'}
_CLOSING = {'(': ')]', '[': '])', '\\{': ('\\}',)}


class Unknown(ValueError):
  """The text is no expression of this module's kind, or too large."""


def parse(text):
  """The value of `text`: a hashable ('expression' | 'list' | 'set' | 'union' ..., parts).

  ('expression', frozenset of terms); ('sequence', opening + closing bracket, values) for tuples and
  intervals; ('set', frozenset of values), also for a bare list; ('union', frozenset of values);
  ('matrix', rows); ('relation', operator, left, right) for an inequality or an equation that names
  no single symbol. Of `x = 3` it is the value of 3. Raises Unknown.
  """
  if len(text) > LENGTH:
    raise Unknown('too long')
  reader = _Reader(_TOKEN.findall(text))
  value = reader.read_top()
  if reader.place < len(reader.tokens):
    raise Unknown(f'trailing {reader.peek()!r}')
  return value


def number(value):
  """The Fraction that a parsed value is, or None."""
  if value[0] != 'expression':
    return None
  terms = dict(value[1])
  if not terms:
    return Fraction(0)
  return terms.get((1, ())) if len(terms) == 1 else None


def _fold(terms):
  terms = {key: value for key, value in terms.items() if value}
  if len(terms) > TERMS:
    raise Unknown('too many terms')
  if any(_bits(value) > BITS for value in terms.values()):
    raise Unknown('too large')
  return terms


def _bits(value):
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _add(one, other, sign=1):
  total = dict(one)
  for key, value in other.items():
    total[key] = total.get(key, 0) + sign * value
  return _fold(total)


def _root(n):
  """(outside, squarefree inside) of the square root of a positive integer below 10^12."""
  if n >= 10 ** 12:
    raise Unknown('root of a large number')
  outside, divisor = 1, 2
  while divisor * divisor <= n and divisor < 10 ** 4 + 10:
    while n % (divisor * divisor) == 0:
      n //= divisor * divisor
      outside *= divisor
    divisor += 1
  whole = round(n ** 0.5)
  return (outside * whole, 1) if whole * whole == n else (outside, n)


def _multiply(one, other):
  if len(one) * len(other) > TERMS * TERMS:
    raise Unknown('too many terms')
  total = {}
  for (root, powers), a in one.items():
    for (root_, powers_), b in other.items():
      outside, inside = _root(root * root_)
      factor = a * b * outside
      exponents = dict(powers)
      for symbol, power in powers_:
        exponents[symbol] = exponents.get(symbol, 0) + power
      turns = exponents.pop('i', 0) % 4
      factor *= -1 if turns >= 2 else 1
      if turns % 2:
        exponents['i'] = 1
      key = inside, tuple(sorted((s, p) for s, p in exponents.items() if p))
      total[key] = total.get(key, 0) + factor
  return _fold(total)


def _invert(terms):
  """One over a single term, or over a sum of two roots of rationals."""
  if len(terms) == 2 and all(not powers or powers == (('i', 1),) for _, powers in terms):
    (first, a), (second, b) = terms.items()
    conjugate = {first: a, second: -b}
    norm = _multiply(terms, conjugate)
    if set(norm) == {(1, ())}:
      return _multiply(conjugate, {(1, ()): 1 / norm[1, ()]})
  if len(terms) != 1:
    raise Unknown('division by a sum')
  ((root, powers), value), = terms.items()
  if dict(powers).get('oo'):
    raise Unknown('division by infinity')
  inverse = {(1, tuple((s, -p) for s, p in powers)): 1 / (value * root)}
  return _multiply(inverse, {(root, ()): Fraction(1)})


def _power(base, exponent):
  value = _constant(exponent)
  if value.denominator == 2:
    return _power(_square_root(base), _make(value.numerator))
  if value.denominator != 1 or abs(value) > 2000:
    raise Unknown('exponent')
  times = int(value)
  if times < 0:
    return _power(_invert(base), _make(-times))
  if len(base) > 1 and times > 12:
    raise Unknown('large power of a sum')
  if len(base) == 1 and max(map(_bits, base.values())) * times > BITS:
    raise Unknown('too large')
  result = _make(1)
  for bit in bin(times)[2:]:
    result = _multiply(result, result)
    if bit == '1':
      result = _multiply(result, base)
  return result


def _square_root(terms):
  value = _constant(terms)
  sign = value < 0
  value = abs(value)
  outside, inside = _root(value.numerator * value.denominator) if value else (0, 1)
  return _fold({(inside, (('i', 1),) if sign else ()): Fraction(outside, value.denominator)})


def _constant(terms):
  value = number(('expression', terms.items()))
  if value is None:
    raise Unknown('not a number')
  return value


def _make(value):
  return {(1, ()): Fraction(value)} if value else {}


class _Reader:
  """A recursive descent over the tokens of one answer."""

  def __init__(self, tokens):
    self.tokens, self.place, self.depth = tokens, 0, 0

  def peek(self, ahead=0):
    place = self.place + ahead
    return self.tokens[place] if place < len(self.tokens) else None

  def take(self, *wanted):
    token = self.peek()
    if token is None or wanted and token not in wanted:
      raise Unknown(f'{token!r} where {wanted} should be')
    self.place += 1
    return token

  def read_top(self):
    """Values joined by commas, `and`, `or` (a set) or by unions."""
    values = [self.read_relation()]
    joint = None
    while self.peek() in (',', ';', '\\cup', '∪', '&'):
      token = self.take()
      joint = 'union' if token in ('\\cup', '∪') else joint or 'set'
      values.extend(self.read_relation())
    values = [part for value in values for part in ([value] if isinstance(value, tuple) else value)]
    return values[0] if len(values) == 1 else (joint or 'set', frozenset(values))

  def read_relation(self):
    """[value] or, of `a \\pm b`, both; `x = 3` and `x \\in S` are what they say of x."""
    names = []
    if self.peek() == '=':
      self.take()
    left = self.read_value()
    while self.peek() in ('=', '\\in', '∈'):
      self.take()
      names.append(left)
      left = self.read_value()
    if self.peek() in ('<', '>', '\\le', '\\ge', '\\ne', '\\approx', '\\equiv'):
      raise Unknown('an inequality')
    if names and not all(_is_name(name) for name in names):
      if any(number(name) is None for name in names) and number(left) is not None:
        raise Unknown('an equation')
    return left if isinstance(left, list) else [left]

  def read_value(self):
    """A bracketed sequence, a set, a matrix or an expression."""
    start = self.place
    token = self.peek()
    if token == '\\begin':
      return self.read_matrix()
    if token in ('\\emptyset', '\\varnothing', '∅'):
      self.take()
      return 'set', frozenset()
    if token in _CLOSING:
      try:
        return self.read_sequence()
      except Unknown:
        self.place = start
    return self.read_expression()

  def read_sequence(self):
    self.deepen()
    opening = self.take()
    values = []
    while self.peek() not in (*_CLOSING[opening], None):
      values.extend(self.read_relation())
      if self.peek() is None or self.peek() not in _CLOSING[opening]:
        self.take(',', ';')
    closing = self.take(*_CLOSING[opening])
    self.depth -= 1
    if opening == '\\{':
      return 'set', frozenset(values)
    if len(values) < 2 or self.peek() not in (None, ',', ';', '=', ')', ']', '\\}', '\\cup', '∪'):
      raise Unknown('brackets of an expression')
    return 'sequence', opening + closing, tuple(values)

  def read_matrix(self):
    self.take('\\begin')
    kind = self.read_word()
    if kind.strip('*') not in ('pmatrix', 'bmatrix', 'matrix', 'vmatrix', 'array'):
      raise Unknown(kind)
    rows = [[]]
    while self.peek() != '\\end':
      if self.peek() == '\\\\':
        self.take()
        rows.append([])
      elif self.peek() == '&':
        self.take()
      else:
        rows[-1].append(self.read_expression())
    self.take()
    if self.read_word() != kind:
      raise Unknown('unclosed matrix')
    rows = tuple(tuple(row) for row in rows if row)
    return 'matrix', rows

  def read_word(self):
    self.take('{')
    word = ''
    while self.peek() not in ('}', None):
      word += self.take()
    self.take('}')
    return word

  def read_expression(self):
    """A sum; of `a \\pm b` a list of two."""
    terms, sign = self.read_sum()
    if sign is None:
      return 'expression', frozenset(terms.items())
    return [('expression', frozenset(_add(terms, sign, way).items())) for way in (1, -1)]

  def read_sum(self, double=True):
    self.deepen()
    total, sign, first, both = {}, 1, True, None
    while first or self.peek() in ('+', '-', '\\pm', '±'):
      token = self.peek()
      sign = 1
      if token in ('\\pm', '±'):
        if both is not None or not double:
          raise Unknown('several signs')
        self.take()
        both = self.read_product()
      else:
        if token in ('+', '-'):
          sign = 1 if self.take() == '+' else -1
        total = _add(total, self.read_product(), sign)
      first = False
    self.depth -= 1
    return total, both

  def read_product(self):
    value = self.read_signed()
    while True:
      token = self.peek()
      if token in ('*', '\\cdot', '\\times', '×', '·'):
        self.take()
        value = _multiply(value, self.read_signed())
      elif token in ('/', '÷', '\\div'):
        self.take()
        value = _multiply(value, self.invert(self.read_signed()))
      elif self.starts_factor(token):
        mixed = (token == '\\frac' and self.tokens[self.place - 1].isdigit()
                 and (self.place < 2 or self.tokens[self.place - 2] not in ('^', '**', '}')))
        part = self.read_factor()
        whole = number(('expression', value.items()))
        if mixed and whole is not None and whole.denominator == 1:
          value = _add(value, part)
        else:
          value = _multiply(value, part)
      else:
        return value

  def read_signed(self):
    if self.peek() in ('+', '-'):
      sign = 1 if self.take() == '+' else -1
      return _multiply(_make(sign), self.read_factor())
    return self.read_factor()

  @staticmethod
  def invert(terms):
    if not terms:
      raise Unknown('division by zero')
    return _invert(terms)

  @staticmethod
  def starts_factor(token):
    return token is not None and (
      token in ('(', '{', '\\frac', '\\sqrt', '\\binom', '√', '|') and token != '|'
      or token in _SYMBOLS or (token.isalpha() and token.isascii()))

  def read_factor(self):
    base = self.read_atom()
    while self.peek() in ('^', '**', '!'):
      if self.take() == '!':
        n = _constant(base)
        if n.denominator != 1 or not 0 <= n <= 200:
          raise Unknown('factorial')
        base = _make(factorial(int(n)))
      else:
        base = _power(base, self.read_argument())
    return base

  def read_argument(self):
    """A group in braces or brackets, or one token, of whose digits LaTeX takes the first."""
    token = self.peek()
    if token in ('{', '(') or token in ('\\frac', '\\sqrt'):
      return self.read_atom()
    if token == '-':
      self.take()
      return _multiply(_make(-1), self.read_atom())
    return self.read_atom()

  def read_digit(self):
    """An argument of \\frac and \\sqrt: one digit where there are no braces."""
    token = self.peek()
    if token is not None and token.isdigit() and len(token) > 1:
      self.tokens[self.place:self.place + 1] = [token[0], token[1:]]
    return self.read_argument()

  def read_atom(self):
    self.deepen()
    value = self.read_unit()
    self.depth -= 1
    return value

  def read_unit(self):
    token = self.take()
    if token[0].isdigit() or token[0] == '.':
      if not token.isascii() or len(token) > DIGITS or token == '.':
        raise Unknown('no number, or too many digits')
      return _make(Fraction(token))
    if token in ('(', '{', '['):
      value, both = self.read_sum(double=False)
      self.take({'(': ')', '{': '}', '[': ']'}[token])
      return value
    if token == '\\frac':
      top = self.read_digit()
      return _multiply(top, self.invert(self.read_digit()))
    if token in ('\\sqrt', '√'):
      if self.peek() == '[':
        return self.read_higher_root()
      return _square_root(self.read_digit() if token == '\\sqrt' else self.read_argument())
    if token == '\\binom':
      top, bottom = (_constant(self.read_digit()) for _ in range(2))
      if top.denominator != 1 or bottom.denominator != 1 or not 0 <= bottom <= top <= 500:
        raise Unknown('binomial coefficient')
      return _make(comb(int(top), int(bottom)))
    if token in _SYMBOLS or (token.isascii() and token.isalpha()):
      return {(1, ((_SYMBOLS.get(token, token), 1),)): Fraction(1)}
    raise Unknown(f'{token!r}')

  def read_higher_root(self):
    self.take('[')
    degree = self.read_sum(double=False)[0]
    self.take(']')
    degree, value = _constant(degree), _constant(self.read_digit())
    if degree == 2:
      return _square_root(_make(value))
    if degree.denominator != 1 or not 2 < degree <= 20 or value.denominator != 1 or value < 0:
      raise Unknown('root')
    if value >= 10 ** 15:
      raise Unknown('root of a large number')
    whole = round(int(value) ** (1 / int(degree)))
    if whole ** int(degree) != value:
      raise Unknown('irrational root')
    return _make(whole)

  def deepen(self):
    self.depth += 1
    if self.depth > DEPTH:
      raise Unknown('too deep')


def _is_name(value):
  """A single symbol or a function of one, `x` or `f(x)`, or a tuple of symbols."""
  if isinstance(value, list):
    return False
  if value[0] == 'sequence':
    return all(_is_name(part) for part in value[2])
  if value[0] != 'expression' or len(value[1]) != 1:
    return False
  ((root, powers), factor), = value[1]
  return root == 1 and factor == 1 and 1 <= len(powers) <= 2 and all(p == 1 for _, p in powers)
