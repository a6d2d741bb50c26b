"""Checklists for answers that do not think: points made for each query, the answer held to them.

The Qwen3 Technical Report (section 4.3) judges non-thinking data by automatically generated
checklists and says no more; the points, the questions to the judge and the threshold are ours.
"""
from qwen3_jax.generation.respond import Failure, find_object, judge
from qwen3_jax.stages.queries import is_right
from qwen3_jax.stages.records import Accept, Fail, Reject
from qwen3_jax.text import languages, repetition

MOST_POINTS = 8

MAKE = """\
Someone will answer the request between the lines. Before you see an answer, write down what a \
very good one must fulfil: 3 to 6 points, each a short sentence that can be checked with yes or no \
by reading the answer, from what was asked for (content, form, length, language, tone), none about \
style in general.

----
{request}
----

Reply with one JSON object and nothing else: {"points": ["...", "..."]}
"""

SCORE = """\
Hold the answer against each point. Judge only what the point says, from the text alone.

Request:
----
{request}
----
Answer:
----
{answer}
----
Points:
{points}

Reply with one JSON object and nothing else: {"met": [true or false, one for each point, in order]}
"""


def read_points(text):
  """The points of a checklist; ValueError for anything but 1 to MOST_POINTS of them."""
  points = find_object(text).get('points')
  if not isinstance(points, list) or not 0 < len(points) <= MOST_POINTS:
    raise ValueError(f'points {points!r:.80}: wanted a list of 1 to {MOST_POINTS} strings')
  if not all(isinstance(point, str) and point.strip() for point in points):
    raise ValueError(f'points {points!r:.80}: wanted strings with words in them')
  return [' '.join(point.split()) for point in points]


def read_marks(text):
  """The marks, as a list of truth values; ValueError where they are something else."""
  marks = find_object(text).get('met')
  if not isinstance(marks, list) or not all(isinstance(mark, bool) for mark in marks):
    raise ValueError(f'met {marks!r:.80}: wanted a list of true and false')
  return marks


def find_broken_rule(record):
  """(rule, reason) of the first point that holds for every answer and not for this; or None.

  It says something, keeps its working to itself (no think tags), is in one language, does not
  repeat itself, and is right where the record has a reference answer.
  """
  answer = record['messages'][-1]['content']
  if not answer.strip():
    return 'says nothing', 'the answer is empty'
  if '<think>' in answer or '</think>' in answer:
    return 'thinks aloud', 'the answer has a think tag'
  for rule, find in (('repetition', repetition.find_repetition),
                     ('language mixing', languages.find_mixing)):
    if reason := find(answer):
      return rule, reason
  if 'answer' in record and not is_right(dict(question='') | record, answer):
    return 'wrong answer', f'the reference is {record["answer"]!r}'
  return None


def begin_checklist(_, model=None, least=0.8, tries=3):
  """Keeps conversations whose last answer meets its checklist; its reasoning, if any, is dropped.

  Every record must pass `find_broken_rule`. With `model`, a judge, a list of points is generated
  for each request (kept in 'checklist' with the marks) and at least the share `least` must be met.
  """
  responder = model and model()

  def decide(records):
    records = [_without_reasoning(record) for record in records]
    faults = [find_broken_rule(record) for record in records]
    asked = [i for i, fault in enumerate(faults) if responder and not fault]
    scored = dict(zip(asked, score(responder, [records[i] for i in asked], tries)))
    return [_decide(record, fault, scored.get(i), least)
            for i, (record, fault) in enumerate(zip(records, faults))]
  return decide


def score(responder, records, tries=3):
  """For each record a list of [point, whether met], or a Failure."""
  requests = [dict(request=_request(record), answer=record['messages'][-1]['content'])
              for record in records]
  lists = judge(responder, MAKE, requests, read_points, tries) if records else []
  have = [i for i, points in enumerate(lists) if not isinstance(points, Failure)]
  asked = [requests[i] | dict(points='\n'.join(f'{k}. {point}' for k, point in enumerate(
    lists[i], 1))) for i in have]
  marks = dict(zip(have, judge(responder, SCORE, asked, read_marks, tries) if asked else ()))
  return [_join(points, marks.get(i)) for i, points in enumerate(lists)]


def _join(points, marks):
  for part in (points, marks):
    if isinstance(part, Failure):
      return part
  if len(points) != len(marks):
    return Failure(f'{len(marks)} marks for {len(points)} points')
  return [[point, mark] for point, mark in zip(points, marks)]


def _request(record):
  return '\n\n'.join(f'{m["role"]}: {m["content"]}' for m in record['messages'][:-1]
                     if m['content'])


def _without_reasoning(record):
  messages = [{key: value for key, value in message.items() if key != 'reasoning_content'}
              for message in record['messages']]
  return record | dict(messages=messages)


def _decide(record, fault, scored, least):
  if fault:
    return Reject(record, *fault)
  if isinstance(scored, Failure):
    return Fail(record, scored.reason)
  if scored is None:
    return Accept(record)
  met = sum(mark for _, mark in scored) / len(scored)
  record = record | dict(checklist=scored)
  if met < least:
    missed = '; '.join(point for point, mark in scored if not mark)
    return Reject(record, 'checklist', f'{met:.0%} of the points met, not: {missed}')
  return Accept(record)
