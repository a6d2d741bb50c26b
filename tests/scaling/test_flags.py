"""Presets of compiler flags: by name, for the generations that take them, each compiled."""
import json
import os
import subprocess
import sys

import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.scaling import chips, flags

TOPOLOGY = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}


def test_none_is_used_unasked(monkeypatch):
  monkeypatch.setenv(flags.VARIABLE, '--mine=1')
  flags.use(None)
  assert os.environ[flags.VARIABLE] == '--mine=1'


@pytest.mark.parametrize('name', flags.PRESETS)
def test_flags_are_added_once_to_the_users_own(name, monkeypatch):
  monkeypatch.setenv(flags.VARIABLE, '--mine=1')
  for _ in range(2):
    flags.use(name)
  given = os.environ[flags.VARIABLE].split()
  assert given[0] == '--mine=1' and len(given) == len(set(given))
  assert given[1:] == [f'--{flag}' for flag in flags.PRESETS[name].flags]
  assert set(flags.PRESETS[name].generations) <= set(chips.CHIPS)


def test_what_does_not_exist_or_fit_is_refused(capsys):
  arguments = ['plan', '--config=configs/s1.py:tiny', '--topology=v5p:2x2x1']
  assert main([*arguments, '--config.xla=fuse_gather']) == 2
  assert 'want one of fuse_gathers' in capsys.readouterr().err
  assert main([*arguments, '--config.xla=fuse_gathers']) == 2
  assert 'is for v5e, not v5p, which takes sparsecore_reductions' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('name, generation', [
  (name, generation) for name, preset in flags.PRESETS.items()
  for generation in preset.generations])
def test_the_compiler_takes_it(name, generation, tmp_path):
  """In a process of its own: libtpu reads its flags once."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  done = subprocess.run(
    [sys.executable, '-m', 'qwen3_jax', 'plan', '--config=configs/s1.py:tiny', '--json',
     f'--topology={TOPOLOGY[generation]}', f'--config.xla={name}', '--config.model.layers=2',
     '--config.data.batch=8'],
    env=os.environ | {'QWEN3_JAX_CACHE': str(tmp_path), 'LIBTPU_INIT_ARGS': ''},
    capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  (update,) = json.loads(done.stdout)
  assert update['fits'] and not update['kept']
