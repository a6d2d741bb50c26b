"""Accuracy in both modes, obedience to flags, budgets: marks are checked by their meaning."""
import dataclasses

import numpy as np
import pytest

from qwen3_jax.data import tasks
from qwen3_jax.evaluation import modes, progress, tables
from qwen3_jax.generation.engine import Output
from qwen3_jax.generation.sampling import GREEDY
from qwen3_jax.text.template import last_flag
from tests.generation.conftest import model, tokenizer  # noqa: F401 (fixtures)

SOURCE = tasks.open_tasks('kinds=chain+coin,difficulty=1-2,size=400', 'heldout')


def answer(text, finish='stop'):
  zeros = np.zeros(3)
  return Output(text, [1, 2, 3], zeros, zeros, zeros > 0, finish, [1])


def test_only_a_finished_final_answer_counts():
  problems = [SOURCE.task(i) for i in range(4)]
  right = [f'The answer is {p.answer}.' for p in problems]
  graded = modes.grade(problems, [
    answer(f'<think>\nhm\n</think>\n\n{right[0]}'),
    answer(f'<think>\n{right[1]}\n</think>\n\nThe answer is unknown.'),  # right only in thinking
    answer(f'<think>\n{right[2]}', 'length'),
    answer(right[3], 'length')])
  assert graded['rate'] == 0.25 and graded['count'] == 4 and graded['finished'] == 0.5
  assert sum(each['count'] for each in graded['kinds'].values()) == 4


def test_interval_is_that_of_wilson():
  """Against values worked out from the formula elsewhere (8 of 10: 0.490 to 0.943)."""
  graded = modes.rate([True] * 8 + [False] * 2)
  assert (graded['low'], graded['high']) == (pytest.approx(0.4902, abs=1e-4),
                                             pytest.approx(0.9433, abs=1e-4))
  none = modes.rate([False] * 20)
  assert none['low'] == 0 and none['high'] == pytest.approx(0.1611, abs=1e-4)


def test_no_problem_is_counted_twice():
  few = tasks.open_tasks('kinds=chain+coin,difficulty=1,size=2000', 'heldout')
  drawn = [few.task(i).question for i in range(300)]
  assert len(set(drawn)) < 300
  problems = modes.distinct(few, 300)
  assert len({problem.question for problem in problems}) == len(problems) == 300
  assert problems[0].question == drawn[0]
  assert len(modes.distinct(tasks.open_tasks('kinds=coin,size=5', 'heldout'), 300)) <= 5


def test_flag_prompts_end_in_each_mode_and_stand_everywhere():
  prompts = modes.flag_prompts(SOURCE, 60)
  assert [think for _, think, _ in prompts].count(True) == 30
  assert {place for *_, place in prompts} == {'system', 'last user turn', 'earlier turn'}
  for messages, think, place in prompts:
    assert messages[-1]['role'] == 'user' and last_flag(messages) is think
    assert (last_flag(messages[-1:]) is None) == (place != 'last user turn')
  assert any(len([m for m in messages if m['role'] == 'assistant']) > 1
             for messages, *_ in prompts)


def test_obedience_is_read_off_the_think_block(monkeypatch):
  """A model that always thinks obeys /think alone; one that never closes its block obeys none."""
  for text, wanted in (('<think>\nyes\n</think>\n\n1', {'/think': 1, '/no_think': 0}),
                       ('<think>\n\n</think>\n\n1', {'/think': 0, '/no_think': 1}),
                       ('<think>\nyes', {'/think': 0, '/no_think': 0})):
    monkeypatch.setattr(modes.engine, 'generate',
                        lambda _, __, prompts, *___, text=text, **____: [
                          answer(text) for _ in prompts])
    found = modes.follow(None, None, SOURCE, 40, GREEDY)
    assert {name: found['parts'][name]['rate'] for name in wanted} == wanted


def test_measure_and_its_tables(model, tokenizer):  # noqa: F811
  """A random model end to end: every part is there, and the report shows it."""
  sampling = dict.fromkeys((True, False), dataclasses.replace(GREEDY, max_tokens=8))
  told = []
  found = modes.measure(model, tokenizer, SOURCE, 6, sampling, budgets=(0, 4), flags=4, rows=8,
                        progress=told.append)
  assert found['thinking']['count'] == found['plain']['count'] == 6
  assert [point['budget'] for point in found['budgets']] == [0, 4] and len(told) == 5
  assert found['budgets'][0]['forced'] > 0
  page = progress.write_modes([dict(name='x', modes=found)], lambda stage: 'The <stage>')
  assert 'The &lt;stage&gt;' in page and '<table' in page and page.count('<svg') == 1
  assert progress.write_modes([dict(name='x')], str) == ''


def test_filters_become_a_table_with_every_rule():
  report = dict(stages=[dict(name='rules', read=1000, accepted=988, rejected=12,
                             rules={'guess': 7, '<b>': 5})],
                mixed=dict(fused=dict(thinking=3), heldout=dict(thinking=1, plain=2)))
  page = tables.write_filters([dict(name='x', filters=report), dict(name='y')], lambda s: s['name'])
  assert 'guess: 7, &lt;b&gt;: 5' in page and '1,000' in page and 'plain' in page
