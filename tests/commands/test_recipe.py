"""The recipe through the command line: its stages, a report, interrupted and run again."""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.training import metrics

REPO = Path(__file__).resolve().parents[2]
STAGES = 's1', 's2', 's3', 'cold_start'
TASKS = 'tasks:kinds=chain,difficulty=1,size=80'


@pytest.fixture(scope='module')
def settings(smallest):
  """Function from a workdir to the arguments of a recipe of four stages of six steps."""
  def one(workdir):
    arguments = ['recipe', '--config=configs/recipe.py:tiny', f'--workdir={workdir}',
                 '--until=cold_start']
    for stage in STAGES:
      own = dict(steps=6, save_every=2, evaluate_every=3)
      own |= dict(data__length=128, data__batch=2, data__length_mix=None) if stage == 's3' else {}
      if stage == 'cold_start':
        own |= dict(data__sources=None, data__heldout=(TASKS,), data__length=160,
                    measure__count=4, measure__flags=4, measure__budgets=(4,),
                    measure__max_tokens=8, prepare__inputs__input=(TASKS,))
      arguments += [f'--set={stage}.{o.removeprefix("--config.")}' for o in smallest(**own)]
    return arguments
  return one


def weights(workdir):
  """Every file of the last stage's last checkpoint, for comparing runs bit for bit."""
  from jax import tree

  from qwen3_jax.stages import load
  return [np.asarray(x) for x in tree.leaves(load.load(workdir / 'cold_start', dtype=None))]


def test_plan_and_typos(settings, tmp_path, capsys):
  assert main([*settings(tmp_path), '--dry-run']) == 0
  head, *rows, total = capsys.readouterr().out.splitlines()
  rows = {row.split()[0]: row for row in rows}
  assert list(rows) == list(STAGES) and not any(tmp_path.iterdir())
  assert rows['s1'].endswith('  random weights') and rows['s3'].endswith('  s2')
  assert '  10,000 ' in rows['s1'] and '  1,000,000 ' in rows['s3']
  assert '6 steps x 4 x 160' in rows['cold_start'] and '  3,840 ' in rows['cold_start']
  assert rows['cold_start'].endswith('s3; data made by filter')
  real = ['recipe', '--config=configs/recipe.py:0.6b', f'--workdir={tmp_path}']
  for stage in STAGES:  # a stage without data is named before the first one begins
    assert main([*real, *(f'--set={each}.data.sources="stdlib"' for each in STAGES
                          if each < stage)]) == 2
    assert 'has no data: set --set=' in capsys.readouterr().err
  assert main([*settings(tmp_path), '--until=s4']) == 2
  assert "--until: no stage 's4'; there are s1, s2, s3, cold_start" in capsys.readouterr().err
  assert main([*settings(tmp_path), '--from=fusion']) == 2
  assert '--from=fusion comes after --until=cold_start' in capsys.readouterr().err
  assert main([*settings(tmp_path), '--set=s1.stepz=3']) == 2
  assert 'config.steps' in capsys.readouterr().err
  assert main([*settings(tmp_path), '--from=s3']) == 2
  assert 's3 takes its init from s2, which is not in' in capsys.readouterr().err


def test_what_failed_says_how_to_go_on(settings, tmp_path, capsys):
  run = [*settings(tmp_path), '--from=s2', '--until=s2']
  assert main([*run, f'--init={tmp_path / "absent"}']) == 2
  errors = capsys.readouterr().err
  assert 's2 (stage 1 of 1) failed (FileNotFoundError). What is finished is kept' in errors
  assert f'delete {tmp_path}/s2' in errors and 'no model in' in errors


@pytest.mark.slow
def test_any_stage_from_any_checkpoint(settings, smallest, tmp_path, capsys):
  """S1 elsewhere, S2 from it; then S2 is to go on with another learning rate."""
  assert main(['train', '--config=configs/s1.py:tiny', f'--workdir={tmp_path / "one"}',
               *smallest(steps=3, save_every=3, evaluate_every=3)]) == 0
  run = [each for each in settings(tmp_path / 'two') if not each.startswith('--until')]
  run += ['--from=s2', '--until=s2']
  capsys.readouterr()
  assert main(run) == 2 and 'give a folder with --init=DIR' in capsys.readouterr().err
  assert main([*run, f'--init={tmp_path / "one"}']) == 0
  out = capsys.readouterr().out
  assert '== s2 (stage 1 of 1)' in out and 'all 1 stages done' in out
  assert json.loads((tmp_path / 'two/plan.json').read_text()) == {
    's2': {'init': str(tmp_path / 'one')}}
  assert set(json.loads((tmp_path / 'two/s2/times.json').read_text())) == {'train', 'measure'}
  begun = (tmp_path / 'two/s2/metrics.jsonl').stat().st_mtime_ns
  assert main([*run, f'--init={tmp_path / "one"}']) == 0
  assert 'trained before' in capsys.readouterr().out
  assert (tmp_path / 'two/s2/metrics.jsonl').stat().st_mtime_ns == begun
  assert main([*run, f'--init={tmp_path / "one"}', '--set=s2.optim.peak_lr=0.1']) == 2
  assert 's2 (stage 1 of 1) failed (ValueError). What is finished is kept' in (
    capsys.readouterr().err)


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(settings, tmp_path):
  """SIGKILL at five moments spread over the whole run; then everything is as if it never was."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  command = [sys.executable, '-m', 'qwen3_jax']
  start = time.monotonic()
  run = subprocess.run([*command, *settings(whole)], cwd=REPO, capture_output=True, text=True)
  took = time.monotonic() - start
  assert run.returncode == 0, run.stderr
  assert 'held-out loss by stage' in run.stdout and (whole / 'report.html').exists()
  for share in np.random.default_rng(0).uniform(0.2, 0.9, 5):
    process = subprocess.Popen([*command, *settings(killed)], cwd=REPO, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
      process.wait(timeout=share * took)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
  last = subprocess.run([*command, *settings(killed)], cwd=REPO, capture_output=True, text=True)
  assert last.returncode == 0, last.stderr
  for a, b in zip(weights(whole), weights(killed), strict=True):
    np.testing.assert_array_equal(a, b)
  for stage in STAGES:
    lines = [[(x['step'], x['loss'], x.get('heldout_loss')) for x in metrics.read(folder / stage)]
             for folder in (whole, killed)]
    assert lines[0] == lines[1] and [step for step, *_ in lines[0]] == [1, 2, 3, 4, 5, 6]
  for made in ('s3/samples.json', 's3/probe.json', 'cold_start/samples.json',
               'cold_start/modes.json', 'cold_start/data/report.json'):
    assert json.loads((whole / made).read_text()) == json.loads((killed / made).read_text()), made
  page = (whole / 'report.html').read_text()
  assert 'Both modes' in page and 'Cold start' in page and 'exact duplicate' in page
  shutil.rmtree(whole)
