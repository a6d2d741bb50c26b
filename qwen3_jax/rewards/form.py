"""The form of an answer: think tags as the mode asks for, JSON of a schema, length.

Schemas are checked by jsonschema: draft 2020-12 is far more than a subset of our own would cover.
An answer may be hostile, so four of its keywords are ours (patterns run in RE2, in linear time;
equal items are found by sorting), the keywords that one answer may set in motion are counted, and
references to other documents are not followed.
"""

import functools
import json
import threading

import jsonschema
import re2
import referencing

from qwen3_jax.rewards.prose import find_words, split_sentences
from qwen3_jax.text.template import last_flag

SIZE, STEPS = 100_000, 50_000  # characters of an answer, keywords that are tried on it
EMPTY = '<think>\n\n</think>\n\n'
UNITS = ('words', 'sentences', 'characters', 'tokens')


def wants_thinking(record):
  """What the prompt asks for: the hard switch, else the last flag, else to think."""
  return record.get('enable_thinking') is not False and last_flag(record['messages']) is not False


def mode(record, response):
  """1 where the think block is as the template writes it in the mode that the prompt asks for.

  Thinking: the text begins with `<think>`, a line break, reasoning that is not empty, a line
  break, `</think>` and a blank line; more follows. Not thinking: an empty block or none, and an
  answer. No other think tag occurs.
  """
  text = response.text
  for end in ('\n', '<|im_end|>', '<|endoftext|>'):
    text = text.removesuffix(end)
  if wants_thinking(record):
    reasoning, close, rest = text.removeprefix('<think>\n').partition('\n</think>\n\n')
    good = text.startswith('<think>\n') and close and reasoning.strip()
    outside = reasoning + rest
  else:
    good, rest = True, text.removeprefix(EMPTY)
    outside = rest
  return float(bool(good and rest.strip() and '<think>' not in outside
                    and '</think>' not in outside))


def length(record, response):
  """1 where the answer's length is within record['limit'], less the further it is outside.

  The limit is {'unit': words, sentences, characters or tokens, 'min', 'max' (either or both),
  'slope'?: 0.5}; 0 is reached at `slope` times the bound beyond it. Tokens are all that the model
  drew, reasoning included; the other units count the answer alone. Raises ValueError for what is
  no such limit.
  """
  limit = record['limit']
  unit, low, high = limit.get('unit', 'words'), limit.get('min'), limit.get('max')
  if unit not in UNITS or low is None and high is None or low and high and low > high:
    raise ValueError(f"a limit is {{'unit': {', '.join(UNITS)}, 'min', 'max'}}, got {limit}")
  count = {'words': lambda text: len(find_words(text)), 'characters': len,
           'sentences': lambda text: len(split_sentences(text)),
           'tokens': lambda text: response.tokens}[unit](response.content)
  bound = low if low is not None and count < low else high
  if bound is None or (low or 0) <= count <= bound:
    return 1.0
  return max(0.0, 1 - abs(count - bound) / max(1, limit.get('slope', 0.5) * bound))


def schema(record, response):
  """1 where the answer is one JSON value, or has it in its only code fence, and it validates.

  0 also for an answer of more than 100,000 characters or 50,000 steps of validation. Raises
  ValueError where record['schema'] is no JSON Schema (draft 2020-12, patterns in RE2's syntax).
  """
  validator = _open_schema(json.dumps(record['schema'], sort_keys=True))
  if len(response.content) > SIZE:
    return 0.0
  _spent.steps = 0
  try:
    return float(validator.is_valid(find_json(response.content)))
  except (_NotJSON, _TooMuch, ArithmeticError, RecursionError, UnicodeEncodeError):
    return 0.0
  except referencing.exceptions.Unresolvable as error:
    raise ValueError(f'the schema refers to {error.ref!r}, which is not in it') from error


class _NotJSON(ValueError):
  pass


class _TooMuch(Exception):
  pass


_spent = threading.local()


def find_json(text):
  """The value of a text that is JSON or has it in its only code fence; raises ValueError."""
  text = text.strip()
  parts = text.split('```')
  if text.startswith('```') or len(parts) == 3 and text[:1] not in ('{', '[', '"'):
    if len(parts) != 3:
      raise _NotJSON(f'{len(parts) // 2} code fences; wanted one')
    text = parts[1].removeprefix('json').removeprefix('JSON')
  try:
    return json.loads(text, parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
    raise _NotJSON(f'not JSON: {error}') from error


def _refuse(word):
  raise ValueError(f'{word} is not JSON')


@functools.lru_cache(256)
def _open_schema(text):
  value = json.loads(text)
  try:
    jsonschema.Draft202012Validator.check_schema(value)
  except (jsonschema.SchemaError, RecursionError) as error:
    raise ValueError(f'not a JSON Schema: {str(error).splitlines()[0]}') from error
  return _make_validator()(value, registry=referencing.Registry())


@functools.cache
def _make_validator():
  """The validator class of draft 2020-12, with work that is bounded."""
  base = jsonschema.Draft202012Validator
  own = {'pattern': _match, 'patternProperties': _match_names, 'uniqueItems': _differ,
         'additionalProperties': _refuse_names}
  return jsonschema.validators.extend(
    base, {name: _count(rule) for name, rule in ({**base.VALIDATORS} | own).items()})


def _count(rule):
  def run(validator, value, instance, schema):
    _spent.steps += 1
    if _spent.steps > STEPS:
      raise _TooMuch
    yield from rule(validator, value, instance, schema) or ()
  return run


@functools.lru_cache(1024)
def _compile(pattern):
  options = re2.Options()
  options.log_errors = False
  try:
    return re2.compile(pattern, options)
  except re2.error as error:
    raise ValueError(f'a pattern that RE2 does not read: {pattern!r:.80}: {error}') from error


def _match(validator, pattern, instance, schema):
  if validator.is_type(instance, 'string') and not _compile(pattern).search(instance):
    yield jsonschema.ValidationError(f'does not match {pattern!r}')


def _match_names(validator, patterns, instance, schema):
  for pattern, rule in patterns.items() if validator.is_type(instance, 'object') else ():
    for name, value in instance.items():
      if _compile(pattern).search(name):
        yield from validator.descend(value, rule, path=name, schema_path=pattern)


def _refuse_names(validator, rule, instance, schema):
  if not validator.is_type(instance, 'object'):
    return
  patterns = [_compile(pattern) for pattern in schema.get('patternProperties', ())]
  for name, value in instance.items():
    if name not in schema.get('properties', ()) and not any(p.search(name) for p in patterns):
      yield from validator.descend(value, rule, path=name)


def _differ(validator, wanted, instance, schema):
  if wanted and validator.is_type(instance, 'array'):
    if len({json.dumps(_unify(item), sort_keys=True) for item in instance}) < len(instance):
      yield jsonschema.ValidationError('items are equal')


def _unify(value):
  """JSON's equality: 1.0 is 1."""
  if isinstance(value, float) and value.is_integer():
    return int(value)
  if isinstance(value, list):
    return [_unify(item) for item in value]
  if isinstance(value, dict):
    return {name: _unify(item) for name, item in value.items()}
  return value
