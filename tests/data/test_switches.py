"""Modes of prompts: the shares asked for, the flags, and what a record says itself."""
import numpy as np
import pytest

from qwen3_jax.data import queries
from qwen3_jax.data.switches import Switched, switch
from qwen3_jax.text.template import last_flag


def ask(i, **fields):
  return dict(messages=[dict(role='user', content=f'question {i}')]) | fields


def test_shares_of_modes_and_flags():
  made = [switch(ask(i), thinking=0.7, flags=0.4) for i in range(2000)]
  flags = [last_flag(record['messages']) for record in made]
  thinks = [record['enable_thinking'] if flag is None else flag
            for record, flag in zip(made, flags)]
  assert np.mean(thinks) == pytest.approx(0.7, abs=0.03)
  assert np.mean([flag is not None for flag in flags]) == pytest.approx(0.4, abs=0.03)
  assert all(record['enable_thinking'] for record, flag in zip(made, flags) if flag is not None)
  assert {flag for flag in flags} == {True, False, None}


def test_what_a_record_says_stands():
  assert switch(ask(1, enable_thinking=False), thinking=1.0)['enable_thinking'] is False
  said = switch(ask(1, enable_thinking=False), thinking=1.0, flags=1.0)
  assert said['enable_thinking'] and said['messages'][0]['content'] == 'question 1 /no_think'
  flagged = ask('1 /no_think')
  assert switch(flagged, 1.0, 1.0) == flagged | dict(enable_thinking=True)
  plain = ask(3)
  switch(plain, 0.5, 1.0)
  assert plain == ask(3)  # the record itself is not touched


def test_a_source_is_seen_through_it():
  source = queries.open_queries('tasks:kinds=chain,size=50,thinking=mixed', 'train')
  seen = Switched(source, 0.5, 0.0)
  assert len(seen) == 50 and [seen[i] for i in range(50)] == [source[i] for i in range(50)]
  assert seen.fingerprint != Switched(source, 0.5, 0.1).fingerprint
  with pytest.raises(ValueError, match='config.modes.flags is 1.5'):
    Switched(source, 0.5, 1.5)
