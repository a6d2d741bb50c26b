"""What a user types: the dispatcher, its help and errors, config files and their overrides."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from qwen3_jax.__main__ import list_commands, main
from qwen3_jax.commands import config as configs

PACKAGE = Path(configs.__file__).resolve().parents[1]

COMMAND = '''"""Prints what it was given.

It takes its time.

Examples:
  python -m qwen3_jax echo --config=a.py --times=2
"""
import json, os, signal, time

def add_arguments(parser):
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--times', type=int, default=3, help='how often')
  parser.add_argument('--fault', help='what to do wrong')

def main(args):
  if args.fault == 'value':
    raise ValueError('got 3 heads, want a multiple of 2')
  if args.fault == 'library':
    json.loads('three')
  if args.fault == 'module':
    import absent_library
  if args.fault == 'file':
    open('absent.txt')
  if args.fault == 'interrupt':
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
  if args.fault == 'code':
    return 78
  print(args.config, args.times, *args.overrides)
'''

CONFIG = """import ml_collections

def get_config(arg):
  if arg not in ('', 'tiny'):
    raise ValueError(f'no size {arg}; there are: tiny')
  return ml_collections.ConfigDict(dict(
    name='x', steps=10 if arg else 1000, resume=True, clip=None, shape=(1, 2),
    optim=dict(peak_lr=1e-3, warmup=0.1)))
"""


@pytest.fixture
def echo(tmp_path):
  """Runs the dispatcher, copied beside one command `echo`, with the given arguments."""
  (tmp_path / 'qwen3_jax/commands').mkdir(parents=True)
  for name in ('__init__.py', '__main__.py', 'commands/__init__.py', 'commands/config.py',
               'commands/compiled.py'):
    shutil.copy(PACKAGE / name, tmp_path / 'qwen3_jax' / name)
  (tmp_path / 'qwen3_jax/commands/echo.py').write_text(COMMAND)

  def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'qwen3_jax', *arguments], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
  return run


@pytest.mark.parametrize('name', list_commands())
def test_help_of_each_command(name, capsys):
  with pytest.raises(SystemExit) as end:
    main([name, '--help'])
  summary = list_commands()[name].partition('\n')[0]
  assert end.value.code == 0
  assert summary and summary in capsys.readouterr().out


@pytest.mark.parametrize('name', list_commands())
def test_each_command_refuses_a_mistyped_flag(name, capsys):
  with pytest.raises(SystemExit) as end:
    main([name, '--hepl'])
  assert end.value.code == 2
  assert 'unknown flag --hepl; did you mean --help?' in capsys.readouterr().err


def test_help_lists_commands_without_loading_them():
  code = ('import sys; from qwen3_jax.__main__ import main; main(["--help"]); '
          'sys.exit(any(name in sys.modules for name in ("jax", "flax", "numpy")))')
  done = subprocess.run([sys.executable, '-c', code], cwd=PACKAGE.parent, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
  for name, text in list_commands().items():
    assert any(line.split()[:1] == [name] and line.endswith(text.partition('\n')[0])
               for line in done.stdout.splitlines())


def test_help_of_a_command_reads_well(echo):
  lines = echo('echo', '--help').stdout.splitlines()
  assert lines[0].startswith('usage: python -m qwen3_jax echo')
  assert lines.index('It takes its time.') < lines.index('Examples:')
  assert lines[-1] == '  python -m qwen3_jax echo --config=a.py --times=2'
  text = '\n'.join(lines)
  assert 'how often (default: 3)' in text and 'None' not in text
  top = echo('--help').stdout
  assert '  echo  Prints what it was given.' in top and 'config' not in top


@pytest.mark.parametrize('arguments, message', [
  (['ehco'], 'unknown command ehco; did you mean echo?'),
  (['zzz'], 'unknown command zzz; there are: echo'),
  (['echo', '--tims=2'], 'unknown flag --tims; did you mean --times?'),
  (['echo', '--confg', 'a'], 'unknown flag --confg; did you mean --config?'),
  (['echo'], 'the following arguments are required: --config'),
  (['echo', '--config=a', '--times=many'], "invalid int value: 'many'"),
])
def test_a_mistyped_line_is_explained(echo, arguments, message):
  done = echo(*arguments)
  assert done.returncode == 2 and not done.stdout
  assert message in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('fault, line', [
  ('value', 'error: got 3 heads, want a multiple of 2'),
  ('file', 'error: No such file or directory: absent.txt'),
  ('library', 'error: Expecting value: line 1 column 1 (char 0) (--traceback shows where)'),
])
def test_errors_are_one_line(echo, fault, line):
  done = echo('echo', '--config=a', f'--fault={fault}')
  assert (done.returncode, done.stderr, done.stdout) == (2, line + '\n', '')
  done = echo('echo', '--config=a', f'--fault={fault}', '--traceback')
  assert done.returncode == 1 and 'Traceback' in done.stderr


def test_missing_library_is_explained(echo):
  done = echo('echo', '--config=a', '--fault=module')
  assert done.returncode == 2 and done.stderr.startswith(
    "error: No module named 'absent_library'; install the package and what it needs: pip install")


def test_exit_codes(echo):
  assert echo('echo', '--config=a', '--fault=code').returncode == 78
  done = echo('echo', '--config=a', '--fault=interrupt')
  assert (done.returncode, done.stdout, done.stderr) == (130, '', '')


def test_overrides_reach_the_command(echo):
  done = echo('echo', '--config=a.py:tiny', '--config.x=1', '--times=2', '--config.y.z', '2')
  assert (done.returncode, done.stdout) == (0, 'a.py:tiny 2 --config.x=1 --config.y.z=2\n')
  done = echo('echo', '--config=a', '--config.x', '--times=2')
  assert done.stdout == 'a 2 --config.x\n'  # load_config then says that it has no value


@pytest.fixture
def file(tmp_path, monkeypatch):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/toy.py').write_text(CONFIG)
  monkeypatch.chdir(tmp_path)
  return 'configs/toy.py'


def test_config_file_and_argument(file):
  assert configs.load_config(file).steps == 1000
  config = configs.load_config(f'{file}:tiny')
  assert config.steps == 10 and config.is_locked
  with pytest.raises(ValueError, match='no size 8b; there are: tiny'):
    configs.load_config(f'{file}:8b')


def test_missing_config_file_names_those_there_are(file, tmp_path):
  with pytest.raises(FileNotFoundError, match='no config file configs/toi.py; .*configs/toy.py'):
    configs.load_config('configs/toi.py:tiny')
  (tmp_path / 'configs/empty.py').write_text('')
  with pytest.raises(ValueError, match='defines no get_config'):
    configs.load_config('configs/empty.py')


def test_config_beside_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
  names = sorted(path.name for path in (configs.ROOT / 'configs').glob('*.py'))
  monkeypatch.chdir(tmp_path)
  for name in names:
    assert configs.find_file(f'configs/{name}') == configs.ROOT / 'configs' / name
  assert names


@pytest.mark.parametrize('override, value', [
  ('optim.peak_lr=1e-6', 1e-6), ('optim.peak_lr=1', 1.0), ('name=new name', 'new name'),
  ('name=123', '123'), ("name='quoted'", 'quoted'), ('resume=False', False),
  ('resume=false', False), ('clip=0.5', 0.5), ('clip=bare', 'bare'),
  ('shape=3,4', (3, 4)), ('shape=[5]', (5,)),
  ('steps=None', None), ('name=None', None), ('name=a=b', 'a=b'),
  ('name=__import__("os").getpid()', '__import__("os").getpid()'),
])
def test_override_sets_a_value_of_the_fields_type(file, override, value):
  config = configs.load_config(file, [f'--config.{override}'])
  field = configs.flatten(config.to_dict())[override.partition('=')[0]]
  assert field == value and type(field) is type(value)


@pytest.mark.parametrize('overrides, message', [
  (['optim.peek_lr=1'], 'no key config.optim.peek_lr; did you mean config.optim.peak_lr?'),
  (['peak_lr=1'], 'no key config.peak_lr; did you mean config.optim.peak_lr?'),
  (['steps.x=1'], 'no key config.steps.x; did you mean config.steps?'),
  (['qqq=1'], 'no key config.qqq; the keys begin with: clip, name, optim, resume, shape, steps'),
  (['optim=1'], 'config.optim is a section; set one of its fields: config.optim.peak_lr, '),
  (['steps=1.5'], 'config.steps=1.5 is of type float; want int or None'),
  (['steps=True'], 'config.steps=True is of type bool; want int or None'),
  (['resume=1'], 'config.resume=1 is of type int; want bool or None'),
  (['optim.peak_lr=fast'], 'config.optim.peak_lr=fast is of type str; want float or None'),
  (['shape=3'], 'config.shape=3 is of type int; want tuple or None'),
  (['steps=1', 'steps=1'], 'config.steps is given twice'),
  (['steps'], 'override --config.steps has no value; want --config.steps=VALUE'),
])
def test_bad_override_is_refused(file, overrides, message):
  with pytest.raises(ValueError) as error:
    configs.load_config(file, [f'--config.{each}' for each in overrides])
  assert str(error.value).startswith(message)


def test_typed_placeholder_keeps_its_type():
  config = ml_collections.ConfigDict({'width': ml_collections.config_dict.placeholder(int)})
  configs.apply_overrides(config, ['width=8'])
  assert config.width == 8
  with pytest.raises(ValueError, match='want int'):
    configs.apply_overrides(config, ['width=wide'])


def test_diff_names_each_field_that_differs(file):
  old = configs.load_config(file)
  new = configs.load_config(file, ['optim.peak_lr=1e-6', 'name=y'])
  saved = json.loads(configs.to_json(old))
  assert configs.diff(saved, old) == []
  assert configs.diff(saved, new) == ["config.name: 'x' -> 'y'",
                                      'config.optim.peak_lr: 0.001 -> 1e-06']
  del saved['clip']
  assert configs.diff(saved, old) == ['config.clip: (absent) -> None']
