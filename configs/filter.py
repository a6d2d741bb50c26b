"""Pipelines that make training data; with `,tiny` for the tiny model and generated tasks."""
import inspect

from ml_collections import ConfigDict

from qwen3_jax.data import decontaminate, duplicates, filters
from qwen3_jax.stages import annotate, synthesis
from qwen3_jax.text import languages, repetition

STAGES = dict(
  cold_start=('read', 'verifiable', 'deduplicate', 'decontaminate', 'judge', 'solvable', 'annotate',
              'balance', 'candidates', 'responses'),
  rl=('read', 'verifiable', 'deduplicate', 'decontaminate', 'pass_rate', 'band'),
  text=('read', 'rules', 'deduplicate', 'decontaminate'),
  chat=('read', 'rules', 'deduplicate', 'decontaminate'),
  plain=('read', 'checklist', 'rules', 'deduplicate', 'decontaminate'),
  rejection=('read', 'candidates', 'responses', 'decontaminate'),
  synthetic=('read', 'synthesise', 'rules', 'deduplicate', 'decontaminate', 'annotate'))
KINDS = dict(cold_start='query', rl='query', text='text', chat='chat', plain='chat',
             rejection='query', synthetic='any')


def defaults(rule):
  """The thresholds of a rule as its own signature has them; its docstring says what they are."""
  return {name: parameter.default for name, parameter in inspect.signature(rule).parameters.items()
          if isinstance(parameter.default, (int, float, tuple, type(None)))
          and name != 'boilerplate'}


def get_config(arg):
  """The pipeline that `arg` names. Thresholds are ours: Qwen published the rules, not the numbers.

  The exception is decontamination: 13 tokens and 0.6 of the shorter text (Qwen2 report, 3.1).
  """
  arg, *options = arg.split(',') if arg else ['cold_start']
  if arg not in STAGES or options not in ([], ['tiny']):
    given = ','.join([arg, *options])
    raise ValueError(f'config argument {given!r}: want {", ".join(STAGES)}, and perhaps ,tiny')
  prompt = '{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}.'
  # None: a model in memory uses the Qwen3 report's settings of the mode, an endpoint its own.
  sampling = dict(temperature=None, top_k=None, top_p=None, min_p=None, presence_penalty=None,
                  max_tokens=None, seed=None)
  config = ConfigDict(dict(
    stages=STAGES[arg], skip=(), workers=None, patience=64,
    engine=dict(rows=64, thinking_budget=None),
    endpoint=dict(workers=16, tries=5, wait=1.0, timeout=600.0),
    read=dict(kind=KINDS[arg], solutions=False),
    judge=dict(model='judge', tries=3, batch=64),
    solvable=dict(model='judge', tries=4, right=1, prompt=prompt, sampling=dict(sampling),
                  batch=64),
    annotate=dict(model='annotator', characters=4000, tries=3, least_education=None,
                  safe_only=arg == 'synthetic', batch=64, domains=annotate.DOMAINS),
    checklist=dict(model='judge', least=0.8, tries=3, batch=64),
    balance=dict(cap=20_000, seed=0, field='domain'),
    candidates=dict(model='generator', n=4, prompt=prompt, sampling=dict(sampling),
                    enable_thinking=True, batch=64),
    responses=dict(thinking=True, keep=None),
    pass_rate=dict(model='generator', n=16, prompt=prompt, sampling=dict(sampling),
                   enable_thinking=True, batch=64),
    band=dict(low=0.0, high=1.0, used=()),
    synthesise=dict(model='generator', kinds=tuple(synthesis.TEMPLATES),
                    characters=3000, sampling=dict(sampling), enable_thinking=True, batch=64),
    repetition=defaults(repetition.find_repetition),
    # A document may quote other languages at length, an answer has no reason to.
    languages=defaults(languages.find_mixing) | (dict(share=0.3) if arg == 'text' else {}),
    guess=defaults(filters.find_guess),
    similar=defaults(filters.find_similar) | defaults(filters.Similar),
    # Short questions that differ in their numbers are two questions.
    deduplicate=defaults(duplicates.Deduplicator) | (
      dict(threshold=0.9) if KINDS[arg] == 'query' else {}),
    decontaminate=dict(tests=()) | defaults(decontaminate.Index)),
    type_safe=False)
  if options:
    _shrink(config, arg)
  return config


def _shrink(config, name):
  """For generated tasks: their steps are the cold start's candidates, and rules judge the rest."""
  config.skip = ('judge', 'solvable', 'annotate', 'decontaminate')
  config.read.solutions = name == 'cold_start'
  config.checklist.model = None
  config.deduplicate.threshold = 1.0  # such questions are alike by nature
  config.guess.least = 3
  config.candidates.n = 1
  for section in (config.solvable, config.candidates, config.pass_rate):
    section.prompt = '{question}'
    section.sampling.update(dict(temperature=0.6, top_k=20, top_p=0.95, max_tokens=160))
