"""Penalties: in tokens, by language, for repetition."""

import dataclasses

import pytest

from qwen3_jax.rewards import penalties
from qwen3_jax.rewards.response import Response

ENGLISH = ('We are asked for the number of ways in which the guests can be seated at the table. '
           'Since nobody has a fixed place, we may turn the table until the first one sits north.')
FRENCH = ('Il faut maintenant trouver combien de façons il y a de placer les invités autour de la '
          'table, sans oublier que deux rotations de la même disposition ne comptent que une fois.')
CHINESE = '我们先计算所有客人入座的方法，然后除以圆桌的对称数，因为没有两位客人是相同的。'


def test_overlong_counts_tokens_and_never_characters():
  """DAPO, eq. 13, with its L_max of 20,480 tokens and cache of 4,096."""
  for tokens, expected in ((0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1),
                           (20481, -1), (10**9, -1)):
    assert penalties.penalise_length(tokens) == expected
  long = Response.read('x' * 100_000, tokens=10)
  assert penalties.overlong({}, long) == 1
  short = dataclasses.replace(long, text='x', content='x', tokens=30)
  assert penalties.overlong({'overlong': {'limit': 40, 'buffer': 20}}, short) == 0.5
  with pytest.raises(ValueError, match='buffer of 50 tokens'):
    penalties.penalise_length(10, limit=40, buffer=50)


@pytest.mark.parametrize('asked, answer, expected', [
  (ENGLISH, ENGLISH, 1), (ENGLISH, FRENCH, 0), (ENGLISH, CHINESE, 0), (CHINESE, CHINESE, 1),
  (CHINESE, ENGLISH, 0), (FRENCH, FRENCH, 1), (FRENCH, ENGLISH, 0), (ENGLISH, '42', 1),
  (ENGLISH, '', 1), ('Hi! /think', FRENCH, 1), ('', FRENCH, 1),
  (f'Translate this into English please: {CHINESE} {ENGLISH}', ENGLISH, 1),
  (f'头脑风暴3种创意\n\n{ENGLISH}', CHINESE, 1), (f'头脑风暴3种创意\n\n{ENGLISH}', ENGLISH, 1),
  (ENGLISH, f'{ENGLISH} 所以 the answer is 24.', 0),
  (ENGLISH, f'<think>\n{ENGLISH}\n\n{CHINESE}\n\n{ENGLISH}\n</think>\n\n{ENGLISH}', 0.5),
  (ENGLISH, f'<think>\n{CHINESE}\n</think>\n\n{ENGLISH}', 1)])
def test_language(asked, answer, expected):
  record = {'messages': [{'role': 'user', 'content': asked}]}
  assert penalties.language(record, Response.read(answer, 10)) == expected


def test_a_language_that_the_record_names_is_wanted():
  record = {'messages': [{'role': 'user', 'content': f'Answer in French. {ENGLISH}'}],
            'language': 'fr'}
  assert penalties.language(record, Response.read(FRENCH, 10)) == 1
  assert penalties.language(record | {'messages': []}, Response.read(ENGLISH, 10)) == 0


def test_repetition_falls_with_what_is_said_again():
  score = lambda text: penalties.repetition({}, Response.read(text, 10))
  words = [f'w{i}x' for i in range(400)]
  assert score(' '.join(words)) == score('') == score('short') == 1
  assert score(' '.join(words + words[:200])) == pytest.approx(
    1 - (189 / 589 - 0.1) / 0.4)
  assert score('I am stuck here now. ' * 60) == 0
  once = ' '.join(words[:100])
  assert score(f'<think>\n{once}\n</think>\n\n{once}') == 1
  assert score(f'<think>\n{"I am stuck here now. " * 60}\n</think>\n\n{once}') == 0
  assert penalties.repeated_share(' '.join(words + words)) == pytest.approx(389 / 789)
