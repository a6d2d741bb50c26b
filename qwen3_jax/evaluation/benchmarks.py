"""Benchmarks that the user has on disk: what each is, where its data are had, how it is asked.

`open_benchmark(name, folder)` gives a `Benchmark`: records to generate answers to (or to measure
likelihoods of, `likelihood`), the settings of the Qwen3 report, and `score`, which judges answers
by the verifiers of reinforcement learning. Data are never downloaded: `describe()` says where each
benchmark lies and under which licence.
"""
import collections
import contextlib
import dataclasses
import difflib
import fnmatch
import glob
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from qwen3_jax.data import files, sources, tasks
from qwen3_jax.evaluation import benchmark_made as made
from qwen3_jax.evaluation import benchmark_rows as rows
from qwen3_jax.rewards import instructions

TOKENS, AIME_TOKENS = 32_768, 38_912  # Qwen3 Technical Report, section 4.6
HF = 'https://huggingface.co/datasets/'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the table: what is known of a benchmark before its files are opened.

  `files` are patterns below the folder of all data; `shape` reads a row; `make` generates records
  from `options` where no file is given.
  """
  title: str
  where: str  # an address and the licence, in words
  files: tuple[str, ...] = ()
  shape: Callable | None = None
  ask: str = ''  # what is said after each question
  metric: str = 'accuracy'
  scorings: tuple[str, ...] = ('generate',)
  samples: int = 1
  max_tokens: int = TOKENS
  modes: tuple[bool, ...] = (True, False)  # thinking
  make: Callable | None = None
  options: tuple[str, ...] = ('size', 'seed')
  only: str = ''  # what names of files have in them


_CHOICES = dict(shape=rows.choice, ask=rows.LETTER, scorings=('generate', 'choices', 'texts'))
_MADE = 'generated here, without end, if no file is given'
TABLE = {
  'gsm8k': Entry(
    'Word problems of primary school (Cobbe et al. 2021), 1,319 questions',
    'https://github.com/openai/grade-school-math (data/test.jsonl); MIT',
    ('gsm8k/test*.jsonl*', 'gsm8k/main/test-*.parquet', 'grade_school_math/data/test.jsonl'),
    rows.solved, rows.STEPS),
  'math': Entry(
    'Competition mathematics (Hendrycks et al. 2021), 5,000 questions',
    'https://github.com/hendrycks/math (MATH.tar); MIT',
    ('math/test*.jsonl*', 'math/test/**/*.json', 'MATH/test/**/*.json',
     'math/**/test-*.parquet'), rows.solved, rows.STEPS),
  'math500': Entry(
    '500 questions of MATH (Lightman et al. 2023)',
    f'{HF}HuggingFaceH4/MATH-500 (test.jsonl); MIT',
    ('math500/*.jsonl*', 'MATH-500/*.jsonl*', 'math/math500*.jsonl*'), rows.solved, rows.STEPS),
  'aime24': Entry(
    'American Invitational Mathematics Examination 2024, both papers, 30 questions',
    f'{HF}HuggingFaceH4/aime_2024; problems of the MAA, for research',
    ('aime24/*', 'aime_2024/**/*.parquet', 'aime/*2024*.json*'), rows.aime, rows.STEPS,
    'mean accuracy of 64 answers', samples=64, max_tokens=AIME_TOKENS),
  'aime25': Entry(
    'American Invitational Mathematics Examination 2025, both papers, 30 questions',
    f'{HF}opencompass/AIME2025; problems of the MAA, for research',
    ('aime25/*', 'AIME2025/*.jsonl', 'aime/*2025*.json*'), rows.aime, rows.STEPS,
    'mean accuracy of 64 answers', samples=64, max_tokens=AIME_TOKENS),
  'svamp': Entry(
    'Word problems with varied stories (Patel et al. 2021), 1,000 questions',
    'https://github.com/arkilpatel/SVAMP (SVAMP.json); MIT', ('svamp/*.json*', 'SVAMP.json'),
    rows.svamp, rows.STEPS),
  'cmath': Entry(
    'Chinese word problems of primary school, by grade (Wei et al. 2023), 1,098 questions',
    f'{HF}weitianwen/cmath (cmath_test.jsonl); CC-BY-4.0', ('cmath/*test*.jsonl*',
                                                            'cmath/*.jsonl*'),
    rows.solved, rows.STEPS),
  'mgsm': Entry(
    'GSM8K in eleven languages (Shi et al. 2022), 250 questions each, the same as in GSM8K',
    'https://github.com/google-research/url-nlp (mgsm/mgsm_*.tsv); CC-BY-4.0',
    ('mgsm/mgsm_*.tsv', 'mgsm/*.jsonl*'), rows.mgsm, rows.STEPS),
  'mmlu': Entry(
    'Multiple choice in 57 subjects (Hendrycks et al. 2021), 14,042 questions',
    f'https://github.com/hendrycks/test (test/*_test.csv), or {HF}cais/mmlu; MIT',
    ('mmlu/test/*_test.csv', 'mmlu/all/test-*.parquet', 'mmlu/test*.jsonl*', 'mmlu/*.jsonl*'),
    **_CHOICES),
  'mmlu_redux': Entry(
    'Questions of MMLU without those found to be wrong (Gema et al. 2024), about 5,700',
    f'{HF}edinburgh-dawg/mmlu-redux-2.0; CC-BY-4.0',
    ('mmlu_redux/**/*.parquet', 'mmlu_redux/*.jsonl*'), **_CHOICES),
  'mmlu_pro': Entry(
    'Harder questions with up to ten choices (Wang et al. 2024), 12,032 questions',
    f'{HF}TIGER-Lab/MMLU-Pro; MIT', ('mmlu_pro/**/test-*.parquet', 'mmlu_pro/*.jsonl*'),
    **_CHOICES),
  'arc': Entry(
    'Science questions of schools (Clark et al. 2018), 1,172 hard ones',
    f'{HF}allenai/ai2_arc (ARC-Challenge); CC-BY-SA-4.0',
    ('arc/*Test.jsonl', 'arc/*.jsonl*', 'ARC-Challenge/*Test.jsonl', 'ARC-Challenge/test-*.parquet',
     'arc/ARC-Challenge/test-*.parquet'), **_CHOICES),
  'gpqa': Entry(
    'Questions that experts of another field cannot look up (Rein et al. 2023), 198 of Diamond',
    'https://github.com/idavidrein/gpqa (gpqa_diamond.csv); CC-BY-4.0, not to be published in '
    'plain text', ('gpqa/*diamond*.csv', 'gpqa_diamond.csv', 'gpqa/*.jsonl*'), rows.gpqa,
    rows.LETTER, 'mean accuracy of 10 answers', ('generate', 'choices', 'texts'), samples=10),
  'arc_agi': Entry(
    'Puzzles of grids (Chollet 2019), 400 for training and 400 for evaluation',
    'https://github.com/fchollet/ARC-AGI (data/evaluation/*.json); Apache-2.0',
    ('arc_agi/evaluation/*.json', 'arc_agi*/*.jsonl*'), rows.arc_agi,
    'What is its output? Answer with the grid alone, as a JSON list of lists.'),
  'humaneval': Entry(
    'Python functions to complete (Chen et al. 2021), 164',
    'https://github.com/openai/human-eval (data/HumanEval.jsonl.gz); MIT',
    ('humaneval/*.jsonl*', 'HumanEval.jsonl*', 'human-eval/data/*.jsonl*'), rows.humaneval,
    metric='pass@1'),
  'mbpp': Entry(
    'Short Python programs (Austin et al. 2021), 500 for testing',
    'https://github.com/google-research/google-research (mbpp/mbpp.jsonl); CC-BY-4.0',
    ('mbpp/test*.jsonl*', 'mbpp/mbpp.jsonl', 'mbpp/*mbpp.json*', 'mbpp/full/test-*.parquet'),
    rows.mbpp, metric='pass@1'),
  'ifeval': Entry(
    'Instructions that a rule can check (Zhou et al. 2023), 541 prompts',
    'https://github.com/google-research/google-research (instruction_following_eval/data/'
    'input_data.jsonl); Apache-2.0', ('ifeval/*.jsonl*',), rows.ifeval,
    metric='strict accuracy of prompts'),
  'bfcl': Entry(
    'Function calls in one turn, and questions that no function answers (Berkeley Function-Calling '
    'Leaderboard, its categories judged by syntax)',
    'https://github.com/ShishirPatil/gorilla (berkeley-function-call-leaderboard/bfcl_eval/data, '
    'with possible_answer/); Apache-2.0',
    ('bfcl/*.json*',), rows.bfcl, only=r'simple(_python)?\.|multiple|parallel|irrelevance'),
  'tasks': Entry(
    'Generated problems with one right answer', _MADE, ('tasks/*.jsonl*',), rows.solved,
    make=made.make_tasks, options=('size', 'seed', 'difficulty', 'kinds')),
  'thinkfollow': Entry(
    'Conversations with /think and /no_think: is the last one obeyed (after ThinkFollow)', _MADE,
    ('thinkfollow/*.jsonl*',), made.thinkfollow, metric='flags obeyed', modes=(True,),
    make=made.make_thinkfollow, options=('size', 'seed', 'difficulty', 'kinds')),
  'lengthctrl': Entry(
    'Texts of so many words: 1 less the relative distance (after LengthCtrl)', _MADE,
    ('lengthctrl/*.jsonl*',), made.lengthctrl, metric='1 - |length - target| / target',
    make=made.make_lengthctrl),
  'counterfact': Entry(
    'Does a question rest on something false (after CounterFactQA)', _MADE,
    ('counterfact/*.jsonl*',), made.counterfact, make=made.make_counterfact),
  'tooluse': Entry(
    'One call, several or none (after the one-turn part of ToolUse)', _MADE, ('tooluse/*.jsonl*',),
    made.tooluse, make=made.make_tooluse, options=('size', 'seed', 'difficulty')),
  'perplexity': Entry(
    'Likelihood of texts: a file, folder or glob of text, JSONL or Parquet, or stdlib:prose',
    'text of your own', ('perplexity/*',), metric='bits per byte', scorings=('perplexity',),
    modes=(False,)),
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
  files: tuple[str, ...] = ()  # ('generated',) where there are none
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
  """The Benchmark `name` from files on disk, or generated.

  `name` is one of NAMES, and may say more after a colon: the scoring ('mmlu:choices', each letter's
  log-probability; 'mmlu:texts', each choice's own), or options of generated records
  ('tasks:kinds=chain+coin,difficulty=1-2,size=200,seed=0'). `folder` holds the files that
  `describe` names, or is the benchmark's own folder, or one file; texts of 'perplexity' are all
  that `data.sources.open_source` opens. All rows are read and checked; `limit` takes so many,
  evenly spaced. Raises ValueError for an unknown name, or a row that is no question (with file and
  line; `skip_bad` leaves it out and counts it in `rejected`), FileNotFoundError where there is no
  file, saying what was looked for and where it is had.
  """
  asked, (name, _, more) = name, name.partition(':')
  entry, rejected, scoring = find(name), {}, ''
  if more and not entry.make:
    if more not in entry.scorings:
      raise ValueError(f'{asked}: {name} is scored by {" or ".join(entry.scorings)}')
    scoring = more
  scoring = scoring or entry.scorings[0]
  paths = () if more and entry.make else _find_files(name, entry, folder)
  if scoring == 'perplexity':
    records = _read_texts(paths, cache)
  elif paths:
    records, rejected = rows.read(paths, entry.shape, name, entry.ask, skip_bad, cache)
  else:
    records = [record | {'benchmark': name} for record in _make(name, entry, more, limit)]
  if not records:
    raise ValueError(f'{paths[0]}: there is no question of {name} in it '
                     f'(left out: {dict(rejected) or 0})')
  if scoring in ('choices', 'texts'):
    records = [record | likelihoods(record, scoring) for record in records]
    scoring = 'choices'
  return Benchmark(
    asked, entry.title, tuple(thin(records, limit)), scoring, entry.metric,
    entry.samples if scoring == 'generate' else 1, entry.max_tokens, entry.modes,
    tuple(map(str, paths)) or ('generated',), dict(rejected))


def find(name):
  """The Entry of a benchmark; ValueError with the nearest name."""
  name = name.partition(':')[0]
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


def likelihoods(record, scoring):
  """What a choice is measured by: 'prompt', 'continuations' of it, of which number 'gold' is right.

  'choices' lists them and asks for the letter; 'texts' shows none and measures each one's text.
  """
  if scoring == 'texts':
    return {'prompt': f'Question: {record["asked"]}\nAnswer:',
            'continuations': [f' {text}' for text in record['choices']]}
  listed = '\n'.join(f'{letter}. {text}' for letter, text in zip(rows.LETTERS, record['choices']))
  return {'prompt': f'{record["asked"]}\n{listed}\nAnswer:',
          'continuations': [f' {letter}' for letter in rows.LETTERS[:len(record['choices'])]]}


def _make(name, entry, options, limit):
  found = tasks.read_options(options, name, 'kinds')
  if strange := found.keys() - set(entry.options):
    raise ValueError(f'{name} has no option {sorted(strange)}; it has {", ".join(entry.options)}')
  return entry.make(**({} if limit is None else {'size': limit}) | found)


def _read_texts(paths, cache):
  records = []
  for path in paths:
    source = sources.open_source(str(path), cache=cache)
    records += [{'id': f'perplexity/{source.hashes[i]:016x}', 'benchmark': 'perplexity',
                 'source': source.name, 'text': source[i]} for i in range(len(source))]
  return records


def _find_files(name, entry, folder):
  """Paths of a benchmark's files; () where it can be generated and there are none."""
  if folder is not None and (name == 'perplexity' and not _has(folder, 'perplexity')):
    return (folder,)
  if folder is not None and Path(folder).expanduser().is_file():
    return files.find(glob.escape(str(folder)))
  tried = []
  if folder is not None:
    root = Path(folder).expanduser()
    tried = [*entry.files, *(f'{name}.{kind}{packed}' for kind in KINDS for packed in PACKED)]
    own = [pattern.partition('/')[2] for pattern in entry.files
           if fnmatch.fnmatch(root.name, pattern.partition('/')[0])]
    for pattern in own + tried:
      with contextlib.suppress(FileNotFoundError):
        found = [path for path in files.find(f'{glob.escape(str(root))}/{pattern}')
                 if files.split_name(path)[0] in KINDS and re.search(entry.only, path.name)]
        if found:
          return found
  if entry.make:
    return ()
  looked = f'no file {", ".join(tried[:-len(KINDS) * len(PACKED) + 1])} in {folder}'
  raise FileNotFoundError(
    f'{name}: {looked if tried else "which folder holds its data?"}; get them from {entry.where}, '
    f'and put them into a folder {name} there, or name the file itself')


KINDS, PACKED = ('jsonl', 'json', 'parquet', 'csv', 'tsv'), ('', '.gz', '.zst')


def _has(folder, name):
  return '*' not in str(folder) and (Path(folder).expanduser() / name).is_dir()


def describe(name=None):
  """In words, for --help: what the benchmarks are, where they are had, how they are asked."""
  lines = []
  for each in [name] if name else TABLE:
    entry = find(each)
    lines += [f'{each}: {entry.title}', f'  from {entry.where}; files {", ".join(entry.files)}',
              f'  scored by {", ".join(entry.scorings)} ({entry.metric}); {entry.samples} '
              f'answer{"s" * (entry.samples > 1)} of at most {entry.max_tokens:,} tokens']
  return '\n'.join(lines)


def open_router(benchmarks, judge=None, mesh=None):
  """The Router that `score` needs; opens a sandbox or a judge only where a record asks for one.

  Raises RuntimeError where this machine has no sandbox, ValueError where a judge is wanting.
  """
  from qwen3_jax.stages import scorers
  asked = {name for each in benchmarks for record in each.records
           for name in record.get('verifiers', ())}
  if 'judge' in asked and judge is None:
    raise ValueError('some records want a judge: name a model, a folder or an http address')
  return scorers.open_router(
    dict(code='code' in asked, judge=judge if 'judge' in asked else None), mesh)


def score(benchmark, records, responses, router):
  """A Score for each `rewards.response.Response` to each record, in order.

  The verifiers of reinforcement learning judge; what they cannot tell is missing. Of IFEval the
  value is 1 where all instructions of a prompt are followed, strictly; `details` have the single
  ones and the loose scores. Of tools, `details` say whether the names are right and the markup is.
  """
  plain = [i for i, record in enumerate(records) if 'instructions' not in record['verifiers']]
  rest = [i for i, record in enumerate(records) if 'instructions' in record['verifiers']]
  found = [None] * len(records)
  scored = router.score([records[i] for i in plain], [responses[i] for i in plain])
  for i, each in zip(plain, scored):
    reasons = '; '.join(f'{name}: {reason}' for name, reason in each.missing.items())
    found[i] = Score(each.reward, _look_at_calls(records[i], responses[i]),
                     reasons if each.reward is None else None)
  for i, each in zip(rest, _follow([records[i] for i in rest], [responses[i] for i in rest],
                                   router)):
    found[i] = each
  return found


def _look_at_calls(record, response):
  if 'expected_calls' not in record:
    return {}
  wanted = sorted(name for call in record['expected_calls'] or () for name in call)
  made = sorted(str(call['name']) for call in response.tool_calls)
  return {'intent': float(made == wanted),
          'format': float('tool_call>' not in response.content)}


def _follow(records, responses, router):
  """Scores of IFEval: each instruction by itself through the router, the loose texts after that."""
  jobs = [(i, k) for i, record in enumerate(records) for k in range(len(record['instructions']))]

  def judge(asked):
    return router.score(
      [{'id': records[i]['id'], 'verifiers': {'instructions': 1.0},
        'messages': records[i]['messages'], 'instructions': [records[i]['instructions'][k]]}
       for (i, k), _ in asked],
      [dataclasses.replace(responses[i], content=text) for (i, _), text in asked])
  strict = dict(zip(jobs, judge([(job, responses[job[0]].content) for job in jobs])))
  again = [(job, text) for job in jobs if strict[job].reward == 0
           for text in instructions.loosen(responses[job[0]].content)[1:]]
  loose = collections.defaultdict(list)
  for (job, _), each in zip(again, judge(again)):
    loose[job].append(each)
  return [_sum_up([strict[i, k] for k in range(len(record['instructions']))],
                  [loose[i, k] for k in range(len(record['instructions']))])
          for i, record in enumerate(records)]


def _sum_up(strict, loose):
  missing = [reason for each in (*strict, *(one for tried in loose for one in tried))
             for reason in each.missing.values()]
  if missing:
    return Score(None, missing=missing[0])
  single = [each.reward for each in strict]
  loosely = [max([own, *(one.reward for one in tried)]) for own, tried in zip(single, loose)]
  return Score(min(single), {'strict_instructions': single, 'loose': min(loosely),
                             'loose_instructions': loosely})


def summarise(scores, records=None):
  """{'value': mean, further metrics: mean, 'missing': count, 'groups': {name: mean value}}.

  Missing scores are in no mean; 'value' is None where none is left. Groups (subjects, languages)
  are those of `records`, where given.
  """
  columns, groups = collections.defaultdict(list), collections.defaultdict(list)
  for i, each in enumerate(scores):
    if each.value is None:
      continue
    columns['value'].append(each.value)
    if records is not None and 'group' in records[i]:
      groups[records[i]['group']].append(each.value)
    for name, value in each.details.items():
      columns[name] += value if isinstance(value, list) else [value]
  means = {name: statistics.fmean(values) for name, values in columns.items() if values}
  return {'value': None} | means | {
    'missing': sum(each.value is None for each in scores),
    'groups': {name: statistics.fmean(values) for name, values in sorted(groups.items())}}
