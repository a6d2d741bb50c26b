"""Questions on disk: JSON lines of several shapes become records with the verifiers they need.

| fields of a line | as in | verifiers |
|---|---|---|
| messages, verifiers | records themselves | their own |
| prompt, instruction_id_list, kwargs | IFEval | instructions |
| question (turns), function, ground_truth | BFCL, one turn | tools |
| prompt, test, entry_point | HumanEval | code |
| text or prompt, test_list | MBPP | code |
| question, choices, answer (a number) | MMLU | math (a choice) |
| question or problem, answer or solution | GSM8K, MATH | math |
| question and tests | | code |
| question and reference | | judge |
| messages or prompt alone | | preference |
"""
import collections
import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from qwen3_jax.data import files, sources, tasks
from qwen3_jax.data.query import by
from qwen3_jax.rewards import answers, code

KINDS = ('exact', 'countdown', 'choice', 'text')
_ROW = np.dtype([('offset', np.int64), ('size', np.int64), ('hash', np.uint64),
                 ('question', np.uint64)])
_TYPES = {'dict': 'object', 'float': 'number', 'tuple': 'array', 'any': None}


@dataclasses.dataclass(frozen=True)
class Records(sources.Source):
  """Records by index; `rejected` counts by reason the lines that were left out."""
  rejected: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def read(spec, split=None, heldout=None, cache=None, skip_bad=False):
  """Records of a path, folder or glob, by index: each line is checked here, see the table above.

  The split goes by what is asked. A line that is no question is a ValueError that names file and
  line or, with `skip_bad`, counted in `rejected` and left out.
  """
  rejected = collections.Counter()
  parts = [_open_file(path, cache, skip_bad, rejected) for path in files.find(spec)]
  found = sources.join(parts, spec)
  if not len(found):
    raise ValueError(f'{spec}: there is no question in it (left out: {dict(rejected) or 0})')
  everything = Records(found.name, found.read, found.sizes, found.hashes, found.groups, rejected)
  return sources.choose(everything, everything.groups, split, heldout)


def _open_file(path, cache, skip_bad, rejected):
  name, local = str(path), files.fetch(path, cache)[0]
  source = '/'.join([*Path(name).parts[-2:-1], Path(name).name.partition('.')[0]])

  def refuse(number, complaint):
    if not skip_bad:
      raise ValueError(f'{name}, line {number}: {complaint}')
    rejected[re.split('[:;(]', str(complaint))[0].strip()] += 1

  rows = np.fromiter(_scan(local, name, source, refuse), _ROW)

  def read_record(i):
    with open(local, 'rb') as file:
      file.seek(rows['offset'][i])
      record = normalise(json.loads(file.readline().decode('utf-8-sig')), source)
      return record | {'id': record.get('id') or f'{rows["hash"][i]:016x}'}
  return sources.Source(name, read_record, rows['size'], rows['hash'], rows['question'])


def _scan(local, name, source, refuse):
  for offset, number, data, line in files.lines(local, name, refuse):
    if data.isspace():
      continue
    try:
      record = normalise(json.loads(line), source)
    except (ValueError, RecursionError) as error:
      refuse(number, f'not JSON: {error}' if isinstance(error, json.JSONDecodeError) else error)
      continue
    asked = ' '.join(m['content'] for m in record['messages'] if m['role'] == 'user')
    yield (offset, len(data), files.hash_text(data),
           files.hash_text(asked.casefold().encode(errors='surrogatepass')))


def normalise(row, source):
  """The record of a line; ValueError where it has no shape of the table."""
  if not isinstance(row, dict):
    raise ValueError(f'not an object: {row!r:.60}; wanted one question, a JSON object')
  if 'messages' in row and row.get('verifiers'):
    return {'source': source} | row
  for shape in (_read_instructions, _read_calls, _read_code, _read_choice, _read_answer,
                _read_reference):
    if record := shape(row):
      break
  else:
    raise ValueError(f'no question that can be scored: the record has {sorted(row)}; wanted '
                     'question and answer, tests or reference, or what IFEval, BFCL, HumanEval, '
                     'MBPP, GSM8K or MATH have')
  return _finish(row, source, record)


def _finish(row, source, record):
  name, fields, question = record
  if isinstance(question, str):
    question = [{'role': 'user', 'content': question}]
  kept = {key: row[key] for key in ('tools', 'enable_thinking', 'difficulty', 'domain')
          if key in row}
  if key := next((k for k in ('id', 'unique_id', 'task_id', 'key') if k in row), None):
    kept['id'] = str(row[key])
  return {'source': source, 'messages': question, 'verifiers': by(name), **kept, **fields}


def _asked(row):
  """Messages or text of the question, or None."""
  for key in ('messages', 'question', 'problem', 'prompt', 'text', 'query', 'instruction'):
    if row.get(key):
      return row[key]
  return None


def _read_instructions(row):
  if 'instruction_id_list' not in row:
    return None
  ids, kwargs = row['instruction_id_list'], row.get('kwargs') or []
  if not ids or len(ids) != len(kwargs):
    raise ValueError(f'{len(ids)} instruction ids with {len(kwargs)} kwargs; wanted one for each')
  rules = [{'id': name, 'kwargs': {k: v for k, v in (given or {}).items() if v is not None}}
           for name, given in zip(ids, kwargs)]
  return 'instructions', {'instructions': rules}, row['prompt']


def _read_calls(row):
  if 'function' not in row or 'question' not in row:
    return None
  turns = row['question']
  if isinstance(turns, list) and turns and isinstance(turns[0], list):
    if len(turns) > 1:
      raise ValueError(f'{len(turns)} turns of questions; one can be scored without an environment')
    turns = turns[0]
  tools = [{'type': 'function', 'function': each | {'parameters': _schema(each['parameters'])}}
           for each in row['function']]
  return 'tools', {'tools': tools, 'expected_calls': row.get('ground_truth') or []}, turns


def _schema(schema):
  """JSON Schema of BFCL's, which has Python's names of types."""
  if isinstance(schema, list):
    return [_schema(each) for each in schema]
  if not isinstance(schema, dict):
    return schema
  found = {key: value if key in ('default', 'enum', 'description') else _schema(value)
           for key, value in schema.items()}
  if isinstance(found.get('type'), str):
    found['type'] = _TYPES.get(found['type'], found['type'])
    if found['type'] is None:
      del found['type']
  return found


def _read_code(row):
  if 'entry_point' in row and 'test' in row:
    question = f'Complete this Python function.\n\n```python\n{row["prompt"]}\n```'
    return 'code', {'tests': code.read_humaneval(row)}, question
  if 'test_list' in row:
    question = (f'{row.get("text") or row["prompt"]}\n\nYour Python code should pass tests like '
                f'this one:\n{row["test_list"][0]}')
    late = row.get('test_setup_code') or '\n'.join(row.get('test_imports') or [])
    return 'code', {'tests': code.read_mbpp(row | {'test_setup_code': late})}, question
  if row.get('tests') and _asked(row):
    return 'code', {'tests': row['tests']}, _asked(row)
  return None


def _read_choice(row):
  if not isinstance(row.get('choices'), list) or type(row.get('answer')) is not int:
    return None
  letters = 'ABCDEFGHIJ'[:len(row['choices'])]
  if not 0 <= row['answer'] < len(letters):
    raise ValueError(f'the answer is choice {row["answer"]} of {len(row["choices"])}')
  shown = '\n'.join(f'({letter}) {choice}' for letter, choice in zip(letters, row['choices']))
  return ('math', {'answer': letters[row['answer']], 'kind': 'choice'},
          f'{_asked(row)}\n{shown}\nAnswer with a letter.')


def _read_answer(row):
  question, answer, kind = _asked(row), row.get('answer'), row.get('kind')
  if not question or 'answer' not in row and 'solution' not in row:
    return None
  if answer is None and isinstance(row.get('solution'), str):
    answer = answers.find_boxed(row['solution'])
  if isinstance(answer, bool) or not isinstance(answer, str | int | float):
    raise ValueError('no answer: wanted a text or number as answer, or a \\boxed{...} in solution')
  answer = str(answer)
  if '####' in answer:
    answer = re.sub(r'(?<=\d),(?=\d{3})', '', answer.rpartition('####')[2].strip())
  if not answer.strip():
    raise ValueError('no answer: it is empty')
  if kind not in KINDS:  # rows of generated problems name what they are about
    kind = 'exact' if kind in tasks.KINDS else None
  numbers = {'numbers': row['numbers']} if kind == 'countdown' else {}
  return 'math', {'answer': answer, 'kind': kind, **numbers}, question


def _read_reference(row):
  question = _asked(row)
  if row.get('reference') and question:
    return 'judge', {'reference': str(row['reference'])}, question
  if row.get('messages') or row.get('prompt'):
    return 'preference', {}, question
  return None
