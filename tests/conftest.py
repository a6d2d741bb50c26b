"""Four fake CPU devices for every test, and where the oracle data lie."""

import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
  os.environ['XLA_FLAGS'] = flags.strip()
if os.environ['JAX_PLATFORMS'] == 'cpu':  # libtpu is then only a compiler: no chip to ask or lock
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import pytest  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / 'shared'


def _folder(name):
  folder = SHARED / name
  if not folder.is_dir():
    pytest.skip(f'ORACLE DATA ABSENT: no folder ../shared/{name} beside the repository')
  return folder


@pytest.fixture(scope='session')
def golden():
  """Folder of outputs of other implementations (HF transformers, TRL, llama.cpp, tiktoken)."""
  return _folder('golden')


@pytest.fixture(scope='session')
def data_dir():
  """Folder of small public data sets."""
  return _folder('data')


_FORBIDDEN = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
  """In CI, where the oracle data lie beside the clone, a skipped test is a failure."""
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')
  if not (os.environ.get('CI') and SHARED.is_dir() and reporter):
    return
  reasons = [str(report.longrepr[2]) for report in reporter.stats.get('skipped', ())]
  count = sum(not reason.startswith('Skipped: needs hardware') for reason in reasons)
  session.config.stash[_FORBIDDEN] = count
  if count and session.exitstatus == pytest.ExitCode.OK:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
  if config.stash.get(_FORBIDDEN, 0):
    terminalreporter.write_line(
      f'error: {config.stash[_FORBIDDEN]} tests skipped in CI although ../shared is present '
      '(only reasons that begin with "needs hardware" may skip)', red=True)
