"""Responders: a model in memory and an endpoint answer alike; what fails is a Failure."""
import json
import socket

import pytest

from qwen3_jax.generation import engine
from qwen3_jax.generation.respond import (
  Answer,
  Endpoint,
  Engine,
  Failure,
  fill,
  find_object,
  judge,
  open_responder,
  read_reply,
  seed_of,
)
from qwen3_jax.generation.sampling import Sampling
from tests.endpoint import serve

ASK = [dict(role='user', content='the quick brown fox')]
OTHER = [dict(role='user', content='a lazy dog')]


@pytest.fixture(scope='module')
def local(model, tokenizer):
  return Engine(model, tokenizer, rows=2)  # one shape for all calls


def test_engine_draws_by_conversation_and_try(local):
  """Neither neighbours nor the order matter, and tries k.. of a later call are those of one."""
  sampling = Sampling(1.0, max_tokens=12)
  (one, two), (three, four) = local.respond([ASK, OTHER], 2, sampling)
  assert len({one.text, two.text, three.text, four.text}) == 4
  assert local.respond([OTHER, ASK], 1, sampling) == [[three], [one]]
  assert local.respond([ASK, OTHER], 1, sampling, first=1) == [[two], [four]]
  assert local.respond([], 2) == []
  out, _ = engine.generate(local.decoder, local.tokenizer, [ASK, ASK], sampling,
                           seeds=[seed_of(ASK, 0), 5])
  assert (one.text, one.finish_reason) == (out.text, out.finish_reason)


def test_engine_prompt_that_cannot_be_answered_is_a_failure(local):
  long = [dict(role='user', content='fox ' * 600)]
  bad = [dict(role='robot', content='?')]
  first, second, third = local.respond([long, ASK, bad], 1, Sampling(0.0, max_tokens=2))
  assert isinstance(first, Failure) and 'the model takes 511' in first.reason
  assert isinstance(second[0], Answer)
  assert isinstance(third, Failure) and "role 'robot'" in third.reason


def test_endpoint_sends_what_was_asked(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', 'abc')
  with serve(lambda body, k: (200, dict(content=f'said {body["seed"]}'))) as (url, seen):
    responder = open_responder(url + '#judge-1', workers=3)
    answers = responder.respond([ASK, OTHER], 2, Sampling(0.5, top_p=0.9, max_tokens=7),
                                enable_thinking=False)
    responder.respond([ASK])
  seeds = [[seed_of(each, k) for k in (0, 1)] for each in (ASK, OTHER)]
  assert [[a.content for a in each] for each in answers] == [
    [f'said {seed}' for seed in pair] for pair in seeds]
  body = next(b for b in seen if b['seed'] == seeds[0][1])
  assert body == dict(messages=ASK, seed=seeds[0][1], model='judge-1', temperature=0.5, top_p=0.9,
                      max_tokens=7, chat_template_kwargs=dict(enable_thinking=False),
                      path='/v1/chat/completions', key='Bearer abc')
  assert set(seen[-1]) == {'messages', 'seed', 'model', 'path', 'key'}


def test_endpoint_tries_again_what_may_pass():
  """500, 429, no JSON, no content and a dropped connection are tried again; then it answers."""
  said = [(500, b'oops'), (429, b'slow down'), (200, b'<html>'), (200, dict(content=None)),
          (200, b'{"choices": []}'), (200, dict(content='at last'))]
  with serve(lambda body, k: said[k]) as (url, seen):
    (answer,), = Endpoint(url, wait=0.001, tries=6).respond([ASK])
    assert (answer.content, len(seen)) == ('at last', 6)


@pytest.mark.parametrize('status, data, tries, reason', [
  (503, b'loading', 3, 'HTTP 503: loading'), (401, b'no key', 1, 'HTTP 401: no key'),
  (200, b'garbage', 3, 'JSONDecodeError'), (200, b'[1]', 3, r'without choices\[0\].message'),
  (200, dict(content=[1]), 3, 'without content')])
def test_endpoint_gives_up_with_the_reason(status, data, tries, reason):
  with serve(lambda body, k: (status, dict(data) if isinstance(data, dict) else data)) as (url,
                                                                                           seen):
    failure, = Endpoint(url, wait=0.001, tries=3).respond([ASK])
  assert isinstance(failure, Failure) and len(seen) == tries
  with pytest.raises(AssertionError, match=reason):
    raise AssertionError(failure.reason)


def test_one_failed_try_of_several_fails_the_prompt_alone():
  def answer(body, k):
    return (400, b'bad') if body['seed'] == seed_of(ASK, 1) else (200, dict(content='yes'))
  with serve(answer) as (url, _):
    first, second = Endpoint(url).respond([ASK, OTHER], 2)
  assert isinstance(first, Failure) and [a.content for a in second] == ['yes', 'yes']


def test_refused_connection_and_timeout_are_failures():
  with socket.create_server(('127.0.0.1', 0)) as silent:  # accepts, never answers
    port = silent.getsockname()[1]
    slow, = Endpoint(f'http://127.0.0.1:{port}/v1', tries=1, timeout=0.05).respond([ASK])
  refused, = Endpoint(f'http://127.0.0.1:{port}/v1', tries=2, wait=0.001).respond([ASK])
  assert 'timed out' in slow.reason and 'refused' in refused.reason


@pytest.mark.parametrize('message, reasoning, content, text', [
  (dict(content='4'), '', '4', '4'),
  (dict(content='<think>\n2+2\n</think>\n\n4'), '2+2', '4', '<think>\n2+2\n</think>\n\n4'),
  (dict(content='\n\n4', reasoning_content='\n2+2\n'), '2+2', '4',
   '<think>\n2+2\n</think>\n\n4'),
  (dict(content='4', reasoning='2+2'), '2+2', '4', '<think>\n2+2\n</think>\n\n4'),
  (dict(content='<think>\n2+'), '2+', '', '<think>\n2+')])
def test_reasoning_is_found_in_each_place(message, reasoning, content, text):
  data = json.dumps(dict(choices=[dict(message=message, finish_reason='stop')]))
  assert read_reply(data) == Answer(text, reasoning, content, 'stop')


def test_reasoning_cut_short_stays_open():
  message = dict(content=None, reasoning_content='2+')
  data = json.dumps(dict(choices=[dict(message=message, finish_reason='length')]))
  assert read_reply(data) == Answer('<think>\n2+\n', '2+', '', 'length')


def test_open_responder_says_what_it_lacks():
  with pytest.raises(ValueError, match='runs/s3 is not an http.s. address, and a folder needs'):
    open_responder('runs/s3')


def read_score(text):
  score = find_object(text).get('score')
  if not isinstance(score, int):
    raise ValueError(f'no score in {text!r}')
  return score


def test_judge_asks_again_and_never_makes_up_a_verdict():
  """Garbage first, then a score; garbage always, and a dead endpoint, are Failures."""
  def answer(body, k):
    question = body['messages'][0]['content']
    if question == 'Rate garbage {"score"}':
      return 200, dict(content='ten out of ten')
    if question == 'Rate dead {"score"}':
      return 400, b'dead'
    first = body['seed'] == seed_of(body['messages'], 0)
    return 200, dict(content='hm {"score": "high"}' if first else '```json\n{"score": 3}\n```')
  with serve(answer) as (url, seen):
    records = [dict(q='good'), dict(q='garbage'), dict(q='dead')]
    good, garbage, dead = judge(Endpoint(url), 'Rate {q} {"score"}', records, read_score)
  assert good == 3
  assert garbage.reason == "no verdict in 3 answers: no JSON object in 'ten out of ten'"
  assert isinstance(dead, Failure) and 'HTTP 400' in dead.reason
  assert len(seen) == 2 + 3 + 1


def test_engine_judges_too(local):
  verdict, = judge(local, 'Rate {q}', [dict(q='x')], read_score, tries=2,
                   sampling=Sampling(1.0, max_tokens=4))
  assert verdict.reason.startswith('no verdict in 2 answers')


def test_find_object_takes_the_last_whole_one():
  assert find_object('{"a": 1} then {"b": {"c": [2]}} and {broken') == dict(b=dict(c=[2]))
  for text in ('', 'none', '{', '[1, 2]', '{"a": '):
    with pytest.raises(ValueError, match='no JSON object'):
      find_object(text)


def test_fill_leaves_foreign_braces():
  assert fill('{q}: {"a": {x}} {q}', dict(q='1{y}', y=2)) == '1{y}: {"a": {x}} 1{y}'
