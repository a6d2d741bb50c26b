"""The verdicts of reasoning-gym, of those of its sets that execute nothing a model wrote."""
import functools
import importlib.util
import inspect
import re
import sys

from qwen3_jax.rewards import answers
from qwen3_jax.rewards.response import Unscored

RIGHT = 0.99  # some sets give a wrong answer a little
NONSENSE = 'certainly no answer'
_EXECUTES = re.compile(r'\b(?:eval|exec|parse_expr|sympify)\s*\(')


def verify(record, response):
  """1 where the data set calls the final answer, or the whole content, right; else 0.

  record['gym'] is {'name', 'seed', 'size', 'entry'}, from which the question is made again. Raises
  Unscored where the package is not installed.
  """
  if not available():
    raise Unscored('reasoning-gym is not installed: pip install reasoning-gym')
  name, seed, size, place = (record['gym'][key] for key in ('name', 'seed', 'size', 'entry'))
  entries = open_entries(name, seed, size)
  given = {answers.extract(response.content) or '', response.content.strip()}
  return float(any(_score(entries, answer, entries[place]) >= RIGHT for answer in given))


def _score(entries, answer, entry):
  try:
    return entries.score_answer(answer, entry)
  except Exception:  # the sets raise whatever comes on answers that they cannot read
    return 0.0


def available():
  return importlib.util.find_spec('reasoning_gym') is not None


@functools.lru_cache(64)
def open_entries(name, seed, size):
  """The data set `name`; ValueError where there is none or its verdicts cannot be trusted.

  Refused are sets whose source evaluates expressions (answers are hostile), that call nonsense
  right, or their own answer wrong.
  """
  import reasoning_gym
  from reasoning_gym.factory import DATASETS
  if name not in DATASETS:
    raise ValueError(f'reasoning-gym has no {name!r}; it has {", ".join(sorted(DATASETS))}')
  if _EXECUTES.search(inspect.getsource(sys.modules[DATASETS[name][0].__module__])):
    raise ValueError(f'reasoning-gym evaluates answers to {name!r} as code; take another set')
  try:
    entries = reasoning_gym.create_dataset(name, seed=seed, size=size)
    entry = entries[0]
  except (AssertionError, ValueError) as error:
    raise ValueError(f'reasoning-gym cannot make {name!r} of size {size}: {error}') from error
  if _score(entries, NONSENSE, entry) >= RIGHT:
    raise ValueError(f'reasoning-gym calls any answer to {name!r} right; take another set')
  if entry['answer'] is not None and _score(entries, str(entry['answer']), entry) < RIGHT:
    raise ValueError(f'reasoning-gym calls its own answer to {name!r} wrong; take another set')
  return entries
