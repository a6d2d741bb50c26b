"""Bad input through the command line: one clear line, a failing exit, before work is lost."""

import contextlib
import io
import json
import resource
import shutil
import subprocess

import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.training import metrics

CONFIG, OTHER = 78, 2


pytestmark = pytest.mark.usefixtures('quick_compilation')


def train(workdir, overrides, *flags, config='configs/s1.py:tiny'):
  """(exit code, what went to stderr) of the command."""
  errors = io.StringIO()
  with contextlib.redirect_stderr(errors):
    code = main(['train', f'--config={config}', f'--workdir={workdir}', *flags, *overrides])
  return code, errors.getvalue()


def check(result, code, *parts):
  """One line `error: ...` that holds all of `parts`, and no traceback."""
  assert result[0] == code, result
  lines = [line for line in result[1].splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith('error: '), result[1]
  for part in parts:
    assert part in lines[0], (part, lines[0])


@pytest.fixture(scope='module')
def trained(smallest, tmp_path_factory):
  """Workdir of a run of four steps."""
  workdir = tmp_path_factory.mktemp('trained')
  assert train(workdir, smallest(steps=4))[0] == 0
  return workdir


@pytest.fixture
def continued(trained, tmp_path):
  """A copy of it."""
  return shutil.copytree(trained, tmp_path / 'run')


@pytest.mark.parametrize('changes, parts', [
  ({'optim__peak_lrr': 1}, ['no key config.optim.peak_lrr', 'did you mean config.optim.peak_lr?']),
  ({'data__lenght': 8}, ['did you mean config.data.length?']),
  ({'steps': 'many'}, ['config.steps=many is of type str; want int']),
  ({'data__sources': 'stdlib'}, ['config.data.sources=stdlib is of type str; want tuple']),
])
def test_config_that_cannot_be_read(tmp_path, smallest, changes, parts):
  check(train(tmp_path / 'run', smallest(**changes)), CONFIG, *parts)
  assert not (tmp_path / 'run').exists()


def test_config_file_or_size_that_is_not_there(tmp_path):
  check(train(tmp_path, [], config='configs/s9.py:tiny'), CONFIG, 'no config file configs/s9.py',
        'configs/s1.py')
  check(train(tmp_path, [], config='configs/s1.py:7b'), CONFIG, "'7b': want 0.6b", 'tiny,moe')


@pytest.mark.parametrize('changes, parts', [
  ({'steps': 2}, ['warm-up of 2 steps does not fit into 2 steps']),
  ({'optim__schedule': 'cosin'}, ["schedule 'cosin' does not exist", 'cosine']),
  ({'micro_batches': 3}, ['4 rows cannot be cut into 3 micro-batches', 'multiple']),
  ({'mesh__tensor': 3}, ['mesh', 'needs 3 devices, there are 4', 'config.mesh']),
  ({'mesh__fsdp': 8}, ['needs 8 devices, there are 4']),
  ({'model__vocab': 200}, ['tokenizer has 310 ids, config.model.vocab is 200']),
  ({'model__heads': 3, 'model__kv_heads': 2}, ['3 query heads cannot share 2 kv heads']),
  ({'keep': 0}, ['keep is 0; at least one checkpoint']),
  ({'remat': 'fully'}, ["config.remat is 'fully'", 'none, full']),
  ({'dtype': 'float31'}, ["config.dtype is 'float31'", 'bfloat16']),
  ({'data__tokenizer': '/absent'}, ['no tokenizer at /absent']),
  ({'init': '/absent'}, ['no model in /absent', 'Hugging Face folder']),
  ({'data__sources': None}, ['config.data.sources is None: say what to train on']),
])
def test_values_that_do_not_fit(tmp_path, smallest, changes, parts):
  check(train(tmp_path, smallest(**{'steps': 4} | changes)), OTHER, *parts)
  assert metrics.read(tmp_path) == [] if (tmp_path / 'metrics.jsonl').exists() else True


def test_values_put_right_go_on_in_the_same_workdir(tmp_path, smallest):
  """A run that was refused has no claim on its workdir."""
  check(train(tmp_path, smallest(steps=2)), OTHER, 'warm-up')
  assert train(tmp_path, smallest(steps=4, optim__warmup=1))[0] == 0
  assert metrics.read(tmp_path)[-1]['step'] == 4


LATIN = 'Grüße aus Köln, und noch etwas mehr.'.encode('latin-1')


@pytest.mark.parametrize('name, content, parts', [
  ('absent.jsonl', None, ['absent.jsonl']),
  ('empty.jsonl', b'', ['empty.jsonl', 'empty']),
  ('latin.txt', LATIN, ['latin.txt', 'UTF-8']),
  ('latin.jsonl', b'{"text": "' + LATIN + b'"}\n', ['latin.jsonl', 'UTF-8']),
  ('nothing.jsonl', b'{"text": "a"}\n{"body": "b"}\n', ['nothing.jsonl', '2', 'text']),
  ('broken.jsonl', b'{"text": "a"}\n{"text": \n', ['broken.jsonl', '2']),
  ('torn.jsonl.gz', b'\x1f\x8b\x08\x00', ['torn.jsonl.gz']),
])
@pytest.mark.parametrize('field', ['data__sources', 'data__heldout'])
def test_data_that_cannot_be_read(tmp_path, smallest, name, content, parts, field):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  given = ((str(path), 1.0),) if field == 'data__sources' else (str(path),)
  check(train(tmp_path / 'run', smallest(**{field: given})), OTHER, *parts)
  assert not (tmp_path / 'run/checkpoints').exists()


def test_folder_in_place_of_a_file(tmp_path, smallest):
  (tmp_path / 'folder.jsonl').mkdir()
  given = ((str(tmp_path / 'folder.jsonl'), 1.0),)
  check(train(tmp_path / 'run', smallest(data__sources=given)), OTHER, 'folder.jsonl')


def test_workdir_of_another_config(continued, smallest):
  before = (continued / 'config.json').read_text()
  other = smallest(steps=4, optim__peak_lr=0.5, seed=3)
  check(train(continued, other), OTHER, 'belongs to a run with another config',
        'config.optim.peak_lr: 0.004 -> 0.5', 'config.seed: 0 -> 3', 'another --workdir')
  assert (continued / 'config.json').read_text() == before
  assert len(metrics.read(continued)) == 4
  assert train(continued, smallest(steps=4, keep=2, remat='full', mesh__tensor=2))[0] == 0


def test_more_steps_continue_and_fewer_are_refused(continued, smallest):
  assert train(continued, smallest(steps=6))[0] == 0
  assert [line['step'] for line in metrics.read(continued)] == [1, 2, 3, 4, 5, 6]
  check(train(continued, smallest(steps=5)), OTHER, 'at step 6 already, config.steps is 5')


def test_checkpoint_of_another_shape(continued, smallest):
  """Its own, whose config.json was lost; and as the start of another run."""
  (continued / 'config.json').unlink()
  check(train(continued, smallest(steps=5, model__mlp=96)), OTHER, 'saved by another model',
        'gate_DF')
  (continued / 'config.json').write_text(json.dumps({'model': {}}))
  check(train(continued / 'new', smallest(steps=4, model__width=48), f'--init={continued}'), OTHER,
        'saved by another model', 'model wants')
  assert (continued / 'checkpoints/4/MANIFEST.json').exists()


@pytest.fixture
def small_disk(tmp_path):
  """A folder that holds 2 MiB: a file system where we may mount one, else a limit on files."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
  if shutil.which('mount') and not subprocess.run(command, capture_output=True).returncode:
    yield folder
    subprocess.run(['umount', str(folder)], check=True)
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, hard))
  yield folder
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_costs_no_checkpoint(small_disk, smallest):
  """Two checkpoints fit; the third is refused in one line, the others continue elsewhere."""
  result = train(small_disk, smallest(steps=12, save_every=2, keep=9))
  check(result, OTHER, 'could not be saved', 'Checkpoints that are intact: 2')
  kept = [path.parent.name for path in small_disk.glob('checkpoints/*/MANIFEST.json')]
  assert '2' in kept and '12' not in kept
