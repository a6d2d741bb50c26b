"""Qwen3's chat template and its inverse: messages to the text a model reads, and back."""
import json
import re
from collections.abc import Mapping

ROLES = ('system', 'user', 'assistant', 'tool')
FLAG = re.compile(r'(?<!\S)/(no_)?think(?![\w/-]|\.\w)')


def render(messages, tools=None, enable_thinking=True, add_generation_prompt=False):
  """The text of a conversation, byte for byte as Qwen3's published chat template writes it.

  `messages` are dicts with `role` and `content`; an assistant's may have `reasoning_content` and
  `tool_calls`: each `{name, arguments}`, alone or under `function`, arguments an object or JSON.
  Reasoning is kept only after the last user query, and the final assistant turn always has a think
  block. `enable_thinking=False` closes the think block in the generation prompt.
  Raises ValueError, naming the message, where a conversation cannot mean anything.
  """
  messages = _check(messages)
  system = messages[0]['content'] if messages[0]['role'] == 'system' else None
  turns = [_open_conversation(system, tools)]
  query = _find_last_query(messages)
  for place, message in enumerate(messages):
    role = message['role']
    if role == 'assistant':
      last = place == len(messages) - 1
      turns.append(_render_assistant(message, place, after_query=place > query, last=last))
    elif role == 'tool':
      turns.append(_render_tool(messages, place))
    elif role == 'user' or place:
      turns.append(f'<|im_start|>{role}\n{message["content"]}<|im_end|>\n')
  if add_generation_prompt:
    turns.append('<|im_start|>assistant\n')
    if enable_thinking is False:
      turns.append('<think>\n\n</think>\n\n')
  return ''.join(turns)


def parse(text):
  """The assistant message in `text`, a model's answer or a rendered assistant turn; never raises.

  Returns `role`, `reasoning_content`, `content` ('' where there is none) and `tool_calls`, a list
  of `{name, arguments}`. The last `</think>` ends the reasoning, with or without an opening tag
  (the 2507 thinking models do not emit one); a leading `<think>` never closed makes all of it
  reasoning. Tool calls count only after the reasoning; one that is not a JSON object with a string
  name and an arguments object stays in the content as it stands.

  Inverse of `render`: the final assistant turn gives its message back if the reasoning has no
  newline at its ends; the content none at its start, no valid tool call within and no end-of-turn
  token at its end; and neither content nor arguments hold `</think>`.
  """
  text = text.removeprefix('<|im_start|>assistant\n')
  text = re.sub(r'(<\|im_end\|>|<\|endoftext\|>)\n?\Z', '', text)
  opening = re.match(r'\s*<think>', text)
  before, close, after = text.rpartition('</think>')
  if opening and not close:
    before, close, after = text, '</think>', ''
  content, tool_calls = _split_calls(after.lstrip('\n') if close else after)
  reasoning = before[opening.end():] if opening else before
  return {'role': 'assistant', 'reasoning_content': reasoning.strip('\n'), 'content': content,
          'tool_calls': tool_calls}


def last_flag(messages):
  """What the last flag asks for: True for /think, False for /no_think, None without any.

  Flags stand in system and user messages, as words of their own.
  """
  for message in reversed(messages):
    if message['role'] in ('system', 'user'):
      if flags := FLAG.findall(message['content']):
        return flags[-1] != 'no_'
  return None


def _check(messages):
  if isinstance(messages, (str, Mapping)) or not messages:
    raise ValueError(f'wanted a non-empty list of messages, got {messages!r:.80}')
  messages = list(messages)
  for place, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f'message {place} is {message!r:.80}: wanted a dict with role and content')
    role, content = message.get('role'), message.get('content')
    if role not in ROLES:
      raise ValueError(f'message {place} has role {role!r}: wanted one of {", ".join(ROLES)}')
    # An assistant may say nothing (None), as beside its tool calls.
    silent = role == 'assistant' and content is None and (
      'content' in message or message.get('tool_calls'))
    if not isinstance(content, str) and not silent:
      got = f'content {content!r:.80}' if 'content' in message else 'no content'
      raise ValueError(f'message {place} ({role}) has {got}: wanted a string')
    reasoning = message.get('reasoning_content')
    if reasoning is not None and not isinstance(reasoning, str):
      raise ValueError(f'message {place} has reasoning_content {reasoning!r:.80}: wanted a string')
  return messages


def _open_conversation(system, tools):
  """The system turn: the system message, the tools' signatures, both or neither."""
  if not tools:
    return '' if system is None else f'<|im_start|>system\n{system}<|im_end|>\n'
  if isinstance(tools, (str, Mapping)) or not all(isinstance(tool, Mapping) for tool in tools):
    raise ValueError(f'tools are {tools!r:.80}: wanted a list of dicts')
  signatures = ''.join('\n' + _to_json(tool, f'tool {place}') for place, tool in enumerate(tools))
  return (
    '<|im_start|>system\n' + ('' if system is None else system + '\n\n') +
    '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n'
    'You are provided with function signatures within <tools></tools> XML tags:\n'
    f'<tools>{signatures}\n</tools>\n\n'
    'For each function call, return a json object with function name and arguments within '
    '<tool_call></tool_call> XML tags:\n'
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    '<|im_end|>\n')


def _find_last_query(messages):
  """The index of the last user message that is not a tool response; without one, the last index."""
  for place in reversed(range(len(messages))):
    if messages[place]['role'] == 'user':
      content = messages[place]['content']
      if not (content.startswith('<tool_response>') and content.endswith('</tool_response>')):
        return place
  return len(messages) - 1


def _render_assistant(message, place, after_query, last):
  content, reasoning = message.get('content') or '', message.get('reasoning_content')
  if reasoning is None:
    reasoning = ''
    if '</think>' in content:
      # The first closing tag ends the reasoning, the last one starts the content, as published.
      reasoning = content.partition('</think>')[0].rstrip('\n')
      reasoning = reasoning.rpartition('<think>')[2].lstrip('\n')
      content = content.rpartition('</think>')[2].lstrip('\n')
  turn = content
  if after_query and (last or reasoning):
    stripped = reasoning.strip('\n')
    turn = f'<think>\n{stripped}\n</think>\n\n' + content.lstrip('\n')
  calls = [_render_call(call, place) for call in message.get('tool_calls') or ()]
  separator = '\n' if content and calls else ''
  return f'<|im_start|>assistant\n{turn}{separator}' + '\n'.join(calls) + '<|im_end|>\n'


def _render_call(call, place):
  where = f'a tool call of message {place}'
  if isinstance(call, Mapping) and call.get('function'):
    call = call['function']
  if not (isinstance(call, Mapping) and isinstance(call.get('name'), str) and 'arguments' in call):
    raise ValueError(f'{where} is {call!r:.80}: wanted a dict with name and arguments')
  name, arguments = call['name'], call['arguments']
  if _to_json(name, where) != f'"{name}"':
    raise ValueError(f'{where} has name {name!r}, which breaks the JSON the template puts it in')
  if not isinstance(arguments, str):
    arguments = _to_json(arguments, where)
  else:
    try:
      json.loads(arguments)
    except ValueError as error:
      raise ValueError(f'{where} has arguments {arguments!r:.80}: not JSON ({error})') from error
  return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _render_tool(messages, place):
  """One tool result; neighbours share a user turn."""
  def is_tool(other):
    return 0 <= other < len(messages) and messages[other]['role'] == 'tool'
  return (('' if is_tool(place - 1) else '<|im_start|>user') +
          f'\n<tool_response>\n{messages[place]["content"]}\n</tool_response>' +
          ('' if is_tool(place + 1) else '<|im_end|>\n'))


def _to_json(value, where):
  try:
    return json.dumps(value, ensure_ascii=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'{where} cannot be written as JSON: {error}') from error


def _split_calls(text):
  """The text outside the valid tool calls, and the calls."""
  content, calls, start = '', [], 0
  for tag in re.finditer(r'\n?<tool_call>', text):
    if tag.start() < start:
      continue
    call, end = _read_call(text, tag.end())
    if call:
      content += text[start:tag.start()]
      calls.append(call)
      start = end
  return content + text[start:], calls


def _read_call(text, start):
  """The call whose JSON starts at `start` and where its closing tag ends, or (None, start)."""
  try:
    call, end = json.JSONDecoder().raw_decode(text, re.compile(r'\s*').match(text, start).end())
  except (ValueError, RecursionError):
    return None, start
  close = re.compile(r'\s*</tool_call>').match(text, end)
  if not close or not isinstance(call, dict) or not isinstance(call.get('name'), str):
    return None, start
  if not isinstance(call.get('arguments'), dict):
    return None, start
  return {'name': call['name'], 'arguments': call['arguments']}, close.end()
