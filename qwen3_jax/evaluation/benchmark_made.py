"""Benchmarks like those that the Qwen3 report names and does not publish, generated or from rows.

Section 4.7 of the report tells of ThinkFollow (turns with random /think and /no_think: is the last
one obeyed), LengthCtrl (how far an answer's length is from the wanted one), CounterFactQA (is it
noticed that a question rests on something false) and ToolUse (intent, format and arguments of
calls), and no question of them. These have the same aims and other questions, so their figures
compare models with each other, not with the report's.
"""
import json
import random

from qwen3_jax.data import queries, tasks
from qwen3_jax.data.problems import NAMES, THINGS, WORDS

PREMISE = ('Say whether this question rests on something that is not so. Put true or false within '
           '\\boxed{}: true if all that the question takes for granted is so, false if not.')
UNITS = {'words': (10, 300), 'sentences': (2, 12)}
FORMS = ('Write about {thing}', 'Tell a story of {name} and some {thing}', 'Describe a {word}',
         'Explain to {name} what a {word} is', 'Write a letter to {name} about {thing}')


def make_tasks(size=200, **options):
  """Generated problems (`data.tasks`), held out from training, each question once."""
  return _draw('tasks', size, options)


def make_tooluse(size=200, **options):
  """One call, several, or none because no tool fits: a third of each."""
  kinds = ('tools', 'tools_many', 'tools_none')
  shares = [size // 3 + (k < size % 3) for k in range(3)]
  return [record for kind, share in zip(kinds, shares) if share
          for record in _draw(kind, share, options)]


def _draw(kind, size, options):
  """Held-out records of `data.queries` with different questions; fewer where it repeats itself."""
  said = {'difficulty': '{0[0]}-{0[1]}', 'seed': '{}', 'kinds': '{}'}
  options = options | {'kinds': '+'.join(options['kinds'])} if 'kinds' in options else options
  spec = ','.join(f'{key}={said[key].format(value)}' for key, value in options.items())
  source, found = queries.open_queries(f'{kind}:{spec}', 'heldout'), {}
  for i in range(min(len(source), 20 * size)):
    record = source[i]
    record |= {'id': f'{kind}/{i}', 'group': record['source'], 'verifiers': {
      name: weight for name, weight in record['verifiers'].items() if name != 'mode'}}
    del record['enable_thinking']
    found.setdefault(json.dumps(record['messages']), record)
    if len(found) == size:
      break
  return list(found.values())


def make_thinkfollow(size=200, seed=0, **options):
  """Conversations of one and more turns with flags, half of them to end in each mode."""
  from qwen3_jax.evaluation import modes
  source = tasks.TaskSource(seed, split='heldout', **options)
  return [{'id': f'thinkfollow/{seed}/{i}', 'messages': messages, 'enable_thinking': True,
           'verifiers': {'mode': 1.0},
           'group': f'{"/think" if think else "/no_think"}, {place}'}
          for i, (messages, think, place) in enumerate(modes.flag_prompts(source, size, seed))]


def make_lengthctrl(size=200, seed=0):
  """So many words or sentences of a text about something."""
  made = []
  for i in range(size):
    rng = random.Random(f'lengthctrl {seed} {i}')
    unit = rng.choice(list(UNITS))
    low, high = UNITS[unit]
    asked = rng.choice(FORMS).format(name=rng.choice(NAMES), thing=rng.choice(THINGS),
                                     word=rng.choice(WORDS))
    target = round(low * (high / low) ** rng.random())
    made.append({'id': f'lengthctrl/{seed}/{i}'} | _limit(
      f'{asked} in exactly {target} {unit}.', target, unit))
  return made


def _limit(question, target, unit):
  return {'messages': [{'role': 'user', 'content': question}], 'verifiers': {'length': 1.0},
          'limit': {'unit': unit, 'min': target, 'max': target, 'slope': 1.0}, 'group': unit}


def make_counterfact(size=72, seed=0):
  """Questions that take a fact for granted, which is so in half of them; at most 72."""
  rng, made = random.Random(f'counterfact {seed}'), []
  for question, values in ASKED:
    others = rng.sample(values, len(values))
    for k, (name, value) in enumerate(others):
      made += [_premise(question.format(name, value), False),
               _premise(question.format(name, others[k - 1][1]), True)]
  order = sorted(range(0, len(made), 2), key=lambda _: rng.random())
  chosen = [k for pair in order for k in (pair, pair + 1)][:size]
  return [{'id': f'counterfact/{seed}/{k}'} | made[k] for k in chosen]


def _premise(question, counterfactual):
  return {'messages': [{'role': 'user', 'content': f'{PREMISE}\n\n{question}'}],
          'verifiers': {'math': 1.0}, 'kind': 'text', 'answer': str(not counterfactual).lower(),
          'group': 'false premise' if counterfactual else 'true premise'}


ASKED = (
  ('When did {1} become the capital of {0}?', (
    ('France', 'Paris'), ('Japan', 'Tokyo'), ('Kenya', 'Nairobi'), ('Peru', 'Lima'),
    ('Norway', 'Oslo'), ('Egypt', 'Cairo'), ('Cuba', 'Havana'), ('Thailand', 'Bangkok'))),
  ('Why do people in {0} pay with the {1}?', (
    ('Japan', 'yen'), ('India', 'rupee'), ('Switzerland', 'franc'), ('Poland', 'zloty'),
    ('Sweden', 'krona'), ('Brazil', 'real'))),
  ('How many years did it take {0} to write {1}?', (
    ('Cervantes', 'Don Quixote'), ('Melville', 'Moby-Dick'), ('Goethe', 'Faust'),
    ('Homer', 'the Odyssey'), ('Tolstoy', 'War and Peace'), ('Dante', 'the Divine Comedy'))),
  ('Why does the chemical symbol of {0} read {1}?', (
    ('gold', 'Au'), ('iron', 'Fe'), ('silver', 'Ag'), ('lead', 'Pb'), ('sodium', 'Na'),
    ('tungsten', 'W'))),
  ('What does a {0} need {1} legs for?', (
    ('spider', 'eight'), ('dog', 'four'), ('bee', 'six'), ('lobster', 'ten'), ('hen', 'two'))),
  ('Why does {0} lie in {1}?', (
    ('Mount Kilimanjaro', 'Africa'), ('the Amazon', 'South America'), ('Mongolia', 'Asia'),
    ('Portugal', 'Europe'), ('Canada', 'North America'))))


# Shapes of rows of one's own; see `benchmark_rows`.

def thinkfollow(row, path):
  """messages with /think or /no_think in them, the last one of the user."""
  from qwen3_jax.text.template import last_flag
  if row['messages'][-1]['role'] != 'user' or (flag := last_flag(row['messages'])) is None:
    raise ValueError('no flag in the messages, or they do not end with the user')
  return row | {'verifiers': {'mode': 1.0}, 'enable_thinking': True,
                'group': '/think' if flag else '/no_think'}


def lengthctrl(row, path):
  """prompt, target (a whole number) and unit: words, sentences or characters."""
  if row['unit'] not in ('words', 'sentences', 'characters') or type(row['target']) is not int:
    raise ValueError(f'target {row["target"]!r} {row["unit"]!r}')
  return {key: row[key] for key in ('id',) if key in row} | _limit(
    row['prompt'], row['target'], row['unit'])


def counterfact(row, path):
  """question, and counterfactual (true or false) or reference (what is false, for a judge)."""
  kept = {key: row[key] for key in ('id',) if key in row}
  if isinstance(row.get('counterfactual'), bool):
    return kept | _premise(row['question'], row['counterfactual'])
  return kept | {'question': row['question'], 'reference': row['reference']}


def tooluse(row, path):
  """messages, tools and expected_calls, or a row as BFCL has them."""
  from qwen3_jax.evaluation import benchmark_rows
  if 'function' in row:
    return benchmark_rows.bfcl(row, path)
  names = {tool.get('function', tool)['name'] for tool in row['tools']}
  if strange := {name for call in row['expected_calls'] for name in call} - names:
    raise ValueError(f'expected calls of {sorted(strange)}, which are no tools of the row')
  return row | {'verifiers': {'tools': 1.0}}
