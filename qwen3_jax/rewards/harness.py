"""The program beside model-written code in a sandbox, and how values travel: as data, never code.

Modes (first argument; the last two are the numbers of the channel's descriptors, a line a message):
`functions` runs /tmp/answer.py and then calls what it defines, on request; `programs` runs it as a
program, once for each input; `tests` runs tests, whose calls of the answer's functions go out as
requests for another sandbox; `session` runs cells of Python in one namespace. What is expected
is never in a process that runs an answer. The file imports nothing of the package, for it is laid
into the sandbox.
"""

import json
import sys

_NUMBER = 2 ** 53  # larger integers travel as hexadecimal text
_MANY = 200_000  # elements of an iterator that are taken


class Unsent(TypeError):
  """A value that cannot travel."""


def encode(value, keep=None):
  """JSON of a Python value: scalars and lists as they are, the rest as {kind: data}.

  What has no such form is passed to `keep`, which returns a handle's number, or raises Unsent.
  Subclasses lose their class, so that nothing of a hostile `__eq__` arrives.
  """
  if value is None or value is True or value is False:
    return value
  if isinstance(value, int):
    value = int.__int__(value) if type(value) is not int else value
    return value if -_NUMBER < value < _NUMBER else {'int': hex(value)}
  if isinstance(value, float):
    return float.__float__(value)
  if isinstance(value, str):
    return str.__str__(value)
  if isinstance(value, complex):
    return {'complex': [value.real, value.imag]}
  if isinstance(value, (bytes, bytearray)):
    return {'bytes': bytes(value).hex()}
  if isinstance(value, range):
    return {'range': [encode(value.start), encode(value.stop), encode(value.step)]}
  if isinstance(value, dict):
    return {'dict': [[encode(key, keep), encode(item, keep)]
                     for key, item in dict.items(value)]}
  for kind in (list, tuple, set, frozenset):
    if isinstance(value, kind):
      items = [encode(item, keep) for item in kind.__iter__(value)]
      return items if kind is list else {kind.__name__: items}
  return _encode_rare(value, keep)


def _encode_rare(value, keep):
  import itertools
  kind = type(value)
  name = f'{kind.__module__}.{kind.__qualname__}'
  if name in ('fractions.Fraction', 'decimal.Decimal'):
    return {kind.__name__.lower(): str(value)}
  if name in ('collections.deque', 'array.array', 'builtins.dict_keys', 'builtins.dict_values',
              'builtins.dict_items'):
    return {'sequence': [name.partition('.')[2], [encode(item, keep) for item in value]]}
  if kind is type and value.__module__ == 'builtins':
    return {'type': value.__name__}
  if hasattr(kind, '__next__'):
    return {'iterator': [encode(item, keep) for item in itertools.islice(value, _MANY)]}
  if keep is None:
    raise Unsent(f'a value of type {kind.__name__} cannot travel')
  return {'handle': keep(value)}


def decode(data, handle=None):
  """The value of JSON made by `encode`; `handle` makes something of a handle's number."""
  if isinstance(data, list):
    return [decode(item, handle) for item in data]
  if not isinstance(data, dict):
    return data
  (kind, inner), = data.items()
  if kind in _SCALARS:
    return _SCALARS[kind](inner)
  if kind in _COLLECTIONS:
    return _COLLECTIONS[kind]([decode(item, handle) for item in inner])
  if kind == 'dict':
    return {decode(key, handle): decode(item, handle) for key, item in inner}
  if kind == 'sequence':
    name, items = inner
    items = [decode(item, handle) for item in items]
    return __import__('collections').deque(items) if name == 'deque' else items
  if kind == 'handle' and handle and type(inner) is int:
    return handle(inner)
  raise Unsent(f'unknown kind of value {kind[:20]!r}')


def _make_decimal(text):
  from decimal import Decimal
  return Decimal(text)


def _make_fraction(text):
  from fractions import Fraction
  above, _, below = text.partition('/')
  return Fraction(int(above), int(below or 1))


def _find_type(name):
  import builtins
  kind = getattr(builtins, name)
  if not isinstance(kind, type):
    raise Unsent(f'{name[:20]!r} is no type')
  return kind


_SCALARS = {'type': _find_type, 'int': lambda text: int(text, 16),
            'complex': lambda pair: complex(*pair), 'bytes': bytes.fromhex,
            'range': lambda ends: range(*map(decode, ends)), 'decimal': _make_decimal,
            'fraction': _make_fraction}
_COLLECTIONS = {'tuple': tuple, 'set': set, 'frozenset': frozenset, 'iterator': iter}


def read_lines(fd):
  """The messages that arrive, as JSON values, until the other side closes."""
  with open(fd, 'rb') as file:
    for line in file:
      yield json.loads(line)


def write_line(fd, value, mark=b''):
  import os
  data = memoryview(mark + json.dumps(value).encode() + b'\n')
  while data:
    data = data[os.write(fd, data):]


def load(path, name):
  """A module made of a source file under /tmp, run."""
  import types
  with open(path, encoding='utf-8', errors='surrogatepass') as file:
    source = file.read()
  module = types.ModuleType(name)
  module.__file__ = path
  sys.modules[name] = module
  exec(compile(source, path, 'exec'), module.__dict__)
  return module


def serve_functions(requests, replies):
  """Answers {'call': name or handle, 'args', 'kwargs'}, {'get': [handle, name]}, {'set': [...]}."""
  kept = []

  def keep(value):
    kept.append(value)
    return len(kept) - 1

  def act(request):
    if 'get' in request:
      place, name = request['get']
      return getattr(kept[place], name)
    if 'set' in request:
      place, name, data = request['set']
      return setattr(kept[place], name, decode(data, kept.__getitem__))
    target = request['call']
    target = kept[target] if isinstance(target, int) else getattr(module, target)
    args = [decode(data, kept.__getitem__) for data in request['args']]
    named = {name: decode(data, kept.__getitem__)
             for name, data in request.get('kwargs', {}).items()}
    return target(*args, **named)

  module, failure = None, None
  try:
    module = load('/tmp/answer.py', 'answer')
  except BaseException as error:  # exit() in an answer, too, is only an error
    failure = error
  for request in read_lines(requests):
    try:
      if failure:
        raise failure
      write_line(replies, {'value': encode(act(request), keep)})
    except BaseException as error:
      write_line(replies, {'error': type(error).__name__, 'text': str(error)[:500]})


def serve_programs(requests, replies):
  """Runs the answer as a program on each text that arrives; replies with its output and code."""
  import os
  with open('/tmp/answer.py', encoding='utf-8', errors='surrogatepass') as file:
    source = file.read()
  for request in read_lines(requests):
    with open('/tmp/.input', 'w', encoding='utf-8', errors='surrogatepass') as file:
      file.write(request['input'])
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
      for fd in (ours, requests, replies):
        os.close(fd)
      os.dup2(os.open('/tmp/.input', os.O_RDONLY), 0)
      os.dup2(theirs, 1)
      _run_program(source)
    os.close(theirs)
    with open(ours, 'rb') as file:
      output = file.read(request['limit'] + 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    write_line(replies, {'output': output.decode('utf-8', 'replace'), 'code': code})


def _run_program(source):
  import os
  import types
  sys.modules['__main__'] = module = types.ModuleType('__main__')
  sys.argv[:] = ['answer.py']
  code = 0
  try:
    exec(compile(source, 'answer.py', 'exec'), module.__dict__)
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
  except BaseException:
    code = 1
    sys.excepthook(*sys.exc_info())
  try:
    sys.stdout.flush()
  finally:
    os._exit(code & 255)


class Remote:
  """In `tests`: something that lives in the answer's process; it never compares equal to data."""

  def __init__(self, ask, place):
    self.__dict__.update(_ask=ask, _place=place)

  def __call__(self, *args, **kwargs):
    return self._ask({'call': self._place, 'args': [_send(value) for value in args],
                      'kwargs': {name: _send(value) for name, value in kwargs.items()}})

  def __getattr__(self, name):
    if name.startswith('__') or not isinstance(self._place, int):
      raise AttributeError(name)
    return self._ask({'get': [self._place, name]})

  def __setattr__(self, name, value):
    self._ask({'set': [self._place, name, _send(value)]})


class _Handles:
  """Stands in for `keep`: only what lives in the answer's process may be named to it."""

  def __call__(self, value):
    if isinstance(value, Remote) and isinstance(value._place, int):
      return value._place
    raise Unsent(f'a test passes a value of type {type(value).__name__}, which cannot travel')


def _send(value):
  return encode(value, _Handles())


def serve_tests(requests, replies):
  """Runs each test in turn; replies `!` and a list of true or false, or what stopped it all.

  On the way, `?` and a request for the answer's process, whose reply is the next line.
  """
  import builtins
  lines = read_lines(requests)
  job = next(lines)

  def ask(request):
    write_line(replies, request, b'?')
    reply = next(lines)
    if 'error' in reply:
      kind = getattr(builtins, str(reply['error']), None)
      if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
      raise RuntimeError(reply['text']) if kind in _AWKWARD else kind(reply['text'])
    try:
      return decode(reply['value'], lambda place: Remote(ask, place))
    except Unsent as error:  # made up by the answer
      raise RuntimeError(str(error)) from None

  space = {'__name__': 'tests'}
  passed = []
  try:
    exec(compile(job['setup'], 'setup.py', 'exec'), space)
    space.update({name: Remote(ask, name) for name in job['names']})
    ready = not job['late_setup']
    for source in job['tests']:
      try:
        if not ready:
          exec(compile(job['late_setup'], 'setup.py', 'exec'), space)
          ready = True
        exec(compile(source, 'tests.py', 'exec'), space)
        passed.append(True)
      except Unsent:
        raise
      except Exception:
        passed.append(False)
        if job['all']:
          break
    write_line(replies, passed, b'!')
  except BaseException as error:
    write_line(replies, f'{type(error).__name__}: {error}'[:500], b'!')


_AWKWARD = (UnicodeError, UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)


def serve_session(requests, replies):
  """Runs each cell in one namespace; shows the value of a last expression, or the traceback."""
  import ast
  import traceback
  space = {'__name__': '__main__', '__builtins__': __builtins__}
  for request in read_lines(requests):
    status = 'ok'
    try:
      tree = ast.parse(request['code'])
      last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
      exec(compile(tree, 'cell', 'exec'), space)
      if last:
        value = eval(compile(ast.Expression(last.value), 'cell', 'eval'), space)
        if value is not None:
          print(repr(value))
    except BaseException as error:
      status = 'memory' if isinstance(error, MemoryError) else 'error'
      traceback.print_exception(type(error), error, error.__traceback__.tb_next)
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    write_line(replies, {'status': status})


if __name__ == '__main__':
  serve = {'functions': serve_functions, 'programs': serve_programs, 'tests': serve_tests,
           'session': serve_session}[sys.argv[1]]
  serve(int(sys.argv[-2]), int(sys.argv[-1]))
