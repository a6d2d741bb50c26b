"""Tool calls against the ground truth of BFCL's rows, and against spoilt copies of it."""

import copy
import json

import pytest

from qwen3_jax.rewards import tools
from qwen3_jax.rewards.response import Response

PARTS = ('simple_python', 'multiple', 'parallel', 'parallel_multiple')


def rows(data_dir, part):
  text = (data_dir / 'bfcl' / f'{part}.dev.jsonl').read_text('utf-8')
  return [json.loads(line) for line in text.split('\n') if line]


def score(record, calls, content=''):
  markup = '\n'.join(f'<tool_call>\n{json.dumps(call)}\n</tool_call>' for call in calls)
  return tools.verify(record, Response.read(f'{content}\n{markup}', 10))


def choose(values):
  """The first accepted value, written as a model would."""
  value = next(value for value in values if value != '')
  return write(value)


def write(value):
  if isinstance(value, dict):
    return {name: choose(v) if isinstance(v, list) else v for name, v in value.items() if v != ['']}
  return [write(item) for item in value] if isinstance(value, list) else value


def answer(expected):
  return [{'name': name, 'arguments': {key: choose(values) for key, values in accepted.items()
                                       if any(value != '' for value in values)}}
          for call in expected for name, accepted in call.items()]


def spoil(value):
  if value is None or isinstance(value, bool):
    return str(value)
  if isinstance(value, (int, float)):
    return value + 1001
  if isinstance(value, str):
    return f'{value} not'
  if isinstance(value, list):
    return [*value, 1]
  return value | {'made_up': 1}


@pytest.mark.parametrize('part', PARTS)
def test_the_ground_truth_scores_one_and_every_spoilt_copy_zero(data_dir, part):
  count = 0
  for row in rows(data_dir, part):
    record = {'tools': row['function'], 'expected_calls': row['ground_truth']}
    calls = answer(row['ground_truth'])
    assert score(record, calls) == score(record, calls[::-1], 'Calling now.') == 1, row['id']
    assert not score(record, calls[1:]) and not score(record, [*calls, calls[0]]), row['id']
    required = {tool['name']: tool['parameters'].get('required', ()) for tool in row['function']}
    for place, call in enumerate(calls):
      for name in call['arguments']:
        wrong = copy.deepcopy(calls)
        wrong[place]['arguments'][name] = spoil(wrong[place]['arguments'][name])
        assert score(record, wrong) == 0, (row['id'], name)
        wrong[place]['arguments'].pop(name)
        if name in required[call['name']]:
          assert score(record, wrong) == 0, (row['id'], name)
      for change in ({'name': call['name'] + 'x'},
                     {'arguments': call['arguments'] | {'unknown_': 1}}):
        assert score(record, [*calls[:place], call | change, *calls[place + 1:]]) == 0, row['id']
    count += 1
  assert count >= 100


def test_irrelevance_rows_expect_no_call(data_dir):
  found = rows(data_dir, 'irrelevance')
  for row in found:
    record = {'tools': row['function'], 'expected_calls': row['ground_truth']}
    assert score(record, [], 'None of the tools can do that.') == 1
    assert score(record, [{'name': row['function'][0]['name'], 'arguments': {}}]) == 0
  assert len(found) == 120


TOOL = {'type': 'function', 'function': {'name': 'f', 'parameters': {
  'type': 'object', 'required': ['n'], 'properties': {
    'n': {'type': 'integer'}, 'x': {'type': 'float'}, 's': {'type': 'string'},
    'many': {'type': 'array', 'items': {'type': 'number'}}, 'flag': {'type': 'boolean'},
    'o': {'type': 'dict', 'properties': {'depth': {'type': 'float'}}}}}}}


@pytest.mark.parametrize('accepted, given, good', [
  ({'n': [5]}, {'n': 5}, True), ({'n': [5]}, {'n': 5.0}, False), ({'n': [5]}, {'n': '5'}, False),
  ({'n': [1]}, {'n': True}, False), ({'n': [5, 6]}, {'n': 6}, True), ({'n': [5]}, {}, False),
  ({'n': [5, '']}, {}, False), ({'n': [5], 'x': [2, '']}, {'n': 5}, True),
  ({'n': [5], 'x': [2]}, {'n': 5, 'x': 2.0}, True),
  ({'n': [5], 'x': [2.0]}, {'n': 5, 'x': 2}, True),
  ({'n': [5], 's': ['New York, NY']}, {'n': 5, 's': 'new york ny'}, True),
  ({'n': [5], 's': ['a']}, {'n': 5, 's': 'b'}, False), ({'n': [5], 's': ['a']}, {'n': 5}, False),
  ({'n': [5]}, {'n': 5, 's': 'a'}, False), ({'n': [5], 'flag': [True]}, {'n': 5, 'flag': 1}, False),
  ({'n': [5], 'many': [[1, 2]]}, {'n': 5, 'many': [1, 2.0]}, True),
  ({'n': [5], 'many': [[1, 2]]}, {'n': 5, 'many': [2, 1]}, False),
  ({'n': [5], 'o': [{'depth': [2, 3], 'w': ['', 1]}]}, {'n': 5, 'o': {'depth': 3.0}}, True),
  ({'n': [5], 'o': [{'depth': [2, 3], 'w': [1]}]}, {'n': 5, 'o': {'depth': 3}}, False),
  ({'n': [5], 'o': [{'in': {'a': ['x']}}]}, {'n': 5, 'o': {'in': {'a': 'X'}}}, True),
  ({'n': [5], 'o': [{'depth': [2]}]}, {'n': 5, 'o': [['depth', 2]]}, False)])
def test_values_and_types(accepted, given, good):
  record = {'tools': [TOOL], 'expected_calls': [{'f': accepted}]}
  assert score(record, [{'name': 'f', 'arguments': given}]) == good


def test_parallel_calls_are_paired_however_they_overlap():
  expected = [{'f': {'n': [1, 2]}}, {'f': {'n': [1]}}, {'f': {'n': [2, 3]}}]
  record = {'tools': [TOOL], 'expected_calls': expected}
  call = lambda *numbers: [{'name': 'f', 'arguments': {'n': n}} for n in numbers]
  assert score(record, call(1, 2, 3)) == score(record, call(2, 1, 2)) == 1
  assert score(record, call(1, 1, 1)) == score(record, call(3, 3, 1)) == 0


def test_markup_that_cannot_be_read_is_wrong():
  none = {'tools': [TOOL], 'expected_calls': []}
  one = none | {'expected_calls': [{'f': {'n': [1]}}]}
  good = {'name': 'f', 'arguments': {'n': 1}}
  assert score(one, [good]) == 1 and score(one, [good], '<tool_call>\n{"name": "f"}') == 0
  assert score(none, [], 'no') == 1 and score(none, [], '<tool_call>{}</tool_call>') == 0
  assert score(none | {'tools': None}, [], 'no') == 1
  thought = Response.read(f'<think>\n<tool_call>{json.dumps(good)}</tool_call>\n</think>\n\nno', 9)
  assert tools.verify(none, thought) == 1


def test_records_that_want_unknown_tools_are_refused():
  with pytest.raises(ValueError, match=r"does not have: \['g'\]"):
    score({'tools': [TOOL], 'expected_calls': [{'g': {}}]}, [])
