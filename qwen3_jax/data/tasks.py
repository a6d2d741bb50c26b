"""Short verifiable problems, worked step by step, right by construction, without end.

`task(kind, seed, difficulty)` is one problem; `as_text` makes a training document of it; `check`
judges any answer. Everything is a pure function of its arguments.
"""

import dataclasses
import hashlib
import random

from qwen3_jax.data.problems import KINDS
from qwen3_jax.rewards import final

HELDOUT = 1 / 16  # share of all questions, by hash, that no training source contains


@dataclasses.dataclass(frozen=True)
class Task:
  """`question` in English, `steps` that solve it, and the one right `answer` as text."""
  kind: str
  seed: int
  difficulty: int
  question: str
  steps: tuple[str, ...]
  answer: str


def task(kind, seed, difficulty=1):
  """The problem of `kind` (one of KINDS) that `seed` gives at `difficulty` 1 to 5."""
  if kind not in KINDS:
    raise ValueError(f'no kind of task {kind!r}; there are: {", ".join(KINDS)}')
  if difficulty not in range(1, 6):
    raise ValueError(f'the difficulty of a task is 1 to 5, got {difficulty!r}')
  rng = random.Random(f'{kind} {seed} {difficulty}')
  question, steps, answer = KINDS[kind](rng, difficulty)
  return Task(kind, seed, difficulty, question, tuple(steps), str(answer))


def as_text(problem):
  """The problem, its steps and its answer as one training document."""
  return '\n'.join([f'Question: {problem.question}', *problem.steps, f'Answer: {problem.answer}'])


def is_heldout(question):
  """Whether a question belongs to the held-out part: a hash of its text, the same for all seeds."""
  return hashlib.blake2b(question.encode(), digest_size=2).digest() < b'\x10\x00'


def check(problem, text):
  """Whether `text`, an answer or a whole solution, ends in the right answer.

  Judged is the last \\boxed{...}, else what follows the last 'answer:' or 'answer is', else the
  last line. Numbers are compared by value (1,024 = 1024 = 1024.0), lists by element, else the words
  without regard to case, quotes and a final full stop.
  """
  return final.agree(text, problem.answer)


class TaskSource:
  """Documents of generated tasks by index; `tasks[i]` is the Task, `source[i]` its text.

  No question of a held-out source is in any training source, whatever their seeds: a question is
  held out by its hash, and each index is drawn again until it falls on its own side.
  """

  def __init__(self, seed=0, size=1_000_000, kinds=None, difficulty=(1, 5), split=None):
    low, high = difficulty
    if not (1 <= low <= high <= 5 and size > 0):
      raise ValueError(f'tasks need a positive size and a difficulty from 1 to 5, got size {size}, '
                       f'difficulty {difficulty}')
    self.kinds = tuple(kinds or KINDS)
    if unknown := set(self.kinds) - set(KINDS):
      raise ValueError(f'no kind of task {sorted(unknown)}; there are: {", ".join(KINDS)}')
    self.seed, self.size, self.difficulty, self.split = seed, size, (low, high), split
    self.name = f'tasks:{split}' if split else 'tasks'
    self.fingerprint = f'{seed} {",".join(self.kinds)} {low}-{high}'

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    return as_text(self.task(i))

  def task(self, i):
    """Task number `i`."""
    if not 0 <= i < self.size:
      raise IndexError(f'task {i} of {self.size}')
    rng = random.Random(f'{self.seed} {i}')
    for _ in range(10_000):
      made = task(rng.choice(self.kinds), rng.getrandbits(48), rng.randint(*self.difficulty))
      if self.split is None or is_heldout(made.question) == (self.split == 'heldout'):
        return made
    raise ValueError(f'tasks of {self.kinds} at difficulty {self.difficulty} have no {self.split} '
                     'questions; allow more kinds or difficulties')


def open_tasks(options, split=None):
  """TaskSource from 'kinds=add+sort,difficulty=1-3,size=1000,seed=7'; all may be left out."""
  return TaskSource(**read_options(options, 'tasks', 'kinds'), split=split)


def read_options(options, source, names):
  """The values in 'NAMES=A+B,difficulty=1-3,size=1000,seed=7', of which all may be left out.

  `names` is the word for NAMES; ValueError calls it an option of `source`.
  """
  values = {}
  for option in filter(None, options.split(',')):
    key, _, value = option.partition('=')
    try:
      if key == names:
        values[key] = value.split('+')
      elif key == 'difficulty':
        low, _, high = value.partition('-')
        values[key] = int(low), int(high or low)
      elif key in ('size', 'seed'):
        values[key] = int(value)
      else:
        raise ValueError
    except ValueError:
      raise ValueError(f'{source} option {option!r}: wanted {names}=A+B, difficulty=1-5, size=N or '
                       'seed=N, separated by commas') from None
  return values
