"""The chat template against published renderings, and its parser against the template."""

import json
import random
from pathlib import Path

import pytest

from qwen3_jax.text.template import parse, render
from qwen3_jax.text.tokenizer import Tokenizer

FIXTURE = Path(__file__).resolve().parents[1] / 'fixtures' / 'text_chats.jsonl'
USER = {'role': 'user', 'content': 'q'}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
BLOCKS = ('', 'a', 'two\nlines', ' spaced ', 'x\n', '\t', 'é 你好 😀', '<think>', '{"a": 1}',
          '\\n', '"', '<tool_call>', '</tool_call>', '<tool_response>', '<|im_start|>',
          'line\n\n\nline')


def read_rows(file):
  return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]


def normalise(message):
  """An assistant message as `parse` returns it."""
  calls = [call.get('function') or call for call in message.get('tool_calls') or ()]
  loaded = [{'name': call['name'], 'arguments': json.loads(call['arguments'])
             if isinstance(call['arguments'], str) else call['arguments']} for call in calls]
  return {'role': 'assistant', 'reasoning_content': message.get('reasoning_content') or '',
          'content': message.get('content') or '', 'tool_calls': loaded}


def last_turn(message):
  return render([USER, message]).removeprefix(render([USER]))


@pytest.mark.parametrize('row', read_rows(FIXTURE), ids=lambda row: row['name'])
def test_rendering_equals_published_template(row):
  assert render(row['messages'], row['tools'], **row['kwargs']) == row['text']


def test_rendering_equals_every_golden_in_text_and_ids(golden):
  tokenizer = Tokenizer(golden / 'tokenizer')
  rows = read_rows(golden / 'chat' / 'chat_goldens.jsonl')
  assert len(rows) > 50
  for row in rows:
    text = render(row['messages'], row['tools'], **row['kwargs'])
    assert text == row['text'], row['name']
    assert tokenizer.encode(text) == row['ids'], row['name']


def test_parsing_inverts_final_assistant_turns_of_goldens(golden):
  checked = 0
  for row in read_rows(golden / 'chat' / 'chat_goldens.jsonl'):
    message = row['messages'][-1]
    inline = '</think>' in (message.get('content') or '')
    if message['role'] != 'assistant' or inline or row['kwargs'].get('add_generation_prompt'):
      continue
    wanted = normalise(message)
    wanted['reasoning_content'] = wanted['reasoning_content'].strip('\n')  # as rendered
    wanted['content'] = wanted['content'].lstrip('\n')
    turn = row['text'][row['text'].rindex('<|im_start|>assistant\n'):]
    assert parse(turn) == wanted, row['name']
    checked += 1
  assert checked > 10


def make_text(draw):
  return ''.join(draw.choices(BLOCKS, k=draw.randint(0, 4)))


def make_arguments(draw):
  values = (1, -2.5, None, True, [1, {'z': 'a', 'a': 'z'}], {}, CALL, 'é"\n', make_text(draw))
  return {make_text(draw): draw.choice(values) for _ in range(draw.randint(0, 3))}


def make_message(draw):
  """A random assistant message within the conditions that `parse` states."""
  reasoning = draw.choice(('', make_text(draw) + draw.choice(('', '</think>x', CALL)))).strip('\n')
  calls = [{'name': draw.choice(('f', 'get-weather', '工具')), 'arguments': make_arguments(draw)}
           for _ in range(draw.choice((0, 0, 1, 1, 3)))]
  return {'role': 'assistant', 'reasoning_content': reasoning,
          'content': make_text(draw).lstrip('\n'), 'tool_calls': calls}


def test_parsing_inverts_rendering_of_random_messages():
  draw = random.Random(0)
  for _ in range(3000):
    message = make_message(draw)
    given = dict(message)
    if draw.random() < 0.5:
      given['tool_calls'] = [{'type': 'function', 'function': {
        'name': call['name'], 'arguments': json.dumps(call['arguments'])}}
        for call in message['tool_calls']]
    turn = last_turn(given)
    assert parse(turn) == message
    assert parse(turn.removeprefix('<|im_start|>assistant\n')) == message
    assert parse(turn.removesuffix('<|im_end|>\n')) == message


def test_parsing_then_rendering_keeps_random_answers():
  draw = random.Random(1)
  for _ in range(3000):
    answer = '<think>\n' + make_text(draw).strip('\n') + '\n</think>\n\n' + make_text(
      draw).lstrip('\n')
    assert last_turn(parse(answer)) == f'<|im_start|>assistant\n{answer}<|im_end|>\n'


@pytest.mark.parametrize('text, reasoning, content', [
  ('plain', '', 'plain'),
  ('\n\nplain\n', '', '\n\nplain\n'),
  ('', '', ''),
  ('<think>\n\n</think>\n\nanswer', '', 'answer'),
  ('<think>\nwhy\n</think>\n\nanswer<|im_end|>', 'why', 'answer'),
  ('\n<think>\nwhy\n</think>\n\nanswer<|endoftext|>', 'why', 'answer'),
  ('why\n</think>\n\nanswer', 'why', 'answer'),  # no opening tag: it was in the prompt
  ('<think>a</think>b</think>c', 'a</think>b', 'c'),  # the last one ends the reasoning
  ('<think>\nnever closed', 'never closed', ''),
  ('<think>\n' + CALL, CALL, ''),  # a call while thinking is a thought
  ('the tag <think> opens', '', 'the tag <think> opens'),
  ('<think>x<think>y</think>z', 'x<think>y', 'z'),
])
def test_reasoning_ends_at_last_closing_tag(text, reasoning, content):
  assert parse(text) == {'role': 'assistant', 'reasoning_content': reasoning, 'content': content,
                         'tool_calls': []}


def test_calls_are_read_among_text():
  one = {'name': 'f', 'arguments': {'x': 1}}
  nested = '<tool_call>{"name": "g", "arguments": {"s": "</tool_call> <tool_call>"}}</tool_call>'
  message = parse(f'say\n{CALL}\n{nested}\nthen')
  assert message['tool_calls'] == [one, {
    'name': 'g', 'arguments': {'s': '</tool_call> <tool_call>'}}]
  assert message['content'] == 'say\nthen'


@pytest.mark.parametrize('broken', [
  '<tool_call>\n{"name": "f", "arguments": {"x": 1}\n</tool_call>',
  '<tool_call>\n{"name": "f", "arguments": {"x": 1}}',
  '<tool_call>\n{"name": "f"}\n</tool_call>',
  '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
  '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
  '<tool_call>\n["f"]\n</tool_call>',
  '<tool_call>\n</tool_call>',
  '<tool_call>' + '[' * 100_000,
  '<tool_call>{"name": "f", "arguments": {"x": ' + '9' * 10_000 + '}}</tool_call>',
])
def test_broken_call_stays_in_content(broken):
  message = parse(f'before {broken}\n{CALL}')
  assert message['content'] == f'before {broken}'
  assert message['tool_calls'] == [{'name': 'f', 'arguments': {'x': 1}}]


def test_parsing_never_raises():
  draw = random.Random(2)
  parts = (*BLOCKS, '</think>', '<think>', CALL, CALL[:-3], '<|im_end|>', '<|im_start|>assistant\n',
           '{"name": "f", "arguments": ', '\ud83d', '\x00', '}')
  for _ in range(3000):
    message = parse(''.join(draw.choices(parts, k=draw.randint(0, 12))))
    assert set(message) == {'role', 'reasoning_content', 'content', 'tool_calls'}
    json.dumps(message)


def test_answer_without_any_query_has_no_think_block():
  answer = {'role': 'assistant', 'content': 'x', 'reasoning_content': 'r'}
  assert render([answer]) == '<|im_start|>assistant\nx<|im_end|>\n'


def test_silent_assistant_is_accepted():
  call = {'name': 'f', 'arguments': {'x': 1}}
  empty_think = '<|im_start|>assistant\n<think>\n\n</think>\n\n'
  for message in ({'content': None, 'tool_calls': [call]}, {'tool_calls': [call]}):
    assert last_turn({'role': 'assistant', **message}) == f'{empty_think}{CALL}<|im_end|>\n'
  assert last_turn({'role': 'assistant', 'content': None}) == f'{empty_think}<|im_end|>\n'


@pytest.mark.parametrize('messages, complaint', [
  ([], 'non-empty list of messages'),
  ('hello', 'non-empty list of messages'),
  (USER, 'non-empty list of messages'),
  (['hello'], 'message 0 is .*wanted a dict'),
  ([USER, {'role': 'human', 'content': ''}], "message 1 has role 'human'"),
  ([{'content': 'x'}], 'message 0 has role None'),
  ([{'role': ['user'], 'content': 'x'}], 'message 0 has role'),
  ([{'role': 'user'}], r'message 0 \(user\) has no content'),
  ([{'role': 'assistant'}], r'message 0 \(assistant\) has no content'),
  ([{'role': 'system', 'content': None}], 'content None: wanted a string'),
  ([{'role': 'user', 'content': [{'type': 'text', 'text': 'x'}]}], 'wanted a string'),
  ([{'role': 'assistant', 'content': 'x', 'reasoning_content': 3}], 'reasoning_content 3'),
])
def test_conversation_without_meaning_is_refused(messages, complaint):
  with pytest.raises(ValueError, match=complaint):
    render(messages)


@pytest.mark.parametrize('call, complaint', [
  ('f', 'wanted a dict with name and arguments'),
  ({'name': 'f'}, 'wanted a dict with name and arguments'),
  ({'function': {'arguments': {}}}, 'wanted a dict with name and arguments'),
  ({'name': 'f', 'arguments': '{x: 1}'}, 'not JSON'),
  ({'name': 'f', 'arguments': {'x': {1}}}, 'cannot be written as JSON'),
  ({'name': 'a"b', 'arguments': {}}, 'breaks the JSON'),
])
def test_broken_call_is_refused(call, complaint):
  with pytest.raises(ValueError, match=complaint):
    render([USER, {'role': 'assistant', 'content': '', 'tool_calls': [call]}])


@pytest.mark.parametrize('tools', ['f', {'name': 'f'}, ['f'], [{'f': {1}}]])
def test_broken_tools_are_refused(tools):
  with pytest.raises(ValueError, match='tool'):
    render([USER], tools)
