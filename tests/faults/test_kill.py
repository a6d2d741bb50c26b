"""Killed at any moment and started again, a run ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwen3_jax.training import metrics

REPO = Path(__file__).resolve().parents[2]
STEPS, EVERY = 30, 5
CLOCK = {'seconds', 'tokens_per_s', 'mfu'}


@pytest.fixture(scope='module')
def launch(smallest, tmp_path_factory):
  """Function from a workdir to a started training process; compiled programs are kept."""
  overrides = smallest(steps=STEPS, save_every=EVERY, evaluate_every=10)
  environment = dict(os.environ, XLA_FLAGS='', JAX_DISABLE_MOST_OPTIMIZATIONS='1',
                     JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp('compiled')),
                     JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')

  def start(workdir):
    return subprocess.Popen(
      [sys.executable, '-m', 'qwen3_jax', 'train', '--config=configs/s1.py:tiny',
       f'--workdir={workdir}', *overrides], cwd=REPO, env=environment, text=True,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  return start


def finish(process):
  _, errors = process.communicate(timeout=300)
  return process.returncode, errors


@pytest.fixture(scope='module')
def uninterrupted(launch, tmp_path_factory):
  """(workdir, seconds from the start of a run to its first step)."""
  workdir = tmp_path_factory.mktemp('whole')
  code, errors = finish(launch(workdir))  # fills the cache of compiled programs
  assert code == 0, errors
  start = time.monotonic()
  process, first = launch(other := tmp_path_factory.mktemp('timed')), None
  while process.poll() is None:
    if first is None and progress(other):
      first = time.monotonic() - start
    time.sleep(0.005)
  assert finish(process)[0] == 0
  return workdir, first


def progress(workdir):
  """Steps in metrics.jsonl so far."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def read_arrays(workdir):
  folder = workdir / 'checkpoints' / str(STEPS)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    names = orbax.metadata(folder / 'state').item_metadata.tree
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    arrays = orbax.restore(folder / 'state', args=ocp.args.PyTreeRestore(restore_args=how))
  return arrays, json.loads((folder / 'data.json').read_text())


def assert_same_end(workdir, whole):
  """Bit-equal final arrays (weights, Adam, counters), equal data cursor, equal metrics."""
  (got, cursor), (want, cursor2) = read_arrays(workdir), read_arrays(whole)
  assert got.keys() == want.keys() and cursor == cursor2
  for name in want:
    assert got[name].tobytes() == want[name].tobytes(), name
  lines, reference = ([{k: v for k, v in line.items() if k not in CLOCK}
                       for line in metrics.read(folder)] for folder in (workdir, whole))
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert lines == reference


@pytest.mark.slow
def test_sigkill_at_five_moments(launch, uninterrupted, tmp_path):
  """Seeded moments: two while it starts, three among steps and saves, later each time.

  All steps together take a second, so that these moments are a number of steps and then a few
  milliseconds; each start goes on from the newest checkpoint.
  """
  whole, first = uninterrupted
  draw, killed = random.Random(1), 0
  moments = [(0, draw.uniform(0.1, 0.7) * first), (0, draw.uniform(0.7, 1.0) * first),
             *((draw.randint(low, low + 4), draw.uniform(0, 0.05)) for low in (6, 14, 22))]
  for steps, delay in moments:
    process = launch(tmp_path)
    while process.poll() is None and progress(tmp_path) < steps:
      time.sleep(0.002)
    time.sleep(delay)
    killed += process.poll() is None
    process.send_signal(signal.SIGKILL)
    finish(process)
    saved = sorted(path.parent.name for path in tmp_path.glob('checkpoints/*/MANIFEST.json'))
    print(f'killed {1e3 * delay:.0f} ms after step {steps} (0: the start): '
          f'{progress(tmp_path)} lines, checkpoints {saved}')
  assert killed >= 4
  code, errors = finish(launch(tmp_path))
  assert code == 0, errors
  assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_sigterm_saves_exits_42_and_continues(launch, uninterrupted, tmp_path):
  process = launch(tmp_path)
  while process.poll() is None and progress(tmp_path) < 3:
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  code, errors = finish(process)
  assert code == 42 and 'stopped by SIGTERM after step' in errors, errors
  step = int(errors.split('after step ')[1].split()[0])
  assert 3 <= step < STEPS and progress(tmp_path) == step
  assert (tmp_path / 'checkpoints' / str(step) / 'MANIFEST.json').exists()
  code, errors = finish(launch(tmp_path))
  assert code == 0, errors
  assert_same_end(tmp_path, uninterrupted[0])
