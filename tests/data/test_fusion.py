"""The mixed set of fusion: shares, flags, turns, and that each turn obeys the last flag."""

import itertools

import pytest

from qwen3_jax.data import conversations, fusion, tasks
from qwen3_jax.text.template import last_flag


def records(kind, count, think, **more):
  source = tasks.TaskSource(seed=1, size=count, kinds=[kind], difficulty=(1, 2))
  made = [source.task(i) for i in range(count)]
  return [dict(messages=[
    dict(role='user', content=t.question),
    dict(role='assistant', content=f'{kind} says {t.answer}.',
         **(dict(reasoning_content='\n'.join(t.steps)) if think else {}))], id=i, **more)
    for i, t in enumerate(made)]


THINKING, PLAIN = records('add', 60, True), records('sort', 60, False)
TRANSLATION = records('reverse', 20, False)


def fused(size=400, **rates):
  return list(fusion.fuse(THINKING, PLAIN, TRANSLATION, size=size,
                          **dict(translation_share=0.3) | rates))


def test_every_turn_obeys_the_last_flag_before_it():
  """What the flags say, read from the text alone, is what each assistant turn does."""
  turns = 0
  for record in fused():
    for place, message in enumerate(record['messages']):
      if message['role'] == 'assistant':
        flag = last_flag(record['messages'][:place])
        thinks = bool(message.get('reasoning_content'))
        assert thinks == (record['enable_thinking'] if flag is None else flag), record
        turns += 1
  assert turns > 500


def test_every_record_becomes_examples_and_plain_blocks_are_trained_as_their_cause_says():
  """No contradiction; an empty block is learnt after /no_think, and given by the hard switch."""
  seen = set()
  for record in fused(200):
    for spans in conversations.examples(record):
      trained = ''.join(text for text, train in spans if train)
      if record['enable_thinking']:
        assert trained.startswith('<think>\n')
      else:
        assert '<think>' not in trained and spans[0][0].endswith('<think>\n\n</think>\n\n')
      seen.add((record['kind'], record['enable_thinking']))
  assert seen == {('thinking', True), ('plain', True), ('plain', False), ('turns', True)}


def test_shares_and_rates_come_out():
  made = fused(3000, thinking_share=0.6, flag_rate=0.25, hard_rate=0.4, system_rate=0.3,
               turns_rate=0.5, extra_rate=0.0)
  kinds = [record['kind'] for record in made]
  assert kinds.count('turns') / len(made) == pytest.approx(0.5, abs=0.04)
  single = [record for record in made if record['kind'] != 'turns']
  thinking = [record for record in single if record['kind'] == 'thinking']
  assert len(thinking) / len(single) == pytest.approx(0.6, abs=0.04)
  flag = lambda record: last_flag(record['messages'])
  assert sum(flag(r) is True for r in thinking) / len(thinking) == pytest.approx(0.25, abs=0.04)
  plain = [record for record in single if record['kind'] == 'plain']
  assert sum(flag(r) is None for r in plain) / len(plain) == pytest.approx(0.4, abs=0.05)
  assert all(not r['enable_thinking'] for r in plain if flag(r) is None)
  translated = sum('reverse' in r['messages'][-1]['content'] for r in plain)
  assert translated / len(plain) == pytest.approx(0.3, abs=0.05)
  systems = [r for r in thinking + plain if flag(r) is not None]
  in_system = sum(r['messages'][0]['role'] == 'system' for r in systems)
  assert in_system / len(systems) == pytest.approx(0.3, abs=0.05)


def test_conversations_hold_several_flags_and_silent_turns():
  made = [record for record in fused(600, turns_rate=1.0, extra_rate=0.5)]
  users = [[m['content'].split() for m in r['messages'] if m['role'] == 'user'] for r in made]
  assert {len(each) for each in users} == {2, 3, 4}
  both = sum({'/think', '/no_think'} <= set(words) for each in users for words in each)
  silent = sum(not {'/think', '/no_think'} & set(words) for each in users for words in each)
  turns = sum(map(len, users))
  assert both > 0.1 * turns and silent > 0.2 * turns
  switching = sum(len({bool(m.get('reasoning_content')) for m in r['messages']
                       if m['role'] == 'assistant'}) == 2 for r in made)
  assert switching > 0.3 * len(made)


def test_same_arguments_same_set_and_pools_are_used_evenly():
  assert fused(50) == fused(50) != fused(50, seed=1)
  made = fused(120, turns_rate=0.0, thinking_share=0.5, flag_rate=0.0, system_rate=0.0)
  used = [r['id'] for r in made if r['kind'] == 'thinking']
  # Each once before any comes again.
  assert len(used) > 30 and len(set(used[:60])) == len(used[:60])
  assert THINKING == records('add', 60, True)  # the sources are untouched


def test_fit_ends_where_the_first_pool_is_used_up():
  rates = dict(thinking_share=0.5, translation_share=0.0, turns_rate=0.25, most_turns=4)
  size = fusion.fit(dict(thinking=1000, plain=3000), **rates)
  used = sum(sum(bool(m.get('reasoning_content')) for m in r['messages'])
             for r in itertools.islice(fusion.fuse(THINKING, PLAIN, size=size, **rates), size))
  assert used == pytest.approx(1000, rel=0.08)


def test_counts_are_those_of_the_set():
  counts = fusion.Counts()
  made = fused(100)
  for record in made:
    counts.add(record)
  assert counts['thinking'] + counts['plain'] + counts['turns'] == 100
  text = [m['content'] for r in made for m in r['messages'] if m['role'] == 'user']
  assert counts['user turns'] == len(text)
  assert counts['user turns with /no_think'] == sum('/no_think' in t.split() for t in text)


def test_a_record_with_tools_is_no_turn_of_another_conversation():
  plain = records('sort', 10, False, tools=[dict(name='f', parameters={})])
  made = list(fusion.fuse(THINKING, plain, size=100, turns_rate=1.0, thinking_share=0.3))
  assert any(r.get('tools') for r in made)
  assert all(r['kind'] != 'turns' for r in made if r.get('tools'))


@pytest.mark.parametrize('rates, message', [
  (dict(thinking_share=1.5), 'thinking_share is 1.5: want a share from 0 to 1'),
  (dict(system_rate=-1), 'system_rate is -1')])
def test_senseless_rates_are_refused(rates, message):
  with pytest.raises(ValueError, match=message):
    fused(1, **rates)


def test_a_wanted_pool_must_hold_something():
  with pytest.raises(ValueError, match='no translation records, but the shares ask for some'):
    list(fusion.fuse(THINKING, PLAIN, None, size=50, translation_share=0.5))
