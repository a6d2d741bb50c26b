"""Installs what the package needs, with a pinned JAX, in a notebook that has not imported JAX yet.

What Colab brings is older than the package needs, and a JAX that is replaced once it is imported
leaves a notebook with halves of both: so it is replaced before, or not at all.
"""
import ast
import glob
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

PINS = {(3, 11): '0.10.2'}  # the last JAX for Python 3.11
NEWEST = '0.12.0.1'  # for later Pythons


def prepare(repo):
  """Makes the package in `repo` importable; installs what is missing and says so.

  Raises RuntimeError where JAX was imported before in a version that does not do, or pip fails.
  """
  sys.path.insert(0, str(Path(repo).resolve()))
  requirements = read_requirements(repo)
  extra = find_accelerator()
  if extra == 'tpu':
    requirements.append('libtpu')
  lacking = [text for text in requirements if not is_met(text)]
  if not lacking:
    print(f'nothing to install: JAX {importlib.metadata.version("jax")} is here')
    return
  if 'jax' in sys.modules:
    raise RuntimeError(f'{", ".join(lacking)} must be installed, but JAX was imported already: '
                       'restart the runtime (menu Runtime), and run this cell before any other')
  command = choose_command(repo, extra)
  print(f'installing {", ".join(lacking)}: {" ".join(command[1:])}', flush=True)
  if subprocess.run(command).returncode:
    raise RuntimeError('pip failed; its messages are above')


def read_requirements(repo):
  """`install_requires` of setup.py, read from its source."""
  tree = ast.parse((Path(repo) / 'setup.py').read_text())
  return next(ast.literal_eval(node.value) for node in ast.walk(tree)
              if isinstance(node, ast.keyword) and node.arg == 'install_requires')


def is_met(text):
  """Whether a package is installed in a version that the requirement `text` takes."""
  requirement = Requirement(text)
  try:
    version = importlib.metadata.version(requirement.name)
  except importlib.metadata.PackageNotFoundError:
    return False
  return requirement.specifier.contains(version, prereleases=True)


def find_accelerator():
  """'tpu', 'cuda' or None, without asking JAX."""
  names = ('TPU_ACCELERATOR_TYPE', 'TPU_NAME', 'COLAB_TPU_ADDR')
  if any(name in os.environ for name in names) or glob.glob('/dev/accel*'):
    return 'tpu'
  return 'cuda' if shutil.which('nvidia-smi') else None


def choose_command(repo, extra, version=sys.version_info[:2]):
  """The pip command: the package in `repo`, with its extra for the accelerator, and JAX pinned."""
  where = f'{Path(repo).resolve()}{f"[{extra}]" if extra else ""}'
  return [sys.executable, '-m', 'pip', 'install', '--quiet', '-e', where,
          f'jax=={PINS.get(version, NEWEST)}']
