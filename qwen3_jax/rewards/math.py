"""Whether two mathematical answers agree: exactly where that can be told, else by math-verify."""

import functools
import logging
import re
from fractions import Fraction

from qwen3_jax.rewards import answers, exact, worker
from qwen3_jax.rewards.answers import extract

__all__ = ['agree', 'extract', 'same']
LENGTH = 2000


def agree(prediction, reference, kind=None, deadline=1.0):
  """Whether the final answer in `prediction` (an answer or a whole solution) is `reference`.

  `kind` is 'choice' (a letter A to J), 'text' (equal words) or None, which finds out. First an
  exact comparison (`exact`): integers of any length, fractions, decimals, roots, polynomials,
  tuples, intervals, sets; units, currency and degrees do not count, 25 % is 25 or 0.25, and no
  number is rounded. What it cannot read goes to math-verify, where installed, in a process that is
  killed after `deadline` seconds (then: no).
  """
  if kind not in (None, 'choice', 'text'):
    raise ValueError(f"kind must be None, 'choice' or 'text', got {kind!r}")
  wanted = answers.find_boxed(reference)
  wanted = (extract(reference) if wanted is None and '####' in reference else wanted) or reference
  answer = extract(prediction)
  if answer is None:
    return False
  letter = answers.find_choice(wanted) if kind in (None, 'choice') else None
  if letter and (kind == 'choice' or len(answers.plain(wanted)) == 1):
    return (answers.find_choice(answer) or answers.find_choice(prediction[-500:])) == letter
  bare = '\n' not in prediction and len(prediction) <= 300 and _spell(prediction) == _spell(wanted)
  return bare or same(answer, wanted, kind, deadline)


def same(answer, wanted, kind=None, deadline=1.0):
  """`agree` for two answers that are already extracted."""
  if not wanted.strip() or len(answer) > LENGTH or len(wanted) > LENGTH:
    return False
  if _spell(answer) == _spell(wanted):
    return True
  if kind == 'text' or not _FORMULA.search(wanted):
    return answers.plain(answers.clean(answer)) == answers.plain(answers.clean(wanted))
  verdict = compare(answer, wanted)
  if verdict is not None:
    return verdict
  if not worker.available():
    _say_once('math-verify is not installed: answers that cannot be read exactly count as wrong '
              '(pip install math-verify)')
    return False
  return bool(worker.compare(_dress(answer), _dress(wanted), deadline))


_FORMULA = re.compile(r'\d|[\\^=<>+*/|]|^[^\w]*\w[^\w]*$')  # what is more than words
_PROSE = re.compile(r'[^\\^={<>]*[^\W\d_]{2}[^\\^={<>]*|[^\x00-\x7f]*\d[^\x00-\x7f]*')
_BASE = re.compile(r'(-?[\dA-F]+(?:\.[\dA-F]+)?)\s*_\s*\{?(?:\\text\{)?(\d+|[a-z]+)\}*')
_SCIENTIFIC = re.compile(r'[-+]?(?:\d+(?:\.\d+)?|\.\d+)[eE][-+]?\d{1,3}')


def _spell(text):
  return answers.clean(answers.TEXT.sub(r'\1', text)).replace(' ', '')


def compare(answer, wanted):
  """True or False where both texts can be read exactly, None where one cannot."""
  based, based_ = (_BASE.fullmatch(answers.clean(text)) for text in (wanted, answer))
  if based:
    return based.groups() == based_.groups() if based_ else based[1] == _spell(answer)
  goal, given = _read(wanted), _read(answer)
  if goal is None:
    return None
  if given is None:
    number = answers.last_number(answer)
    if exact.number(goal[0]) is None or number is None or not _PROSE.fullmatch(answer):
      return None
    given = _read(number)
    if given is None:
      return None
  (goal, percent), (given, percent_) = goal, given
  if goal == given:
    return True
  one, other = exact.number(goal), exact.number(given)
  if one is not None and other is not None:
    return percent != percent_ and (one == other * 100 if percent else other == one * 100)
  if one is not None and given[0] == 'set' and _decimal_comma(answer) is not None:
    return _decimal_comma(answer) == one
  return False


@functools.lru_cache(4096)
def _read(text):
  """(value, is it a percentage), or None."""
  text = answers.clean(text)
  short = answers.strip_units(text)
  percent = '%' in short or 'percent' in text
  if _SCIENTIFIC.fullmatch(short):  # in a formula this would be a product with e
    value = Fraction(short)
    return ('expression', frozenset({((1, ()), value)} if value else ())), percent
  try:
    return exact.parse(short.replace('%', ' ').strip()), percent
  except (exact.Unknown, ZeroDivisionError):
    return None


def _decimal_comma(text):
  whole, comma, part = answers.clean(text).partition(',')
  try:
    return Fraction(f'{whole}.{part}') if comma and part.isdigit() else None
  except ValueError:
    return None


def _dress(text):
  """Text as math-verify wants formulas: between dollars."""
  return text if '$' in text or '\\boxed' in text else f'${text}$'


@functools.cache
def _say_once(message):
  logging.getLogger(__name__).warning(message)
