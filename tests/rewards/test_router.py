"""Components, their weights, and what happens to those that are missing."""
import json
import math

import pytest

from qwen3_jax.rewards import pool
from qwen3_jax.rewards.response import Response
from qwen3_jax.rewards.router import MEMORY, Router, summarise


def ask(answer='7', **verifiers):
  return {'messages': [{'role': 'user', 'content': 'What is 3 + 4?'}], 'source': 'sums', 'id': 'x',
          'answer': answer, 'kind': 'exact', 'verifiers': verifiers or {'math': 1.0}}


def say(text, **more):
  return Response.read(text, 10, **more)


@pytest.fixture
def route():
  routers = []

  def make(**options):
    routers.append(Router(**options))
    return routers[-1]
  yield make
  for router in routers:
    router.close()


def fixed(*values):
  return lambda pairs: list(values)


def test_weights_are_those_of_the_record_or_of_its_source(route):
  router = route(scorers={'a': fixed(0.5), 'b': fixed(0.75)}, defaults={'sums': {'math': 3.0}})
  scored, = router.score([ask(math=2.0, a=1.0, b=-1.0)], [say('The answer is 7.')])
  assert scored.components == {'math': 1.0, 'a': 0.5, 'b': 0.75} and scored.reward == 2.25
  plain = ask()
  del plain['verifiers']
  assert [s.reward for s in router.score([plain] * 2, [say('7'), say('8')])] == [3.0, 0.0]


def test_answers_keep_their_order_over_many_workers(route):
  records = [ask(str(i)) for i in range(60)]
  scored = route(workers=3).score(records, [say(str(i + i % 2)) for i in range(60)])
  assert [s.reward for s in scored] == [1.0, 0.0] * 30


@pytest.mark.parametrize('kind, answer, more, right, wrong', [
  ('exact', '3, 1', {}, 'answer: [3, 1]', '1, 3'), ('choice', 'B', {}, 'The answer is (B).', 'A'),
  ('text', 'Monday', {}, '**Monday**', 'Tuesday'), (None, '\\frac{1}{2}', {}, '\\boxed{0.5}', '2'),
  ('countdown', '16', {'numbers': [2, 3, 5]}, 'Answer: (3 + 5) * 2 = 16', '2 * 8')])
def test_kinds_of_answers(route, kind, answer, more, right, wrong):
  record = ask(answer) | more | {'kind': kind}
  scored = route(workers=1).score([record] * 3, [say(right), say(wrong), say('')])
  assert [s.reward for s in scored] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize('said', [
  '((' * 60, '3 5 + 2', '(3+5)2', '2*8', '3+5+2/0', '16', '', '2*(3+5)*1', '(3+5', '3**5*2',
  '9' * 400 + '*2', '2 * (3 + 5) ; 1'])
def test_no_other_expression_reaches_the_target(route, said):
  record = ask('16') | {'kind': 'countdown', 'numbers': [2, 3, 5]}
  assert route(workers=1).score([record], [say(f'Answer: {said}')])[0].reward == 0.0


def test_a_shut_gate_leaves_penalties_and_its_own_part(route):
  router = route(scorers={'gate': fixed(0.0, 1.0), 'rest': fixed(None, 0.5), 'fine': fixed(0.5, 1)},
                 gates=('gate',))
  records = [ask(gate=0.25, rest=1.0, fine=-0.5)] * 2
  shut, opened = router.score(records, [say('7')] * 2)
  assert shut.reward == -0.25 and opened.reward == 0.75
  assert shut.components == {'gate': 0.0, 'rest': None, 'fine': 0.5}


def test_missing_is_never_zero(route):
  router = route(scorers={'a': fixed(None, 0.5, math.nan, math.inf, 1.5, 'no', 0.5),
                          'fine': fixed(0.0, None, 0, 0, 0, 0, ValueError('it broke'))})
  scored = router.score([ask(a=1.0, fine=-1.0)] * 7, [say('7')] * 7)
  assert [s.reward for s in scored] == [None, 0.5, None, None, None, None, 0.5]
  assert scored[2].components['a'] is None and 'nan' in scored[2].missing['a']
  assert scored[6].missing == {'fine': 'ValueError: it broke'}
  metrics = summarise(scored)
  assert metrics['reward'] == 0.5 and metrics['reward_missing'] == 5 and metrics['a'] == 0.5
  assert metrics['reasons']['a: no number'] == 1


def test_all_missing_gives_no_reward(route):
  def broken(pairs):
    raise ConnectionError('nobody there')
  router = route(scorers={'judge': broken, 'short': fixed(1.0)})
  record = ask(judge=1.0, short=-1.0) | {'reference': 'seven'}
  scored = router.score([record] * 2, [say('7')] * 2)
  assert [s.reward for s in scored] == [None] * 2
  assert scored[0].missing == {'judge': 'ConnectionError: nobody there',
                               'short': 'the scorer gave 1 numbers for 2 answers'}
  assert 'reward' not in summarise(scored)


def test_outcomes_of_environments(route):
  record = ask(**{'environment': 0.75, 'environment.valid': 0.25}) | {'environment': {'name': 'x'}}
  done = say('done', outcome={'reward': 1.0, 'valid': 0.5})
  scored = route(workers=1).score([record] * 3, [done, say('7'), say('7', outcome={'goal': 1.0})])
  assert [s.reward for s in scored] == [0.875, None, None]
  assert 'no reward' in scored[2].missing['environment']


def test_unbounded_scores_are_normalised_by_source_and_resume(route):
  first, second = [3.0, -1.0, 500.0, 700.0], [9.0, 1.0, 600.0, math.nan]
  calls = iter([first, second])
  router = route(scorers={'preference': lambda pairs: next(calls)})
  resumed = route(scorers={'preference': fixed(*second)})
  records = [ask(preference=1.0) | {'source': name} for name in ('low', 'low', 'high', 'high')]
  scored = router.score(records, [say('7')] * 4)
  one = 1 / (1 + math.exp(-1))  # one deviation above the mean of two
  assert [s.reward for s in scored] == pytest.approx([one, 1 - one, 1 - one, one])
  assert [s.raw['preference'] for s in scored] == first
  state = json.loads(json.dumps(router.state()))
  assert state['preference low'] == pytest.approx([2, 1.0, 8.0])
  scored = router.score(records, [say('7')] * 4)
  mean, deviation = 3.0, math.sqrt(14)  # of 3, -1, 9 and 1
  assert scored[0].reward == pytest.approx(1 / (1 + math.exp(-(9 - mean) / deviation)))
  assert scored[2].reward == 0.5 and scored[3].reward is None
  resumed.restore(state)
  assert repr(resumed.score(records, [say('7')] * 4)) == repr(scored)
  assert resumed.state() == router.state()


def test_running_statistics_forget():
  router = Router(scorers={})
  for value in [0.0] * MEMORY + [5.0] * 10 * MEMORY:
    router._add('x', value)
  count, mean, square = router.state()['x']
  assert count == MEMORY and mean == pytest.approx(5.0, abs=1e-3) and square / count < 0.01
  router.close()


@pytest.mark.parametrize('change, message', [
  ({'verifiers': {'maths': 1.0}}, "'maths'; did you mean 'math'"),
  ({'verifiers': {'judge': 1.0}}, 'which this run has not opened'),
  ({'verifiers': {'schema': 1.0}}, "'schema' but has no 'schema'"),
  ({'verifiers': {}}, 'no verifiers and its source has no default'),
  ({'verifiers': {'math': math.nan}}, 'wanted a finite number')])
def test_records_that_cannot_be_scored(route, change, message):
  with pytest.raises(ValueError, match=message):
    route().score([ask() | change], [say('7')])


def test_calls_nested_too_deep_and_records_that_are_no_json(route):
  deep = {}
  for _ in range(5000):
    deep = {'a': deep}
  call = {'name': 'f', 'arguments': deep}
  records = [ask(), ask() | {'numbers': {1, 2}}, ask()]
  said = [Response('7', '', '7', (call,), 9, 'stop'), say('7'), say('7')]
  scored = route(workers=1).score(records, said)
  assert [s.reward for s in scored] == [None, None, 1.0]
  assert all('cannot be sent' in s.missing['math'] for s in scored[:2])


def test_children_that_do_not_start_stop_the_run(route, monkeypatch):
  monkeypatch.setattr(pool, '__name__', 'qwen3_jax.rewards.no_such_module')
  with pytest.raises(RuntimeError, match='do not start .worker ended with 1.; try'):
    route(workers=1).score([ask()], [say('7')])


def test_equal_calls_give_equal_results(route):
  records, responses = [ask()] * 8, [say(str(i)) for i in range(8)]
  assert route(workers=1).score(records, responses) == route(workers=3).score(records, responses)
