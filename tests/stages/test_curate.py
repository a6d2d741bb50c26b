"""The pipeline: order, counts, resumption after kill -9, retries of failures, refusals."""
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_jax.stages import curate, records
from qwen3_jax.stages.curate import Stage
from qwen3_jax.stages.records import Accept, Fail, Reject

REPO = Path(__file__).resolve().parents[2]


def begin_evens(folder, lowest=0):
  """Odd numbers and those below `lowest` are rejected; each other is accepted in two halves."""
  def decide(records):
    decisions = []
    for record in records:
      n = record['n']
      if n % 2:
        decisions.append(Reject(record, 'odd', f'{n} is odd'))
      elif n < lowest:
        decisions.append(Reject(record, 'low', f'{n} < {lowest}'))
      else:
        decisions += [Accept(record | dict(half=half)) for half in (1, 2)]
    return decisions
  return decide


def begin_slow(folder):
  """Batches take a moment, so that a kill comes in the midst of them."""
  def decide(records):
    time.sleep(0.02)
    return [Reject(r, 'seventh', '7 divides it') if r['n'] % 7 == 0 else Accept(r) for r in records]
  return decide


def begin_first(folder):
  """Keeps the first record of each n: what was kept before is read from the stage's own file."""
  seen = {json.loads(line)['n'] for line in (folder / 'accepted.jsonl').open()}

  def decide(records):
    decisions = []
    for record in records:
      new = record['n'] not in seen
      seen.add(record['n'])
      decisions.append(Accept(record) if new else Reject(record, 'again', 'n was there'))
    return decisions
  return decide


STAGES = (Stage('evens', begin_evens, batch=7, parallel=True), Stage('slow', begin_slow, batch=5),
          Stage('first', begin_first, batch=3))


@pytest.fixture
def numbers(tmp_path):
  path = tmp_path / 'numbers.jsonl'
  draw = random.Random(0)
  path.write_text(''.join(json.dumps(dict(n=draw.randrange(100), text='é\u2028x')) + '\n'
                          for _ in range(120)))
  return path


def read(path):
  return [json.loads(line) for line in path.read_bytes().decode().split('\n') if line]


def contents(workdir):
  """All files of a pipeline but its lock."""
  return {str(path.relative_to(workdir)): path.read_bytes()
          for path in sorted(workdir.rglob('*')) if path.is_file() and path.name != 'lock'}


def run(*args, **options):
  return curate.run(*args, say=lambda line: None, workers=1, **options)


def test_counts_balance_and_files_say_why(numbers, tmp_path):
  report = run(STAGES, [numbers], tmp_path / 'w')
  evens, slow, first = report['stages']
  odd = sum(record['n'] % 2 for record in read(numbers))
  assert (evens['read'], evens['rejected'], evens['accepted']) == (120, odd, 2 * (120 - odd))
  assert evens['rules'] == dict(odd=odd)
  for k, line in enumerate(report['stages'], 1):
    folder = tmp_path / 'w' / f'{k}_{line["name"]}'
    sizes = {name: len(read(folder / f'{name}.jsonl')) for name in curate.FILES}
    assert sizes == {name: line[name] for name in curate.FILES}
    assert line['decided'] == line['accepted'] + line['rejected'] + line['failed']
    assert line['rejected'] == sum(line['rules'].values())
    assert json.loads((folder / 'counts.json').read_text()) | dict(name=line['name']) == line
  assert slow['read'] == slow['decided'] == evens['accepted'] and first['read'] == slow['accepted']
  reject = read(tmp_path / 'w/1_evens/rejected.jsonl')[0]
  assert list(reject) == ['stage', 'rule', 'reason', 'n', 'text']
  assert (reject['stage'], reject['rule'], reject['text']) == ('evens', 'odd', 'é\u2028x')
  assert reject['reason'] == f'{reject["n"]} is odd'
  assert len({r['n'] for r in read(tmp_path / 'w' / report['output'])}) == first['accepted']
  assert json.loads((tmp_path / 'w/report.json').read_text()) == report
  before = contents(tmp_path / 'w')
  assert run(STAGES, [numbers], tmp_path / 'w') == report and contents(tmp_path / 'w') == before


def test_processes_decide_the_same(numbers, tmp_path, monkeypatch):
  monkeypatch.setattr(curate, 'SMALL', 0)
  run(STAGES[1:], [numbers], tmp_path / 'one')
  # What another process calls is imported there: a reader of the package, not of this file.
  reader = functools.partial(records.begin_reading, kind='any')
  stages = [Stage('read', reader, raw=True, parallel=True, batch=10), *STAGES[1:]]
  curate.run(stages, [numbers], tmp_path / 'two', workers=2, say=lambda line: None)
  rows = read(tmp_path / 'two/3_first/accepted.jsonl')
  assert [r['n'] for r in rows] == [r['n'] for r in read(tmp_path / 'one/2_first/accepted.jsonl')]


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import test_curate_stages as stages
from qwen3_jax.stages import curate, records
curate.run(stages.STAGES, [{numbers!r}], Path({workdir!r}), workers={workers})
print('done')
"""


def is_running(pid):
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
  except FileNotFoundError:
    return False


@pytest.mark.parametrize('workers', [1, 2])
def test_killed_at_any_moment_it_ends_in_the_same_files(numbers, tmp_path, workers):
  (tmp_path / 'test_curate_stages.py').write_text(
    Path(__file__).read_text().replace('Path(__file__).resolve().parents[2]', 'None')
    + '\ncurate.SMALL = 0\n')
  code = KILLED.format(folder=str(tmp_path), numbers=str(numbers), workdir=str(tmp_path / 'cut'),
                       workers=workers)
  draw, kills = random.Random(workers), 0
  for _ in range(40):
    process = subprocess.Popen([sys.executable, '-c', code], cwd=REPO, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
      if kills < 2:
        deadline = time.monotonic() + 20
        while not list((tmp_path / 'cut').glob('*/progress.json')) and process.poll() is None:
          assert time.monotonic() < deadline
          time.sleep(0.01)
      out, err = process.communicate(timeout=kills * draw.uniform(0.05, 0.3) if kills < 2 else 60)
      assert process.returncode == 0, err
      break
    except subprocess.TimeoutExpired:
      children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
      process.send_signal(signal.SIGKILL)
      process.communicate()
      kills += 1
      deadline = time.monotonic() + 20
      while any(map(is_running, children)):  # none outlives it
        assert time.monotonic() < deadline
        time.sleep(0.01)
  assert kills >= 1 and 'done' in out
  run(STAGES, [numbers], tmp_path / 'whole')
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


def test_what_was_half_written_is_cut_off(numbers, tmp_path):
  run(STAGES, [numbers], tmp_path / 'w')
  whole = contents(tmp_path / 'w')
  for name in curate.FILES:
    with (tmp_path / f'w/2_slow/{name}.jsonl').open('ab') as file:
      file.write(b'{"n": 1')
  run(STAGES, [numbers], tmp_path / 'w')
  assert contents(tmp_path / 'w') == whole
  with (tmp_path / 'w/2_slow/accepted.jsonl').open('r+b') as file:
    file.truncate(10)
  with pytest.raises(ValueError, match='accepted.jsonl is shorter than what was written to it'):
    run(STAGES, [numbers], tmp_path / 'w')


class Oracle:
  """Fails on the n that it does not know yet."""

  def __init__(self, known):
    self.known = known

  def __call__(self, folder):
    return lambda records: [Accept(r) if r['n'] % 10 in self.known else Fail(r, 'no answer')
                            for r in records]


def test_failures_are_tried_again_and_flow_on(numbers, tmp_path):
  def stages(known):
    return [Stage('ask', Oracle(known), batch=8), Stage('first', begin_first)]
  report = run(stages(range(7)), [numbers], tmp_path / 'w')
  failed = [r for r in read(numbers) if r['n'] % 10 >= 7]
  ask = report['stages'][0]
  assert (ask['read'], ask['decided'], ask['failed']) == (120, 120, len(failed))
  left = read(tmp_path / 'w/1_ask/failed.jsonl')
  assert left == [dict(failure='no answer') | r for r in failed]
  run(stages(range(9)), [numbers], tmp_path / 'w')
  report = run(stages(range(10)), [numbers], tmp_path / 'w')
  ask, first = report['stages']
  assert (ask['read'], ask['decided'], ask['failed'], ask['accepted']) == (120, 120, 0, 120)
  assert first['read'] == 120 and not (tmp_path / 'w/1_ask/retry.jsonl').exists()
  assert {r['n'] for r in read(tmp_path / 'w' / report['output'])} == {
    r['n'] for r in read(numbers)}
  assert not any('failure' in r for r in read(tmp_path / 'w/1_ask/accepted.jsonl'))


def test_a_dead_machine_stops_the_run_and_loses_nothing(numbers, tmp_path):
  with pytest.raises(ConnectionError, match='ask: the last 24 records failed .no answer.; mend'):
    run([Stage('ask', Oracle(()), batch=8)], [numbers], tmp_path / 'w', patience=20)
  assert len(read(tmp_path / 'w/1_ask/failed.jsonl')) == 24
  report = run([Stage('ask', Oracle(range(10)), batch=8)], [numbers], tmp_path / 'w', patience=20)
  assert sorted(r['n'] for r in read(tmp_path / 'w' / report['output'])) == sorted(
    r['n'] for r in read(numbers))


def test_another_pipeline_is_refused(numbers, tmp_path):
  def stages(**options):
    return [Stage('evens', begin_evens, options), Stage('first', begin_first)]
  run(stages(lowest=0), [numbers], tmp_path / 'w')
  with pytest.raises(ValueError, match=r'another pipeline \(evens.lowest: 0 -> 5\).*delete '
                                       '1_evens, 2_first'):
    run(stages(lowest=5), [numbers], tmp_path / 'w')
  with pytest.raises(ValueError, match='stage first -> slow.*delete 2_first'):
    run([stages(lowest=0)[0], STAGES[1]], [numbers], tmp_path / 'w')
  with pytest.raises(ValueError, match='there is no stage first any more'):
    run(stages(lowest=0)[:1], [numbers], tmp_path / 'w')
  longer = run([*stages(lowest=0), STAGES[1]], [numbers], tmp_path / 'w')  # only adds
  assert [line['name'] for line in longer['stages']] == ['evens', 'first', 'slow']
  os.rename(tmp_path / 'w/2_first', tmp_path / 'moved')
  with pytest.raises(ValueError, match='lacks a stage before 3_slow; delete 3_slow too'):
    run([*stages(lowest=0), STAGES[1]], [numbers], tmp_path / 'w')
  numbers.write_bytes(numbers.read_bytes() + b'{"n": 2}\n')
  with pytest.raises(ValueError, match='an input file has changed'):
    run(stages(lowest=0), [numbers], tmp_path / 'w')


def test_two_at_once_are_refused(numbers, tmp_path):
  (tmp_path / 'w').mkdir()
  with curate._locked(tmp_path / 'w'), pytest.raises(ValueError, match='another process works in'):
    run(STAGES, [numbers], tmp_path / 'w')
