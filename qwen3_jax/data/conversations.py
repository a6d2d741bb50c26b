"""Conversations become tokens with a loss mask: only what the model itself would write is trained.

A conversation becomes one example a turn that is trained, each the exact text of inference: the
history without its reasoning, then the turn. A turn whose prompt goes on from the end of the
example before it, as in a chain of tool calls with reasoning, extends that example instead.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from qwen3_jax.data import chat_formats, files, sources, tasks
from qwen3_jax.data.chat_formats import normalise
from qwen3_jax.text import template
from qwen3_jax.text import tokenizer as tokenizer_module
from qwen3_jax.text.template import FLAG, last_flag, render

LINE_BYTES = 16 * 1024 * 1024
SLOW = 10  # seconds: what took longer to measure is kept
TOKEN = np.dtype([('id', np.int32), ('weight', np.float32)])  # weight as a target of the loss
_TURN = re.compile(r'(?<=.)(?=<\|im_start\|>)', re.DOTALL)


# Reading.

@dataclasses.dataclass(frozen=True)
class Conversations(sources.Source):
  """Conversation records by index; `rejected` counts by reason the lines that were left out.

  `sizes` are bytes of lines, `groups` 64 bits of what the users ask, flags and case aside.
  """
  rejected: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def read(spec, split=None, heldout=None, cache=None, skip_bad=False):
  """The conversation records that `spec` names: JSON lines by path, folder or glob, or 'tasks:...'.

  Compressed and remote files, `heldout` and `cache` are as in `sources.open_source`; the split goes
  by what the users ask, so that all answers to a question are on one side. Each line is read and
  checked here (see `normalise`). A bad one is a ValueError that names file, line and reason or,
  with `skip_bad`, counted in `rejected` and left out. 'tasks[:options]' generates problems whose
  steps are the reasoning (see `tasks.open_tasks`); an answer is 'The answer is X.'
  """
  kind, _, options = spec.partition(':')
  if kind == 'tasks':
    return TaskConversations(tasks.open_tasks(options, split))
  rejected = collections.Counter()
  parts = [_open_file(path, cache, skip_bad, rejected) for path in files.find(spec)]
  joined = sources.join(parts, spec)
  if not len(joined):
    raise ValueError(f'{spec}: there is no conversation in it (left out: {dict(rejected) or 0})')
  everything = Conversations(joined.name, joined.read, joined.sizes, joined.hashes, joined.groups,
                             rejected)
  return sources.choose(everything, everything.groups, split, heldout)


def _open_file(path, cache, skip_bad, rejected):
  name, local = str(path), files.fetch(path, cache)[0]

  def refuse(number, complaint):
    if not skip_bad:
      raise ValueError(f'{name}, line {number}: {complaint}')
    rejected[reason_of(complaint)] += 1

  rows = np.fromiter(_scan(local, name, refuse), _ROW)

  def read_record(i):
    with open(local, 'rb') as file:
      file.seek(rows['offset'][i])
      return _parse_line(file.readline().decode('utf-8-sig'))[rows['part'][i]]

  return sources.Source(name, read_record, rows['size'], rows['hash'], rows['question'])


_ROW = np.dtype([('offset', np.int64), ('part', np.int32), ('size', np.int64),
                 ('hash', np.uint64), ('question', np.uint64)])


def _scan(local, name, refuse):
  """A row for each conversation of a file."""
  for offset, number, data, line in files.lines(local, name, refuse, LINE_BYTES):
    if data.isspace():
      continue
    try:
      found = _parse_line(line)
    except ValueError as error:
      refuse(number, error)
      continue
    for part, record in enumerate(found):
      yield offset, part, len(data), files.hash_text(data + b'%d' % part), _question(record)


def reason_of(error):
  """The reason of a refusal, the same words for each of its kind."""
  return re.split(r'[:;(]', str(error))[0].strip()


def _parse_line(line):
  """The conversations of a line, mostly one."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'not JSON: {error}; each line must be one JSON object') from error
  found = normalise(record)
  return found if isinstance(found, list) else [found]


def _question(record):
  asked = ' '.join(m['content'] for m in record['messages'] if m['role'] == 'user')
  return files.hash_text(' '.join(FLAG.sub(' ', asked).casefold().split()).encode())


class TaskConversations:
  """Generated problems as conversations with reasoning; 'answer' and 'domain' are labels."""
  rejected = collections.Counter()

  def __init__(self, problems):
    self.tasks, self.name = problems, problems.name
    self.fingerprint = f'{problems.fingerprint} as conversations'

  def __len__(self):
    return len(self.tasks)

  def __getitem__(self, i):
    problem = self.tasks.task(i)
    return {'id': f'{self.name}/{self.tasks.seed}/{i}', 'domain': problem.kind,
            'answer': problem.answer, 'messages': [
              {'role': 'user', 'content': problem.question},
              {'role': 'assistant', 'reasoning_content': '\n'.join(problem.steps),
               'content': f'The answer is {problem.answer}.'}]}


# Masks.

def examples(record):
  """The training examples of a conversation: lists of (text, trained), see the top of this file.

  Trained is what follows the generation prompt, up to and with <|im_end|>. Whether the prompt
  closes the think block (enable_thinking=False) is said by record['enable_thinking'] or, without
  it, by the turn: one without reasoning that no /no_think asked for was made with it closed. Not
  trained are turns with 'train': False and those before any question.
  Raises ValueError where flags and reasoning contradict each other or nothing is left to train.
  """
  messages, tools = record['messages'], record.get('tools')
  found, text = [], None
  for place, message in enumerate(messages):
    asked = any(m['role'] == 'user' for m in messages[:place])
    if message['role'] != 'assistant' or not asked or not message.get('train', True):
      continue
    thinking = _is_thinking(record, place)
    prompt = render(messages[:place], tools, thinking, add_generation_prompt=True)
    full = render(messages[:place + 1], tools).removesuffix('\n')
    if not full.startswith(prompt):
      raise ValueError(f'turn without a prompt: message {place} does not follow what is asked for '
                       'an answer; join assistant turns in a row')
    target = full[len(prompt):]
    if text and prompt.startswith(text):
      found[-1] += [(prompt[len(text):], False), (target, True)]
    else:
      found.append([(prompt, False), (target, True)])
    text = full
  if not found:
    raise ValueError('nothing to train: no assistant turn follows a question')
  return found


def _is_thinking(record, place):
  """Whether the think block of the turn at `place` is the model's own."""
  reasoning = record['messages'][place].get('reasoning_content')
  flag, given = last_flag(record['messages'][:place]), record.get('enable_thinking')
  if reasoning and (given is False or flag is False):
    raise ValueError(f'reasoning not wanted: message {place} has reasoning though thinking is off '
                     'there; drop it, or the flag')
  if not reasoning and flag and given is not False:
    raise ValueError(f'reasoning missing: message {place} has none though /think asks for it')
  return bool(reasoning) or flag is False if given is None else given


def encode_example(tokenizer, spans):
  """TOKEN array of (text, trained) spans, each tokenised apart as at inference."""
  return _encode(tokenizer.encode, spans)


def _encode(encode, spans):
  """Turn by turn, which gives the same ids, so that `encode` may remember the history's."""
  ids = [[id for turn in _TURN.split(text) for id in encode(turn)] for text, _ in spans]
  sizes = [len(part) for part in ids]
  tokens = np.empty(sum(sizes), TOKEN)
  tokens['id'] = [id for part in ids for id in part]
  tokens['weight'] = np.repeat([float(trained) for _, trained in spans], sizes)
  return tokens


def _fit(tokens, length, too_long):
  """`tokens` within `length`, cut behind the last trained one; none where they cannot be."""
  if len(tokens) <= length:
    return tokens
  trained = np.flatnonzero(tokens['weight'][:length])
  return tokens[:trained[-1] + 1 if too_long == 'truncate' and len(trained) else 0]


class Examples:
  """The examples of a source of conversations by index, as TOKEN arrays of at most `length`.

  `too_long`: 'drop' leaves longer ones out; 'truncate' cuts the end of the last trained span (it
  has no <|im_end|> then), never of a prompt: where no trained token would remain, or only whole
  turns before a prompt that does not fit, the rest goes. All is tokenised once here; kept are
  `sizes` (tokens) and places, 16 bytes an example, for files also in `cache` (see `files.fetch`).
  `report` counts conversations read, examples, tokens, trained_tokens, too_long_dropped,
  too_long_truncated, and by 'refused: <reason>' lines and conversations left out.
  Raises ValueError where no example is left.
  """

  def __init__(self, source, tokenizer, length, too_long='drop', cache=None):
    if too_long not in ('drop', 'truncate'):
      raise ValueError(f"too_long must be 'drop' or 'truncate', got {too_long!r}")
    self._source, self._tokenizer = source, tokenizer
    self._length, self._too_long = length, too_long
    places, counts = self._open(cache)
    self._counts = collections.Counter(counts)
    for reason, count in getattr(source, 'rejected', {}).items():
      self._counts[f'refused: {reason}'] += count
    self._take(places, source.name)

  def _open(self, cache):
    """The places and what was left out; measured, or found in the cache."""
    begin, counts = time.monotonic(), collections.Counter()
    path = self._cached(cache)
    if path and path.exists():
      with np.load(path) as saved:
        return saved['places'], json.loads(str(saved['counts']))
    places = np.fromiter(self._scan(counts), _PLACE)
    if path and time.monotonic() - begin > SLOW:
      with files.replace(path) as file:
        np.savez(file, places=places, counts=json.dumps(counts))
    return places, counts

  def _cached(self, cache):
    """The file for the places, named by all that decides them; None for what is not of files."""
    if not isinstance(self._source, Conversations):
      return None
    code = [module.__file__ for module in (template, chat_formats, files, tokenizer_module)]
    read = [self._tokenizer.file, *code, __file__]
    key = [self._source.fingerprint, self._length, self._too_long,
           *(files.hash_text(Path(path).read_bytes()) for path in read)]
    return files.cache_folder(key, cache) / 'places.npz'

  def _scan(self, counts):
    """The places, counting the rest; tokenizers let threads work side by side."""
    with ThreadPoolExecutor() as pool:
      for first in range(0, len(self._source), 1024):
        block = range(first, min(first + 1024, len(self._source)))
        for i, (reason, measured) in zip(block, pool.map(self._measure, block)):
          counts.update([f'refused: {reason}'] if reason else ())
          for turn, (size, kept, trained) in enumerate(measured):
            if size > kept:
              counts['too_long_truncated' if kept else 'too_long_dropped'] += 1
            if kept:
              yield i, turn, kept, trained

  def _measure(self, i):
    """Why conversation `i` is refused, or None, and (tokens, tokens kept, trained) an example."""
    try:
      found = examples(self._source[i])
    except ValueError as error:
      return reason_of(error), []
    encode, measured = functools.cache(self._tokenizer.encode), []
    for spans in found:
      tokens = _encode(encode, spans)
      kept = _fit(tokens, self._length, self._too_long)
      measured.append((len(tokens), len(kept), np.count_nonzero(kept['weight'])))
    return None, measured

  def _take(self, places, name):
    self._places, self.sizes, self.name = places, places['size'], name
    self.report = {
      'conversations': len(self._source), 'examples': len(places),
      'tokens': int(self.sizes.sum()), 'trained_tokens': int(places['trained'].sum()),
      'too_long_dropped': 0, 'too_long_truncated': 0, **self._counts}
    if not len(places):
      raise ValueError(f'{name}: no example is left; {self.report}')

  def by_tokens(self, low, high):
    """The examples of `low` to `high` tokens, as a source of their own."""
    view = copy.copy(self)
    chosen = (self.sizes >= low) & (self.sizes <= high)
    view._take(self._places[chosen], f'{self.name} of {low}-{high} tokens')
    return view

  def __len__(self):
    return len(self._places)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)} in {self.name}')
    record, turn, _, _ = self._places[i].tolist()
    tokens = encode_example(self._tokenizer, examples(self._source[record])[turn])
    return _fit(tokens, self._length, self._too_long)

  @property
  def fingerprint(self):
    """Changes with the conversations, their order, the tokenizer's lengths or the limit."""
    what = [self._source.fingerprint, self._length, self._too_long]
    return hashlib.blake2b(json.dumps(what).encode() + self._places.tobytes(),
                           digest_size=8).hexdigest()


_PLACE = np.dtype([('record', np.int32), ('turn', np.int32), ('size', np.int32),
                   ('trained', np.int32)])
