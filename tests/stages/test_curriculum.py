"""The order of prompts: unused, learnable, hard, broad; the same again from a saved state."""
import json

import pytest

from qwen3_jax.stages.curriculum import Curriculum, key


class Prompts:
  def __init__(self, name, count, rates=None):
    self.name, self.fingerprint, self.count, self.rates = name, f'{name} {count}', count, rates

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    record = dict(messages=[dict(role='user', content=f'{self.name} {i}?')], source=self.name)
    return record | (dict(pass_rate=self.rates[i]) if self.rates else {})


def indices(drawn):
  return [index for (_, index), _ in drawn]


def test_each_prompt_comes_once_a_round():
  order = indices(Curriculum([(Prompts('a', 30), 1.0)], seed=1).draw(60))
  assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
  assert order[:30] != order[30:] and order[:30] != list(range(30))


def test_known_prompts_are_ordered_by_the_variance_of_their_rewards():
  rates = [0.1, 0.5, 0.7, 0.0, 0.95, 0.45]
  order = indices(Curriculum([(Prompts('a', 6, rates), 1.0)]).draw(5))
  assert set(order[:2]) == {1, 5} and order[2:] == [2, 0, 3]  # 4 is too easy, 3 taught nothing yet


def test_what_is_mastered_is_not_drawn_again_and_what_failed_waits_for_the_next_round():
  curriculum = Curriculum([(Prompts('a', 10), 1.0)], high=0.9)
  for place, _ in curriculum.draw(10):
    curriculum.learn(place, dict(enumerate([1.0, 0.9, 0.0])).get(place[1], 0.5))
  second = indices(curriculum.draw(8))
  assert sorted(second) == [2, 3, 4, 5, 6, 7, 8, 9] and second[-1] == 2


def test_used_questions_are_skipped_whatever_their_spelling():
  source = Prompts('A', 8)
  used = {key(dict(messages=[dict(role='user', content=f'a   {i}?')])) for i in range(5)}
  curriculum = Curriculum([(source, 1.0)], used=used)
  assert sorted(indices(curriculum.draw(6))) == [5, 5, 6, 6, 7, 7]
  assert curriculum.skipped >= 5


def test_effort_goes_where_answers_differ():
  """Sources of pass rate 0.5, 1 and 0 with equal shares: weights 1, 0.1, 0.1."""
  rate = [0.5, 1.0, 0.0]
  curriculum = Curriculum([(Prompts(name, 200_000), 1.0) for name in 'abc'])
  for _ in range(60):
    for place, _ in curriculum.draw(10):
      curriculum.learn(place, rate[place[0]])
  parts = [part for (part, _), _ in curriculum.draw(120)]
  assert [parts.count(part) for part in range(3)] == pytest.approx([100, 10, 10], abs=2)


def test_shares_hold_before_anything_is_known():
  parts = [part for (part, _), _ in Curriculum(
    [(Prompts('a', 99), 3.0), (Prompts('b', 99), 1.0)]).draw(40)]
  assert parts.count(0) == 30 and parts[:8].count(1) == 2


def test_a_restored_curriculum_goes_on_where_it_was():
  def make():
    return Curriculum([(Prompts('a', 12), 1.0), (Prompts('b', 200_000), 2.0)], seed=3, high=0.9)

  def play(curriculum, rounds):
    seen = []
    for n in range(rounds):
      drawn = curriculum.draw(5)
      seen += [place for place, _ in drawn]
      for place, _ in drawn:
        curriculum.learn(place, (place[1] * 7 + n) % 11 / 10)
    return seen
  whole, first = make(), make()
  both = play(whole, 9), play(first, 9)
  assert both[0] == both[1]
  second = make()
  second.restore(json.loads(json.dumps(first.state())))
  assert play(second, 12) == play(whole, 12)


def test_other_sources_than_saved_are_refused():
  curriculum = Curriculum([(Prompts('a', 5), 1.0)])
  with pytest.raises(ValueError, match='prompts have changed'):
    Curriculum([(Prompts('a', 6), 1.0)]).restore(curriculum.state())


def test_a_source_without_prompts_left_is_named():
  curriculum = Curriculum([(Prompts('a', 3, [1.0, 0.95, 0.9]), 1.0)])
  with pytest.raises(ValueError, match='a has no prompt left'):
    curriculum.draw(1)
  with pytest.raises(ValueError, match='source of prompts is empty'):
    Curriculum([(Prompts('a', 0), 1.0)])
