"""Each form of chat data means one conversation; what means none is refused with its reason."""

import pytest

from qwen3_jax.data.chat_formats import normalise
from qwen3_jax.data.conversations import reason_of


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content='', reasoning=None, calls=()):
  calls = [{'name': name, 'arguments': arguments} for name, arguments in calls]
  return {'role': 'assistant', 'content': content} | (
    {'reasoning_content': reasoning} if reasoning else {}) | (
    {'tool_calls': calls} if calls else {})


def tool(content):
  return {'role': 'tool', 'content': content}


CALLS = [user('go'), assistant(calls=[('f', {'x': 1}), ('g', {})])]


def test_sharegpt_form():
  record = {'id': 7, 'system': 'Be kind.', 'tools': '[{"name": "f"}]', 'conversations': [
    {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': '<think>\nr\n</think>\n\nI look.'},
    {'from': 'function_call', 'value': '{"name": "f", "arguments": {"x": 1}}'},
    {'from': 'function_call', 'value': '[{"name": "g", "arguments": "{}"}]'},
    {'from': 'observation', 'value': '1'}, {'from': 'tool', 'value': '2'},
    {'from': 'assistant', 'value': 'a'}]}
  assert normalise(record) == {
    'id': 7, 'tools': [{'type': 'function', 'function': {'name': 'f'}}], 'messages': [
      {'role': 'system', 'content': 'Be kind.'}, user('q'),
      assistant('I look.', 'r', [('f', {'x': 1}), ('g', '{}')]), tool('1'), tool('2'),
      assistant('a')]}


def test_pairs_and_instances():
  assert normalise({'instruction': 'Add.', 'input': '1 2', 'output': '3', 'tools': None}) == {
    'messages': [user('Add.\n\n1 2'), assistant('3')]}
  assert normalise({'prompt': 'q', 'response': 'a', 'domain': 'x'}) == {
    'domain': 'x', 'messages': [user('q'), assistant('a')]}
  assert normalise({'question': 'q', 'answer': 'a'})['messages'] == [user('q'), assistant('a')]
  one, two = normalise({'id': 's', 'instruction': 'i', 'instances': [
    {'input': '', 'output': 'a'}, {'input': 'x', 'output': 'b'}]})
  assert one == {'id': 's.0', 'messages': [user('i'), assistant('a')]}
  assert two == {'id': 's.1', 'messages': [user('i\n\nx'), assistant('b')]}


def test_messages_form_keeps_labels_and_drops_empty_fields():
  record = {'question': 'q', 'answer': '4', 'tools': [], 'enable_thinking': None, 'messages': [
    {'role': 'user', 'content': [{'type': 'text', 'text': 'q'}, {'type': 'text', 'text': '?'}]},
    {'role': 'assistant', 'content': 'r</think>a', 'reasoning_content': ' ', 'tool_calls': None}]}
  assert normalise(record) == {
    'question': 'q', 'answer': '4', 'messages': [user('q?'), assistant('a', 'r')]}


@pytest.mark.parametrize('record, reason', [
  ('text', 'not an object'),
  ({'text': 'x'}, 'no conversation: the record has text'),
  ({'messages': CALLS, 'conversations': []}, 'conversation given twice'),
  ({'prompt': 'q', 'response': 'a', 'question': 'q', 'answer': 'b'}, 'conversation given twice'),
  ({'messages': []}, 'empty conversation'),
  ({'messages': 'hi'}, 'bad messages'),
  ({'messages': ['hi']}, 'bad messages: message 0'),
  ({'messages': [user('q')]}, 'no assistant turn'),
  ({'messages': [user('q'), {'role': 'bot', 'content': 'a'}]}, "unknown role: message 1 has 'bot'"),
  ({'conversations': [{'from': 'bing', 'value': 'a'}]}, "unknown role: turn 0 is from 'bing'"),
  ({'conversations': [{'from': ['human'], 'value': 'a'}]}, 'unknown role'),
  ({'conversations': ['q']}, 'bad conversations'),
  ({'messages': [{'role': 'system', 'content': 's'}] * 2 + CALLS}, 'two system turns: .* 0 and 1'),
  ({'messages': [*CALLS, {'role': 'system', 'content': 's'}]}, 'late system turn: message 2'),
  ({'system': 's', 'conversations': [{'from': 'system', 'value': 't'}]}, 'two system turns'),
  ({'messages': [user('q'), tool('1'), assistant('a')]}, 'tool response without a call'),
  ({'messages': [tool('1'), assistant('a')]}, 'tool response without a call'),
  ({'messages': [*CALLS, user('x'), tool('1')]}, 'tool response without a call'),
  ({'messages': [*CALLS, *[tool('1')] * 3]}, 'more tool responses than calls: message 4'),
  ({'messages': [user('q'), assistant('<think>\nhm')]}, 'unclosed <think>: message 1'),
  ({'messages': [user('q'), assistant('<think>x', 'r')]}, 'unclosed <think>: message 1'),
  ({'messages': [user('q'), assistant('<think>x</think>a', 'r')]}, 'stray </think>'),
  ({'messages': [user('q'), assistant('<think>x</think>a</think>b')]}, 'stray </think>'),
  ({'messages': [user('q'), assistant('so <think>x</think>a')]}, 'stray <think>'),
  ({'messages': [user('q'), assistant(calls=[('f', {'x': '</think>'})])]}, 'stray </think>'),
  ({'messages': [user('<|im_end|>'), assistant('a')]}, r'control token: message 0 .*im_end'),
  ({'messages': [user('q'), assistant('<|im_start|>')]}, 'control token: message 1'),
  ({'messages': [user('q'), assistant('a', 'x<|endoftext|>')]}, 'control token: message 1'),
  ({'messages': [*CALLS, tool('<|im_end|>')]}, 'control token: message 2'),
  ({'messages': CALLS, 'tools': [{'name': '<|im_end|>'}]}, 'control token: the tools'),
  ({'messages': [user('\ud800'), assistant('a')]}, 'lone surrogate: message 0'),
  ({'messages': [user('q'), assistant(' ')]}, 'empty answer: message 1'),
  ({'messages': [user(None), assistant('a')]}, r'no text: message 0 \(user\)'),
  ({'messages': [user('q'), assistant('a', 3)]}, 'no text: message 1 has reasoning_content 3'),
  ({'messages': [user([{'type': 'image'}]), assistant('a')]}, 'no text: message 0'),
  ({'messages': [user('q'), assistant(calls=[('f', [1])])]}, 'bad tool call: message 1 calls f'),
  ({'messages': [user('q'), assistant(calls=[('f', '{x')])]}, 'bad tool call: .*not JSON'),
  ({'messages': [user('q'), assistant(calls=[('a"b', {})])]}, 'bad tool call: message 1 calls'),
  ({'conversations': [{'from': 'function_call', 'value': 'f(1)'}]}, 'bad tool call: turn 0'),
  ({'messages': CALLS, 'tools': '[{'}, 'bad tools'),
  ({'messages': CALLS, 'tools': ['f']}, 'bad tools'),
  ({'messages': CALLS, 'enable_thinking': 'no'}, 'bad enable_thinking'),
  ({'messages': [user('q'), assistant('a') | {'train': 0}]}, 'bad train'),
  ({'instruction': 'i', 'instances': []}, 'no instances'),
  ({'instruction': 3, 'output': 'a'}, 'no text'),
])
def test_bad_conversation_is_one_sentence_with_a_reason(record, reason):
  with pytest.raises(ValueError, match=reason) as caught:
    normalise(record)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 300
  assert reason_of(caught.value) == reason.partition(':')[0]
