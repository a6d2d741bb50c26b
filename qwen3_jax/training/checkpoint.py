"""Verified checkpoints: Orbax writes the arrays, a manifest of checksums proves them.

Orbax restores a file with a flipped bit without any error. So a step here is a folder
`<folder>/<step>/` with `state/` (Orbax), `data.json`, `config.json` and, written last by rename,
`MANIFEST.json`: the size and crc32 of every other file. A step without its manifest does not
exist. While a step is being written or removed the manifest bears another name, so that a process
killed at any moment leaves nothing that could be taken for a checkpoint.

On many hosts every host writes its own shards, and process 0 alone hashes all files, reading them
back from the file system that the hosts share.
"""

import concurrent.futures
import json
import logging
import os
import re
import threading
import zlib

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

MANIFEST = 'MANIFEST.json'
UNFINISHED = 'MANIFEST.unfinished'

log = logging.getLogger(__name__)
# Orbax logs the traceback of one failed write several times; `save` and `wait` raise it once.
logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)


class Checkpoints:
  """The newest `keep` checkpoints of one run, saved in the background.

  Every process of a run makes its own and calls the same methods in the same order. Only `save`
  and `restore` change the folder (they also clear what a killed run left there); the other
  methods are safe beside a running training.
  """

  def __init__(self, folder, keep=3):
    if keep < 1:
      raise ValueError(f'keep is {keep}; at least one checkpoint must be kept')
    self.folder = epath.Path(folder).resolve()
    self.keep = keep
    self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    self._thread = None
    self._failure = None
    self._tidied = False

  def save(self, step, state, data, config, force=False):
    """Copies `state` to the host and returns; files, manifest and pruning follow in a thread.

    `state` is any pytree of jax arrays, whose buffers may be donated once this returns; `data`
    (the data cursor) and `config` are JSON dicts. A step that exists is left alone, or replaced
    with `force`. Raises OSError if this save, or the one before it, failed: older checkpoints are
    then intact.
    """
    self.wait()
    self._tidy()
    if step in self.steps() and not force:
      return
    path = self._path(step)
    try:
      if jax.process_index() == 0:
        _begin(path, data, config)
      self._orbax.save(path / 'state', args=ocp.args.PyTreeSave(_name_leaves(state)))
    except Exception as error:
      raise self._give_up(step, error) from error
    self._thread = threading.Thread(target=self._finish, args=(step,), name='checkpoint')
    self._thread.start()

  def wait(self):
    """Blocks until the save in progress is complete; raises OSError if it failed."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
      _meet('checkpoint complete')
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def close(self):
    """Waits, then ends Orbax's threads; raises OSError if the last save failed."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def steps(self):
    """The steps that have a manifest, ascending."""
    return steps(self.folder)

  def latest(self):
    """The newest step, or None."""
    return max(self.steps(), default=None)

  def restore(self, abstract_state, step=None):
    """The newest undamaged checkpoint as (step, state, data), laid out as `abstract_state` says.

    `abstract_state` is the saved state's pytree with `jax.ShapeDtypeStruct` leaves, whose
    shardings may be of any mesh. A damaged step is named in a warning, renamed `<step>.corrupt`,
    and the next older one is tried; a `step` asked for by number is tried alone and not renamed.
    Raises FileNotFoundError if none is good, ValueError if an array's shape or type differs.
    """
    self.wait()
    self._tidy()
    step = self._choose(step)
    path = self._path(step)
    return step, _read_state(path, abstract_state), json.loads((path / 'data.json').read_text())

  def config(self, step=None):
    """The config saved with `step`, or with the newest step whose config is undamaged."""
    for path in [self._path(step)] if step is not None else _list_steps(self.folder):
      problem = find_fault(path, only='config.json')
      if problem is None:
        return json.loads((path / 'config.json').read_text())
      log.warning('checkpoint %s: %s', path, problem)
    raise FileNotFoundError(f'no checkpoint with a readable config in {self.folder}')

  def _path(self, step):
    return self.folder / str(step)

  def _finish(self, step):
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        _seal(self._path(step))
        for old in self.steps()[:-self.keep]:
          _remove(self._path(old))
    except Exception as error:
      self._failure = self._give_up(step, error)
      self._failure.__cause__ = error

  def _give_up(self, step, error):
    """Removes a step that could not be written; the error to raise."""
    try:
      if jax.process_index() == 0 and not _exists(self._path(step)):
        _remove(self._path(step))
    except OSError as another:
      log.warning('the unfinished %s could not be removed: %s', self._path(step), another)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    reason = os.strerror(int(code[1])) if code else str(error) or type(error).__name__
    there = ', '.join(map(str, self.steps())) or 'none'
    return OSError(f'the checkpoint of step {step} could not be saved in {self.folder}: {reason}. '
                   f'Checkpoints that are intact: {there}. Put this right and run again')

  def _tidy(self):
    """Once: removes the unfinished steps of killed runs, sets aside steps that lost a manifest."""
    if self._tidied:
      return
    self._tidied = True
    for path in _list_steps(self.folder) if jax.process_index() == 0 else ():
      if not _exists(path):
        if (path / UNFINISHED).exists() or not any(path.iterdir()):
          _remove(path)
        else:
          _set_aside(path, f'{MANIFEST} is missing')
    _meet('checkpoint folder tidied')

  def _choose(self, step):
    """The step to restore: process 0 looks, sets damaged ones aside, and tells the others."""
    chosen, problems = -1, []
    for candidate in self.steps()[::-1] if step is None else [step]:
      problem = find_fault(self._path(candidate)) if jax.process_index() == 0 else None
      if problem is None:
        chosen = candidate
        break
      problems.append(f'{candidate}: {problem}')
      if step is None:
        _set_aside(self._path(candidate), problem)
    if jax.process_count() > 1:
      chosen = int(multihost_utils.broadcast_one_to_all(chosen))
    if chosen < 0:
      raise FileNotFoundError(f'no undamaged checkpoint to restore in {self.folder} '
                              f'({"; ".join(problems) or "it holds none"})')
    return chosen


def steps(folder):
  """The steps in `folder` that have a manifest, ascending."""
  return sorted(int(path.name) for path in _list_steps(epath.Path(folder)) if _exists(path))


def restore_subtree(folder, name, abstract):
  """The part `name` ('params', say) of the newest undamaged checkpoint, as `abstract` says.

  Arrays are laid out and cast as the `jax.ShapeDtypeStruct` leaves ask. Only reads: damaged steps
  are named in a warning and left. Raises FileNotFoundError, or ValueError if a shape differs.
  """
  folder = epath.Path(folder).resolve()
  for path in _list_steps(folder):
    problem = find_fault(path)
    if problem is None:
      return _read_state(path, abstract, within=f'{name}.', cast=True)
    log.warning('checkpoint %s is not used: %s', path, problem)
  raise FileNotFoundError(f'no undamaged checkpoint in {folder}')


def find_fault(path, only=None):
  """What is wrong with the step in folder `path`, in a few words, or None.

  Reads and hashes every file that the manifest lists, or the file `only`.
  """
  path = epath.Path(path)
  try:
    files = json.loads((path / MANIFEST).read_text())['files']
    wanted = {name: (size, crc) for name, (size, crc) in files.items() if only in (None, name)}
  except FileNotFoundError:
    return f'{MANIFEST} is missing'
  except (ValueError, KeyError, TypeError, AttributeError):
    return f'{MANIFEST} is damaged'

  def check(name):
    try:
      size, crc = _hash_file(path / name)
    except FileNotFoundError:
      return f'{name} is missing'
    except (OSError, ValueError) as error:
      return f'{name} cannot be read: {error}'
    if size != wanted[name][0]:
      return f'{name} has {size} bytes, {wanted[name][0]} were written'
    return None if crc == wanted[name][1] else f'{name} has changed since it was written (crc32)'

  if only is not None and not wanted:
    return f'{MANIFEST} does not list {only}'
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return next((problem for problem in pool.map(check, wanted) if problem), None)


def _name_leaves(tree):
  """The leaves of a pytree by dotted path, without the `.value` that ends a Flax Param's."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if names[-1] == 'value' and isinstance(path[-1], jax.tree_util.GetAttrKey):
      names.pop()
    leaves['.'.join(names)] = leaf
  assert len(leaves) == len(jax.tree.leaves(tree)), 'two leaves share a name'
  return leaves


def _read_state(path, abstract, within='', cast=False):
  """The arrays of step `path` whose names begin with `within`, in the structure of `abstract`."""
  wanted = {within + name: leaf for name, leaf in _name_leaves(abstract).items()}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    saved = orbax.metadata(path / 'state').item_metadata.tree
    saved = {name: array for name, array in saved.items() if name.startswith(within)}
    _check_match(path, saved, wanted, cast)
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    how = {name: ocp.ArrayRestoreArgs(
      sharding=leaf.sharding or local, global_shape=leaf.shape, dtype=leaf.dtype)
      for name, leaf in wanted.items()}
    found = orbax.restore(path / 'state', args=ocp.args.PyTreeRestore(
      item=wanted, restore_args=how, partial_restore=True))
  return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])


def _check_match(path, saved, wanted, cast):
  """Raises ValueError naming the first arrays in which the checkpoint and the model differ."""
  problems = []
  for name in sorted(saved.keys() | wanted.keys()):
    has, wants = saved.get(name), wanted.get(name)
    if has is None:
      problems.append(f'model wants {name} {tuple(wants.shape)}, checkpoint has none')
    elif wants is None:
      problems.append(f'checkpoint has {name} {tuple(has.shape)}, model has none')
    elif tuple(has.shape) != tuple(wants.shape):
      problems.append(
        f'checkpoint has {name} {tuple(has.shape)}, model wants {tuple(wants.shape)}')
    elif has.dtype != wants.dtype and not cast:
      problems.append(f'checkpoint has {name} {has.dtype}, model wants {wants.dtype}')
  if problems:
    more = [f'and {len(problems) - 4} more'] if len(problems) > 4 else []
    raise ValueError(f'{path} was saved by another model: {"; ".join(problems[:4] + more)}. '
                     'Use the config it was saved with, or another folder')


def _meet(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _list_steps(folder):
  """Folders named by a number, newest first, whether or not they are valid."""
  paths = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
  return sorted(paths, key=lambda path: int(path.name), reverse=True)


def _exists(path):
  return (path / MANIFEST).exists()


def _begin(path, data, config):
  """Makes a step's folder afresh, marked as unfinished."""
  _remove(path)
  path.mkdir(parents=True)
  (path / UNFINISHED).write_text('')
  (path / 'data.json').write_text(json.dumps(data))
  (path / 'config.json').write_text(json.dumps(config, indent=2))


def _seal(path):
  """Writes the manifest, which makes `path` a checkpoint."""
  files = {str(file.relative_to(path)): file for file in _walk(path) if file.name != UNFINISHED}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    sums = dict(zip(files, pool.map(_hash_file, files.values())))
  (path / UNFINISHED).write_text(json.dumps({'files': sums}, sort_keys=True))
  (path / UNFINISHED).rename(path / MANIFEST)


def _remove(path):
  """Deletes a step, if it is there; its manifest loses its name first and goes last."""
  if _exists(path):
    (path / MANIFEST).rename(path / UNFINISHED)
  for item in path.iterdir() if path.exists() else ():
    if item.is_dir():
      item.rmtree()
    elif item.name != UNFINISHED:
      item.unlink()
  path.rmtree(missing_ok=True)


def _set_aside(path, problem):
  """Renames a damaged step, so that it is never used again but can be looked at."""
  aside, count = path.parent / f'{path.name}.corrupt', 1
  while aside.exists():
    count += 1
    aside = path.parent / f'{path.name}.corrupt{count}'
  path.rename(aside)
  log.warning('checkpoint %s is damaged (%s); renamed it to %s', path, problem, aside.name)


def _walk(path):
  for item in path.iterdir():
    yield from _walk(item) if item.is_dir() else (item,)


def _hash_file(path):
  """Size and crc32 of a file, read in pieces of 16 MiB."""
  size = crc = 0
  with path.open('rb') as file:
    while piece := file.read(1 << 24):
      size, crc = size + len(piece), zlib.crc32(piece, crc)
  return size, crc
