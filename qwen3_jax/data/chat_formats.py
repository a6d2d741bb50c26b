"""Chat records in the forms people keep them in become one form, or are refused with a reason.

Every refusal is a ValueError '<reason>: <detail>' whose reason is the same words each time, so that
a reader can count by it (`text.partition(':')[0]`).
"""

import json
import re
from collections.abc import Mapping

from qwen3_jax.text.template import ROLES

FORMS = (('messages',), ('conversations',), ('instruction', 'instances'),
         ('instruction', 'output'), ('prompt', 'response'), ('question', 'answer'))
SHAREGPT = {'system': 'system', 'human': 'user', 'user': 'user', 'gpt': 'assistant',
            'assistant': 'assistant', 'function_call': 'call', 'observation': 'tool',
            'tool': 'tool'}
CONTROL = ('<|im_start|>', '<|im_end|>', '<|endoftext|>')


def normalise(record):
  """The conversation record that `record` means: {'messages', 'tools'?, 'enable_thinking'?, ...}.

  Forms: 'messages' as OpenAI has them (reasoning may stand in the content as <think>..</think>);
  ShareGPT's 'conversations' of {'from', 'value'} with 'system' and 'tools' beside them, where
  function calls in a row, and the words before them, are one assistant message; and a pair
  'instruction' ('input') 'output', 'prompt' 'response' or 'question' 'answer'. Self-instruct's
  'instruction' with 'instances' gives a list of records, one an instance. Other keys stay as they
  are. Raises ValueError for what has no one meaning, or would break the loss mask.
  """
  if not isinstance(record, Mapping):
    raise ValueError(f'not an object: {record!r:.60}; wanted one conversation, a JSON object')
  forms = [form for form in FORMS if all(record.get(key) is not None for key in form)]
  forms = [form for form in forms if len(form) == 1] or forms
  if len(forms) != 1:
    reason = 'conversation given twice' if forms else 'no conversation'
    raise ValueError(f"{reason}: the record has {', '.join(map(str, record)) or 'no field'}; "
                     "wanted one of 'messages', 'conversations', or 'instruction' and 'output'")
  if forms[0] == ('instruction', 'instances'):
    return _normalise_instances(record)
  if forms[0] == ('messages',):
    used, messages, tools = (), record['messages'], _read_tools(record.get('tools'))
  elif forms[0] == ('conversations',):
    used, messages = ('conversations', 'system'), _from_sharegpt(record)
    tools = [tool if 'function' in tool else {'type': 'function', 'function': tool}
             for tool in _read_tools(record.get('tools'))]
  else:
    used, tools = (*forms[0], 'input', 'system'), _read_tools(record.get('tools'))
    messages = _from_pair(record, *forms[0])
  kept = {key: value for key, value in record.items() if key not in (*used, 'messages', 'tools')}
  if kept.get('enable_thinking', True) is None:
    del kept['enable_thinking']
  if not isinstance(kept.get('enable_thinking', True), bool):
    raise ValueError(f'bad enable_thinking: {kept["enable_thinking"]!r:.60}; wanted true or false')
  kept['messages'] = _check(messages)
  if tools:
    _check_text(tools, 'the tools')
    kept['tools'] = tools
  return kept


def _normalise_instances(record):
  """One record an instance; where there are several, each has its number behind the 'id'."""
  instances = record['instances']
  if not isinstance(instances, list) or not instances:
    raise ValueError(f'no instances: got {instances!r:.60}; wanted a list of input and output')
  found = []
  for k, instance in enumerate(instances):
    whole = {key: value for key, value in record.items() if key != 'instances'}
    if 'id' in whole and len(instances) > 1:
      whole['id'] = f'{whole["id"]}.{k}'
    found.append(normalise(whole | instance if isinstance(instance, Mapping) else instance))
  return found


def _from_pair(record, question, answer):
  system, extra = record.get('system'), record.get('input')
  asked = record[question]
  if not isinstance(asked, str) or not isinstance(extra or '', str):
    raise ValueError(f'no text: {question!r} and input are {asked!r:.40} and {extra!r:.40}; wanted '
                     'strings')
  asked = f'{asked}\n\n{extra}' if extra and extra.strip() else asked
  return [*([{'role': 'system', 'content': system}] if system else []),
          {'role': 'user', 'content': asked}, {'role': 'assistant', 'content': record[answer]}]


def _from_sharegpt(record):
  system, turns = record.get('system'), record['conversations']
  if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
    raise ValueError(f"bad conversations: {turns!r:.60}; wanted a list of 'from' and 'value'")
  messages = [{'role': 'system', 'content': system}] if system else []
  for place, turn in enumerate(turns):
    speaker, value = turn.get('from'), turn.get('value')
    role = SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None:
      raise ValueError(f'unknown role: turn {place} is from {speaker!r:.40}; wanted one of '
                       f'{", ".join(SHAREGPT)}')
    if role != 'call':
      messages.append({'role': role, 'content': value})
      continue
    if not messages or messages[-1]['role'] != 'assistant':
      messages.append({'role': 'assistant', 'content': ''})
    calls = _load(value, 'bad tool call', f'turn {place}')
    messages[-1].setdefault('tool_calls', []).extend(calls if isinstance(calls, list) else [calls])
  return messages


def _load(text, reason, where):
  try:
    return json.loads(text)
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'{reason}: {where} has {text!r:.60}, which is not JSON ({error})') from error


def _read_tools(tools):
  """The list of tool definitions, which may be given as JSON."""
  tools = _load(tools, 'bad tools', 'the record') if isinstance(tools, str) and tools else tools
  tools = tools or []
  if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
    raise ValueError(f'bad tools: {tools!r:.60}; wanted a list of objects')
  return tools


def _check(messages):
  if not isinstance(messages, list):
    raise ValueError(f'bad messages: {messages!r:.60}; wanted a list')
  if not messages:
    raise ValueError('empty conversation: it has no message')
  messages = [_check_message(message, f'message {place}') for place, message in enumerate(messages)]
  calls, answered = 0, False
  for place, message in enumerate(messages):
    if message['role'] == 'system' and place:
      if messages[0]['role'] == 'system':
        raise ValueError(f'two system turns: messages 0 and {place}; join them into the first')
      raise ValueError(f'late system turn: message {place}; it must be the first')
    if message['role'] != 'tool':
      calls, answered = len(message.get('tool_calls', ())), False
    elif calls:
      calls, answered = calls - 1, True
    elif answered:
      raise ValueError(f'more tool responses than calls: message {place} answers none of them')
    else:
      raise ValueError(f'tool response without a call: no tool call comes before message {place}')
  if all(message['role'] != 'assistant' for message in messages):
    raise ValueError('no assistant turn: there is nothing to learn from the conversation')
  return messages


def _check_message(message, where):
  """The message without empty fields, its reasoning apart and its calls {name, arguments}."""
  if not isinstance(message, Mapping):
    raise ValueError(f'bad messages: {where} is {message!r:.60}; wanted role and content')
  message = {key: value for key, value in message.items() if value is not None}
  role, content = message.get('role'), message.get('content')
  if role not in ROLES:
    raise ValueError(f'unknown role: {where} has {role!r:.40}; wanted one of {", ".join(ROLES)}')
  if isinstance(content, list) and all(isinstance(part, Mapping) and part.get('type') == 'text' and
                                       isinstance(part.get('text'), str) for part in content):
    content = ''.join(part['text'] for part in content)
  if content is None and role == 'assistant':
    content = ''
  if not isinstance(content, str):
    raise ValueError(f'no text: {where} ({role}) has content {content!r:.60}; wanted a string')
  message['content'] = content
  if not isinstance(message.get('train', True), bool):
    raise ValueError(f'bad train: {where} has {message["train"]!r:.40}; wanted true or false')
  if role == 'assistant':
    _split_reasoning(message, where)
    if calls := message.pop('tool_calls', None):
      message['tool_calls'] = _check_calls(calls, where)
    if not message['content'].strip() and not calls:
      raise ValueError(f'empty answer: {where} has neither content nor a tool call')
  said = [message[key] for key in ('content', 'reasoning_content', 'tool_calls') if key in message]
  text = _check_text(said, where)
  if role == 'assistant' and '</think>' in text:
    raise ValueError(f'stray </think>: {where} has one beside its reasoning; reasoning stands in '
                     'reasoning_content, or in one <think> block before the content')
  return message


def _split_reasoning(message, where):
  """Moves a <think> block that leads the content to 'reasoning_content'; drops blank reasoning."""
  reasoning, content = message.pop('reasoning_content', ''), message['content']
  if not isinstance(reasoning, str):
    raise ValueError(f'no text: {where} has reasoning_content {reasoning!r:.60}; wanted a string')
  opening = re.match(r'\s*<think>', content)
  if opening and '</think>' not in content:
    raise ValueError(f'unclosed <think>: {where} never ends its reasoning')
  if '</think>' in content and not reasoning.strip():
    reasoning, _, content = content.partition('</think>')
    reasoning = reasoning[opening.end() if opening else 0:].strip('\n')
    if '<think>' in reasoning and not opening:
      raise ValueError(f'stray <think>: {where} has text before it; it must come first')
    message['content'] = content.lstrip('\n')
  if reasoning.strip():
    message['reasoning_content'] = reasoning


def _check_calls(calls, where):
  """The calls as {name, arguments}; arguments are an object, or JSON of one."""
  if not isinstance(calls, list):
    raise ValueError(f'bad tool call: {where} has tool_calls {calls!r:.60}; wanted a list')
  clean = []
  for call in calls:
    call = call.get('function') or call if isinstance(call, Mapping) else {}
    name, arguments = call.get('name'), call.get('arguments') or {}
    if not isinstance(name, str) or json.dumps(name, ensure_ascii=False) != f'"{name}"':
      raise ValueError(f'bad tool call: {where} calls {name!r:.40}; wanted the name of a function')
    value = _load(arguments, 'bad tool call', where) if isinstance(arguments, str) else arguments
    if not isinstance(value, Mapping):
      raise ValueError(f'bad tool call: {where} calls {name} with {arguments!r:.60}; wanted an '
                       'object of arguments')
    clean.append({'name': name, 'arguments': arguments})
  return clean


def _check_text(said, where):
  """`said` as JSON; what is not Unicode text or holds a token of the template is refused."""
  text = json.dumps(said, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'lone surrogate: {where} holds one (\\ud800 to \\udfff), which is not '
                     'Unicode text; repair it') from error
  if found := [token for token in CONTROL if token in text]:
    raise ValueError(f'control token: {where} holds {found[0]} as text, which would end or open a '
                     'turn; remove it')
  return text
