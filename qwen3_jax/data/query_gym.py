"""Questions of reasoning-gym, an optional package, whose own check is the verifier."""
from qwen3_jax.data import tasks
from qwen3_jax.data.query import by
from qwen3_jax.rewards import gym

TRIES = 1000


def open_gym(options, split=None):
  """GymQueries from 'NAME,size=1000,seed=7'; ValueError as of `gym.open_entries`."""
  name, *rest = options.split(',')
  values = {'size': 100_000, 'seed': 0}
  for option in filter(None, rest):
    key, _, value = option.partition('=')
    if key not in values or not value.isdecimal():
      raise ValueError(f'gym option {option!r}: wanted size=N or seed=N')
    values[key] = int(value)
  if not gym.available():
    raise ValueError(f'gym:{name} needs: pip install reasoning-gym')
  return GymQueries(name, split=split, **values)


class GymQueries:
  """Records of one data set. A record names its entry, which the verifier makes again."""

  def __init__(self, kind, size, seed, split=None):
    self.kind, self.size, self.seed, self.split = kind, size, seed, split
    self.name = f'gym:{kind}:{split}' if split else f'gym:{kind}'
    self.fingerprint = f'gym {kind} {seed} {size}'
    self.entries = gym.open_entries(kind, seed, size * TRIES)

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    if not 0 <= i < self.size:
      raise IndexError(f'query {i} of {self.size}')
    for place in range(i, self.size * TRIES, self.size):
      question = self.entries[place]['question']
      if self.split is None or tasks.is_heldout(question) == (self.split == 'heldout'):
        return {'id': f'{self.name}/{self.seed}/{i}', 'source': f'gym:{self.kind}',
                'messages': [{'role': 'user', 'content': question}], 'verifiers': by('gym'),
                'gym': {'name': self.kind, 'seed': self.seed, 'size': self.size * TRIES,
                        'entry': place}}
    raise ValueError(f'{self.name} has no {self.split} questions at {i}; allow a larger size')
