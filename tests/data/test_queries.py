"""Every generated question has a right answer that earns all and a wrong one that earns nothing."""
import functools
import json
import re

import pytest

from qwen3_jax.data import queries, query_files
from qwen3_jax.rewards import code, gym
from qwen3_jax.rewards.instruction_rules import RULES
from qwen3_jax.rewards.response import Response
from qwen3_jax.rewards.router import Router
from qwen3_jax.text.template import render

NAMES = ['tasks', *queries.GENERATORS]
ROWS = ('gsm8k/train.jsonl.gz', 'gsm8k/test_dev_first250.jsonl', 'math/train_answers.jsonl.gz',
        'math/test4500_with_solutions.jsonl.gz', 'math/math500_dev.jsonl')


@pytest.fixture(scope='module')
def router():
  """Scorers of judge and reward model know the wrong answer by its look; code runs in calls."""
  def judge(pairs):
    return [float(response.content != 'I do not know.') for _, response in pairs]

  def prefer(pairs):
    return [9.0 if 'pleasure' in response.content else -9.0 for _, response in pairs]

  def run(pairs):
    return [code.verify(*pair) for pair in pairs]

  router = Router({'judge': judge, 'preference': prefer, 'code': run}, workers=2)
  yield router
  router.close()


def write(record, message):
  """The text that a model would write after the prompt of a record."""
  text = render([{'role': 'user', 'content': '?'}, message]).partition('<|im_start|>assistant\n')[2]
  closed = not record['enable_thinking'] and not message['reasoning_content']
  return text.removesuffix('<|im_end|>\n').removeprefix('<think>\n\n</think>\n\n' if closed else '')


@functools.lru_cache
def source_of(name, difficulty, split=None):
  return queries.open_queries(f'{name}:difficulty={difficulty},thinking=mixed', split)


@pytest.mark.parametrize('name', NAMES)
def test_right_answers_earn_all_and_wrong_ones_nothing(router, name):
  if name == 'code' and not code.SANDBOX.available():
    pytest.skip('no sandbox on this machine')
  for difficulty in range(1, 6):
    source, records, responses = source_of(name, difficulty), [], []
    for i in range(4 if name == 'code' else 50):
      for message in source.answers(i):
        records.append(source[i])
        responses.append(Response.read(write(source[i], message), 50))
    rewards = [scored.reward for scored in router.score(records, responses)]
    full = sum(weight for weight in records[0]['verifiers'].values() if weight > 0)
    if name == 'open':  # a reward model compares: no number is the best
      assert min(rewards[::2]) > max(rewards[1::2])
    else:
      assert set(rewards[::2]) == {full}
      assert max(rewards[1::2]) <= 0, records[2 * rewards[1::2].index(max(rewards[1::2]))]


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'code'])  # it takes its time
def test_the_mode_of_thinking_is_a_gate(router, name):
  """The right answer in the wrong mode earns nothing."""
  source, records, responses = source_of(name, 1), [], []
  for i in range(20):
    record, (right, _) = source[i], source.answers(i)
    thinks = bool(right['reasoning_content'])
    other = right | {'reasoning_content': '' if thinks else 'So be it.'}
    records.append(record)
    responses.append(Response.read(write(record | {'enable_thinking': True}, other), 9))
  assert {scored.reward for scored in router.score(records, responses)} <= {0.0, -0.0}


def test_names_and_verifiers_cover_the_families():
  assert len(NAMES) >= 20
  verifiers = {name for kind in NAMES for name in source_of(kind, 3)[0]['verifiers']}
  assert verifiers == {'math', 'mode', 'code', 'instructions', 'length', 'schema', 'judge', 'tools',
                       'preference', 'repetition', 'citations', 'language'}
  table = queries.__doc__
  assert not [name for name in NAMES if not re.search(rf'\b{name}\b', table)]


@pytest.mark.parametrize('name', NAMES)
def test_questions_are_short_at_first_and_a_pure_function_of_the_index(name):
  easy, again = source_of(name, 1), queries.open_queries(f'{name}:difficulty=1,thinking=mixed')
  lengths = sorted(sum(len(m['content']) for m in easy[i]['messages']) for i in range(60))
  assert lengths[30] < 180
  for i in (3, 0, 59):
    record = easy[i]
    assert record == again[i] and record == json.loads(json.dumps(record))
    record['messages'][0]['content'] = record['verifiers']['mode'] = None
    assert easy[i] == again[i]
  assert easy.fingerprint == again.fingerprint != queries.open_queries(f'{name}:seed=1').fingerprint
  assert easy[0] != queries.open_queries(f'{name}:difficulty=1,seed=1')[0]


@pytest.mark.parametrize('name', NAMES)
def test_no_held_out_question_is_trained_on(name):
  def ask(split, seed, count):
    source = queries.open_queries(f'{name}:seed={seed},difficulty=2', split)
    return {source[i]['messages'][-1]['content'] for i in range(count)}
  train, held = ask('train', 0, 150) | ask('train', 1, 150), ask('heldout', 0, 40)
  assert train and held and not train & held


def test_every_rule_is_asked_for_and_some_together():
  found = [source_of('rules', d)[i]['instructions'] for d in (1, 3, 5) for i in range(400)]
  assert {rule['id'] for rules in found for rule in rules} == set(RULES)
  assert max(map(len, found)) == 3 and min(map(len, found)) == 1


def test_flags_stand_everywhere_and_the_last_one_counts():
  records = [source_of('mode', 5)[i] for i in range(200)]
  texts = [' | '.join(f'{m["role"]}: {m["content"]}' for m in r['messages']) for r in records]
  assert any('system: Do what you are asked. /no_think' in text for text in texts)
  assert any(text.count('think') >= 3 for text in texts)
  assert {r['enable_thinking'] for r in records} == {True, False}
  turned = [r for r in records if len(r['messages']) > 3 and '/think' in r['messages'][1]['content']
            and '/no_think' in r['messages'][-1]['content']]
  assert turned


def test_thinking_option():
  modes = {option: {queries.open_queries(f'tasks:thinking={option}')[i]['enable_thinking']
                    for i in range(30)} for option in ('on', 'off', 'mixed')}
  assert modes == {'on': {True}, 'off': {False}, 'mixed': {True, False}}
  plain = queries.open_queries('tasks:kinds=chain,difficulty=1,size=5,thinking=off')
  assert len(plain) == 5 and plain.answers(2)[0]['reasoning_content'] == ''
  assert plain[2]['source'] == 'tasks:chain'
  with pytest.raises(IndexError, match='5 of 5'):
    plain[5]


@pytest.mark.parametrize('spec, message', [
  ('countdwn', "did you mean 'countdown'"), ('xyz', 'there are: tasks, gym, countdown'),
  ('logic:kinds=add', "logic option 'kinds=add'"), ('logic:thinking=maybe', 'thinking=on, off'),
  ('logic:difficulty=9', 'difficulty from 1 to 5'), ('code:sise=3', 'sise=3')])
def test_specs_that_mean_nothing(spec, message):
  with pytest.raises(ValueError, match=message):
    queries.open_queries(spec)


def test_a_path_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    queries.open_queries(str(tmp_path / 'questions.jsonl'))


# Files.

@pytest.mark.parametrize('path', ROWS)
def test_every_row_of_gsm8k_and_math_agrees_with_itself(data_dir, router, tmp_path, path):
  """Four rows have no answer; all others are right about themselves, and not about a neighbour."""
  source = queries.open_queries(str(data_dir / path), cache=tmp_path, skip_bad=True)
  assert len(source) > 90
  assert sum(source.rejected.values()) == (4 if 'train_answers' in path else 0)
  records = [source[i] | {'verifiers': {'math': 1.0}} for i in range(len(source))]
  said = [Response.read(f'So it is \\boxed{{{record["answer"]}}}.', 9) for record in records]
  assert {scored.reward for scored in router.score(records, said)} == {1.0}
  wrong = router.score(records[:90], said[1:91])
  assert sum(scored.reward for scored in wrong) < 0.2 * len(wrong)


@pytest.mark.parametrize('path, verifier, field', [
  ('ifeval/dev.jsonl', 'instructions', 'instructions'), ('mbpp/test_dev.jsonl', 'code', 'tests'),
  ('humaneval/dev_even.jsonl', 'code', 'tests'),
  ('bfcl/parallel_multiple.dev.jsonl', 'tools', 'expected_calls'),
  ('bfcl/irrelevance.dev.jsonl', 'tools', 'expected_calls'),
  ('svamp_cmath_mmlu/mmlu_stem_dev.jsonl', 'math', 'answer')])
def test_benchmarks_get_their_verifiers(data_dir, router, tmp_path, path, verifier, field):
  source = queries.open_queries(str(data_dir / path), cache=tmp_path)
  records = [source[i] for i in range(len(source))]
  assert len({record['id'] for record in records}) > 0.99 * len(records)  # MMLU has a row twice
  assert all(record['verifiers'] == {verifier: 1.0, 'mode': 0.0} for record in records)
  assert all(field in router.weigh(record) or field in record for record in records)
  assert not any('"dict"' in json.dumps(record.get('tools')) for record in records)
  if verifier != 'code':
    empty = router.score(records, [Response.read('<think>\nno\n</think>\n\n-', 3)] * len(records))
    assert not any(scored.missing for scored in empty)


def test_bfcl_calls_are_right_about_themselves(data_dir, router, tmp_path):
  source = queries.open_queries(str(data_dir / 'bfcl' / 'parallel.dev.jsonl'), cache=tmp_path)
  records = [source[i] for i in range(len(source))]
  said = []
  for record in records:
    calls = [{'name': name, 'arguments': {key: values[0] for key, values in wanted.items()
                                          if values[0] != ''}}
             for call in record['expected_calls'] for name, wanted in call.items()]
    said.append(Response('<think>\nx\n</think>\n\ncalls', 'x', '', tuple(calls), 9, 'stop'))
  rewards = [scored.reward for scored in router.score(records, said)]
  assert sum(rewards) >= 0.95 * len(rewards)


@pytest.mark.parametrize('row, verifier', [
  ({'question': 'a', 'answer': 7}, 'math'), ({'problem': 'a', 'solution': '\\boxed{7}'}, 'math'),
  ({'question': 'a', 'tests': {'kind': 'stdio', 'cases': []}}, 'code'),
  ({'prompt': 'a', 'reference': 'b'}, 'judge'), ({'prompt': 'a'}, 'preference'),
  ({'messages': [{'role': 'user', 'content': 'a'}], 'answer': '7'}, 'math'),
  ({'messages': [{'role': 'user', 'content': 'a'}], 'verifiers': {'length': 2}}, 'length')])
def test_shapes(row, verifier):
  record = query_files.normalise(row, 'here')
  assert next(iter(record['verifiers'])) == verifier and record['source'] == 'here'
  assert record['messages'] == [{'role': 'user', 'content': 'a'}]


@pytest.mark.parametrize('row, message', [
  ([], 'not an object'), ({'text': 'a'}, 'no question that can be scored'),
  ({'question': 'a', 'answer': None}, 'no answer'), ({'question': 'a', 'answer': ' '}, 'is empty'),
  ({'question': 'a', 'solution': 'so 7'}, 'no answer'),
  ({'prompt': 'a', 'instruction_id_list': ['x'], 'kwargs': []}, '1 instruction ids with 0 kwargs'),
  ({'question': [[], []], 'function': [], 'ground_truth': []}, '2 turns of questions'),
  ({'question': 'a', 'choices': ['x', 'y'], 'answer': 2}, 'choice 2 of 2')])
def test_rows_that_are_no_question(tmp_path, row, message):
  with pytest.raises(ValueError, match=message):
    query_files.normalise(row, 'here')
  path = tmp_path / 'rows.jsonl'
  path.write_text(f'{json.dumps({"question": "a", "answer": "7"})}\n{json.dumps(row)}\n')
  with pytest.raises(ValueError, match=f'rows.jsonl, line 2: .*{message}'):
    queries.open_queries(str(path))
  assert len(queries.open_queries(str(path), skip_bad=True)) == 1


def test_reasoning_gym_is_optional_and_runs_no_answer():
  if not gym.available():
    with pytest.raises(ValueError, match='pip install reasoning-gym'):
      queries.open_queries('gym:leg_counting')
    return
  source = queries.open_queries('gym:leg_counting,size=50,seed=3', 'train')
  entry = gym.open_entries('leg_counting', 3, 50_000)[source[7]['gym']['entry']]
  assert gym.verify(source[7], Response.read(f'\\boxed{{{entry["answer"]}}}', 3)) == 1.0
  assert gym.verify(source[7], Response.read('many', 3)) == 0.0
  with pytest.raises(ValueError, match='evaluates answers'):
    queries.open_queries('gym:countdown')
