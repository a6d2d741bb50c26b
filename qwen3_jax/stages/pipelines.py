"""From a config's list of names to the stages of a pipeline, with their options and models."""
import collections
import dataclasses
import functools

from qwen3_jax.data import duplicates
from qwen3_jax.stages import annotate, candidates, checklist, queries, records, rules, synthesis
from qwen3_jax.stages.curate import Stage

# Which stages ask a model: `config.<stage>.model` says which one, generator, judge or annotator.
ASKING = ('judge', 'solvable', 'annotate', 'candidates', 'pass_rate', 'synthesise', 'checklist')


def make_stages(config, specs, open_model):
  """The stages that `config.stages` names, `config.skip` left out.

  `specs` are {'generator': spec ...}, those absent None; `open_model(spec)` is called when a stage
  first needs the model. Raises ValueError for a name that does not exist, a stage without its model
  or without test files, all before any work.
  """
  unknown = [name for name in (*config.stages, *config.skip) if name not in MAKERS]
  if unknown:
    raise ValueError(f'no stage {unknown[0]!r}; there are: {", ".join(MAKERS)}')
  names = [name for name in config.stages if name not in config.skip]
  if names[:1] != ['read']:
    raise ValueError(f'the first stage is read, got {names}')
  models = {}
  for name in names:
    if name in ASKING and not (name == 'candidates' and config.read.solutions):
      role = config[name].model
      if role is None:  # a checklist may do with rules alone
        continue
      if not specs.get(role):
        raise ValueError(f'stage {name} needs a model: give --{role}=DIR or URL, or leave the '
                         f'stage out with --skip={name}')
      models[name] = specs[role]
  if 'decontaminate' in names and not config.decontaminate.tests:
    raise ValueError('stage decontaminate needs test files: give --tests=FILES, or leave the stage '
                     'out with --skip=decontaminate')
  return [_make(name, config, models.get(name), open_model) for name in names]


def _make(name, config, spec, open_model):
  make, sections = MAKERS[name]
  own = _plain(config[name]) if name in sections else {}
  batch = own.pop('batch', None)
  own.pop('model', None)
  options = {section: _plain(config[section]) for section in sections if section != name} | own
  if spec:
    own['model'] = functools.partial(open_model, spec)
    options['model'] = spec.rpartition('#')[2]  # a server may move, its model may not change
  if name in ('decontaminate', 'responses'):
    options['tests'] = records.Rows(config.decontaminate.tests).describe()
  return Stage(name, options=options, **make(config, own), **(dict(batch=batch) if batch else {}))


def _plain(section):
  return {key: _plain(value) if hasattr(value, 'items') else value
          for key, value in section.items()}


def _sampling(own, thinking=True):
  """The arguments with `sampling` as `respond` takes it: None, or the mode's with what is given."""
  given = {key: value for key, value in own['sampling'].items() if value is not None}
  if not given:
    return own | dict(sampling=None)
  from qwen3_jax.generation import sampling
  mode = sampling.THINKING if thinking else sampling.NON_THINKING
  return own | dict(sampling=dataclasses.replace(mode, **given))


# What a stage would refuse when it begins is refused here: before any work.

def _read(config, own):
  records.begin_reading(None, **own)
  return dict(begin=functools.partial(records.begin_reading, **own), raw=True, parallel=True)


def _verifiable(config, own):
  return dict(begin=rules.begin_verifying, parallel=True)


def _judge(config, own):
  return dict(begin=functools.partial(queries.begin_judging, **own))


def _solvable(config, own):
  return dict(begin=functools.partial(queries.begin_solving, **_sampling(own, thinking=False)))


def _annotate(config, own):
  return dict(begin=functools.partial(annotate.begin_annotating, **own))


def _balance(config, own):
  return dict(begin=functools.partial(queries.begin_balancing, **own),
              survey=functools.partial(queries.survey_domains, **own))


def _rules(config, own):
  return dict(parallel=True, begin=functools.partial(
    rules.begin_cleaning, repetitions=_plain(config.repetition), mixing=_plain(config.languages)))


def _deduplicate(config, own):
  duplicates.Deduplicator(**own)
  return dict(begin=functools.partial(rules.begin_deduplicating, **own))


def _decontaminate(config, own):
  collections.deque(rules.read_tests(own['tests']), 0)
  return dict(begin=functools.partial(rules.begin_decontaminating, **own), parallel=True)


def _candidates(config, own):
  return dict(begin=functools.partial(
    candidates.begin_candidates, **_sampling(own, own['enable_thinking'])))


def _responses(config, own):
  keep, thinking = own.pop('keep'), own.pop('thinking')
  thinks = config.candidates.enable_thinking  # who was not to think need not show how
  return dict(parallel=True, begin=functools.partial(
    _begin_responses, keep=keep, thinking=thinking and thinks and not config.read.solutions,
    repetitions=_plain(config.repetition), mixing=_plain(config.languages),
    guess=_plain(config.guess) if thinks else None, similar=_plain(config.similar),
    tests=tuple(config.decontaminate.tests)))


def _begin_responses(folder, keep, **options):
  return candidates.begin_responses(folder, rules.Faults(**options), keep)


def _checklist(config, own):
  return dict(begin=functools.partial(checklist.begin_checklist, **own))


def _pass_rate(config, own):
  return dict(begin=functools.partial(
    candidates.begin_pass_rate, **_sampling(own, own['enable_thinking'])))


def _band(config, own):
  records.Rows(own['used'])
  return dict(begin=functools.partial(candidates.begin_band, **own))


def _synthesise(config, own):
  return dict(begin=functools.partial(
    synthesis.begin_writing, **_sampling(own, own['enable_thinking'])))


# Each stage: what makes it, and the sections of the config that decide what it does.
MAKERS = dict(
  read=(_read, ('read',)), verifiable=(_verifiable, ()), judge=(_judge, ('judge',)),
  solvable=(_solvable, ('solvable',)), annotate=(_annotate, ('annotate',)),
  balance=(_balance, ('balance',)), rules=(_rules, ('repetition', 'languages')),
  deduplicate=(_deduplicate, ('deduplicate',)), decontaminate=(_decontaminate, ('decontaminate',)),
  candidates=(_candidates, ('candidates',)),
  responses=(_responses, ('responses', 'repetition', 'languages', 'guess', 'similar')),
  checklist=(_checklist, ('checklist',)), pass_rate=(_pass_rate, ('pass_rate',)),
  band=(_band, ('band',)),
  synthesise=(_synthesise, ('synthesise',)))
