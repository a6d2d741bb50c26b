"""A file system in memory, and instructions whose goal is a final set of files."""
from qwen3_jax.environments.environment import Environment, Refused, progress, tool

FILES, LENGTH, NAME = 100, 10_000, 200  # of a file system; characters of a file; of a path
_PATH = {'type': 'string', 'minLength': 1, 'maxLength': NAME}


class Files(Environment):
  """Settings: `files` and `goal`, both {path: text}. Spaces at the end of a text do not count."""
  tools = (
    tool('list_files', 'Lists the paths of all files in a folder and below it; of all files '
         'without one.', path={'type': 'string', 'maxLength': NAME}),
    tool('read_file', 'The text of a file.', ['path'], path=_PATH),
    tool('write_file', 'Writes a file; one that exists is replaced.', ['path', 'text'], path=_PATH,
         text={'type': 'string', 'maxLength': LENGTH}),
    tool('move_file', 'Moves or renames a file. The target must not exist.', ['source', 'target'],
         source=_PATH, target=_PATH),
    tool('delete_file', 'Deletes a file.', ['path'], path=_PATH))

  def begin(self, settings):
    self.files, self.aim = dict(settings['files']), _strip(settings['goal'])
    self.start = _strip(self.files)

  def call(self, name, arguments):
    if name == 'list_files':
      folder = _normal(arguments.get('path') or '/')
      found = sorted(path for path in self.files if not folder or path.startswith(f'{folder}/'))
      return '\n'.join(found) or 'No files.'
    if name == 'write_file':
      path = self._free(arguments['path'])
      self.files[path] = arguments['text']
      return f'Wrote {len(arguments["text"])} characters to {path}.'
    path = _normal(arguments['source' if name == 'move_file' else 'path'])
    if path not in self.files:
      raise Refused(f'there is no file {path}')
    if name == 'read_file':
      return self.files[path]
    if name == 'delete_file':
      del self.files[path]
      return f'Deleted {path}.'
    target = self._free(arguments['target'])
    if target in self.files:
      raise Refused(f'{target} exists already')
    self.files[target] = self.files.pop(path)
    return f'Moved {path} to {target}.'

  def _free(self, path):
    """The path, if a file may be there."""
    path = _normal(path)
    if not path or any(other.startswith(f'{path}/') for other in self.files):
      raise Refused(f'{path or "/"} is a folder')
    parts = path.split('/')
    for end in range(1, len(parts)):
      if '/'.join(parts[:end]) in self.files:
        raise Refused(f'{"/".join(parts[:end])} is a file, not a folder')
    if path not in self.files and len(self.files) >= FILES:
      raise Refused(f'no space left: {FILES} files at most')
    return path

  def goal(self):
    end = _strip(self.files)
    return {'goal': float(end == self.aim), 'progress': progress(self.start, end, self.aim)}


def _strip(files):
  return {path: text.rstrip() for path, text in files.items()}


def _normal(path):
  """The path without slashes at its ends, without '.' and doubled slashes."""
  parts = [part for part in path.split('/') if part not in ('', '.')]
  if '..' in parts:
    raise Refused('a path may not contain ".."')
  return '/'.join(parts)


# Instructions.

_FOLDERS = ('notes', 'drafts', 'reports', 'data', 'letters', 'plans', 'archive', 'photos')
_NAMES = ('alpha', 'birch', 'cedar', 'delta', 'ember', 'fjord', 'grove', 'heron', 'ivory',
          'juniper', 'krill', 'lotus', 'maple', 'nectar', 'olive', 'pearl', 'quartz', 'raven',
          'sable', 'tulip')
_KEYS = ('port', 'workers', 'retries', 'timeout', 'width', 'height')


def make(rng, difficulty):
  """(question, settings, plan): `difficulty` changes among up to 20 files."""
  names, folders = iter(rng.sample(_NAMES, len(_NAMES))), rng.sample(_FOLDERS, 4)

  def path(kind):
    return f'{rng.choice(folders)}/{next(names)}.{kind}'
  kinds = [_move, _delete, _write] if difficulty < 3 else [_move, _edit, _append, _sum]
  chosen = rng.sample(kinds, min(difficulty, 3)) if difficulty < 4 else rng.sample(kinds, 4)
  chosen += [_delete] * (difficulty - len(chosen))
  files = {path('txt'): f'Nothing of interest {k}.\n' for k in range(2 + difficulty // 2)}
  goal, asked = dict(files), []
  plan = [('I look at what files there are.', [{'name': 'list_files', 'arguments': {}}])]
  for change in chosen:
    before, after, wish, turns = change(rng, path)
    files |= before
    goal |= after
    asked.append(wish)
    plan += turns
  plan.append(('Every change is made.', 'All is done.'))
  order = rng.sample(sorted(files), len(files))
  question = 'Do this with my files: ' + '; '.join(asked) + '. Leave all other files as they are.'
  return question, {'files': {name: files[name] for name in order}, 'goal': goal,
                    'turns': len(plan) + 3}, plan


def _call(name, **arguments):
  return {'name': name, 'arguments': arguments}


def _move(rng, path):
  """Each change: (files before, files after, words, turns of the solution)."""
  source, target = path('txt'), path('txt')
  text = f"Meeting {rng.randint(1, 99)} is at {rng.randint(8, 18)} o'clock.\n"
  return {source: text}, {target: text}, f'move {source} to {target}', [
    (f'{source} has to go to {target}.', [_call('move_file', source=source, target=target)])]


def _delete(rng, path):
  target = path('log')
  return {target: f'error {rng.randint(100, 999)}\n'}, {}, f'delete {target}', [
    (f'{target} has to go.', [_call('delete_file', path=target)])]


def _write(rng, path):
  target, text = path('txt'), f'code {rng.randint(1000, 9999)}'
  return {}, {target: text}, f'write "{text}" into a new file {target}', [
    (f'{target} is to hold "{text}".', [_call('write_file', path=target, text=text)])]


def _edit(rng, path):
  target, keys = path('conf'), rng.sample(_KEYS, 3)
  values = {key: rng.randint(1, 500) for key in keys}
  key, value = rng.choice(keys), rng.randint(501, 999)
  before, after = (''.join(f'{k} = {v}\n' for k, v in each.items())
                   for each in (values, values | {key: value}))
  return {target: before}, {target: after}, f'set {key} to {value} in {target}', [
    (f'To change {target} I must read it.', [_call('read_file', path=target)]),
    (f'{key} is {values[key]} and becomes {value}; the other lines stay.',
     [_call('write_file', path=target, text=after)])]


def _append(rng, path):
  target, line = path('md'), f'- item {rng.randint(100, 999)}\n'
  before = ''.join(f'- item {rng.randint(10, 99)}\n' for _ in range(rng.randint(2, 4)))
  return {target: before}, {target: before + line}, f'append the line "{line[:-1]}" to {target}', [
    (f'To append to {target} I must read it.', [_call('read_file', path=target)]),
    ('The new line comes behind the others.',
     [_call('write_file', path=target, text=before + line)])]


def _sum(rng, path):
  one, other, target = path('csv'), path('csv'), path('txt')
  x, y = rng.randint(10, 999), rng.randint(10, 999)
  before = {one: f'{x}\n', other: f'{y}\n'}
  wish = f'write the sum of the numbers in {one} and {other} into a new file {target}'
  return before, before | {target: str(x + y)}, wish, [
    ('I need both numbers.', [_call('read_file', path=one), _call('read_file', path=other)]),
    (f'{x} + {y} = {x + y}.', [_call('write_file', path=target, text=str(x + y))])]
