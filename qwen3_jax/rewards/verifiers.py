"""The rules that give an answer its components, by the names that records use.

| name | reads of the record | 1 says |
|---|---|---|
| math | answer, kind, numbers | the final answer is right |
| instructions | instructions | all instructions are followed; less: this share |
| schema | schema | the answer is JSON of that schema |
| tools | expected_calls, tools | the calls are those wanted |
| citations | documents, answer, answerable | claims are in the cited spans |
| mode | messages, enable_thinking | think tags as flags and template ask for |
| length | limit | the answer's length is within the limit |
| language | language | answer and reasoning keep to their language |
| repetition | | nothing is repeated |
| overlong | overlong | the answer ends well before the limit |
| environment | environment | the reward of an episode's end |
| environment.X | environment | component X of its outcome, such as goal or valid |
| gym | gym | reasoning-gym's own verdict |
"""
import importlib

from qwen3_jax.rewards import final
from qwen3_jax.rewards import math as mathematics
from qwen3_jax.rewards.response import Unscored

RULES = {
  'math': 'verifiers.judge_math', 'environment': 'verifiers.read_outcome',
  'gym': 'gym.verify', 'instructions': 'instructions.verify', 'schema': 'form.schema',
  'mode': 'form.mode', 'length': 'form.length', 'tools': 'tools.verify',
  'citations': 'citations.verify', 'language': 'penalties.language',
  'repetition': 'penalties.repetition', 'overlong': 'penalties.overlong'}
NEEDS = {'math': 'answer', 'instructions': 'instructions', 'schema': 'schema',
         'tools': 'expected_calls', 'citations': 'documents', 'length': 'limit', 'code': 'tests',
         'environment': 'environment', 'judge': 'reference', 'gym': 'gym', 'mode': 'messages'}


def verify(name, record, response):
  """The component `name` of a response, from 0 to 1; raises Unscored where it cannot be told."""
  if name.startswith('environment.'):
    return read_outcome(record, response, name.partition('.')[2])
  module, _, function = RULES[name].partition('.')
  return getattr(importlib.import_module(f'qwen3_jax.rewards.{module}'), function)(record, response)


def judge_math(record, response):
  """1 where the answer after the reasoning agrees with record['answer'].

  `kind` says how: 'exact' as `final.agree`, 'countdown' any expression of record['numbers'] worth
  the answer, else as `math.agree`.
  """
  kind, answer = record.get('kind'), str(record['answer'])
  if kind == 'exact':
    return float(final.agree(response.content, answer))
  if kind == 'countdown':
    return float(final.reaches(response.content, record['numbers'], int(answer)))
  return float(mathematics.agree(response.content, answer,
                                 kind if kind in ('choice', 'text') else None))


def read_outcome(record, response, component='reward'):
  """A component that the environment gave; Unscored where no episode was run or it failed."""
  if not response.outcome or response.outcome.get(component) is None:
    raise Unscored(f'no {component} in the outcome of the environment: {response.outcome!r:.200}')
  return float(response.outcome[component])
