"""Think tags, schemas and lengths, right and wrong."""

import json

import pytest

from qwen3_jax.rewards import form
from qwen3_jax.rewards.response import Response

EMPTY = '<think>\n\n</think>\n\n'
GOOD = '<think>\nLet me see.\n</think>\n\nIt is 4.'


def mode(text, question='How much?', **more):
  record = {'messages': [{'role': 'user', 'content': question}], **more}
  return form.mode(record, Response.read(text, 10))


@pytest.mark.parametrize('asked', [
  {}, {'question': 'Really? /think'}, {'question': '/no_think or /think'},
  {'enable_thinking': True}, {'question': 'the folder a/no_think'}])
def test_thinking_mode_wants_one_full_block(asked):
  assert mode(GOOD, **asked) == mode(GOOD + '<|im_end|>\n', **asked) == 1
  call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
  assert mode(f'<think>\nhm\n</think>\n\n{call}', **asked) == 1
  for wrong in ('It is 4.', '', EMPTY + 'It is 4.', '<think>\n \n\n</think>\n\nIt is 4.',
                '<think>\nLet me', '<think>\nLet me</think>\n\nIt', '<think>Let\n</think>\n\nIt',
                '<think>\nLet me\n</think>\nIt is 4.', '<think>\nLet me\n</think>\n\n<|im_end|>',
                f'Well, {GOOD}', f'\n{GOOD}', 'Let me.\n</think>\n\nIt is 4.', GOOD + GOOD,
                '<think>\n<think>\nLet me.\n</think>\n\nIt is 4.', GOOD + '\n</think>\n\n5',
                '<think>\nIn </think> out\n</think>\n\nIt is 4.', GOOD + '<think>'):
    assert mode(wrong, **asked) == 0, wrong


@pytest.mark.parametrize('asked', [
  {'question': 'Really? /no_think'}, {'enable_thinking': False},
  {'question': 'Really? /think', 'enable_thinking': False}, {'question': '/think or /no_think'}])
def test_plain_mode_wants_no_reasoning(asked):
  assert mode('It is 4.', **asked) == mode(EMPTY + 'It is 4.<|im_end|>', **asked) == 1
  for wrong in (GOOD, '', EMPTY, EMPTY + EMPTY + 'x', '<think>\n</think>\n\nx', 'x\n</think>\n\ny',
                EMPTY + 'Well <think>\nso\n</think>\n\nx', '<think>It is 4.'):
    assert mode(wrong, **asked) == 0, wrong


PERSON = {
  'type': 'object', 'required': ['name', 'age'], 'additionalProperties': False,
  'properties': {
    'name': {'type': 'string', 'pattern': '^[A-Z][a-z]+$'},
    'age': {'type': 'integer', 'minimum': 0},
    'tags': {'type': 'array', 'uniqueItems': True, 'items': {'$ref': '#/$defs/tag'}}},
  'patternProperties': {'^x-': {'type': 'number'}}, '$defs': {'tag': {'enum': ['a', 'b', 1]}}}


def schema(content, wanted=PERSON):
  return form.schema({'schema': wanted}, Response.read(content, 10))


@pytest.mark.parametrize('content, good', [
  ('{"name": "Ada", "age": 36}', 1), (' {"name": "Ada", "age": 36, "x-y": 1.5}\n', 1),
  ('Here it is:\n```json\n{"name": "Ada", "age": 36, "tags": ["a", 1]}\n```\nDone.', 1),
  ('```\n{"name": "Ada", "age": 36}\n```', 1), ('{"name": "Ada", "age": 36.0}', 1),
  ('{"name": "Ada"}', 0), ('{"name": "ada", "age": 36}', 0), ('{"name": "Ada", "age": -1}', 0),
  ('{"name": "Ada", "age": 36, "more": 1}', 0), ('{"name": "Ada", "age": 36, "x-y": "1"}', 0),
  ('{"name": "Ada", "age": 36, "tags": ["a", "a"]}', 0), ('{"name": "Ada", "age": true}', 0),
  ('{"name": "Ada", "age": 36, "tags": [1, 1.0]}', 0), ('{"name": "Ada", "age": 36} so', 0),
  ('{"name": "Ada", "age": 36, "tags": ["c"]}', 0), ('{"name": "Ada", "age": NaN}', 0),
  ('```json\n{}\n```\n```json\n{"name": "Ada", "age": 36}\n```', 0), ('[]', 0), ('', 0), ('```', 0),
  ('{"name": "Ada", "age": 1' + '0' * 5000 + '}', 0), ('[' * 5000, 0), ('"\\ud800"', 0)])
def test_schema(content, good):
  assert schema(content) == good


def test_schema_judges_the_answer_not_the_reasoning():
  assert schema('<think>\n{"age"\n</think>\n\n{"name": "Ada", "age": 36}') == 1
  assert schema('<think>\n{"name": "Ada", "age": 36}\n</think>\n\nThere.') == 0


def test_schema_work_is_bounded_on_hostile_answers():
  assert schema(json.dumps('a' * 50000 + '!'), {'type': 'string', 'pattern': '^(a+)+$'}) == 0
  assert schema('[' + '[[1]],[["a"]],' * 5000 + '0]', {'uniqueItems': True}) == 0
  assert schema('"' + 'a' * 100_000 + '"', {}) == 0
  tree = {'type': 'array', 'anyOf': [{'items': {'$ref': '#'}}, {'items': {'$ref': '#'}, 'not': {}}]}
  assert schema('[' * 40 + '1' + ']' * 40, tree) == 0
  assert schema('[' * 900 + ']' * 900, {'items': {'$ref': '#'}}) == 0
  assert schema('1e400', {'multipleOf': 0.01}) == 0
  assert schema('"\\ud800"', {'pattern': 'a'}) == 0


@pytest.mark.parametrize('wanted, complaint', [
  ({'type': 'objekt'}, 'not a JSON Schema'), ({'pattern': '(?=a)b'}, 'a pattern that RE2'),
  ({'$ref': 'http://127.0.0.1:9/schema.json'}, "refers to 'http://127.0.0.1:9/schema.json'")])
def test_bad_schemas_are_the_record_s_fault(wanted, complaint):
  with pytest.raises(ValueError, match=complaint):
    schema('"ab"', wanted)


def length(content, tokens=10, **limit):
  return form.length({'limit': limit}, Response.read(content, tokens))


def test_length_falls_with_the_distance_from_the_limit():
  words = lambda n: 'word ' * n
  assert [length(words(n), min=100, max=200) for n in (100, 150, 200)] == [1, 1, 1]
  assert length(words(75), min=100) == 0.5 and length(words(50), min=100) == 0
  assert length(words(250), max=200, slope=0.25) == 0
  assert length(words(225), max=200, slope=0.25) == 0.5 and length('', max=200) == 1
  assert length(f'<think>\n{words(50)}\n</think>\n\n{words(9)}', max=10) == 1
  assert length('One. Two! Dr. Three?', unit='sentences', min=3, max=3) == 1
  assert length('今天很好', unit='words', min=4, max=4) == 1
  assert length('今天很好', unit='characters', max=3) == pytest.approx(1 - 1 / 1.5)
  assert length('x', unit='tokens', max=20) == 1 and length('x', 25, unit='tokens', max=20) == .5
  for limit in ({}, {'min': 3, 'max': 2}, {'max': 3, 'unit': 'pages'}):
    with pytest.raises(ValueError, match='a limit is'):
      length('x', **limit)
