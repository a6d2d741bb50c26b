"""Pairs of answers, one preferred to the other, as tokens; a pair is never split over two rows.

On disk a pair is a JSON line {'prompt', 'chosen', 'rejected'}. The prompt is a text or messages
('messages' is another name for it), an answer a text, a message, or the messages of one turn with
its tool calls. Without a prompt both answers are whole conversations, and what they share at the
beginning is the prompt. 'margin' says by how much the chosen answer is the better one; 'tools' and
'enable_thinking' are as in conversations.
"""

import collections
import hashlib
import json
import math
import random
import re
import string
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen3_jax.data import conversations, files, sources, tasks
from qwen3_jax.data.chat_formats import normalise

SHORTEST = 28  # tokens of the template in the smallest pair, from which follows how many fit a row
TOKEN = np.dtype([('id', np.int32), ('weight', np.float32), ('rejected', np.int32),
                  ('margin', np.float32), ('reference', np.float32)])


def read(spec, split=None, heldout=None, cache=None):
  """The pairs that `spec` names, by index: JSON lines by path, folder or glob, or 'pairs:...'.

  The split goes by what the users ask. Each line is read and checked here; a bad one is a
  ValueError that names file and line. 'pairs[:options]' generates right and wrong solutions of
  problems, see `open_generated`.
  """
  kind, _, options = spec.partition(':')
  if kind == 'pairs':
    return open_generated(options, split)
  source = sources.join([_open_file(path, cache) for path in files.find(spec)], spec)
  if not len(source):
    raise ValueError(f'{spec}: there is no pair in it')
  return sources.choose(source, source.groups, split, heldout)


def _open_file(path, cache):
  name, local = str(path), files.fetch(path, cache)[0]
  rows = np.fromiter(_scan(local, name), [('offset', np.int64), ('size', np.int64),
                                          ('hash', np.uint64), ('question', np.uint64)])

  def read_pair(i):
    with open(local, 'rb') as file:
      file.seek(rows['offset'][i])
      return normalise_pair(json.loads(file.readline().decode('utf-8-sig')))
  return sources.Source(name, read_pair, rows['size'], rows['hash'], rows['question'])


def _scan(local, name):
  for offset, number, data, line in files.lines(local, name):
    if data.isspace():
      continue
    try:
      pair = normalise_pair(json.loads(line))
    except (ValueError, RecursionError) as error:
      kind = 'not JSON: ' if isinstance(error, json.JSONDecodeError) else ''
      raise ValueError(f'{name}, line {number}: {kind}{error}') from error
    asked = ' '.join(m['content'] for m in pair['chosen']['messages'] if m['role'] == 'user')
    yield offset, len(data), files.hash_text(data), files.hash_text(asked.casefold().encode())


def normalise_pair(record):
  """{'chosen': conversation, 'rejected': conversation, 'margin': number} of a record on disk.

  In both conversations only the answer is trained. Where either answer has reasoning, the prompt of
  both leaves the think block open. Raises ValueError '<reason>: detail'.
  """
  if not isinstance(record, dict):
    raise ValueError(f'not an object: {record!r:.60}; wanted one pair, a JSON object')
  if missing := [key for key in ('chosen', 'rejected') if record.get(key) in (None, '', [])]:
    raise ValueError(f"no pair: the record has no {' and no '.join(missing)}; wanted 'prompt', "
                     "'chosen' and 'rejected'")
  margin = record.get('margin') or 0
  if not isinstance(margin, (int, float)) or not math.isfinite(margin):
    raise ValueError(f'bad margin: {margin!r:.40}; wanted a number')
  answers = [_messages(record[key], 'assistant', key) for key in ('chosen', 'rejected')]
  given = [record[key] for key in ('prompt', 'messages') if record.get(key)]
  if len(given) > 1:
    raise ValueError("prompt given twice: the record has both 'prompt' and 'messages'")
  prompt = _messages(given[0], 'user', 'prompt') if given else _shared(*answers)
  answers = answers if given else [answer[len(prompt):] for answer in answers]
  if answers[0] == answers[1]:
    raise ValueError('equal answers: chosen and rejected are the same')
  if not all(answer and answer[0].get('role') == 'assistant' for answer in answers):
    raise ValueError('different prompts: what chosen and rejected differ in is not an answer of '
                     'the assistant')
  prompt = [message | {'train': False} for message in prompt]
  shared = {key: record[key] for key in ('tools', 'enable_thinking') if key in record}
  pair = [normalise(shared | {'messages': prompt + answer}) for answer in answers]
  turns = [message for side in pair for message in side['messages'][len(prompt):]]
  if any(message.get('reasoning_content') for message in turns):
    pair = [{'enable_thinking': True} | side for side in pair]
  return {'chosen': pair[0], 'rejected': pair[1], 'margin': float(margin)}


def _messages(given, role, name):
  given = [{'role': role, 'content': given}] if isinstance(given, str) else given
  given = [given] if isinstance(given, dict) else given
  if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
    raise ValueError(f'bad {name}: {given!r:.60}; wanted a text, a message or a list of messages')
  return given


def _shared(chosen, rejected):
  """The messages that both begin with, up to the last of the users'."""
  same = next((k for k, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
              min(len(chosen), len(rejected)))
  asked = [k for k in range(same) if chosen[k].get('role') == 'user']
  if not asked:
    raise ValueError("no prompt: give 'prompt', or conversations that begin with the same question")
  return chosen[:asked[-1] + 1]


def encode_answer(tokenizer, record):
  """conversations.TOKEN array of a conversation up to its answer's <|im_end|>, the last token."""
  found = conversations.examples(record)
  if len(found) > 1:
    raise ValueError('answer of several turns: a user speaks between them; compare one turn')
  return conversations.encode_example(tokenizer, found[0])


def encode_last(tokenizer, record):
  """Token ids of a conversation record up to the end of its last message, an answer."""
  *history, answer = record['messages']
  messages = [message | {'train': False} for message in history] + [answer]
  return encode_answer(tokenizer, normalise(record | {'messages': messages}))['id']


def encode_pair(tokenizer, pair):
  """TOKEN array of a pair: the chosen answer with its prompt, then the rejected with its own."""
  sides = [encode_answer(tokenizer, pair[key]) for key in ('chosen', 'rejected')]
  tokens = np.zeros(sum(map(len, sides)), TOKEN)
  for field in ('id', 'weight'):
    tokens[field] = np.concatenate([side[field] for side in sides])
  tokens['rejected'][len(sides[0]):] = 1
  tokens['margin'] = pair['margin']
  return tokens


def make_batch(rows, length):
  """Batch arrays from one list of TOKEN arrays (pairs) a row, as `packing.make_batch` has them.

  Pair k of a row, from 1, is the segments 2k - 1 and 2k; pair_BC is 1 for each. reference_BT is the
  reference model's log-probability of the token; the last tokens of a row may be padding.
  """
  B, C = len(rows), max(1, length // SHORTEST)
  batch = {}
  for kind, wide, names in ((np.int32, length, ('tokens_BT', 'segment_BT', 'position_BT')),
                            (np.float32, length, ('weight_BT', 'reference_BT')),
                            (np.float32, C, ('pair_BC', 'margin_BC'))):
    batch |= {name: np.zeros((B, wide), kind) for name in names}
  for b, pairs in enumerate(rows):
    used = 0
    for k, pair in enumerate(pairs):
      part, first = np.s_[b, used:used + len(pair)], np.count_nonzero(pair['rejected'] == 0)
      batch['tokens_BT'][part], batch['weight_BT'][part] = pair['id'], pair['weight']
      batch['segment_BT'][part] = 2 * k + 1 + pair['rejected']
      batch['position_BT'][part] = np.arange(len(pair)) - first * pair['rejected']
      batch['reference_BT'][part] = pair['reference']
      batch['pair_BC'][b, k], batch['margin_BC'][b, k] = 1, pair['margin'][0]
      used += len(pair)
  return batch


class Pairs:
  """The pairs of a source by index, as TOKEN arrays of at most `length`.

  All is tokenised once here; kept are `sizes` (tokens of both answers with their prompts) and a few
  numbers a pair. `report` counts pairs, those left out because they are `too_long`, and by reason
  those that cannot be rendered. `reference`, set later, is the log-probability of every trained
  token of every pair, in order. Raises ValueError where no pair is left.
  """

  def __init__(self, source, tokenizer, length):
    self._source, self._tokenizer, self._length, self.name = source, tokenizer, length, source.name
    self._refused, self.reference = collections.Counter(), None
    self._places = np.fromiter(self._scan(), _PLACE)
    self.sizes, trained = self._places['size'], self._places['trained']
    self._ends = np.cumsum(trained)
    self.report = {'pairs': len(self.sizes), 'tokens': int(self.sizes.sum()),
                   'trained_tokens': int(trained.sum()), **self._refused}
    if not len(self.sizes):
      raise ValueError(f'{self.name}: no pair is left of {len(source)}; {dict(self._refused)}, '
                       f'config.data.length is {length}')

  def _scan(self):
    with ThreadPoolExecutor() as pool:
      for first in range(0, len(self._source), 1024):
        block = range(first, min(first + 1024, len(self._source)))
        for i, tokens in zip(block, pool.map(self._encode, block)):
          if isinstance(tokens, str):
            self._refused[tokens] += 1
          elif len(tokens) > self._length:
            self._refused['too_long'] += 1
          else:
            yield (i, len(tokens), np.count_nonzero(tokens['weight']),
                   zlib.crc32(tokens['id'].tobytes()))

  def _encode(self, i):
    """The tokens of pair `i` of the source, or why it has none."""
    try:
      return encode_pair(self._tokenizer, self._source[i])
    except ValueError as error:
      return conversations.reason_of(error)

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'pair {i} of {len(self)} in {self.name}')
    tokens = encode_pair(self._tokenizer, self._source[self._places[i]['record'].item()])
    if self.reference is not None:
      where = tokens['weight'] > 0
      tokens['reference'][where] = self.reference[self._ends[i] - where.sum():self._ends[i]]
    return tokens

  @property
  def fingerprint(self):
    """Changes with the tokens of any pair, or their order."""
    return hashlib.blake2b(self._places.tobytes(), digest_size=8).hexdigest()


_PLACE = np.dtype([('record', np.int64), ('size', np.int32), ('trained', np.int32),
                   ('crc', np.uint32)])


# Generated pairs.

def open_generated(options, split=None):
  """Pairs from 'longer=0.9,kinds=add+sort,difficulty=1-3,size=1000,seed=7'; all may be left out.

  The chosen answer solves a problem (see `tasks.open_tasks`); in the rejected one single digits
  or letters, or the order of words, are wrong, so that it has the same length. With `longer` one of
  the two, the chosen one with this probability, goes on with a sentence that says nothing: a bias.
  """
  parts = options.split(',') if options else []
  mine = [part for part in parts if part.startswith('longer=')]
  problems = tasks.open_tasks(','.join(part for part in parts if part not in mine), split)
  try:
    longer = float(mine[-1].removeprefix('longer=')) if mine else None
    if longer is not None and not 0 <= longer <= 1:
      raise ValueError
  except ValueError:
    raise ValueError(f'pairs option {mine[-1]!r}: wanted a probability, longer=0.9, say') from None
  return GeneratedPairs(problems, longer)


class GeneratedPairs:
  """Pairs by index; see `open_generated`."""

  def __init__(self, problems, longer):
    self.tasks, self.longer = problems, longer
    self.name = problems.name.replace('tasks', 'pairs', 1)
    self.fingerprint = f'{problems.fingerprint} longer {longer}'

  def __len__(self):
    return len(self.tasks)

  def __getitem__(self, i):
    problem = self.tasks.task(i)
    rng = random.Random(f'pair {self.tasks.seed} {i}')
    steps, answer = corrupt(problem, rng)
    sides = [[list(problem.steps), problem.answer], [steps, answer]]
    if self.longer is not None:
      sides[rng.random() >= self.longer][0].append(rng.choice(FILLERS))
    chosen, rejected = ({'role': 'assistant', 'reasoning_content': '\n'.join(steps),
                         'content': f'The answer is {answer}.'} for steps, answer in sides)
    return normalise_pair({'prompt': problem.question, 'chosen': chosen, 'rejected': rejected})


FILLERS = ('All of this was done with care, step by step.', 'That is how one does it.',
           'Nothing else is needed for the answer now.')


def corrupt(problem, rng):
  """(steps, answer) of a wrong solution: the answer is, and each step in one of two cases."""
  for _ in range(100):
    answer = _spoil(problem.answer, rng)
    if not tasks.check(problem, f'Answer: {answer}'):
      break
  else:
    answer = 'none' if problem.answer != 'none' else '0'
  steps = [_spoil(step, rng) if _FACT.search(step) and rng.random() < 0.5 else step
           for step in problem.steps]
  return steps, answer


_SIDES = ('heads', 'tails'), ('north', 'south'), ('east', 'west')  # each of one length
_FACT = re.compile(r'\d|\b(?:heads|tails|north|east|south|west|[A-Z])\b')


def _spoil(text, rng):
  """`text` with one digit, letter or side replaced, or else two neighbours exchanged."""
  if facts := list(_FACT.finditer(text)):
    fact = rng.choice(facts)
    known = next((group for group in _SIDES if fact[0] in group), (
      '123456789' if fact[0].isdigit() else string.ascii_uppercase))
    others = [other for other in known if other != fact[0]]
    return text[:fact.start()] + rng.choice(others) + text[fact.end():]
  glue = ', ' if ', ' in text else ''
  parts = text.split(glue) if glue else list(text)
  k = rng.randrange(max(1, len(parts) - 1))
  parts[k:k + 2] = parts[k:k + 2][::-1]
  return glue.join(parts)
