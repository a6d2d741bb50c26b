"""Final answers of generated problems, compared exactly: values, lists, words, a sum to reach."""
import re
from fractions import Fraction

TAIL = 20000  # characters of the end of an answer that are read
_STATED = re.compile(r'answer(?: is)?\s{0,20}:?\s{0,20}([^\n]+)', re.I)
_BOXED = re.compile(r'\\boxed\{([^{}]*)\}')
_HUGE = re.compile(r'e[-+]?[\d_]{4,}|[\d_]{400}', re.I)  # Fraction would write these numbers out
_TOKEN = re.compile(r'\s*(\d{1,9}|[-+*/()])')


def find(text):
  """What `text` ends in: the last \\boxed{...}, or the last 'answer:' or 'answer is', or line."""
  text = text[-TAIL:]
  lines = text.strip().splitlines()
  return (_BOXED.findall(text) or _STATED.findall(text) or lines[-1:] or [''])[-1]


def agree(text, answer):
  """Whether `text`, an answer or a whole solution, ends in `answer` (see `find`).

  Numbers are compared by value (1,024 = 1024 = 1024.0), lists by element, else the words without
  regard to case, quotes and a final full stop.
  """
  return _normal(find(text)) == _normal(answer)


def _normal(text):
  text = re.sub(r'[*`"\'$]', '', text).strip().rstrip('.').strip()
  listed = re.fullmatch(r'\[?([^\[\]]*)\]?', text)
  text = listed[1] if listed else text
  parts = re.split(r',\s+|;\s*', text.strip())
  return tuple(_value(part.strip()) for part in parts)


def _value(text):
  plain = re.sub(r'(?<=\d),(?=\d{3}(?!\d))', '', text)
  try:
    return Fraction('' if _HUGE.search(plain) else plain)
  except (ValueError, ZeroDivisionError):
    return ' '.join(text.casefold().split())


def reaches(text, numbers, target):
  """Whether `text` ends in an expression of `numbers`, each used once, that is worth `target`.

  The expression has + - * / and parentheses; what follows an equals sign is not read.
  """
  given = find(text).replace('\\times', '*').replace('\\cdot', '*').replace('\\div', '/')
  given = given.translate(str.maketrans('×·÷−', '**/-')).partition('=')[0].strip(' .`*$"\'')
  tokens, place = [], 0
  while place < len(given):
    token = _TOKEN.match(given, place)
    if not token or len(tokens) > 100:
      return False
    tokens.append(token[1])
    place = token.end()
  if sorted(int(t) for t in tokens if t.isdigit()) != sorted(numbers):
    return False
  try:
    value = _sum(tokens)
  except (IndexError, ValueError, ZeroDivisionError):
    return False
  return not tokens and value == target


def _sum(tokens):
  """The value of a sum at the start of `tokens`, which are taken off; ValueError where none is."""
  value = _product(tokens)
  while tokens and tokens[0] in '+-':
    value = value + _product(tokens) if tokens.pop(0) == '+' else value - _product(tokens)
  return value


def _product(tokens):
  value = _factor(tokens)
  while tokens and tokens[0] in '*/':
    value = value * _factor(tokens) if tokens.pop(0) == '*' else value / _factor(tokens)
  return value


def _factor(tokens):
  token = tokens.pop(0)
  if token != '(':
    return Fraction(int(token))
  value = _sum(tokens)
  if tokens.pop(0) != ')':
    raise ValueError('a parenthesis that does not close')
  return value
