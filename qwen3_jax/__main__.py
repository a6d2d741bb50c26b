"""Runs one command: `python -m qwen3_jax COMMAND ...`."""

import argparse
import ast
import difflib
import importlib
import re
import sys
import traceback
from pathlib import Path

from qwen3_jax.commands.compiled import keep_compiled

PACKAGE = Path(__file__).resolve().parent
USER_ERROR = 2
INTERRUPTED = 130


def list_commands():
  """Maps each command's name to its docstring, read from source so that nothing is imported.

  A file of `commands/` that defines both `add_arguments` and `main` is a command.
  """
  commands = {}
  for path in sorted((PACKAGE / 'commands').glob('*.py')):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if {'add_arguments', 'main'} <= defined:
      commands[path.stem] = ast.get_docstring(tree) or ''
  return commands


def describe_commands(commands):
  """The text of `--help`: every command with the first line of its docstring."""
  width = max(map(len, commands), default=0)
  rows = [f'  {name:{width}}  {text.partition(chr(10))[0]}' for name, text in commands.items()]
  return '\n'.join([
    'usage: python -m qwen3_jax COMMAND ...', '',
    'Qwen3 in JAX: pretraining, post-training and generation.', '',
    'commands:', *rows, '',
    'python -m qwen3_jax COMMAND --help  explains a command.',
    'With --traceback an error shows where it was raised.'])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
  """Keeps the docstring's lines and shows every default that says something."""

  def _get_help_string(self, action):
    silent = action.default in (None, False, argparse.SUPPRESS) or action.required
    if silent or '%(default)' in (action.help or ''):
      return action.help
    return f'{action.help or ""} (default: %(default)s)'.strip()


def make_parser(name, module):
  """Parser of a command; a docstring's part from `Examples:` on closes its help."""
  description, examples, rest = (module.__doc__ or '').partition('Examples:')
  parser = argparse.ArgumentParser(
    prog=f'python -m qwen3_jax {name}', description=description.strip(), allow_abbrev=False,
    epilog=(examples + rest).rstrip(), formatter_class=_HelpFormatter)
  module.add_arguments(parser)
  return parser


def suggest(word, known):
  """The tail of an error message: the known word nearest to `word`, or all of them."""
  known = sorted(known)
  near = difflib.get_close_matches(word, known, 1, 0.5)
  return f'did you mean {near[0]}?' if near else f'there are: {", ".join(known)}'


def split_overrides(arguments):
  """Separates `--config.KEY=VALUE` (or `--config.KEY VALUE`) from a command's own arguments."""
  own, overrides, unfinished = [], [], False
  for argument in arguments:
    if argument.startswith('--config.'):
      overrides.append(argument)
      unfinished = '=' not in argument
    elif unfinished and not argument.startswith('--'):
      overrides[-1] += f'={argument}'
      unfinished = False
    else:
      own.append(argument)
      unfinished = False
  return own, overrides


def parse_arguments(name, module, arguments):
  """Arguments of a command, its config overrides as `args.overrides`; exits 2 on a bad flag."""
  parser = make_parser(name, module)
  own, overrides = split_overrides(arguments)
  known = {flag for action in parser._actions for flag in action.option_strings}
  flags = [a.partition('=')[0] for a in own[:own.index('--') if '--' in own else None]]
  for flag in flags:
    if re.match('--[A-Za-z]', flag) and flag not in known:
      long = {each for each in known if each.startswith('--')}
      parser.error(f'unknown flag {flag}; {suggest(flag, long)}')
  if overrides and '--config' not in known:
    parser.error(f'{overrides[0]}: the command {name} takes no config')
  args = parser.parse_args(own)
  args.overrides = overrides
  return args


def describe_error(error):
  """One line of text for an error of the user's making."""
  text = str(error)
  if isinstance(error, ModuleNotFoundError):
    return f'error: {text}; install the package and what it needs: pip install -e {PACKAGE.parent}'
  if isinstance(error, OSError) and error.strerror:
    text = ': '.join(str(part) for part in (error.strerror, error.filename) if part)
  frames = traceback.extract_tb(error.__traceback__)
  homes = (PACKAGE, PACKAGE.parent / 'configs')
  foreign = frames and not any(map(Path(frames[-1].filename).is_relative_to, homes))
  hint = ' (--traceback shows where)' if foreign and not isinstance(error, OSError) else ''
  return f'error: {text or type(error).__name__}{hint}'


def main(arguments):
  """Runs the command named first and returns the process's exit code."""
  show_traceback = '--traceback' in arguments
  arguments = [a for a in arguments if a != '--traceback']
  commands = list_commands()
  if not arguments or arguments[0] in ('-h', '--help', 'help'):
    print(describe_commands(commands))
    return 0
  name, *rest = arguments
  if name not in commands:
    print(f'error: unknown command {name}; {suggest(name, commands)}', file=sys.stderr)
    return USER_ERROR
  try:
    module = importlib.import_module(f'qwen3_jax.commands.{name}')
    return module.main(parse_arguments(name, module, rest)) or 0
  except KeyboardInterrupt:
    return INTERRUPTED
  except (ValueError, OSError, ModuleNotFoundError) as error:
    if show_traceback:
      raise
    print(describe_error(error), file=sys.stderr)
    return getattr(error, 'exit_code', USER_ERROR)


if __name__ == '__main__':
  keep_compiled()
  sys.exit(main(sys.argv[1:]))
