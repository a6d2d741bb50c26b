"""The notebooks: each runs as a script in SMOKE mode, and its .ipynb is made from its .py."""
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[1]
COLAB = REPO / 'colab'
sys.path.insert(0, str(COLAB))
import install  # noqa: E402
import make  # noqa: E402

sys.path.remove(str(COLAB))


@pytest.mark.slow
@pytest.mark.parametrize('name', make.NOTEBOOKS)
def test_notebook_runs(name, tmp_path):
  """From an empty folder beside the repository, without a network; its own assertions must hold."""
  (tmp_path / 'qwen3_jax').symlink_to(REPO)
  one_device = os.environ['XLA_FLAGS'].replace('device_count=4', 'device_count=1')
  done = subprocess.run(
    [sys.executable, COLAB / f'{name}.py'], cwd=tmp_path, capture_output=True, text=True,
    env=os.environ | dict(SMOKE='1', JAX_PLATFORMS='cpu', XLA_FLAGS=one_device, HF_HUB_OFFLINE='1'))
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  assert 'nothing to install: JAX' in done.stdout
  assert 'CPU, ' in done.stdout and ' GiB free: it ' in done.stdout
  assert not list(COLAB.glob('runs*'))


@pytest.mark.parametrize('name', make.NOTEBOOKS)
def test_notebook_is_made_from_its_source(name):
  text = (COLAB / f'{name}.ipynb').read_text()
  assert text == make.convert(COLAB / f'{name}.py'), 'run: python colab/make.py'
  cells = json.loads(text)['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert len({cell['id'] for cell in cells}) == len(cells)
  assert not any(cell['outputs'] or cell['execution_count'] for cell in code)
  sources = [''.join(cell['source']) for cell in code]
  assert 'install.prepare(REPO)' in sources[0] and 'import jax' not in sources[0]
  planned, allocated = (next(i for i, source in enumerate(sources) if any(
    word in source for word in words)) for words in (
      ('memory.describe(',), ('qwen3_jax.load(', 'train.train(', 'main(command)')))
  assert planned < allocated
  assert 'assert ' in sources[-1]


def test_every_notebook_is_known():
  assert {path.stem for path in COLAB.glob('*.ipynb')} == {*make.NOTEBOOKS}


def test_what_is_pinned_suits_the_package():
  """setup.py takes every pinned version; the one for this Python is what the tests run on."""
  wanted = next(Requirement(text) for text in install.read_requirements(REPO)
                if Requirement(text).name == 'jax')
  assert all(wanted.specifier.contains(pin) for pin in (install.NEWEST, *install.PINS.values()))
  if sys.version_info[:2] in install.PINS:
    assert importlib.metadata.version('jax') == install.PINS[sys.version_info[:2]]
  command = install.choose_command(REPO, 'tpu', (3, 13))
  assert command[-2:] == [f'{REPO}[tpu]', f'jax=={install.NEWEST}']
  assert install.choose_command(REPO, None, (3, 11))[-2:] == [str(REPO), 'jax==0.10.2']


def test_jax_is_never_replaced_once_it_is_imported(tmp_path):
  """Without JAX in memory pip is called; with it the notebook is told to start anew."""
  (tmp_path / 'setup.py').write_text("setup(install_requires=['jax>=999', 'no-such-package>=1'])")
  code = ('import sys, subprocess, types; sys.path.insert(0, sys.argv[1]); import install; '
          'install.subprocess.run = lambda command: print(command) or types.SimpleNamespace('
          'returncode=0); exec(sys.argv[3]); install.prepare(sys.argv[2])')
  fresh, stale = (subprocess.run([sys.executable, '-c', code, COLAB, tmp_path, before],
                                 capture_output=True, text=True)
                  for before in ('pass', 'sys.modules["jax"] = types'))
  assert fresh.returncode == 0, fresh.stderr
  assert 'installing jax>=999, no-such-package>=1: -m pip' in fresh.stdout
  assert str(tmp_path) in fresh.stdout
  assert stale.returncode == 1 and 'pip' not in stale.stdout
  assert 'JAX was imported already: restart the runtime' in stale.stderr


def test_accelerator_is_found_without_jax(monkeypatch):
  for name in ('TPU_ACCELERATOR_TYPE', 'TPU_NAME', 'COLAB_TPU_ADDR'):
    monkeypatch.delenv(name, raising=False)
  assert install.find_accelerator() != 'tpu' or list(Path('/dev').glob('accel*'))
  monkeypatch.setenv('TPU_ACCELERATOR_TYPE', 'v5litepod-1')
  assert install.find_accelerator() == 'tpu'
