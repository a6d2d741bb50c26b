"""What the store says of a part: its rate with an interval, pass@k, maj@k, groups; and results."""
import collections
import math
from pathlib import Path

import numpy as np

from qwen3_jax.evaluation import benchmarks as catalogue
from qwen3_jax.evaluation import estimates, likelihood, store
from qwen3_jax.rewards import final

GROUPS = 100  # groups of records that are told apart


def summarise(ask, part):
  """What the store says of a part.

  {'benchmark', 'title', 'mode', 'budget', 'metric', 'rate', 'low', 'high', 'count' (problems),
  'samples', 'missing' (samples without a score), 'folder', 'details' (means of further metrics),
  'groups' ({group: an interval})} and, of what was generated, 'tokens' (mean), 'finished' (share),
  'forced' (share that a budget cut short), 'pass' and 'maj' ({k: an interval}).
  """
  benchmark, problems = ask.benchmark, collections.defaultdict(list)
  for key, (record, _) in ask.jobs.items():
    if 'score' in part.lines.get(key, ()):
      problems[record['id']].append(part.lines[key])
  lines = [line for each in problems.values() for line in each]
  about = dict(benchmark=benchmark.name, title=benchmark.title, mode=ask.mode, budget=ask.budget,
               metric=benchmark.metric, samples=ask.samples, folder=part.folder.name,
               missing=sum(line['score'] is None for line in lines))
  scored = {id: [line for line in each if line['score'] is not None]
            for id, each in problems.items()}
  scored = {id: each for id, each in scored.items() if each}
  if benchmark.scoring == 'perplexity':
    read = [each[0] for each in scored.values()]
    sums = {key: sum(line[key] for line in read) for key in ('nll', 'tokens', 'bytes')}
    return about | dict(details=likelihood.rates(**sums)) | estimates.ratio(
      [line['nll'] / math.log(2) for line in read], [line['bytes'] for line in read])
  values = {id: sum(line['score'] for line in each) / len(each) for id, each in scored.items()}
  about |= estimates.interval(list(values.values()), ask.samples)
  about |= dict(details=_average(scored)) | _by_group(benchmark, values, ask.samples)
  if ask.sampling and lines:
    about |= dict(
      tokens=float(np.mean([line['tokens'] for line in lines])),
      finished=float(np.mean([line['finish'] == 'stop' for line in lines])),
      forced=float(np.mean([line.get('forced', 0) > 0 for line in lines])),
      **_estimate(scored, ask.samples))
  return about


def _average(scored):
  """Means of the further metrics of a benchmark."""
  means = catalogue.summarise([catalogue.Score(line['score'], line['details'])
                               for each in scored.values() for line in each])
  return {name: value for name, value in means.items()
          if name not in ('value', 'missing', 'groups')}


def _estimate(scored, samples):
  """pass@k and maj@k of the problems that have all their samples scored."""
  whole = [each for each in scored.values() if len(each) == samples]
  if samples == 1 or not whole:
    return {}
  marks = [[line['score'] for line in each] for each in whole]
  voted = [_group(each) for each in whole]
  ks = estimates.powers(samples)
  found = {'pass': {str(k): estimates.interval(
    [estimates.pass_at(each, k) for each in marks], samples // k) for k in ks}}
  if any(answer is not None for each in voted for answer in each):
    found['maj'] = {str(k): estimates.interval(
      [estimates.maj_at(*each, k) for each in zip(voted, marks)], samples // k) for k in ks}
  return found


def _group(lines):
  """Answers as group numbers: all right ones are the same, wrong ones where they are equal."""
  said = [True if line['score'] == 1 and line['answer'] is not None else line['answer']
          for line in lines]
  return estimates.group(said, lambda a, b: True not in (a, b) and final.agree(a, b))


def _by_group(benchmark, values, samples):
  groups = collections.defaultdict(list)
  for record in benchmark.records:
    if record['id'] in values and record.get('group') is not None:
      groups[str(record['group'])].append(values[record['id']])
  if not 1 < len(groups) <= GROUPS:
    return {}
  return dict(groups={name: estimates.interval(each, samples)
                      for name, each in sorted(groups.items())})


def keep(result, to):
  """Writes a result below `to`/results; parts of the same model that are there already stay.

  Of two parts of one benchmark, mode and budget the new one counts. Returns the whole.
  """
  folder = Path(to) / 'results'
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{result["fingerprint"]}-{store.digest(result["model"], size=4)}.json'
  before = store.read_json(path)['parts'] if path.exists() else []
  name = lambda part: (part['benchmark'], part['mode'], part['budget'])
  parts = {name(part): part for part in [*before, *result['parts']]}
  whole = result | dict(parts=list(parts.values()))
  store.write_json(path, whole)
  return whole


def read_results(to):
  """[(path, result)] of the models below `to`, by name; FileNotFoundError where there is none."""
  paths = (Path(to) / 'results').glob('*.json')
  found = sorted(((path, store.read_json(path)) for path in paths),
                 key=lambda pair: (pair[1]['model'], pair[0].name))
  if not found:
    raise FileNotFoundError(f'no results in {to}: evaluate a model with --to={to} first')
  return found
