"""Whatever a model writes, every rule answers: a number from 0 to 1, in bounded work, without JAX.

Long texts are of the kinds on which searches take quadratic time or worse if they can; the test
runner's patience is the only clock.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.rewards import citations, form, instructions, penalties, tools
from qwen3_jax.rewards.instruction_rules import RULES
from qwen3_jax.rewards.response import Response

SAMPLE = {list: ['word', 'a+b(', '\\'], int: 2, str: 'P.S. (x'}
RULE_SET = [{'id': id, 'kwargs': {
  name: kind[1] if isinstance(kind, tuple) else 'en' if name == 'language' else SAMPLE[kind]
  for name, kind in arguments.items()}} for id, (_, arguments) in RULES.items()]
RECORD = {
  'messages': [{'role': 'user', 'content': 'Tell me what the guests had at the table. /think'}],
  'instructions': RULE_SET, 'limit': {'min': 10, 'max': 100},
  'schema': {'type': 'object', 'properties': {'a': {'type': 'string', 'pattern': '^(a|a)*$'}},
             'patternProperties': {'(x+)+y': {'uniqueItems': True}}, 'additionalProperties': True},
  'tools': [{'name': 'f', 'parameters': {'properties': {'n': {'type': 'integer'}}}}],
  'expected_calls': [{'f': {'n': [1], 'o': [{'a': [['x', 2.0]]}]}}],
  'documents': [{'id': '1', 'text': 'The guests had soup.'}], 'answer': 'soup'}
VERIFIERS = {
  'instructions': instructions.verify, 'mode': form.mode, 'schema': form.schema,
  'length': form.length, 'citations': citations.verify, 'tools': tools.verify,
  'language': penalties.language, 'repetition': penalties.repetition,
  'overlong': penalties.overlong,
  'loose': lambda record, response: instructions.verify(record, response, loose=True),
  'refusal': lambda record, response: citations.verify(record | {'answerable': False}, response),
  'sentences': lambda record, response: form.length(
    record | {'limit': {'unit': 'sentences', 'max': 3}}, response)}
PIECES = ['<think>', '</think>', '\n', '\n\n', '<tool_call>', '</tool_call>', '{"name": "f", ',
          '"arguments": {"n": 1}}', '[', ']', '[1', ': "', '"]', '***', '******', '*', '```', '"',
          '<<', '>>', 'P.S.', '. ', '?', '。', 'a', ' ', 'Section 1', '\ud800', '\\(', '\\)', '$$',
          '\\begin{align}', '@', '.', 'ﷺ', 'İ', '中', '가', '\u0301', '\x00', '1e999', '[[',
          '{"a":', 'we are not able to say', '<|im_end|>', '~~~', "'", ',', '-', '\u2028']


@pytest.mark.parametrize('name', VERIFIERS)
@settings(max_examples=30, deadline=None)
@given(text=st.one_of(st.text(st.characters()), st.lists(st.sampled_from(PIECES)).map(''.join)),
       tokens=st.integers(0, 10**6), finish=st.sampled_from(('stop', 'length')))
def test_any_text_is_answered(name, text, tokens, finish):
  assert 0 <= VERIFIERS[name](RECORD, Response.read(text, tokens, finish)) <= 1


@pytest.mark.parametrize('size', [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('piece', [*PIECES, '<a', 'a@', '(', '“', '[1] ', '[1: "a b c"]', '[a, ',
                                   "a'", 'Aa, ', 'あ ', '<<<\n', '\n* ', '!"', '.)', '[{"a":['])
def test_long_texts_of_one_piece_are_answered(piece, size):
  text = piece * (size // len(piece)) + '!x'
  for made in (text, f'<think>\nSo.\n</think>\n\n{text}') if size > 10_000 else (text,):
    response = Response.read(made, 1)
    for name, verify in VERIFIERS.items():
      assert 0 <= verify(RECORD, response) <= 1, name


def test_hostile_arguments_are_compared_not_trusted():
  deep = json.loads('[' * 400 + ']' * 400)
  for arguments in ({'n': deep}, {'n': {'a': deep}}, {'o': {'a': deep, 'n': None}}, {},
                    {'n': 1, 'o': {'a': ['x', 2]}}, {'n': 1e400, 'o': {}}, {'\ud800': 1}):
    response = Response('', None, '', ({'name': 'f', 'arguments': arguments},), 1, 'stop')
    assert tools.verify(RECORD, response) == (arguments == {'n': 1, 'o': {'a': ['x', 2]}})


def test_rules_load_without_jax():
  code = ('import sys; from qwen3_jax.rewards import citations, form, instructions, penalties, '
          'tools; sys.exit("jax" in sys.modules)')
  folder = Path(__file__).resolve().parents[2]
  assert subprocess.run([sys.executable, '-c', code], cwd=folder).returncode == 0
