"""Questions that can be scored, by index: generated without end, or JSON lines.

| family | names of generators |
|---|---|
| reasoning | tasks (20 kinds), countdown, logic, sorting, strings, choice |
"""
import hashlib
import random

from qwen3_jax.data import query, query_puzzles, tasks

GENERATORS = {
  'countdown': query_puzzles.make_countdown, 'logic': query_puzzles.make_logic,
  'sorting': query_puzzles.make_sorting, 'strings': query_puzzles.make_strings,
  'choice': query_puzzles.make_choice, 'translate': query_puzzles.make_translate,
}
TRIES = 10_000


def open_queries(spec, split=None):
  """Records by index of 'NAME:difficulty=1-3,size=1000,seed=7,thinking=on' or of a path.

  NAME is one of GENERATORS or 'tasks' (with kinds=A+B, see `tasks.open_tasks`). `thinking` is on,
  off (the template closes the think block) or mixed. All options may be left out. `split` is
  'train', 'heldout' or None (all): no question of one is in the other, whatever their seeds. The
  source has a length, `[i]` (a fresh record), `query(i)`, `name` and `fingerprint`. Raises
  ValueError for options that mean nothing.
  """
  if split not in (None, 'train', 'heldout'):
    raise ValueError(f"split must be 'train', 'heldout' or None, got {split!r}")
  name, _, options = spec.partition(':')
  if name != 'tasks' and name not in GENERATORS:
    raise ValueError(f'no queries {spec!r}; there are: tasks, {", ".join(GENERATORS)}')
  thinking, rest = 'on', []
  for option in filter(None, options.split(',')):
    key, _, value = option.partition('=')
    if key != 'thinking':
      rest.append(option)
    elif value in ('on', 'off', 'mixed'):
      thinking = value
    else:
      raise ValueError(f'queries option {option!r}: wanted thinking=on, off or mixed')
  if name != 'tasks' and any(option.startswith('kinds') for option in rest):
    raise ValueError(f"queries {spec!r}: only 'tasks' has kinds")
  drawn = tasks.open_tasks(','.join(rest), split)
  return Queries(name, drawn, thinking)


class Queries:
  """Generated records; `drawn` (a TaskSource) has seed, size, difficulty and split."""

  def __init__(self, kind, drawn, thinking='on'):
    self.kind, self.drawn, self.thinking = kind, drawn, thinking
    self.name = f'{kind}:{drawn.split}' if drawn.split else kind
    kinds = drawn.fingerprint if kind == 'tasks' else f'{drawn.seed} {drawn.difficulty}'
    self.fingerprint = f'{kind} {kinds} thinking {thinking}'

  def __len__(self):
    return self.drawn.size

  def __getitem__(self, i):
    made, source, difficulty = self.draw(i)
    number = f'{self.name}/{self.drawn.seed}/{i}'
    return query.as_record(made, source, number, self.thinks(i)) | {'difficulty': difficulty}

  def answers(self, i):
    """The right and a wrong answer to query `i`, as assistant messages."""
    made = self.draw(i)[0]
    wanted = self.thinks(i) if made.thinks is None else made.thinks
    return query.answers(made, wanted)

  def thinks(self, i):
    if self.thinking != 'mixed':
      return self.thinking == 'on'
    key = f'{self.drawn.seed} {i} thinking'
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < 128

  def draw(self, i):
    """(Query, source, difficulty) number `i`."""
    if not 0 <= i < self.drawn.size:
      raise IndexError(f'query {i} of {self.drawn.size}')
    if self.kind == 'tasks':
      problem = self.drawn.task(i)
      return query_puzzles.from_task(problem), f'tasks:{problem.kind}', problem.difficulty
    split, rng = self.drawn.split, random.Random(f'{self.kind} {self.drawn.seed} {i}')
    for _ in range(TRIES):
      difficulty = rng.randint(*self.drawn.difficulty)
      made = GENERATORS[self.kind](rng, difficulty)
      if split is None or tasks.is_heldout(made.question) == (split == 'heldout'):
        return made, self.kind, difficulty
    raise ValueError(f'{self.kind} at difficulty {self.drawn.difficulty} has no {split} questions; '
                     'allow more difficulties')
