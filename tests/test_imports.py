"""The house's rules, read from the source: imports point down, files and functions stay small."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import qwen3_jax

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / 'qwen3_jax'
ROOMS = ('__main__', 'commands', 'scaling', 'evaluation', 'stages', 'generation', 'training',
         'model', 'environments', 'data', 'rewards', 'text', 'kernels', 'mesh', 'spec')
WITHOUT_JAX = ('environments', 'data', 'rewards', 'text')
JAX = ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex')
FILE_LINES, FUNCTION_LINES, FUNCTION_LIMIT = 450, 45, 60


def name_module(path):
  parts = path.relative_to(REPO).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def find_imports(source, module, package, modules):
  """Names of modules that the source of `module` imports, wherever in the file it does so."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = module.split('.') if package else module.split('.')[:-1]
      base = base[:len(base) - node.level + 1] if node.level else []
      base = '.'.join(base + [node.module] * bool(node.module))
      for alias in node.names:  # `from qwen3_jax import mesh` imports a module, not a name
        full = f'{base}.{alias.name}'
        found.add(full if full in modules else base)
  return found


def read_house(package=PACKAGE):
  """Maps each module of the package to the modules it imports."""
  root = package.parent
  paths = {'.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__'): path
           for path in sorted(package.rglob('*.py'))}
  return {module: find_imports(path.read_text(), module, path.stem == '__init__', paths)
          for module, path in paths.items()}


def room(module):
  parts = module.split('.')
  return parts[1] if len(parts) > 1 else ''


def find_upward(house):
  """Imports that leave a room for one above it, or for the public names at the top."""
  wrong = []
  for module, imports in house.items():
    for target in imports:
      if target.split('.')[0] != 'qwen3_jax' or not room(module):
        continue
      if not room(target) or ROOMS.index(room(target)) < ROOMS.index(room(module)):
        wrong.append(f'{module} imports {target}')
  return sorted(wrong)


def find_cycle(house):
  """One import cycle between modules as a list, or []."""
  done = set()

  def visit(module, path):
    if module in path:
      return [*path[path.index(module):], module]
    if module in done:
      return []
    for target in sorted(house[module] & house.keys()):
      if found := visit(target, [*path, module]):
        return found
    done.add(module)
    return []

  return next((cycle for module in house if (cycle := visit(module, []))), [])


def find_jax(house):
  """Modules of the rooms without JAX that reach it, themselves or through another module."""
  wrong = []
  for module in house:
    reached, queue = {module}, [module]
    while queue:
      new = house.get(queue.pop(), set()) - reached
      reached |= new
      queue += new
    hits = {target for target in reached if target.split('.')[0] in JAX}
    if room(module) in WITHOUT_JAX and hits:
      wrong.append(f'{module} reaches {", ".join(sorted(hits))}')
  return wrong


def measure_functions(source):
  """Pairs (name, lines) of the functions in `source`, a docstring not counted."""
  sizes = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      size = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node) is not None:
        size -= node.body[0].end_lineno - node.body[0].lineno + 1
      sizes.append((node.name, size))
  return sizes


def test_public_names_load_on_first_use():
  code = 'import sys, qwen3_jax; sys.exit(any(name in sys.modules for name in ("jax", "numpy")))'
  assert subprocess.run([sys.executable, '-c', code], cwd=REPO).returncode == 0
  names = ['Spec', 'Tokenizer', 'generate', 'load', 'parse', 'render', 'save']
  assert dir(qwen3_jax) == names
  assert all(callable(getattr(qwen3_jax, name)) for name in names)
  with pytest.raises(AttributeError, match="no attribute 'Spek'; it has Spec, "):
    qwen3_jax.Spek  # noqa: B018


def test_rooms_are_those_of_the_house():
  strangers = {room(module) for module in read_house()} - {*ROOMS, ''}
  assert not strangers, f'give these a place in ROOMS: {strangers}'


def test_imports_point_down():
  assert not find_upward(read_house())


def test_no_import_cycle():
  assert not find_cycle(read_house())


def test_data_rewards_and_text_do_without_jax():
  assert not find_jax(read_house())


def test_files_and_functions_stay_small():
  paths = [*PACKAGE.rglob('*.py'), *(REPO / 'configs').rglob('*.py')]
  sizes = {path: path.read_text().count('\n') for path in paths}
  large = {name_module(path): size for path, size in sizes.items() if size > FILE_LINES}
  assert not large, f'files over {FILE_LINES} lines: {large}'
  functions = sorted(((size, f'{name_module(path)}.{name}') for path in paths
                      for name, size in measure_functions(path.read_text())), reverse=True)
  long = [f'{name}: {size}' for size, name in functions if size > FUNCTION_LINES]
  if long:
    warnings.warn(f'functions over {FUNCTION_LINES} lines: {", ".join(long)}', stacklevel=1)
  assert functions[0][0] <= FUNCTION_LIMIT, long


def test_no_file_names_a_folder_of_its_author():
  """An absolute path of one machine is of no use on another."""
  pattern = re.compile(r'(?<![\w.$}~<-])/(?:work|root|Users)/\w')
  listed = subprocess.run(['git', '-C', REPO, 'ls-files', '-z'], capture_output=True, text=True)
  names = listed.stdout.split('\0')[:-1] or [  # a copy of the tree without its history
    str(path.relative_to(REPO)) for path in PACKAGE.rglob('*.py')]
  assert len(names) > 10
  found = []
  kinds = ('.py', '.sh', '.md', '.toml', '.yml', '.yaml', '.json', '')
  for path in (REPO / name for name in names):
    if path.suffix in kinds and path.is_file():
      found += [f'{path.relative_to(REPO)}: {match[0]}'
                for match in pattern.finditer(path.read_text(errors='replace'))]
  assert not found


@pytest.fixture
def crooked(tmp_path):
  """A house with one fault of each kind."""
  package = tmp_path / 'qwen3_jax'
  files = {'__init__': '', 'spec': '', 'mesh': 'import jax',
           'kernels/__init__': 'from ..model import rope', 'model/__init__': '',
           'model/rope': 'def f():\n  from . import moe', 'model/moe': 'from .rope import angle',
           'text/__init__': 'import qwen3_jax.mesh', 'data/__init__': 'from qwen3_jax import Spec',
           'rewards/__init__': 'import numpy'}
  for name, source in files.items():
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / f'{name}.py').write_text(source)
  return read_house(package)


def test_faults_are_found(crooked):
  """The checks above can fail: each fault of a crooked house is named."""
  assert find_upward(crooked) == ['qwen3_jax.data imports qwen3_jax',
                                  'qwen3_jax.kernels imports qwen3_jax.model.rope']
  assert find_cycle(crooked) == ['qwen3_jax.model.rope', 'qwen3_jax.model.moe',
                                 'qwen3_jax.model.rope']
  assert find_jax(crooked) == ['qwen3_jax.text reaches jax']
  assert measure_functions('def f():\n  """One\n  two."""\n  return 1\n') == [('f', 2)]
