"""Rows of files by cursor, the records they hold, and what a stage decides on each.

A cursor is [file, offset, line]: where the next row begins. Rows are split on \\n only.
"""
import dataclasses
import functools
import hashlib
import json
import os
import re
from pathlib import Path

from etils import epath

from qwen3_jax.data import chat_formats, files, tasks
from qwen3_jax.rewards import answers

LINE_BYTES = 16 * 1024 * 1024  # a longer line is not read into memory
EDGE = 1 << 20  # bytes at either end of a file by which a change is noticed
START = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Accept:
  record: dict


@dataclasses.dataclass(frozen=True)
class Reject:
  record: dict
  rule: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Fail:
  """Not decided, for a reason that lies in the machinery; `record` is what to read again."""
  record: dict
  reason: str


class Rows:
  """The rows of files, folders or globs of JSON lines, and of generated tasks ('tasks:size=100').

  Raises FileNotFoundError for a name that fits no file, ValueError for bad options of tasks.
  """

  def __init__(self, specs):
    self.specs = [path for spec in specs for path in _find(str(spec))]

  def read(self, cursor):
    """Iterates over (cursor after it, file's name, line number from 1, bytes without the newline).

    Of a line over LINE_BYTES only the beginning is kept, LINE_BYTES and one more. Empty lines are
    left out.
    """
    first, *begin = cursor
    for place in range(first, len(self.specs)):
      spec = self.specs[place]
      name = spec if _generated(spec) else Path(spec).name.split('.')[0]
      for offset, line, data in (_make if _generated(spec) else _read)(spec, *begin):
        if data.strip():
          yield (place, offset, line), name, line, data
      begin = 0, 0

  def left(self, cursor):
    """About how many bytes are unread; a generated task counts 200, a packed file thrice."""
    sizes = [tasks.open_tasks(spec[6:]).size * 200 if _generated(spec)
             else spec.stat().length * (3 if files.split_name(spec)[1] else 1)
             for spec in self.specs[cursor[0]:]]
    return sum(sizes) - cursor[1]

  def describe(self):
    """[name, size, hash of both ends] of each file: what a continued run must find unchanged."""
    return [[spec, None, None] if _generated(spec) else _describe(spec) for spec in self.specs]


def _generated(spec):
  return isinstance(spec, str)


def _find(spec):
  if spec.startswith('tasks:'):
    tasks.open_tasks(spec[6:])  # its options are checked now
    return [spec]
  return [epath.Path(path) for path in files.find(spec)]


def _make(spec, offset, line):
  source = tasks.open_tasks(spec[6:])
  for i in range(offset, len(source)):
    made = source.task(i)
    record = dict(kind=made.kind, seed=made.seed, difficulty=made.difficulty,
                  question=made.question, answer=made.answer, steps='\n'.join(made.steps))
    yield i + 1, i + 1, json.dumps(record).encode()


def _read(path, offset, line):
  with open(files.fetch(path)[0], 'rb') as file:
    file.seek(offset)
    while data := file.readline(LINE_BYTES + 1):
      rest = data
      offset += len(data)
      while rest and not rest.endswith(b'\n'):
        rest = file.readline(LINE_BYTES)
        offset += len(rest)
      line += 1
      yield offset, line, data.rstrip(b'\r\n')


def _describe(path):
  size, digest = path.stat().length, hashlib.blake2b(digest_size=8)
  with path.open('rb') as file:
    digest.update(file.read(EDGE))
    file.seek(max(0, size - EDGE))
    digest.update(file.read(EDGE))
  return [os.fspath(path), size, digest.hexdigest()]


def load_line(data):
  """The object in one line; ValueError says why there is none."""
  if len(data) > LINE_BYTES:
    raise ValueError(f'a line of more than {LINE_BYTES:,} bytes')
  try:
    record = json.loads(data.decode('utf-8-sig'), parse_constant=_refuse)
    json.dumps(record, ensure_ascii=False).encode()
  except UnicodeDecodeError as e:
    raise ValueError(f'invalid UTF-8 at byte {e.start}') from None
  except UnicodeEncodeError:
    raise ValueError('half a surrogate pair in a string') from None
  except json.JSONDecodeError as e:
    raise ValueError(f'not JSON: {e}') from None
  except RecursionError:
    raise ValueError('nested too deeply') from None
  if not isinstance(record, dict):
    raise ValueError(f'{type(record).__name__} on a line: want an object')
  return record


def _refuse(name):
  raise ValueError(f'{name} is not JSON')


def dump_line(record):
  """One line of JSON, as UTF-8 with its newline."""
  try:
    return json.dumps(record, ensure_ascii=False).encode() + b'\n'
  except UnicodeEncodeError:
    return json.dumps(record).encode() + b'\n'


def begin_reading(_, kind='any', solutions=False):
  """The first stage: (file's name, line number, bytes) become records of `kind`.

  'query': {'question', 'answer' ...} of question and answer, GSM8K's `#### ` and MATH's problem
  with an answer or a \\boxed one; with `solutions` the given solution becomes the one candidate.
  'chat': conversation records, whatever form they have. 'text': {'text'}. 'any': objects as they
  are. Each gets an 'id' and a 'source' where it has none. Refused lines keep their beginning.
  Raises ValueError for another kind.
  """
  kinds = dict(query=functools.partial(_query, solutions=solutions), chat=_chat, text=_text,
               any=lambda record: [record])
  if kind not in kinds:
    raise ValueError(f'no kind {kind!r} of records; there are: {", ".join(kinds)}')
  convert = kinds[kind]

  def decide(rows):
    return [decision for row in rows for decision in _read_row(convert, *row)]
  return decide


def _read_row(convert, name, line, data):
  place = dict(source=name, id=f'{name}:{line}')
  try:
    record = load_line(data)
  except ValueError as e:
    start = data[:500].decode(errors='replace')
    return [Reject(place | dict(line=start), 'unreadable line', str(e))]
  try:
    found = convert(record)
  except ValueError as e:
    return [Reject(place | record, str(e).partition(':')[0], str(e))]
  ends = [''] if len(found) == 1 else [f'.{k}' for k in range(len(found))]
  return [Accept(place | dict(id=f'{name}:{line}{end}') | each) for each, end in zip(found, ends)]


def _query(record, solutions):
  question = record.get('question') or record.get('problem')
  if not isinstance(question, str) or not question.strip():
    raise ValueError(f"no question: the record has {', '.join(record)}; wanted 'question' or "
                     "'problem'")
  solution, answer = record.get('solution'), record.get('answer')
  if isinstance(answer, str) and '#### ' in answer:
    solution, _, answer = answer.rpartition('#### ')
    solution = f'{re.sub("<<[^>]*>>", "", solution)}The answer is {answer.strip()}.'
  if answer is None and isinstance(solution, str):
    answer = answers.find_boxed(solution)
  reasoning = ''
  if _is_made(record):
    reasoning, solution = record['steps'], f'The answer is {answer}.'
  kept = {key: value for key, value in record.items()
          if key not in ('question', 'problem', 'answer', 'solution', 'steps')}
  kept = {key: kept[key] for key in ('id', 'source') if key in kept} | dict(question=question) | (
    {} if answer is None else dict(answer=str(answer).strip())) | kept
  if solutions:
    if not isinstance(solution, str) or not solution.strip():
      raise ValueError("no solution: wanted one in 'solution', or before '#### ' in 'answer'")
    kept['candidates'] = [dict(reasoning=reasoning, content=solution.strip(),
                               finish_reason='stop')]
  return [kept]


def _is_made(record):
  """Whether it is a generated task with its steps."""
  return record.get('kind') in tasks.KINDS and isinstance(record.get('steps'), str)


def _chat(record):
  if _is_made(record):
    answer = dict(role='assistant', content=f'The answer is {record["answer"]}.',
                  reasoning_content=record['steps'])
    record = record | dict(messages=[dict(role='user', content=record['question']), answer])
  found = chat_formats.normalise(record)
  return found if isinstance(found, list) else [found]


def _text(record):
  if not isinstance(record.get('text'), str) or not record['text'].strip():
    raise ValueError(f"no text: the record has {', '.join(record)}; wanted 'text'")
  return [record]


def text_of(record):
  """The text that rules read: a document, what the assistant says, or a question.

  Raises ValueError where the record is none of the three.
  """
  if 'text' in record:
    return record['text']
  if 'messages' in record:
    return '\n\n'.join(
      part for message in record['messages'] if message['role'] == 'assistant'
      for part in (message.get('reasoning_content'), message['content']) if part)
  if 'question' in record:
    return record['question']
  raise ValueError(f"the record has {', '.join(record)}; wanted text, messages or a question")


def words_of(record):
  """All words of a record, those of its tool calls too: what may be a copy, or hold a test item."""
  if 'messages' not in record:
    return text_of(record)
  parts = []
  for message in record['messages']:
    parts += [message.get('reasoning_content'), message['content']]
    if calls := message.get('tool_calls'):
      parts.append(json.dumps(calls, ensure_ascii=False))
  return '\n\n'.join(filter(None, parts))


def item_of(record):
  """What a test item asks; ValueError where it has none of the fields it may stand in."""
  for key in ('question', 'problem', 'prompt', 'instruction', 'text'):
    if isinstance(record.get(key), str):
      return record[key]
  if 'messages' in record:
    return '\n\n'.join(m['content'] for m in record['messages'] if m['role'] == 'user')
  raise ValueError(f'the record has {", ".join(record)}')
