"""What holds for every environment: arguments, refusals, limits, goals that only work reaches."""
import json
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from qwen3_jax.data import conversations
from qwen3_jax.environments import records
from qwen3_jax.environments.environment import OUTPUT, Environment, progress, tool
from qwen3_jax.environments.records import demonstrate, make_record, open_environment, solve
from qwen3_jax.rewards.sandbox import Sandbox
from qwen3_jax.text.template import parse, render

NAMES = tuple(records.ENVIRONMENTS)
needs_sandbox = pytest.mark.skipif(not Sandbox().available(),
                                   reason='needs hardware: a Linux that allows bubblewrap')
EACH = [pytest.param(name, marks=needs_sandbox if name == 'python' else ()) for name in NAMES]


def start(record):
  environment = open_environment(record)
  environment.reset(record)
  return environment


def say(content='', *calls):
  return {'role': 'assistant', 'reasoning_content': '', 'content': content,
          'tool_calls': [{'name': name, 'arguments': arguments} for name, arguments in calls]}


def texts(turn):
  return [message['content'] for message in turn.messages]


@pytest.mark.parametrize('name', EACH)
@pytest.mark.parametrize('difficulty', range(1, 6))
def test_the_solution_reaches_the_goal_and_nothing_less_does(name, difficulty):
  for seed in range(2 if name == 'python' else 25):
    record = make_record(name, seed, difficulty)
    environment, messages = start(record), solve(record)
    assert environment.outcome()['reward'] == 0
    for message in messages:
      assert environment.outcome()['reward'] < 1 or message is messages[-1]
      turn = environment.step(message)
      assert turn.done == (message is messages[-1])
      assert not any(text.startswith('Error') for text in texts(turn))
    assert set(environment.outcome().values()) == {1}


def guess(rng, record):
  """A model that calls tools at random with words of the question, then answers one of them."""
  words = record['messages'][0]['content'].replace('"', '').replace(';', '').rstrip('.').split()
  names = [schema['function'] for schema in record['tools']]
  for _ in range(rng.randint(1, 6)):
    chosen = rng.choice(names)
    made = {key: rng.randint(1, 50) if kind['type'] == 'integer' else ' '.join(
      rng.choices(words, k=rng.randint(1, 3)))
      for key, kind in chosen['parameters']['properties'].items()}
    yield say('', (chosen['name'], made))
  yield say(f'The answer is {rng.choice(words)}.')


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'python'])
def test_a_random_solver_earns_little(name):
  rng, reached = random.Random(0), []
  for seed in range(200):
    record = make_record(name, seed, 1 + seed % 5)
    environment = start(record)
    for message in guess(rng, record):
      if environment.step(message).done:
        break
    outcome = environment.outcome()
    assert all(0 <= part <= 1 for part in outcome.values())
    reached.append(outcome['reward'])
  assert sum(reached) / len(reached) < 0.05


@pytest.mark.parametrize('name', NAMES)
def test_records_are_json_and_a_function_of_their_seed(name):
  for difficulty in range(1, 6):
    record = make_record(name, 7, difficulty)
    assert json.loads(json.dumps(record)) == record == make_record(name, 7, difficulty)
    assert record != make_record(name, 8, difficulty)
    assert record['verifiers'] == {'environment': 1.0}


@pytest.mark.parametrize('thinking', [True, False])
@pytest.mark.parametrize('name', EACH)
def test_a_demonstration_is_a_conversation_to_train_on(name, thinking):
  record = make_record(name, 3, 3)
  shown = demonstrate(record, thinking)
  spans = conversations.examples(shown)
  assert len(spans) == (1 if thinking else len(solve(record)))
  trained = [text for span in spans for text, wanted in span if wanted]
  assert len(trained) == len(solve(record))
  for text, message in zip(trained, solve(record)):
    read = parse(text)
    assert read['tool_calls'] == message['tool_calls'] and read['content'] == message['content']
    assert read['reasoning_content'] == (message['reasoning_content'] if thinking else '')
  assert any(message['role'] == 'tool' for message in shown['messages'])
  assert render(shown['messages'], shown['tools']).startswith('<|im_start|>system\n# Tools')


def test_what_the_model_gets_wrong_it_is_told():
  environment = start(make_record('todo', 0, 1))
  cases = [(('fly', {}), "Error: no tool 'fly'; there are: list_items, add_item"),
           (('add_item', {}), "Error: bad arguments: 'text' is a required property"),
           (('add_item', {'text': 5}), "Error: bad arguments at text: 5 is not of type 'string'"),
           (('complete_item', {'id': '3'}), 'Error: bad arguments at id'),
           (('complete_item', {'id': True}), 'Error: bad arguments at id'),
           (('complete_item', {'id': 10 ** 400}), 'Error: there is no item'),
           (('list_items', {'x': 1}), 'Error: bad arguments: Additional properties'),
           (('add_item', {'text': 'x' * 201}), 'Error: bad arguments at text'),
           (('add_item', {'text': 'x' * 20_001}), 'Error: the arguments are longer')]
  environment.turns = 100
  for call, answer in cases:
    turn = environment.step(say('', call))
    assert len(turn.messages) == 1 and texts(turn)[0].startswith(answer) and not turn.done
    assert len(texts(turn)[0]) < 500
  assert environment.outcome()['valid'] == 0
  assert texts(environment.step(say('', ('complete_item', {'id': 1e400}))))[0].startswith('Error')


TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(
    ['doc-1', '/', '..', 'a/b', '1/0', '9**9**9', '((', 'print(1)', 10 ** 4000, '\ud800', '\0']),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
  max_leaves=6)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'python'])
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_no_arguments_make_an_environment_raise(name, data):
  """What a model could raise at will would take its worst episodes out of the count."""
  record = make_record(name, 0, 3)
  environment = start(record)
  for _ in range(3):
    chosen = data.draw(st.sampled_from(record['tools']))['function']
    keys = st.sampled_from([*chosen['parameters']['properties'], 'other'])
    made = data.draw(st.dictionaries(keys, VALUES, max_size=3))
    turn = environment.step(say(data.draw(TEXT), (chosen['name'], made)))
    assert all(text.encode() and len(text) < OUTPUT + 60 for text in texts(turn))
  environment.step(say(data.draw(TEXT)))
  assert all(0 <= part <= 1 for part in environment.outcome().values())


def test_arguments_nested_deep_are_refused():
  environment = start(make_record('todo', 0, 1))
  nested = {}
  for _ in range(100_000):
    nested = {'text': nested}
  assert texts(environment.step(say('', ('add_item', nested)))) == [
    'Error: the arguments are nested too deep']


@pytest.mark.parametrize('written', [
  '<tool_call>\n{"name": "list_items", "arguments": {}\n</tool_call>', '<tool_call>',
  '<tool_call>\n{"name": "list_items"}\n</tool_call>', '<tool_call>[]</tool_call>',
  '<tool_call>\n{"name": "list_items", "arguments": "{}"}\n</tool_call>'])
def test_a_call_that_is_no_json_is_answered(written):
  environment = start(make_record('todo', 0, 1))
  turn = environment.step(parse(f'<think>\nHm.\n</think>\n\n{written}'))
  assert texts(turn)[0].startswith('Error: a tool call must be') and not turn.done
  good = '<tool_call>\n{"name": "list_items", "arguments": {}}\n</tool_call>'
  turn = environment.step(parse(f'{good}\n{written}'))
  assert len(turn.messages) == 2 and '[' in texts(turn)[0] and texts(turn)[1].startswith('Error')


def test_calls_and_turns_are_limited():
  environment = start(make_record('todo', 0, 1))
  many = [('add_item', {'text': f'{k}'}) for k in range(10)]
  turn = environment.step(say('', *many))
  assert len(turn.messages) == 5 and 'the last 6 were not made' in texts(turn)[-1]
  assert '9' not in texts(environment.step(say('', ('list_items', {}))))[0].split()
  for _ in range(environment.turns - 3):
    assert not environment.step(say('', ('list_items', {}))).done
  assert environment.step(say('', ('list_items', {}))).done


def test_the_last_turn_counts():
  record = make_record('todo', 0, 2)
  messages = solve(record)
  record['environment']['turns'] = len(messages) - 1
  environment = start(record)
  done = [environment.step(message).done for message in messages[:-1]]
  assert done[-1] and not any(done[:-1]) and environment.outcome()['reward'] == 1


class Loud(Environment):
  tools = (tool('shout', 'Shouts.'), tool('fail', 'Fails.'))

  def begin(self, settings):
    pass

  def call(self, name, arguments):
    return 'a' * 10_000 if name == 'shout' else [][0]

  def goal(self):
    return {'goal': 0.5, 'style': 1.0}


def test_output_is_capped_and_faults_are_the_environments_own():
  environment = Loud()
  environment.reset({'environment': {'weights': {'goal': 3, 'style': 1}}})
  text = texts(environment.step(say('', ('shout', {}))))[0]
  assert text == 'a' * OUTPUT + '\n... (8000 more characters)'
  with pytest.raises(IndexError):
    environment.step(say('', ('fail', {})))
  assert environment.outcome()['reward'] == (3 * 0.5 + 1) / 4


def test_progress_counts_what_should_change_and_what_should_not_have():
  start_, goal = dict(a=1, b=2, c=3), dict(a=1, b=5, d=4)
  assert progress(start_, start_, goal) == 0 and progress(start_, goal, goal) == 1
  assert progress(start_, dict(a=1, b=5, c=3), goal) == pytest.approx(1 / 3)
  assert progress(start_, dict(a=0, b=5, c=3), goal) == 0
  assert progress(start_, {}, goal) == 0
  assert progress(goal, goal, goal) == 1 and progress(goal, start_, goal) == 0


def test_episodes_by_index():
  train, held = (records.open_episodes('names=todo+files,difficulty=1-2,size=50,seed=3', split)
                 for split in ('train', 'heldout'))
  questions = [{source[i]['messages'][0]['content'] for i in range(50)} for source in (train, held)]
  assert len(questions[0]) > 40 and not questions[0] & questions[1]
  assert train[4] == train[4] and train.fingerprint != held.fingerprint
  assert {train[i]['environment']['name'] for i in range(50)} == {'todo', 'files'}
  assert {train[i]['environment']['difficulty'] for i in range(50)} == {1, 2}
  with pytest.raises(IndexError):
    train[50]


@pytest.mark.parametrize('wrong, words', [
  (lambda: records.open_episodes('names=tudu'), "no environment .'tudu'.; there are: calculator"),
  (lambda: records.open_episodes('colour=red'), "episodes option 'colour=red'"),
  (lambda: records.open_episodes('difficulty=0-9'), 'difficulty from 1 to 5'),
  (lambda: make_record('todo', 1, 6), 'difficulty of an episode is 1 to 5, got 6'),
  (lambda: make_record('tudu', 1), "no environment 'tudu'"),
  (lambda: open_environment({'environment': {'name': 'tudu'}}), "no environment 'tudu'")])
def test_bad_settings_are_one_sentence(wrong, words):
  with pytest.raises(ValueError, match=words):
    wrong()
