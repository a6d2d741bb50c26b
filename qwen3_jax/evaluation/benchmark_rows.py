"""Rows of benchmark files become records: each file's shape, the words that ask, the gold answer.

A file is JSON lines, JSON (one object, a list, or lines under that name), CSV, TSV or Parquet,
compressed with gzip or zstd if it likes. A shape turns a row into one that `data.query_files`
knows, which makes the record; what is written here is only where a benchmark differs.
"""
import collections
import csv
import hashlib
import io
import json
import os
import re
from pathlib import Path

from qwen3_jax.data import files, query_files

STEPS = 'Please reason step by step, and put your final answer within \\boxed{}.'
LETTER = 'Please reason step by step, and put the letter of your answer within \\boxed{}.'
LETTERS = 'ABCDEFGHIJ'
_LOST = re.compile(r'[\x00-\x08\x0b\x0c\x0e-\x1f]')


def read(paths, shape, name, ask='', skip_bad=False, cache=None):
  """(records, Counter of what was left out) of files; `shape` makes a row known, `ask` is appended.

  A record is that of `data.query_files` without a gate on the mode, and with 'id' (the row's, else
  a hash of it: the same whatever the order of rows), 'benchmark', 'solution' where the row has one,
  and 'group' where it belongs to one. Raises ValueError naming file and line of a row that is none
  (with `skip_bad` it is counted and left out).
  """
  records, rejected, seen = [], collections.Counter(), collections.Counter()
  for path in paths:
    for place, row in read_rows(path, cache):
      try:
        record = _make(row, shape, path, name, ask)
      except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        complaint = f'no field {error}' if isinstance(error, KeyError) else str(error)
        if not skip_bad:
          raise ValueError(f'{path}, {place}: {complaint}; wanted {shape.__doc__}') from error
        rejected[re.split('[:;(]', complaint)[0].strip()] += 1
        continue
      seen[record['id']] += 1
      if seen[record['id']] > 1:  # the same row twice
        record['id'] += f'#{seen[record["id"]]}'
      records.append(record)
  return records, rejected


def _make(row, shape, path, name, ask):
  shaped = shape(row, Path(path))
  record = query_files.normalise(shaped, name)
  text = ' '.join(message['content'] for message in record['messages'])
  if lost := _LOST.search(text):
    raise ValueError(f'the question holds the control character {lost[0]!r}: a backslash was lost')
  last = dict(record['messages'][-1])
  last['content'] += f'\n{ask}' if ask else ''
  number = hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).hexdigest()
  verifiers = {key: weight for key, weight in record['verifiers'].items() if key != 'mode'}
  kept = {key: shaped[key] for key in ('solution', 'group', 'choices', 'gold') if key in shaped}
  return record | kept | {
    'id': f'{name}/{record.get("id", number)}', 'benchmark': name, 'verifiers': verifiers,
    'messages': [*record['messages'][:-1], last]}


# Files.

def read_rows(path, cache=None):
  """('line 3', row) of a file, row by row; ValueError names the place of what is not readable."""
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
          raise ValueError(f'{path}, line {number}: not JSON: {error}') from error


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


# Shapes: (row, path) -> a row that `query_files.normalise` knows; the docstring says what is wanted.

def _lower(row):
  if not isinstance(row, dict):
    raise ValueError(f'not an object: {row!r:.60}')
  return {str(key).lower(): value for key, value in row.items()}


def solved(row, path):
  """question or problem, and answer (a text that may end in #### 42) or solution (with a \\boxed{})

  Names of fields may be written in capitals.
  """
  row = _lower(row)
  question = row.get('question') or row.get('problem') or row.get('prompt')
  if not isinstance(question, str) or not question.strip():
    raise ValueError(f'no question among the fields {sorted(row)}')
  answer, solution = row.get('answer'), row.get('solution')
  if isinstance(answer, float) and answer.is_integer():
    answer = int(answer)
  made = {'question': question, 'answer': answer}
  if solution is not None:
    made['solution'] = solution
  if isinstance(answer, str) and '####' in answer:
    made['solution'] = answer
  return made | _keep(row, ('id', 'unique_id'), ('subject', 'type', 'grade'))


def _keep(row, ids, groups):
  kept = {key: row[key] for key in ids if row.get(key) is not None}
  group = next((str(row[key]) for key in groups if row.get(key) is not None), None)
  return kept | ({} if group is None else {'group': group})
