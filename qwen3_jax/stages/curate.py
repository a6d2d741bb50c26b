"""Record stages in a row: streamed from file to file, resumable, every decision with its reason.

A stage reads what the one before accepted and writes, in a folder of its own, accepted.jsonl,
rejected.jsonl (with stage, rule and reason), failed.jsonl (what the machinery could not decide:
tried again when the pipeline is run again) and counts.json. Kill it at any moment: run again, it
ends in the same files, byte for byte.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qwen3_jax.stages import records
from qwen3_jax.stages.records import Accept, Reject, Rows, dump_line, load_line

FILES = ('accepted', 'rejected', 'failed')
SMALL = 1 << 20  # bytes of input from which on other processes are worth their start
BATCH_BYTES = 1 << 23
SECONDS = 10  # between two lines of progress


@dataclasses.dataclass(frozen=True)
class Stage:
  """`begin(folder)` returns `decide(records) -> decisions`, called a batch at a time.

  A record gets one decision or several (a query with its candidates). `parallel`: decisions depend
  on the record alone, and other processes may make them; `begin` is then called there (it must be
  picklable). `survey(rows)` looks at the whole input first; what it returns is kept in the folder
  as survey.json. `raw`: `decide` is given (file's name, line number, bytes) instead of records.
  `options` is what a run that is continued must have unchanged.
  """
  name: str
  begin: Callable
  options: dict = dataclasses.field(default_factory=dict)
  batch: int = 256
  parallel: bool = False
  raw: bool = False
  survey: Callable | None = None


def run(stages, inputs, workdir, workers=None, patience=64, say=print):
  """Runs or continues the pipeline in `workdir`; returns its report, which is also report.json.

  `inputs` are files, globs or tasks (`records.Rows`). `workers` processes make the decisions of
  parallel stages (default: one a core). Raises ValueError where `workdir` holds other inputs or
  settings, ConnectionError once `patience` records in a row failed.
  """
  workdir, workers = Path(workdir), workers or len(os.sched_getaffinity(0))
  rows = Rows(inputs)
  workdir.mkdir(parents=True, exist_ok=True)
  with _locked(workdir):
    claim(workdir, stages, rows)
    lines = []
    for place, stage in enumerate(stages, 1):
      folder = workdir / f'{place}_{stage.name}'
      lines.append(run_stage(stage, rows, folder, workers, patience, say))
      rows = Rows([folder / 'accepted.jsonl'])
    report = dict(stages=lines, output=f'{folder.name}/accepted.jsonl')
    _write(workdir / 'report.json', json.dumps(report, indent=2, ensure_ascii=False))
  return report


@contextlib.contextmanager
def _locked(workdir):
  with (workdir / 'lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f'another process works in {workdir}; wait for it, or use another workdir'
                       ) from None
    yield


def claim(workdir, stages, rows):
  """Writes what the pipeline is into `workdir`; ValueError where its files are of another one.

  Stages after the first difference may not have begun.
  """
  path = workdir / 'pipeline.json'
  plan = [['inputs', rows.describe()], *([stage.name, stage.options] for stage in stages)]
  plan = json.loads(json.dumps(plan))
  old = json.loads(path.read_text()) if path.exists() else plan
  begun = sorted((int(progress.parent.name.partition('_')[0]), progress.parent.name)
                 for progress in workdir.glob('*_*/progress.json'))
  same = next((k for k, (a, b) in enumerate(zip(old, plan)) if a != b), min(len(old), len(plan)))
  stale = [name for place, name in begun if place >= max(same, 1)]
  gap = [name for k, (place, name) in enumerate(begun, 1) if place != k]
  if stale and same < len(old):
    change = f'{_difference(old[same], plan[same])}' if same < len(plan) else (
      f'there is no stage {old[same][0]} any more')
    raise ValueError(f'{workdir} holds another pipeline ({change}); use the same inputs and '
                     f'settings, another workdir, or delete {", ".join(stale)}')
  if gap:
    raise ValueError(f'{workdir} lacks a stage before {gap[0]}; delete {", ".join(gap)} too')
  _write(path, json.dumps(plan, indent=1, ensure_ascii=False))


def _difference(old, new):
  """'stage.key: 1 -> 2' for the first thing that differs."""
  if old[0] != new[0]:
    return f'stage {old[0]} -> {new[0]}'
  name, old, new = old[0], old[1], new[1]
  if isinstance(old, list):
    return f'inputs: {[row[0] for row in old]} -> {[row[0] for row in new]}' if (
      [row[0] for row in old] != [row[0] for row in new]) else 'an input file has changed'
  key = next(key for key in old | new if old.get(key) != new.get(key))
  return f'{name}.{key}: {old.get(key)!r} -> {new.get(key)!r}'


class Book:
  """A stage's files and how far they are good; what lies behind is of a batch that was cut short.

  A batch is appended and flushed to disk, then progress.json replaced: it alone says what counts.
  """

  def __init__(self, folder):
    folder.mkdir(exist_ok=True)
    self.folder, path = folder, folder / 'progress.json'
    self.progress = json.loads(path.read_text()) if path.exists() else dict(
      cursor=records.START, retry=None, sizes=dict.fromkeys(FILES, 0),
      counts=dict(read=0, decided=0, accepted=0, rejected=0, failed=0, rules={}))
    self.files = {}
    for name in FILES:
      self.files[name] = open(folder / f'{name}.jsonl', 'ab')
      size = self.progress['sizes'][name]
      if self.files[name].tell() < size:
        raise ValueError(f'{folder}/{name}.jsonl is shorter than what was written to it; delete '
                         f'{folder} and the stages after it')
      self.files[name].truncate(size)

  def close(self):
    for file in self.files.values():
      file.close()

  def commit(self, **changed):
    self.progress |= changed
    _write(self.folder / 'progress.json', json.dumps(self.progress, ensure_ascii=False))

  def append(self, written, read, **moved):
    """Adds what a batch of `read` new records gave, and where the next one begins."""
    counts = self.progress['counts']
    for name in FILES:
      if data := written.data[name]:
        self.files[name].write(data)
        self.files[name].flush()
        os.fsync(self.files[name].fileno())
        self.progress['sizes'][name] += len(data)
      counts[name] += written.counts[name]
      counts['decided'] += written.counts[name]
    counts['read'] += read
    for rule, count in written.rules.items():
      counts['rules'][rule] = counts['rules'].get(rule, 0) + count
    self.commit(**moved)

  def begin_retry(self):
    """Moves what failed before to retry.jsonl, to be read again."""
    counts, sizes = self.progress['counts'], self.progress['sizes']
    if self.progress['retry'] is None and sizes['failed']:
      shutil.copyfile(self.folder / 'failed.jsonl', self.folder / 'retry.jsonl')
      _flush(self.folder / 'retry.jsonl')
      counts['decided'] -= counts['failed']
      counts['failed'] = sizes['failed'] = 0
      self.commit(retry=records.START)
      self.files['failed'].truncate(0)

  def end_retry(self):
    if self.progress['retry'] is not None:
      self.commit(retry=None)
    (self.folder / 'retry.jsonl').unlink(missing_ok=True)


@dataclasses.dataclass
class Written:
  """What a batch adds to each file, as bytes and as counts."""
  data: dict
  counts: collections.Counter
  rules: collections.Counter


def write_decisions(name, decisions):
  """`Written` of a batch's decisions in stage `name`."""
  data = {file: bytearray() for file in FILES}
  counts, rules = collections.Counter(), collections.Counter()
  for each in decisions:
    if isinstance(each, Accept):
      file, record = 'accepted', each.record
    elif isinstance(each, Reject):
      file, record = 'rejected', dict(stage=name, rule=each.rule, reason=each.reason) | {
        key: value for key, value in each.record.items() if key not in ('stage', 'rule', 'reason')}
      rules[each.rule] += 1
    else:
      file, record = 'failed', dict(failure=each.reason) | each.record
    data[file] += dump_line(record)
    counts[file] += 1
  return Written({file: bytes(text) for file, text in data.items()}, counts, rules)


def run_stage(stage, rows, folder, workers=1, patience=64, say=print):
  """Runs one stage to the end of `rows`; returns its line of the report."""
  book, began = Book(folder), time.monotonic()
  try:
    if stage.survey and not (folder / 'survey.json').exists():
      _write(folder / 'survey.json', json.dumps(stage.survey(rows), ensure_ascii=False))
    book.begin_retry()
    seen = book.progress['counts']['read']
    if book.progress['retry'] is not None:
      again = Rows([folder / 'retry.jsonl'])
      _process(dataclasses.replace(stage, raw=False), again, 'retry', book, workers, patience, say)
    book.end_retry()
    _process(stage, rows, 'cursor', book, workers, patience, say)
    counts = book.progress['counts']
    _write(folder / 'counts.json', json.dumps(counts, indent=2, ensure_ascii=False))
  finally:
    book.close()
  new = counts['read'] - seen
  rate = f', {new / (time.monotonic() - began) * 60:,.0f} a minute' if new else ''
  say(f'{stage.name}: {_tell(counts)}{rate}')
  return dict(name=stage.name, **counts)


def _tell(counts):
  return ', '.join(f'{counts[key]:,} {key}' for key in ('read', 'accepted', 'rejected', 'failed')
                   if counts[key] or key != 'failed')


def _process(stage, rows, cursor, book, workers, patience, say):
  """Decides on all rows from `book.progress[cursor]` on; retried ones are not new."""
  begin = book.progress[cursor]
  batches = _batches(rows.read(begin), stage.batch)
  first = next(batches, None)
  if first is None:
    return
  if not stage.parallel or rows.left(begin) < SMALL:
    workers = 1
  streak, told = 0, time.monotonic()
  work = _Work(stage, book.folder)
  for batch, written in _mapped(work, itertools.chain([first], batches), workers):
    read = len(batch) if cursor == 'cursor' else 0
    book.append(written, read, **{cursor: batch[-1][0]})
    failed = written.counts['failed']
    streak = streak + failed if failed == written.counts.total() else failed
    if streak >= patience:
      last = load_line(written.data['failed'].splitlines()[-1])['failure']
      raise ConnectionError(f'{stage.name}: the last {streak} records failed ({last}); mend that '
                            'and run again: they are tried again, the rest is kept')
    if time.monotonic() - told > SECONDS:
      told = time.monotonic()
      say(f'{stage.name}: {_tell(book.progress["counts"])} ...')


def _batches(rows, size):
  """Lists of `size` rows, fewer where they are long."""
  batch, held = [], 0
  for row in rows:
    batch.append(row)
    held += len(row[3])
    if len(batch) == size or held > BATCH_BYTES:
      yield batch
      batch, held = [], 0
  if batch:
    yield batch


@dataclasses.dataclass
class _Work:
  """What is done with a batch, here or in another process; `begin` is called on first use."""
  stage: Stage
  folder: Path
  decide: Callable | None = None

  def __call__(self, batch):
    if self.decide is None:
      self.decide = self.stage.begin(self.folder)
    return write_decisions(self.stage.name, self.decide(_parse(self.stage, batch)))


def _parse(stage, batch):
  if stage.raw:
    return [row[1:] for row in batch]
  parsed = [load_line(row[3]) for row in batch]
  for record in parsed:
    record.pop('failure', None)
  return parsed


def _mapped(work, batches, workers):
  """Iterates over (batch, work(batch)), in order, a few batches ahead of what is asked for."""
  if workers == 1:
    yield from ((batch, work(batch)) for batch in batches)
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context('spawn'), _enter, (work,))  # fork and JAX's threads clash
  try:
    queue = collections.deque()
    for batch in batches:
      queue.append((batch, pool.submit(_call, batch)))
      if len(queue) > 2 * workers:
        batch, future = queue.popleft()
        yield batch, future.result()
    yield from ((batch, future.result()) for batch, future in queue)
  except concurrent.futures.process.BrokenProcessPool as e:
    raise OSError(f'a process of stage {work.stage.name} died (out of memory?); run again to go on'
                  ) from e
  finally:
    pool.shutdown(cancel_futures=True)


def _enter(work):
  """Sets up a process: it leaves Ctrl-C to its parent, and ends when its parent does."""
  global _work
  _work = work
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process().sentinel
  watch = functools.partial(multiprocessing.connection.wait, [parent])
  threading.Thread(target=lambda: (watch(), os._exit(1)), daemon=True).start()


def _call(batch):
  return _work(batch)


def _flush(path):
  with path.open('rb') as file:
    os.fsync(file.fileno())


def _write(path, content):
  """Replaces a file whole: readers and a crash see the old or the new one."""
  new = path.with_name(path.name + '.new')
  with new.open('wb') as file:
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
  new.replace(path)


def show(report, console):
  """Prints the table of counts, a line a rule."""
  from rich.table import Table
  table = Table(box=None, pad_edge=False)
  for name in ('stage', 'read', 'accepted', 'rejected', 'failed', 'rule'):
    table.add_column(name, justify='left' if name in ('stage', 'rule') else 'right')
  for line in report['stages']:
    table.add_row(line['name'], *(f'{line[key]:,}' for key in (
      'read', 'accepted', 'rejected', 'failed')))
    for rule, count in sorted(line['rules'].items(), key=lambda pair: -pair[1]):
      table.add_row('', '', '', f'{count:,}', '', rule)
  console.print(table)
