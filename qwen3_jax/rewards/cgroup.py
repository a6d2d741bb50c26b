"""Memory cgroups of sandboxes, where this process may make them: root, or a delegated folder.

The address-space limit is of one process; a group's limit is of all in it together, tmpfs included.
A group is used again for later sandboxes, and removed when this process ends.
"""

import atexit
import contextlib
import functools
import os
import re
import threading

_lock = threading.Lock()
_free, _made = [], []  # folders, of the process in _owner
_owner = [None]
_NAME = 'qwen3_jax-{}-{}'


@functools.cache
def _find_base():
  """(folder to make groups in, name of the limit's file, of the events' file), or None."""
  with contextlib.suppress(OSError, KeyError), open('/proc/self/cgroup') as file:
    paths = dict(line.rstrip('\n').split(':', 2)[1:] for line in file)
    if 'memory' in paths:
      folder = '/sys/fs/cgroup/memory' + paths['memory'].rstrip('/')
      return folder, 'memory.limit_in_bytes', 'memory.oom_control'
    folder = '/sys/fs/cgroup' + paths[''].rstrip('/')
    with open(f'{folder}/cgroup.subtree_control', 'r+') as control:
      if 'memory' not in control.read().split():
        control.write('+memory')
    return folder, 'memory.max', 'memory.events'
  return None


def take(limit):
  """The folder of an unused group of `limit` bytes, or None where none can be made."""
  base = _find_base()
  if base is None:
    return None
  folder, name, _ = base
  with _lock, contextlib.suppress(OSError):
    if _owner[0] != os.getpid():
      _start(folder)
    if not _free:
      path = os.path.join(folder, _NAME.format(os.getpid(), len(_made)))
      os.mkdir(path)
      _made.append(path)
      _free.append(path)
    _write(os.path.join(_free[-1], name), limit)
    return _free.pop()
  return None


def give(path):
  """Returns a group whose processes have ended."""
  with _lock:
    _free.append(path)


def count_kills(path):
  """How often the kernel killed a process of the group for want of memory."""
  with contextlib.suppress(OSError), open(os.path.join(path, _find_base()[2])) as file:
    return int(dict(line.split() for line in file).get('oom_kill', 0))
  return 0


def enter(path):
  """The start of a command that runs in the group."""
  return ['/bin/sh', '-c', 'echo 0 >"$0/cgroup.procs" && exec "$@"', path]


def _write(path, value):
  with open(path, 'w') as file:
    file.write(str(value))


def _start(folder):
  """A new process owns no groups yet; what dead ones left is removed."""
  _owner[0] = os.getpid()
  _free.clear()
  _made.clear()
  for name in os.listdir(folder):
    match = re.fullmatch(_NAME.format(r'(\d+)', r'\d+'), name)
    if match and not os.path.exists(f'/proc/{match[1]}'):
      with contextlib.suppress(OSError):
        os.rmdir(os.path.join(folder, name))


@atexit.register
def _remove():
  if _owner[0] == os.getpid():
    for path in _made:
      with contextlib.suppress(OSError):
        os.rmdir(path)
