"""Four fake CPU devices for every test, where oracle data lie, and the smallest training run."""

import json
import os
import random
import signal
from pathlib import Path

# A shell that runs the tests in the background has them ignore Ctrl-C, and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
  os.environ['XLA_FLAGS'] = flags.strip()
# Compilation is most of the tests' time; what is compiled here runs once. `.ci/run` also runs the
# goldens with all optimisations (JAX_DISABLE_MOST_OPTIMIZATIONS=0).
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
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


SMALLEST = {
  'model.layers': 2, 'model.width': 32, 'model.heads': 2, 'model.kv_heads': 1,
  'model.head_width': 16, 'model.mlp': 64, 'model.vocab': 320, 'data.tokenizer_size': 310,
  'data.batch': 4, 'data.length': 64, 'data.heldout_batches': 2, 'optim.warmup': 2}


@pytest.fixture(scope='session')
def smallest(tmp_path_factory):
  """Function from changed fields to the overrides of a training run of 30,000 weights.

  It trains on 400 short JSON records of its own, with a tokenizer made here once.
  """
  from qwen3_jax.text import tokenizer
  folder = tmp_path_factory.mktemp('smallest')
  words = 'one cat sat on 12 mats and ran far over green hills while birds sang of 345 seas'.split()
  draw = random.Random(0)
  texts = [' '.join(draw.choices(words, k=draw.randint(20, 80))) for _ in range(400)]
  (folder / 'records.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  tokenizer.train(texts, SMALLEST['data.tokenizer_size'], folder / 'tokenizer')
  own = {'data.sources': ((str(folder / 'records.jsonl'), 1.0),),
         'data.heldout': (str(folder / 'records.jsonl'), 'tasks:size=40'),
         'data.tokenizer': str(folder / 'tokenizer')}

  def override(**changes):
    changes = {key.replace('__', '.'): value for key, value in changes.items()}
    return [f'--config.{key}={value}' for key, value in (SMALLEST | own | changes).items()]
  return override


@pytest.fixture(scope='module')
def quick_compilation(tmp_path_factory):
  """LLVM hardly optimises code that runs once, and equal programs are compiled once a session."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache
  wanted = {'jax_disable_most_optimizations': True,
            'jax_compilation_cache_dir': str(tmp_path_factory.getbasetemp() / 'compiled'),
            'jax_persistent_cache_min_compile_time_secs': 0.0}
  before = {name: getattr(jax.config, name) for name in wanted if hasattr(jax.config, name)}
  for settings in (wanted, {'jax_disable_most_optimizations': False} | before):
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if settings is wanted:
      yield
