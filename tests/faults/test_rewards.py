"""Verifiers that die, hang or give nonsense: the others go on, and no model pays for it."""
import contextlib
import json
import math
import os
import signal
import threading
import time

import pytest

from qwen3_jax.rewards import pool, worker
from qwen3_jax.rewards.judge import Judge
from qwen3_jax.rewards.response import Response
from qwen3_jax.rewards.router import Router, summarise


def ask(answer='7', **verifiers):
  return {'messages': [{'role': 'user', 'content': 'What is 3 + 4?'}], 'source': 'sums',
          'answer': answer, 'kind': 'exact', 'verifiers': verifiers or {'math': 1.0}}


SEVEN = Response.read('The answer is 7.', 5)


@contextlib.contextmanager
def opened(**options):
  router = Router(**options)
  try:
    router.score([ask()], [SEVEN])  # children start one by one, as they are needed
    yield router
  finally:
    router.close()


def score_while(router, meddle, count=3, **verifiers):
  """Scores right answers while a stopped child holds one of them up; `meddle(child)` frees it."""
  worker = router.pool.workers[0]
  os.kill(worker.process.pid, signal.SIGSTOP)
  before, child, found = worker.jobs, worker.process, []
  thread = threading.Thread(target=lambda: found.extend(
    router.score([ask(**verifiers)] * count, [SEVEN] * count)))
  thread.start()
  while worker.jobs == before:
    time.sleep(0.01)
  meddle(worker)
  thread.join()
  assert child.poll() is not None  # nothing is left of it
  return found


def test_a_child_killed_under_way_loses_no_answer():
  with opened(workers=2) as router:
    found = score_while(router, lambda worker: worker.process.kill())
    assert [s.reward for s in found] == [1.0] * 3
    assert [s.reward for s in router.score([ask()] * 3, [SEVEN] * 3)] == [1.0] * 3


def test_an_answer_that_kills_two_children_is_missing():
  def kill(worker):
    first = worker.process
    first.kill()
    while worker.process in (first, None):
      time.sleep(0.001)
    worker.process.kill()

  with opened(workers=1) as router:
    found = score_while(router, kill)
    assert [s.reward for s in found] == [None, 1.0, 1.0]
    assert found[0].missing == {'math': 'worker ended with -9'}


def test_a_child_that_hangs_is_killed_at_the_deadline():
  with opened(workers=2, seconds={'math': 1.0}, scorers={'judge': lambda pairs: [0.5] * len(pairs)}
              ) as router:
    record = dict(math=0.5, judge=0.5)
    worker = router.pool.workers[0]
    os.kill(worker.process.pid, signal.SIGSTOP)
    records = [ask(**record) | {'reference': '7'}] * 3
    found = router.score(records, [SEVEN] * 3)
    assert [s.components['judge'] for s in found] == [0.5] * 3
    assert [s.reward for s in found] == [None, 0.75, 0.75]
    assert found[0].missing == {'math': 'deadline'}
    assert [s.reward for s in router.score(records, [SEVEN] * 3)] == [0.75] * 3


def test_a_child_ends_itself_when_a_job_takes_too_long():
  """Also where its parent is gone or looks elsewhere."""
  worker = pool._Worker()
  worker.start()
  assert worker.socket.recv(100) == b'[null, "ready"]\n'
  endless = ask('1') | {'kind': 'countdown', 'numbers': [1]}
  worker.seconds, worker.line = 60.0, json.dumps(
    ['math', endless, {'text': '', 'reasoning': None, 'content': '1', 'tool_calls': [],
                       'tokens': 1, 'finish_reason': 'stop'}, 1e-6]).encode() + b'\n'
  worker.send()
  assert worker.process.wait(20) == -signal.SIGALRM
  assert worker.go_on(True) == pool.Missing('deadline')
  worker.stop()


def test_a_scorer_that_hangs_is_left_behind():
  held, calls = threading.Event(), []

  def judge(pairs):
    calls.append(len(pairs))
    held.wait(60)
    return [1.0] * len(pairs)

  with opened(scorers={'judge': judge}, seconds={'judge': 0.1}) as router:
    record = ask(math=0.5, judge=0.5) | {'reference': '7'}
    found = router.score([record] * 2, [SEVEN] * 2)
    assert [s.reward for s in found] == [None] * 2
    assert [s.components for s in found] == [{'math': 1.0, 'judge': None}] * 2
    assert found[0].missing == {'judge': 'deadline'}
    again = router.score([record], [SEVEN])
    assert again[0].missing == {'judge': 'an earlier call still hangs'} and calls == [2]
    held.set()
    router.hung['judge'].join()
    assert router.score([record], [SEVEN])[0].reward == 1.0


def test_a_judge_that_hangs_is_left_behind():
  held = threading.Event()

  def words(conversations, attempt):
    if attempt:  # what was read at first is kept
      held.wait(60)
    return ['{"score": 8}' if 'six' in c[0]['content'] else 'well' for c in conversations]

  with opened(scorers={'judge': Judge(words, seconds=0.2)}) as router:
    record = ask(judge=1.0) | {'reference': 'seven'}
    found = router.score([record, record | {'reference': 'six'}], [SEVEN] * 2)
    assert [s.reward for s in found] == [None, 0.8]
    assert 'no verdict in 1 answers' in found[0].missing['judge']
    held.set()


def test_nan_and_infinite_rewards_are_missing_and_spoil_no_statistics():
  numbers = [1.0, math.nan, math.inf, -math.inf, 3.0]
  with opened(scorers={'preference': lambda pairs: numbers}) as router:
    found = router.score([ask(preference=1.0)] * 5, [SEVEN] * 5)
    assert [s.reward is None for s in found] == [False, True, True, True, False]
    assert router.state()['preference sums'][:2] == [2, 2.0]
    assert summarise(found)['reward'] == pytest.approx(0.5)


def test_what_hangs_elsewhere_is_answered_and_the_rest_arrives(golden):
  lines = (golden / 'verify' / 'math_verify_goldens.jsonl').read_text('utf-8').split('\n')
  rows = [row for row in map(json.loads, filter(None, lines)) if row['cat'] == 'hang']
  assert len(rows) >= 5
  records = [ask(row['gold'], math=1.0, other=0.0) | {'kind': None} for row in rows]
  with opened(scorers={'other': lambda pairs: [0.5] * len(pairs)}, seconds={'math': 5.0}) as router:
    found = router.score(records, [Response.read(row['prediction'], 9) for row in rows])
  assert [s.components for s in found] == [
    {'math': float(row['expected']), 'other': 0.5} for row in rows]


def test_a_comparison_that_waits_for_a_processor_is_not_wrong():
  """The deadline of math-verify counts its own processor time."""
  if not worker.available():
    pytest.skip('math-verify is not installed')
  assert worker.compare('$\\sin^2 x$', '$1-\\cos^2 x$', 60.0) is True
  child, found = worker._child['process'], []
  os.kill(child.pid, signal.SIGSTOP)
  thread = threading.Thread(target=lambda: found.append(
    worker.compare('$\\ln 8$', '$3\\ln 2$', 2.0)))
  thread.start()
  time.sleep(2.5)
  os.kill(child.pid, signal.SIGCONT)
  thread.join()
  assert found == [True] and worker._child['process'] is child
  worker.stop()


def test_no_child_is_left_behind():
  with opened(workers=3) as router:
    router.score([ask()] * 9, [SEVEN] * 9)
    children = [worker.process for worker in router.pool.workers]
    assert all(child.poll() is None for child in children)
  assert all(child.poll() is not None for child in children)
