"""Records of episodes: questions made from a seed, their worked solutions, and who plays them.

An environment's module has `make(rng, difficulty)` -> (question, settings, plan): a plan is a list
of (reasoning, calls), and (reasoning, words) as the last turn.
"""
import random

from qwen3_jax.data.tasks import is_heldout, read_options
from qwen3_jax.environments import calculator, files, python, store, todo

ENVIRONMENTS = {
  'calculator': (calculator.Calculator, calculator.make), 'python': (python.Python, python.make),
  'store': (store.Store, store.make), 'todo': (todo.Todo, todo.make),
  'files': (files.Files, files.make)}


def open_environment(record):
  """The Environment that record['environment'] names, not yet reset; ValueError where none is."""
  name = record['environment'].get('name')
  if name not in ENVIRONMENTS:
    raise ValueError(f'no environment {name!r}; there are: {", ".join(ENVIRONMENTS)}')
  return ENVIRONMENTS[name][0]()


def make_record(name, seed, difficulty=1):
  """The record of an episode in environment `name`; difficulty is 1 to 5."""
  question, settings, _ = _make(name, seed, difficulty)
  return {
    'messages': [{'role': 'user', 'content': question}], 'source': f'environment:{name}',
    'id': f'{name}/{seed}/{difficulty}', 'tools': list(ENVIRONMENTS[name][0].tools),
    'verifiers': {'environment': 1.0},
    'environment': {'name': name, 'seed': seed, 'difficulty': difficulty, **settings}}


def solve(record):
  """The assistant messages that reach the goal of a record of `make_record`, with reasoning."""
  settings = record['environment']
  *turns, (reasoning, words) = _make(settings['name'], settings['seed'], settings['difficulty'])[2]
  messages = [{'role': 'assistant', 'reasoning_content': reasoning, 'content': '',
               'tool_calls': calls} for reasoning, calls in turns]
  return [*messages, {'role': 'assistant', 'reasoning_content': reasoning, 'content': words,
                      'tool_calls': []}]


def demonstrate(record, thinking=True):
  """The solved episode as a conversation to train on: the solution among what the tools answer.

  `thinking=False` leaves the reasoning out; the template then makes an example of each turn.
  """
  environment, messages = open_environment(record), list(record['messages'])
  environment.reset(record)
  for message in solve(record):
    turn = environment.step(message)
    kept = {key: value for key, value in message.items()
            if value and (thinking or key != 'reasoning_content')}
    messages += [{'content': '', **kept}, *turn.messages]
  return {'messages': messages, 'tools': record['tools'], 'id': record['id'],
          'domain': record['source'], 'enable_thinking': thinking}


def _make(name, seed, difficulty):
  if name not in ENVIRONMENTS:
    raise ValueError(f'no environment {name!r}; there are: {", ".join(ENVIRONMENTS)}')
  if difficulty not in range(1, 6):
    raise ValueError(f'the difficulty of an episode is 1 to 5, got {difficulty!r}')
  return ENVIRONMENTS[name][1](random.Random(f'{name} {seed} {difficulty}'), difficulty)


class Episodes:
  """Records of `names` by index, without end; no question of one split is in the other."""

  def __init__(self, names=None, seed=0, size=1_000_000, difficulty=(1, 5), split=None):
    self.names, (low, high) = tuple(names or ENVIRONMENTS), difficulty
    if unknown := set(self.names) - set(ENVIRONMENTS):
      raise ValueError(f'no environment {sorted(unknown)}; there are: {", ".join(ENVIRONMENTS)}')
    if not (1 <= low <= high <= 5 and size > 0):
      raise ValueError(f'episodes need a positive size and a difficulty from 1 to 5, got size '
                       f'{size}, difficulty {difficulty}')
    self.seed, self.size, self.difficulty, self.split = seed, size, (low, high), split
    self.name = f'episodes:{split}' if split else 'episodes'
    self.fingerprint = f'{self.name} {seed} {size} {",".join(self.names)} {low}-{high}'

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    if not 0 <= i < self.size:
      raise IndexError(f'episode {i} of {self.size}')
    rng = random.Random(f'{self.seed} {i}')
    while True:
      record = make_record(rng.choice(self.names), rng.getrandbits(48),
                           rng.randint(*self.difficulty))
      held = is_heldout(record['messages'][0]['content'])
      if self.split is None or held == (self.split == 'heldout'):
        return record


def open_episodes(options, split=None):
  """Episodes from 'names=todo+files,difficulty=1-3,size=1000,seed=7'; all may be left out."""
  return Episodes(**read_options(options, 'episodes', 'names'), split=split)
