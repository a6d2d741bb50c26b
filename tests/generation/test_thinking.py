import numpy as np
import pytest

from qwen3_jax.generation import engine, thinking
from qwen3_jax.generation.sampling import Sampling

ROW = Sampling(2.0, max_tokens=40, stop_ids=())


@pytest.fixture(scope='module')
def marks(tokenizer):
  return tokenizer.id('<think>'), tokenizer.id('</think>')


def open_prompt(tokenizer):
  return tokenizer.encode('the fox\n<think>\n')


@pytest.mark.parametrize('stop', [thinking.STOP, thinking.STOP_AS_PRINTED])
def test_budget_is_exact_in_every_row(model, tokenizer, marks, stop):
  """Rows spend different budgets in one batch; the inserted ids are the stop text's own."""
  budgets, words = [0, 1, 7, 11, None], tokenizer.encode(stop)
  prompt = open_prompt(tokenizer)
  outputs = engine.generate(model, tokenizer, [prompt] * 5, ROW, budgets, stop_text=stop)
  free = engine.generate(model, tokenizer, [prompt] * 5, ROW)
  for out, alone, budget in zip(outputs, free, budgets):
    ended = marks[1] in alone.tokens[:40 if budget is None else budget]
    if ended or budget is None:
      assert out.tokens == alone.tokens and not out.forced.any()
      continue
    assert out.tokens[:budget] == alone.tokens[:budget]
    assert out.tokens[budget:budget + len(words)] == words
    assert np.flatnonzero(out.forced).tolist() == list(range(budget, budget + len(words)))
    assert not out.logp[out.forced].any() and (out.logp_untempered[out.forced] < 0).all()
    assert len(out.tokens) == 40  # it goes on afterwards
    assert tokenizer.decode(words) == stop and stop in out.text
  assert sum(out.forced.any() for out in outputs) >= 3


def test_forced_tokens_are_seen_by_what_follows(model, tokenizer):
  """The continuation equals that of a prompt that already holds the stop text."""
  prompt, words = open_prompt(tokenizer), tokenizer.encode(thinking.STOP)
  greedy = Sampling(0, max_tokens=len(words) + 10, stop_ids=())
  out, = engine.generate(model, tokenizer, [prompt], greedy, 0)
  after, = engine.generate(model, tokenizer, [prompt + words], greedy)
  assert out.tokens == words + after.tokens[:10]


def test_an_unopened_block_is_opened_for_budget_0(model, tokenizer):
  chat = [dict(role='user', content='the fox')]
  whole = tokenizer.encode(thinking.OPENING) + tokenizer.encode(thinking.STOP)
  out, = engine.generate(model, tokenizer, [chat], ROW, 0)
  assert out.tokens[:len(whole)] == whole and out.forced.sum() == len(whole)


def test_no_thinking_no_budget(model, tokenizer):
  """A closed block (hard switch), or a first token that opens none, leaves the budget unused."""
  chat = [dict(role='user', content='the fox')]
  closed, = engine.generate(model, tokenizer, [chat], ROW, 0, enable_thinking=False)
  plain, = engine.generate(model, tokenizer, [chat], ROW, 3)
  assert not closed.forced.any() and not plain.forced.any()
  assert tokenizer.decode(closed.prompt).endswith('<think>\n\n</think>\n\n')


def test_a_stop_id_inside_the_stop_text_does_not_stop(model, tokenizer, marks):
  row = Sampling(2.0, max_tokens=40, stop_ids=(marks[1],))
  out, = engine.generate(model, tokenizer, [open_prompt(tokenizer)], row, 0)
  words = tokenizer.encode(thinking.STOP)
  assert out.tokens[:len(words)] == words and len(out.tokens) > len(words)


def steps(progress, budget, tokens):
  """What one row emits when it draws `tokens`."""
  out = []
  for token in tokens:
    progress, emitted, forced = thinking.steer(progress, budget, np.array([token]))
    out.append((int(emitted[0]), bool(forced[0])))
  return out


def test_counting_by_hand(tokenizer, marks):
  """Neither tag counts; `</think>` in time leaves the budget unused, a late one is replaced."""
  think, close = marks
  budget = thinking.make_budget(tokenizer, [3])
  def begin():
    return thinking.begin(budget, [[50, 51]])
  natural = [think, 60, 61, close, 70, 71, 72, 73]
  assert steps(begin(), budget, natural) == [(t, False) for t in natural]
  late = steps(begin(), budget, [think, 60, 61, 62, close, *[9] * 400])
  words = tokenizer.encode(thinking.STOP)
  assert [t for t, _ in late[:4]] == [think, 60, 61, 62]
  assert late[4:4 + len(words)] == [(t, True) for t in words]
  assert late[4 + len(words):][:2] == [(9, False)] * 2


def test_bad_budgets_are_named(tokenizer):
  with pytest.raises(ValueError, match='-1'):
    thinking.make_budget(tokenizer, [-1])
  with pytest.raises(ValueError, match='</think>'):
    thinking.make_budget(tokenizer, [1], 'enough')
