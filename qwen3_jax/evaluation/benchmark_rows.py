"""Rows of benchmark files become records: each file's shape, the words that ask, the gold answer.

A file is JSON lines, JSON (one object, a list, or lines under that name), CSV, TSV or Parquet,
compressed with gzip or zstd if it likes. A shape turns a row into one that `data.query_files`
knows, which makes the record; what is written here is only where a benchmark differs.
"""
import collections
import csv
import functools
import hashlib
import io
import json
import os
import random
import re
from pathlib import Path

from etils import epath

from qwen3_jax.data import files, query_files
from qwen3_jax.rewards import instructions
from qwen3_jax.rewards.response import Response

STEPS = 'Please reason step by step, and put your final answer within \\boxed{}.'
LETTER = 'Please reason step by step, and put the letter of your answer within \\boxed{}.'
LETTERS = 'ABCDEFGHIJ'
_LOST = re.compile(r'[\x00-\x08\x0b\x0c\x0e-\x1f]')


def read(paths, shape, name, ask='', skip_bad=False, cache=None):
  """(records, Counter of what was left out) of files; `shape` makes a row known, `ask` is appended.

  A record is that of `data.query_files` without a gate on the mode, and with 'id' (the row's, else
  a hash of it: the same whatever the order of rows), 'benchmark', and where the row has them
  'solution', 'group' (a subject, a language) and, of multiple choice, 'asked', 'choices' and 'gold'
  (the right one's place). Raises ValueError naming file and line of a row that is none (with
  `skip_bad` it is counted and left out).
  """
  records, rejected, seen = [], collections.Counter(), collections.Counter()
  for path in paths:
    for place, row in read_rows(path, cache):
      try:
        if isinstance(row, ValueError):
          raise row
        shaped = shape(row, Path(path))
        record = shaped and finish(shaped, row, name, ask)
      except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        complaint = f'no field {error}' if isinstance(error, KeyError) else str(error)
        if not skip_bad:
          raise ValueError(f'{path}, {place}: {complaint}; wanted {wanted(shape)}') from error
        rejected[re.split('[:;(]', complaint)[0].strip()] += 1
        continue
      if record:  # a shape may leave out rows that belong to another part of the data
        seen[record['id']] += 1
        if seen[record['id']] > 1:  # the same row twice
          record['id'] += f'#{seen[record["id"]]}'
        records.append(record)
  return records, rejected


def wanted(shape):
  """What rows of a shape have, in words."""
  return ' '.join(shape.__doc__.split()).rstrip('.')


def finish(shaped, row, name, ask=''):
  """The record of a row that `query_files` knows; `row` as it was gives the id."""
  record = query_files.normalise(shaped, name)
  text = ' '.join(message['content'] for message in record['messages'])
  if lost := _LOST.search(text):
    raise ValueError(f'the question holds the control character {lost[0]!r}: a backslash was lost')
  last = dict(record['messages'][-1])
  last['content'] += f'\n{ask}' if ask else ''
  number = hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=8)
  verifiers = {key: weight for key, weight in record['verifiers'].items() if weight}
  kept = {key: shaped[key] for key in ('solution', 'group', 'choices', 'gold') if key in shaped}
  if 'choices' in kept:
    kept['asked'] = shaped['question']
  return record | kept | {
    'id': f'{name}/{record.get("id", number.hexdigest())}', 'benchmark': name,
    'verifiers': verifiers, 'messages': [*record['messages'][:-1], last]}


def solve(record):
  """The Response that the data have as right, without reasoning; None where they have none."""
  if 'tests' in record:
    content = f'```python\n{record["solution"]}\n```' if 'solution' in record else None
  elif 'expected_calls' in record:
    calls = tuple({'name': name, 'arguments': {
      key: given[0] for key, values in wanted.items() if (given := [v for v in values if v != ''])}}
      for call in record['expected_calls'] for name, wanted in call.items())
    return Response('', '', '', calls, 0, 'stop')
  elif 'schema' in record:
    content = json.dumps(record['schema']['const'])
  else:
    content = f'\\boxed{{{record["answer"]}}}' if 'answer' in record else None
  return None if content is None else Response(content, '', content, (), 0, 'stop')


# Files.

def read_rows(path, cache=None):
  """('line 3', row) of a file, row by row; a line that is not JSON is a ValueError in its place.

  Raises ValueError where the file itself cannot be read.
  """
  kind = files.split_name(path)[0]
  if kind == 'parquet':
    yield from _read_parquet(path)
    return
  local = files.fetch(path, cache)[0]
  if kind in ('csv', 'tsv'):
    yield from _read_table(path, local, '\t' if kind == 'tsv' else ',')
  elif kind == 'json' and (whole := _read_whole(local)) is not None:
    yield from whole
  else:
    for _, number, _, line in files.lines(local, os.fspath(path)):
      if line.strip():
        try:
          yield f'line {number}', json.loads(line)
        except (ValueError, RecursionError) as error:
          yield f'line {number}', ValueError(f'not JSON: {error}')


def _read_whole(local):
  """The rows of a file that is one JSON value, or None: JSON lines go by the name .json too."""
  try:
    value = json.loads(local.read_text('utf-8-sig'))
  except (ValueError, RecursionError):
    return None
  rows = value if isinstance(value, list) else [value]
  return [(f'item {number}', row) for number, row in enumerate(rows, 1)]


def _read_table(path, local, mark):
  """Rows of CSV as objects if its first line names columns, else as lists; of TSV always lists."""
  text = local.read_text('utf-8-sig')
  if mark == '\t':  # quotes mean nothing there
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        yield f'line {number}', line.rstrip('\r').split('\t')
    return
  reader, names = csv.reader(io.StringIO(text, newline='')), None
  for row in reader:
    if reader.line_num == 1 or names is None:
      names = row if {each.strip().lower() for each in row} & {'question', 'problem'} else []
      if names:
        continue
    if names and len(row) != len(names):
      raise ValueError(f'{path}, line {reader.line_num}: {len(row)} cells under {len(names)} names')
    yield f'line {reader.line_num}', dict(zip(names, row)) if names else row


def _read_parquet(path):
  try:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
  except ImportError as error:
    raise ValueError(f'{path}: reading Parquet needs: pip install pyarrow') from error
  try:
    with open(path, 'rb') as file:
      for number, row in enumerate(parquet.read_table(file).to_pylist(), 1):
        yield f'row {number}', row
  except arrow.ArrowInvalid as error:
    raise ValueError(f'{path}: not a Parquet file ({error}); fetch the file again') from error


# Shapes: (row, path) -> a row that `query_files.normalise` knows. Docstrings say what is wanted.

def solved(row, path):
  """question or problem, and answer (a text that may end in #### 42) or solution (with a \\boxed{})
  """
  row = _lower(row)
  question = next((row[key] for key in ('question', 'problem', 'prompt') if key in row), None)
  answer = _whole(row.get('answer'))
  made = {'question': _text(question, row), 'answer': answer}
  if row.get('solution') is not None:
    made['solution'] = row['solution']
  elif isinstance(answer, str) and '####' in answer:
    made['solution'] = answer
  return made | _keep(row, ('id', 'unique_id'), ('subject', 'type', 'grade'))


def aime(row, path):
  """problem (or question) and answer, a whole number from 0 to 999."""
  made = solved(row, path)
  answer = str(made['answer']).strip()
  if not (answer.isascii() and answer.isdigit() and int(answer) <= 999):
    raise ValueError(f'the answer is {made["answer"]!r}')
  return made | {'answer': str(int(answer))}


def svamp(row, path):
  """Body, Question and Answer, a number."""
  row = _lower(row)
  story, answer = _text(row['body'], row).strip(), float(row['answer'])
  story += '' if story.endswith(('.', '?', '!')) else '.'
  return {'question': f'{story} {_text(row["question"], row)}', 'answer': _whole(answer)} | _keep(
    row, ('id',), ('type',))


def mgsm(row, path):
  """a question and a number with a tab between, in mgsm_LANGUAGE.tsv; or question and answer."""
  language = re.sub(r'^mgsm[_-]?', '', path.name.partition('.')[0]) or path.parent.name
  if isinstance(row, dict):
    row = _lower(row)
    question, number = row['question'], row.get('answer_number', row.get('answer'))
  else:
    question, number = row
  number = str(_whole(number)).replace(',', '').strip()
  if not re.fullmatch(r'-?\d+(\.\d+)?', number):
    raise ValueError(f'the answer is {number!r:.40}')
  return {'question': _text(question, row), 'answer': number, 'group': language}


def choice(row, path):
  """question, choices (2 to 10 texts) and answer (a place from 0 on, or a letter), or as ARC and
  MMLU-Pro have them; or the cells question, A, B, C, D, letter
  """
  if isinstance(row, list):
    question, *choices, answer = row
    group = {'group': re.sub('_(test|dev|val)$', '', path.name.partition('.')[0])}
    row, labels = {}, LETTERS[:len(choices)]
  else:
    row = _lower(row)
    question = row['question']
    if isinstance(question, dict):
      question, row = question['stem'], row | {'choices': question['choices']}
    given = row.get('choices') or row.get('options') or [row[key] for key in 'abcd']
    if isinstance(given, dict):
      given = [{'text': text, 'label': label} for text, label in zip(given['text'], given['label'])]
    labels = [each['label'] if isinstance(each, dict) else letter
              for letter, each in zip(LETTERS, given)]
    choices = [each['text'] if isinstance(each, dict) else each for each in given]
    answer = row['answerkey'] if 'answerkey' in row else row['answer']
    group = _keep(row, ('id', 'question_id'), ('subject', 'category', 'type'))
  if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) and c for c in choices):
    raise ValueError(f'{len(choices)} choices {choices!r:.60}')
  gold = list(labels).index(answer) if answer in labels else answer
  if type(gold) is not int or not 0 <= gold < len(choices):
    raise ValueError(f'the answer {answer!r} is none of {len(choices)} choices')
  if row.get('error_type', 'ok') != 'ok':  # MMLU-Redux marks questions of MMLU that are wrong
    return None
  return group | {'question': _text(question, row), 'choices': choices, 'answer': gold,
                  'gold': gold}


def gpqa(row, path):
  """Question, Correct Answer and Incorrect Answer 1 to 3."""
  row = _lower(row)
  choices = [_text(row['correct answer'], row).strip(), *(
    _text(row[f'incorrect answer {k}'], row).strip() for k in (1, 2, 3))]
  order = random.Random(row['question']).sample(range(4), 4)  # the same for everybody, always
  return {'question': _text(row['question'], row).strip(), 'choices': [choices[k] for k in order],
          'answer': order.index(0), 'gold': order.index(0)} | _keep(
            row, (), ('high-level domain',))


def humaneval(row, path):
  """task_id, prompt, entry_point, test and, for checking, canonical_solution."""
  for key in ('prompt', 'entry_point', 'test'):
    _text(row[key], row)
  if row['entry_point'] not in row['prompt'] or 'check' not in row['test']:
    raise ValueError('the prompt does not name the entry point, or the test has no check')
  solution = row.get('canonical_solution')
  return row | ({} if solution is None else {'solution': f'{row["prompt"]}{solution}'})


def mbpp(row, path):
  """task_id, text or prompt, test_list and, for checking, code; of the whole file 11 to 510."""
  tests = row['test_list']
  _text(row.get('text') or row.get('prompt'), row)
  if not isinstance(tests, list) or not tests or not all('assert' in _text(t, row) for t in tests):
    raise ValueError(f'test_list is {tests!r:.60}')
  if path.name.startswith(('mbpp.', 'sanitized')) and not 11 <= int(row['task_id']) <= 510:
    return None
  return row | ({} if row.get('code') is None else {'solution': row['code']})


def ifeval(row, path):
  """key, prompt, instruction_id_list and kwargs, one for each."""
  _text(row['prompt'], row)
  for id, given in zip(row['instruction_id_list'], row['kwargs']):
    instructions.check({'id': id, 'kwargs': given})
  return row


def bfcl(row, path):
  """id, question (one turn), function and ground_truth, in the row or in possible_answer/ beside it
  """
  kind = re.match(r'[a-z_]*', row['id'])[0].strip('_')
  calls = row.get('ground_truth')
  if calls is None:
    calls = _possible_answers(path.parent / 'possible_answer' / path.name).get(row['id'])
  if bool(calls) == ('irrelevance' in kind):
    raise ValueError(f'{kind} with {len(calls or ())} calls as ground truth')
  functions = row['function'] if isinstance(row['function'], list) else [row['function']]
  names = {each['name'] for each in functions}
  if strange := {name for call in calls or () for name in call} - names:
    raise ValueError(f'ground truth calls {sorted(strange)}, which is no function of the row')
  return row | {'function': functions, 'ground_truth': calls, 'group': kind}


@functools.lru_cache(16)
def _possible_answers(path):
  if not path.is_file():
    return {}
  rows = (row for _, row in read_rows(epath.Path(path)))
  return {row['id']: row['ground_truth'] for row in rows if isinstance(row, dict)}


def arc_agi(row, path):
  """train and test, lists of {input, output}, grids of digits; of several tests the first is asked.
  """
  shown = [f'Input {k}:\n{_grid(pair["input"])}\nOutput {k}:\n{_grid(pair["output"])}'
           for k, pair in enumerate(row['train'], 1)]
  test = row['test'][0]
  wanted = json.loads(_grid(test['output']))
  question = ('Each output grid is made from its input grid by one rule.\n\n' + '\n\n'.join(shown)
              + f'\n\nThe last input:\n{_grid(test["input"])}')
  return {'id': row.get('id', path.stem), 'verifiers': {'schema': 1.0}, 'schema': {'const': wanted},
          'messages': [{'role': 'user', 'content': question}]}


def _grid(grid):
  if not grid or not all(isinstance(line, list) and line and len(line) == len(grid[0]) and all(
      type(cell) is int and 0 <= cell <= 9 for cell in line) for line in grid):
    raise ValueError(f'no grid: {grid!r:.60}')
  return json.dumps(grid, separators=(',', ':'))


def _lower(row):
  if not isinstance(row, dict):
    raise ValueError(f'not an object: {row!r:.60}')
  return {str(key).lower(): value for key, value in row.items()}


def _text(value, row):
  if not isinstance(value, str) or not value.strip():
    names = sorted(row) if isinstance(row, dict) else row
    raise ValueError(f'{value!r:.40} where a text should be; the row has {names!r:.80}')
  return value


def _whole(value):
  return int(value) if isinstance(value, float) and value.is_integer() else value


def _keep(row, ids, groups):
  """The id and the group of a row, where it has them."""
  found = next((row[key] for key in ids if row.get(key) not in (None, '')), None)
  group = next((str(row[key]) for key in groups if row.get(key) not in (None, '')), None)
  return ({} if found is None else {'id': found}) | ({} if group is None else {'group': group})
