"""Questions that can be scored, by index: generated without end, or JSON lines.

| family | names | verifiers |
|---|---|---|
| reasoning | tasks (20 kinds), countdown, logic, sorting, strings, choice, gym | math, gym |
| | code | code |
| instructions | rule (one of IFEval's 25), rules (up to three) | instructions |
| | length | length |
| format | mode (flags, several turns) | mode, math |
| | json | schema |
| preference | judged (with a reference) | judge |
| | open | preference, repetition |
| agent | tools (one call), tools_many, tools_none | tools |
| | episodes (`environments.records`, opened by the stages) | environment |
| specialised | rag, rag_none | citations |
| | translate | math |
| | language | instructions, language |
"""
import difflib
import hashlib
import random

from qwen3_jax.data import query, query_agent, query_code, query_files, query_form, query_gym, tasks
from qwen3_jax.data import query_puzzles as puzzles
from qwen3_jax.data import query_rules as rules

GENERATORS = {
  'countdown': puzzles.make_countdown, 'logic': puzzles.make_logic,
  'sorting': puzzles.make_sorting, 'strings': puzzles.make_strings,
  'choice': puzzles.make_choice, 'code': query_code.make_code,
  'rule': rules.make_rule, 'rules': rules.make_rules,
  'length': query_form.make_length, 'mode': query_form.make_mode, 'json': query_form.make_json,
  'judged': query_form.make_judged, 'open': query_form.make_open, 'tools': query_agent.make_tools,
  'tools_many': query_agent.make_tools_many, 'tools_none': query_agent.make_tools_none,
  'rag': query_agent.make_rag, 'rag_none': query_agent.make_rag_none,
  'translate': puzzles.make_translate, 'language': query_form.make_language}
TRIES = 10_000


def open_queries(spec, split=None, heldout=None, cache=None, skip_bad=False):
  """Records by index of 'NAME:difficulty=1-3,size=1000,seed=7,thinking=on' or of JSON lines.

  NAME is one of GENERATORS, 'tasks' (which has kinds=A+B too, see `tasks.open_tasks`) or 'gym:SET'
  (`query_gym`). `thinking` is on, off (the template closes the think block) or mixed. All options
  may be left out. Anything else is a path, folder or glob of JSON lines (`query_files`, for which
  the other arguments are). `split` is 'train', 'heldout' or None (all): no question of one is in
  the other, whatever their seeds. The source has a length, `[i]` (a fresh record), `name` and
  `fingerprint`; a generated one also `answers(i)`. Raises ValueError for options that mean nothing,
  FileNotFoundError for a path that is not there.
  """
  if split not in (None, 'train', 'heldout'):
    raise ValueError(f"split must be 'train', 'heldout' or None, got {split!r}")
  name, _, options = spec.partition(':')
  if name == 'gym':
    return query_gym.open_gym(options, split)
  if name == 'tasks' or name in GENERATORS:
    return _open_generated(name, options, split)
  if '/' in spec or '.' in spec or '*' in spec:
    return query_files.read(spec, split, heldout, cache, skip_bad)
  known = ['tasks', 'gym', *GENERATORS]
  near = difflib.get_close_matches(name, known, 1)
  hint = f'did you mean {near[0]!r}?' if near else f'there are: {", ".join(known)}, or a path'
  raise ValueError(f'no queries {spec!r}; {hint}')


def _open_generated(name, options, split):
  thinking, rest = 'on', []
  for option in filter(None, options.split(',')):
    key, _, value = option.partition('=')
    if key == 'thinking' and value in ('on', 'off', 'mixed'):
      thinking = value
    elif key == 'thinking' or key == 'kinds' and name != 'tasks':
      raise ValueError(f'{name} option {option!r}: wanted difficulty=1-5, size=N, seed=N or '
                       'thinking=on, off or mixed, separated by commas')
    else:
      rest.append(option)
  return Queries(name, tasks.open_tasks(','.join(rest), split), thinking)


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
    return query.answers(made, self.thinks(i))

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
      return puzzles.from_task(problem), f'tasks:{problem.kind}', problem.difficulty
    split, rng = self.drawn.split, random.Random(f'{self.kind} {self.drawn.seed} {i}')
    for _ in range(TRIES):
      difficulty = rng.randint(*self.drawn.difficulty)
      made = GENERATORS[self.kind](rng, difficulty)
      if split is None or tasks.is_heldout(made.question) == (split == 'heldout'):
        return made, self.kind, difficulty
    raise ValueError(f'{self.kind} at difficulty {self.drawn.difficulty} has no {split} questions; '
                     'allow more difficulties')
