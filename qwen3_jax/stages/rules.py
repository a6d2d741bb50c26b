"""The rules of `data` as stages: on questions, on texts and on candidate answers."""
import functools
import re

from qwen3_jax.data import decontaminate, duplicates, filters, tasks
from qwen3_jax.stages.records import (
  START,
  Accept,
  Reject,
  Rows,
  item_of,
  load_line,
  text_of,
  words_of,
)
from qwen3_jax.text import languages, repetition


def each(judge):
  """decide(records) from a function of one record that returns None or (rule, reason)."""
  def decide(records):
    found = [(record, judge(record)) for record in records]
    return [Reject(record, *fault) if fault else Accept(record) for record, fault in found]
  return decide


def begin_verifying(_):
  """Rejects questions whose answer cannot be checked against one reference."""
  return each(judge_question)


def judge_question(record):
  if not record.get('answer'):
    return 'no reference answer', 'there is nothing to compare an answer with'
  reason = None if record.get('kind') in tasks.KINDS else filters.find_unverifiable(
    record['question'])
  return reason and (re.sub(r'^\d+ ', '', reason.partition(':')[0]), reason)


def begin_cleaning(_, repetitions, mixing):
  """Rejects texts that repeat themselves or mix languages; of chats the assistant's words count.

  `repetitions` and `mixing` are arguments of `find_repetition` and `find_mixing`.
  """
  def judge(record):
    text = text_of(record)
    asked = '\n\n'.join(message['content'] for message in record.get('messages', ())
                        if message['role'] != 'assistant')
    for rule, reason in (('repetition', repetition.find_repetition(text, **repetitions)),
                         ('language mixing', find_mixing(text, asked, mixing))):
      if reason:
        return rule, reason
  return each(judge)


def find_mixing(text, asked, options):
  """`languages.find_mixing`, but the languages of `asked`, the request, may occur too."""
  reason = languages.find_mixing(text, **options)
  if reason and asked:
    allowed = (*options.get('allowed', ()), *sorted(languages.find_languages(asked)))
    reason = languages.find_mixing(text, **options | dict(allowed=allowed))
  return reason


def begin_deduplicating(folder, **options):
  """Rejects what is equal to, or nearly, a record kept before; `options` of `Deduplicator`.

  What was kept is read again from the stage's own file, so memory grows with what is kept: about
  550 bytes a record.
  """
  kept = duplicates.Deduplicator(**options)
  for row in Rows([folder / 'accepted.jsonl']).read(START):
    record = load_line(row[3])
    kept.check(record['id'], words_of(record))

  def judge(record):
    found = kept.check(record['id'], words_of(record))
    return found and (f'{found[0]} duplicate', f'similarity {found[2]:.2f} to {found[1]}')
  return each(judge)


def read_tests(tests):
  """(id, text) of each item in test files: its question, or the words of the user."""
  for _, name, line, data in Rows(tests).read(START):
    try:
      yield f'{name}:{line}', item_of(load_line(data))
    except ValueError as e:
      raise ValueError(f'{name}, line {line}: {e}; a test item has question, problem, prompt, '
                       'instruction, text or messages') from None


def begin_decontaminating(_, tests, **options):
  """Rejects what contains an item of the files `tests`; `options` of `decontaminate.Index`."""
  index = decontaminate.Index(read_tests(tests), **options)

  def judge(record):
    reason = decontaminate.find_contamination(words_of(record), index)
    return reason and ('contaminated', reason)
  return each(judge)


class Faults:
  """What is wrong with a candidate answer: `faults(record, candidate)` -> (rule, reason) or None.

  `thinking`: the reasoning stands apart, and an answer without is a guess; else a worked solution
  is its own reasoning. `tests` are files of validation items. The other arguments are those of the
  rules; `guess` None leaves that one out. In this order: unfinished, wrong answer, repetition,
  guess, inconsistent, language mixing, close to validation.
  """

  def __init__(self, thinking, repetitions, mixing, guess, tests=(), similar=None):
    similar = dict(similar or {})
    self.thinking, self.repetitions, self.mixing, self.guess = thinking, repetitions, mixing, guess
    shape = {key: similar.pop(key) for key in ('width', 'least') if key in similar}
    self.index = filters.Similar(read_tests(tests), **shape) if tests else None
    self.similar = similar

  def __call__(self, record, candidate):
    reasoning, content = candidate['reasoning'], candidate['content']
    if candidate['finish_reason'] != 'stop' or not content.strip():
      return 'unfinished', (f'ended by {candidate["finish_reason"]} with {len(content)} characters '
                            'of answer')
    wrong = filters.find_wrong_answer(content, record['answer'], lambda *_: candidate['right'])
    if wrong:
      return 'wrong answer', wrong
    whole = f'{reasoning}\n\n{content}' if reasoning else content
    worked, stated = (reasoning, content) if reasoning or self.thinking else (content, '')
    for rule, find in (
        ('repetition', functools.partial(repetition.find_repetition, whole, **self.repetitions)),
        ('guess', lambda: self.guess is not None and filters.find_guess(
          worked, stated, **self.guess)),
        ('inconsistent', functools.partial(filters.find_inconsistency, reasoning, content)),
        ('language mixing', functools.partial(find_mixing, whole, record['question'], self.mixing)),
        ('close to validation', lambda: self.index and filters.find_similar(
          whole, self.index, **self.similar))):
      if reason := find():
        return rule, reason
    return None
