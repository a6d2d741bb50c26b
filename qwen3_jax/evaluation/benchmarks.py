"""Benchmarks that the user has on disk: what each is, where its data are had, how it is asked.

`open_benchmark(name, folder)` gives a `Benchmark`: records to generate answers to (or to measure
likelihoods of, `likelihood`), the settings of the Qwen3 report, and `score`, which judges answers
by the verifiers of reinforcement learning. Data are never downloaded: `describe()` says where each
benchmark lies and under which licence.
"""
import collections
import dataclasses
import difflib
import statistics
from collections.abc import Callable
from pathlib import Path

from qwen3_jax.data import files
from qwen3_jax.evaluation import benchmark_rows as rows

TOKENS, AIME_TOKENS = 32_768, 38_912  # Qwen3 Technical Report, section 4.6


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the table: what is known of a benchmark before its files are opened."""
  title: str
  where: str  # an address and the licence, in words
  files: tuple[str, ...]  # patterns within the benchmark's own folder
  shape: Callable | None = None
  ask: str = ''  # what is said after each question
  metric: str = 'accuracy'
  scorings: tuple[str, ...] = ('generate',)
  samples: int = 1
  max_tokens: int = TOKENS
  modes: tuple[bool, ...] = (True, False)  # thinking
  folders: tuple[str, ...] = ()  # other names of its folder


TABLE = {
  'gsm8k': Entry(
    'Word problems of primary school (Cobbe et al. 2021), 1,319 questions',
    'https://github.com/openai/grade-school-math, data/test.jsonl; MIT',
    ('test*.jsonl*', '*/test-*.parquet', 'test-*.parquet'), rows.solved, rows.STEPS,
    folders=('grade_school_math',)),
}
NAMES = tuple(TABLE)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Records (as `data.queries` makes them, with a stable 'id') and the settings to ask them with.

  `scoring` is 'generate', 'choices' (log-probabilities of each choice) or 'perplexity'; `modes`
  are the values of enable_thinking that mean something; `samples` answers to each question.
  """
  name: str
  title: str
  records: tuple[dict, ...]
  scoring: str
  metric: str
  samples: int = 1
  max_tokens: int = TOKENS
  modes: tuple[bool, ...] = (True, False)
  rejected: dict = dataclasses.field(default_factory=dict)

  def sampling(self, thinking):
    """The report's Sampling in a mode: presence penalty 1.5 without thinking, none with it."""
    from qwen3_jax.generation import sampling
    usual = sampling.THINKING if thinking else sampling.NON_THINKING
    return dataclasses.replace(usual, max_tokens=self.max_tokens)


@dataclasses.dataclass(frozen=True)
class Score:
  """What an answer is worth: `value` from 0 to 1, None where the machinery failed (never zero).

  `details` are further metrics by name, each a number or a list of numbers (one for each
  instruction of a prompt, say): `summarise` takes the mean over all of them. `missing` says why.
  """
  value: float | None
  details: dict = dataclasses.field(default_factory=dict)
  missing: str | None = None


def open_benchmark(name, folder=None, limit=None, skip_bad=False, cache=None):
  """The Benchmark `name` (of NAMES; 'mmlu:choices' names the scoring too) from files on disk.

  `folder` holds the benchmark's own folder (`describe` names the files), or is that folder, or one
  file. All rows are read and checked; `limit` takes so many of them, evenly spaced. Raises
  ValueError for an unknown name or a row that is no question (with file and line; `skip_bad` leaves
  it out and counts it in `rejected`), FileNotFoundError where no file is, saying what was looked
  for and where it is had.
  """
  name, _, scoring = name.partition(':')
  entry = find(name)
  if scoring and scoring not in entry.scorings:
    raise ValueError(f'{name}:{scoring}: {name} is scored by {" or ".join(entry.scorings)}')
  paths = _find_files(name, entry, folder)
  records, rejected = rows.read(paths, entry.shape, name, entry.ask, skip_bad, cache)
  if not records:
    raise ValueError(f'{paths[0]}: there is no question of {name} in it')
  return Benchmark(name, entry.title, tuple(thin(records, limit)), scoring or entry.scorings[0],
                   entry.metric, entry.samples, entry.max_tokens, entry.modes, dict(rejected))


def find(name):
  """The Entry of a benchmark; ValueError with the nearest name."""
  if name not in TABLE:
    near = difflib.get_close_matches(name, TABLE, 1)
    hint = f'did you mean {near[0]!r}?' if near else f'there are: {", ".join(TABLE)}'
    raise ValueError(f'no benchmark {name!r}; {hint}')
  return TABLE[name]


def thin(records, limit):
  """`limit` records, evenly spaced: files are often sorted by subject."""
  if limit is None or limit >= len(records):
    return records
  if limit < 1:
    raise ValueError(f'the limit of questions is {limit}; want at least 1')
  return [records[i * len(records) // limit] for i in range(limit)]


def _find_files(name, entry, folder):
  if folder is None:
    raise FileNotFoundError(f'{name} needs its data; {_where(name, entry)}')
  root = Path(folder).expanduser()
  if root.is_file():
    return files.find(str(root))
  kinds = [f'{kind}{packed}' for kind in ('jsonl', 'json', 'parquet', 'csv', 'tsv')
           for packed in ('', '.gz', '.zst')]
  own = {name, *entry.folders}
  tried = [*(f'{each}/{pattern}' for each in sorted(own) for pattern in entry.files),
           *(entry.files if root.name in own else ()), *(f'{name}.{kind}' for kind in kinds)]
  for pattern in tried:
    try:
      return files.find(f'{root}/{pattern}')
    except FileNotFoundError:
      continue
  raise FileNotFoundError(f'{name}: no file {" or ".join(tried[:8])} in {root}; '
                          f'{_where(name, entry)}')


def _where(name, entry):
  return (f'get it from {entry.where}, and put it into a folder {name}/ there, or name the file '
          'itself')


def describe(name=None):
  """In words, for --help: what the benchmarks are, where they are had, how they are asked."""
  lines = []
  for each in [name] if name else TABLE:
    entry = find(each)
    lines += [f'{each}: {entry.title}', f'  from {entry.where}',
              f'  files {each}/{", ".join(entry.files)}; scored by {", ".join(entry.scorings)} '
              f'({entry.metric}); {entry.samples} '
              f'answer{"s" * (entry.samples > 1)} of at most {entry.max_tokens:,} tokens']
  return '\n'.join(lines)


def open_router(benchmarks, judge=None, mesh=None):
  """The Router that `score` needs; opens a sandbox or a judge only where a record asks for one.

  Raises RuntimeError where this machine has no sandbox.
  """
  from qwen3_jax.stages import scorers
  asked = {name for each in benchmarks for record in each.records for name in record['verifiers']}
  if 'judge' in asked and judge is None:
    raise ValueError('some records want a judge: name a model, a folder or an http address')
  return scorers.open_router(
    dict(code='code' in asked, judge=judge if 'judge' in asked else None), mesh)


def score(benchmark, records, responses, router):
  """A Score for each `rewards.response.Response` to each record, in order.

  The verifiers of reinforcement learning judge; what they cannot tell is missing.
  """
  found = []
  for each in router.score(records, responses):
    reasons = '; '.join(f'{name}: {reason}' for name, reason in each.missing.items())
    found.append(Score(each.reward, missing=reasons if each.reward is None else None))
  return found


def summarise(scores):
  """{'value': mean, further metrics: mean, 'missing': count} of Scores; None where none is left."""
  columns = collections.defaultdict(list)
  for each in scores:
    if each.value is not None:
      columns['value'].append(each.value)
      for name, value in each.details.items():
        columns[name] += value if isinstance(value, list) else [value]
  means = {name: statistics.fmean(values) for name, values in columns.items() if values}
  return {'value': None} | means | {'missing': sum(each.value is None for each in scores)}
