"""Reads a config file with its overrides, and compares configs."""

import ast
import difflib
import importlib.util
import json
from pathlib import Path

import ml_collections

ROOT = Path(__file__).resolve().parents[2]


def load_config(name, overrides=()):
  """Locked ConfigDict of `name`, 'configs/s1.py:tiny': a file and the argument of its get_config.

  The file is looked for from the current folder, then from the repository's root. `overrides` are
  texts like '--config.optim.peak_lr=1e-6'; their values are read as data, never evaluated.
  Raises FileNotFoundError naming the files there are, ValueError for a bad argument or override.
  """
  file, _, argument = name.partition(':')
  path = find_file(file)
  spec = importlib.util.spec_from_file_location(f'qwen3_jax_config_{path.stem}', path)
  if spec is None:
    raise ValueError(f'{file} is not a Python file; want one that defines get_config(arg)')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path} defines no get_config(arg); a config file is one that does')
  config = module.get_config(argument)
  apply_overrides(config, overrides)
  return config.lock()


class ConfigError(ValueError):
  """The config cannot be read: a command ends with an exit code of its own."""
  exit_code = 78


def load_given(args):
  """The config that a command's arguments name; ConfigError where `load_config` refuses it."""
  try:
    return load_config(args.config, args.overrides)
  except (ValueError, FileNotFoundError) as error:
    raise ConfigError(str(error)) from error


def find_file(file):
  """Path of a config file, relative to the current folder or to the repository's root."""
  for path in (Path(file), ROOT / file):
    if path.is_file():
      return path.resolve()
  folders = {(base / Path(file).parent).resolve() for base in (Path(), ROOT)}
  folders.add(ROOT / 'configs')
  there = sorted(f'configs/{path.name}' if path.parent == ROOT / 'configs' else str(path)
                 for folder in folders for path in folder.glob('*.py') if path.parent != ROOT)
  tail = f'; there are: {", ".join(there)}' if there else f', and none in {ROOT / "configs"}'
  raise FileNotFoundError(f'no config file {file}{tail}')


def apply_overrides(config, overrides):
  """Sets the fields of `config` that `overrides` name, each checked against its present type."""
  seen = set()
  for override in overrides:
    key, equals, text = override.removeprefix('--').removeprefix('config.').partition('=')
    if not equals:
      raise ValueError(f'override {override} has no value; want --config.{key}=VALUE')
    if key in seen:
      raise ValueError(f'config.{key} is given twice; give it once')
    seen.add(key)
    *parents, field = key.split('.')
    section = config
    for part in parents:
      section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
    if not isinstance(section, ml_collections.ConfigDict) or field not in section:
      raise ValueError(_describe_typo(config, key))
    if isinstance(section[field], ml_collections.ConfigDict):
      if text == 'None':
        section[field] = None
        continue
      fields = ', '.join(f'config.{key}.{each}' for each in section[field])
      raise ValueError(f'config.{key} is a section; set one of its fields: {fields}, or None')
    section[field] = _read_value(f'config.{key}', text, section.get_type(field))


def _describe_typo(config, key):
  names = {name: name for name in flatten(config.to_dict())}
  for known in (names, {name.split('.')[-1]: name for name in names}):
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if near:
      return f'no key config.{key}; did you mean config.{known[near[0]]}?'
  return f'no key config.{key}; the keys begin with: {", ".join(config)}'


def _read_value(name, text, kind):
  """The value that `text` writes, as `kind`; None means off and fits every field."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    value = {'true': True, 'false': False}.get(text, text) if kind is bool else text
  if value is None or kind is type(None) or type(value) is kind:
    return value
  if kind is str:
    return text
  if kind is float and type(value) is int:
    return float(value)
  if kind in (tuple, list) and isinstance(value, (tuple, list)):
    return kind(value)
  raise ValueError(f'{name}={text} is of type {type(value).__name__}; want {kind.__name__} or None')


def flatten(config, prefix=''):
  """Leaves of nested dicts as a dict from dotted name to value; an empty dict is a leaf."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      leaves |= flatten(value, f'{prefix}{key}.')
    else:
      leaves[f'{prefix}{key}'] = value
  return leaves


def to_json(config):
  """Text of config.json; tuples become lists."""
  config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  return json.dumps(config, indent=2) + '\n'


def diff(old, new):
  """Lines 'config.optim.peak_lr: 0.001 -> 1e-06', one a field that differs; [] if none does.

  Each config may be a ConfigDict or what was read from a config.json.
  """
  old, new = (flatten(json.loads(to_json(config))) for config in (old, new))
  return [f'config.{name}: {_show(old, name)} -> {_show(new, name)}'
          for name in old | new if name not in old or name not in new or old[name] != new[name]]


def _show(leaves, name):
  return repr(leaves[name]) if name in leaves else '(absent)'
