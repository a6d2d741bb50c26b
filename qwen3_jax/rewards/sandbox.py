"""Programs that a model wrote, run where they can reach nothing: bubblewrap, seccomp and limits.

Layers, from outside: our uid given up if it is root, an empty environment, new namespaces (user,
pid, network, ipc, mounts, no further user namespaces), no capabilities, a read-only system without
/proc, /etc, homes or packages, one small tmpfs (/tmp), a system call filter, limits of memory, CPU,
processes, files and output, a deadline, and a memory cgroup where we may make one. Linux 5.14 or
later: only there the limit of processes counts a sandbox's own.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time

from qwen3_jax.rewards.child import Child, Limits, Result
from qwen3_jax.rewards.response import Unscored
from qwen3_jax.rewards.seccomp import make_filter

UID = 64061  # of no account; sandboxes of a root process run under it
DISK = 16 * 2 ** 20  # bytes of /tmp; they are memory too
HARNESS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'harness.py')
_FILES = 64  # open at once, of a process
_FILE_NAME = re.compile(r'(?!/)[\w./ -]{1,200}')
_SYSTEM = ('/usr/lib', '/usr/lib64', '/usr/lib32', '/usr/libx32', '/usr/bin')
_ENVIRONMENT = {'PATH': '/usr/bin', 'HOME': '/tmp', 'LANG': 'C.UTF-8', 'PYTHONHASHSEED': '0',
                'PYTHONDONTWRITEBYTECODE': '1'}
_HINT = ('user namespaces must be allowed (Ubuntu 24.04: sysctl -w '
         'kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt '
         'seccomp=unconfined --security-opt apparmor=unconfined)')
counts = dict.fromkeys(('runs', 'retried', 'unscored'), 0)  # of this process
_lock = threading.Lock()
_checked = {}  # (Sandbox, pid) -> None or why it does not hold


def count(name):
  with _lock:
    counts[name] += 1


def attempt(work):
  """work(), once more if the machinery failed; Unscored if it failed twice."""
  try:
    return work()
  except Unscored:
    count('retried')
  try:
    return work()
  except Unscored as error:
    count('unscored')
    raise Unscored(f'the sandbox failed twice: {error}') from error


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Settings of a sandbox; safe to share between threads.

  `python` runs inside (None: this interpreter, or the system's where the sandbox's user may not
  read this one, such as one in root's home). `seconds` limits both processor time and the clock,
  whose time spent waiting for a processor on a busy machine does not count. `memory_mb` is per
  process, and of all together where a cgroup can be made. Output past `output_bytes`, of stdout
  and stderr each, ends a run. `processes` counts threads too.
  """
  python: str | None = None
  memory_mb: int = 512
  seconds: float = 5.0
  output_bytes: int = 64_000
  processes: int = 16

  def run(self, program, stdin='', files=None, seconds=None):
    """The Result of Python source (str) or of a command (list) in a fresh sandbox.

    `files` maps names to text or bytes, laid in the working folder /tmp. Raises Unscored where the
    machinery failed twice, RuntimeError where no sandbox can be had on this machine, ValueError on
    names that are no relative paths.
    """
    self.check()
    seconds = self.seconds if seconds is None else seconds

    def work():
      with self._start(program, stdin, files, seconds) as child:
        child.wait(seconds)
      return child.result

    return attempt(work)

  def open(self, files, seconds, *arguments):
    """A Child that runs the harness with `arguments` and answers `ask`; a context manager.

    `seconds` limits its processor time in all. Raises Unscored where it cannot be started.
    """
    self.check()
    with open(HARNESS, 'rb') as file:
      files = {'.harness.py': file.read(), **files}
    return self._start(['python', '-P', '.harness.py', *arguments], '', files, seconds, True)

  def session(self):
    """A Session: Python cells one after another in one namespace; a context manager."""
    return Session(self)

  def check(self):
    """Tries, once per process, that the sandbox holds. Raises RuntimeError with what does not."""
    key = dataclasses.replace(self, seconds=1.0, output_bytes=1), os.getpid()
    with _lock:
      known = key in _checked
    if not known:
      reason = self._find_fault()
      with _lock:
        _checked[key] = reason
    if _checked[key]:
      raise RuntimeError(f'no sandbox for model-written code: {_checked[key]}')

  def available(self):
    """Whether `check` passes."""
    try:
      self.check()
    except RuntimeError:
      return False
    return True

  def _find_fault(self):
    probe = (f'MEMORY, PROCESSES = {self.memory_mb * 2 ** 20}, {self.processes}\n'
             f'PACKAGE = {HARNESS!r}\n{_PROBE}')
    try:
      with self._start(probe, '', None, 10.0) as child:
        child.wait(30.0)
      result = child.result
      if result.status != 'ok':
        return f'the self-test ended with {result.status}: {result.stderr.strip()[-300:]}'
      found = json.loads(result.stdout)
    except Unscored as error:
      return f'{error}; {_HINT}'
    except (RuntimeError, ValueError, OSError) as error:
      return str(error)
    wrong = [name for name, held in found['held'].items() if not held]
    if found['uid'] == 0:
      wrong.append('runs as uid 0')
    if found['forks'] > self.processes:
      wrong.append(f'{found["forks"]} processes of {self.processes} allowed')
    if set(found['environment']) - _ENVIRONMENT.keys() - {'PWD', 'LC_CTYPE'}:
      wrong.append('the environment is not empty')
    return 'the self-test found: ' + ', '.join(wrong) if wrong else None

  def _start(self, program, stdin, files, seconds, channel=False):
    count('runs')
    interpreter, binds = find_interpreter(self.python)
    files = dict(files or {})
    for name in files:
      if not _FILE_NAME.fullmatch(name) or '..' in name.split('/'):
        raise ValueError(f'got the file name {name!r}; want a relative path of plain characters')
    if isinstance(program, str):
      files['main.py'] = program
      program = ['python', 'main.py']
    program = list(program)
    if program[0] == 'python':
      program[:1] = [interpreter, '-S', '-B']
    processor = max(1, math.ceil(seconds))
    limits = ['/usr/bin/prlimit', f'--as={self.memory_mb * 2 ** 20}',
              f'--nproc={self.processes + 1}', f'--cpu={processor}:{processor + 1}', '--core=0',
              f'--nofile={_FILES}', f'--fsize={DISK}', '--']
    return Child([*drop_root(), *_bubblewrap(), *binds], [*limits, *program], stdin, files, channel,
                 Limits(self.output_bytes, processor, self.memory_mb * 2 ** 20,
                        tasks=4 + ('programs' in program)))


class Session:
  """Python cells that share a namespace, in one sandbox; a context manager.

  A cell past its time, memory or output ends the process: the next starts with nothing defined, and
  the Result of the former says so in its status. The last expression's value is shown. The process
  ends with the thread that ran its first cell.
  """

  def __init__(self, sandbox):
    self.sandbox, self.child = sandbox, None

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def close(self):
    if self.child:
      self.child.end()
      self.child = None

  def run(self, code, seconds=None):
    """The Result of one cell. Raises Unscored where no sandbox could be started."""
    seconds = self.sandbox.seconds if seconds is None else seconds
    if self.child is None:
      # Processor time is limited over all cells, the clock for each.
      self.child = attempt(lambda: self.sandbox.open({}, 20 * self.sandbox.seconds, 'session'))
    child, start = self.child, time.monotonic()
    try:
      reply = child.ask(json.dumps({'code': code}).encode(), seconds)
    except Unscored:
      self.close()
      raise
    if reply is None:
      self.child = None
      return child.result
    stdout, stderr = child.take()
    status = 'error' if b'error' in reply else 'memory' if b'memory' in reply else 'ok'
    return Result(stdout, stderr, status, 0, time.monotonic() - start)


@functools.cache
def find_interpreter(python=None):
  """(path, bubblewrap arguments that show it) of the interpreter that runs inside.

  Only the system's libraries and programs, the interpreter and its standard library are shown; its
  folders of packages are covered. Raises RuntimeError where none can be read by the sandbox's user.
  """
  own = os.path.realpath(getattr(sys, '_base_executable', None) or sys.executable)
  choices = [os.path.realpath(python)] if python else [own, '/usr/bin/python3']
  code = ('import json, os, sys, sysconfig; library = sysconfig.get_path("stdlib"); '
          'os.stat(sys.argv[1]), os.stat(library)\n'  # setpriv starts what its user may not read
          'print(json.dumps([sys.argv[1], sys.base_prefix, library]))')
  for choice in choices:
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
      done = subprocess.run([*drop_root(), choice, '-I', '-S', '-c', code, choice], check=True,
                            capture_output=True, cwd='/', env={}, timeout=60,
                            stdin=subprocess.DEVNULL)
      path, prefix, library = json.loads(done.stdout)
      return path, _show(path, prefix, library)
  raise RuntimeError(f"the sandbox's user cannot run {' or '.join(choices)}; install the "
                     "system's python3, or name one that others may read in python=")


def _show(path, prefix, library):
  shown = []
  for folder in _SYSTEM:
    shown += ['--ro-bind-try', folder, folder]
  for link in ('/lib', '/lib64', '/lib32', '/bin'):
    if os.path.islink(link):
      shown += ['--symlink', os.readlink(link), link]
    elif os.path.isdir(link):
      shown += ['--ro-bind', link, link]
  for part in (path, os.path.join(prefix, 'lib')):
    if not any(part == folder or part.startswith(folder + '/') for folder in _SYSTEM):
      shown += ['--ro-bind', part, part]
  for folder in (f'{library}/site-packages', f'{library}/dist-packages',
                 '/usr/lib/python3/dist-packages'):
    if os.path.isdir(folder):
      shown += ['--tmpfs', folder, '--remount-ro', folder]
  return shown


def drop_root():
  """The start of a command that must not run as root."""
  if os.geteuid():
    return []
  return ['setpriv', f'--reuid={UID}', f'--regid={UID}', '--clear-groups', '--inh-caps=-all', '--']


@functools.cache
def _bubblewrap():
  """bubblewrap's arguments that are the same for every run, the filter as bytes."""
  bwrap = shutil.which('bwrap')
  if not bwrap:
    raise RuntimeError('bubblewrap is not installed; on Debian and Ubuntu: apt-get install '
                       'bubblewrap')
  if not os.path.exists('/usr/bin/prlimit'):
    raise RuntimeError('there is no /usr/bin/prlimit; install util-linux')
  command = [bwrap, '--unshare-all', '--unshare-user', '--disable-userns', '--cap-drop', 'ALL',
             '--die-with-parent', '--new-session', '--hostname', 'sandbox', '--clearenv']
  for name, value in _ENVIRONMENT.items():
    command += ['--setenv', name, value]
  for device in ('null', 'zero', 'full', 'random', 'urandom'):
    command += ['--dev-bind', f'/dev/{device}', f'/dev/{device}']
  return [*command, '--symlink', '/tmp', '/dev/shm', '--size', str(DISK), '--tmpfs', '/tmp',
          '--chdir', '/tmp', '--seccomp', make_filter()]


_PROBE = """
import json, os, signal, socket

def denied(action):
  try:
    action()
  except (OSError, MemoryError):
    return True
  return False

held = {'the network is not denied': denied(lambda: socket.socket()),
        'the host can be written to': all(denied(lambda path=path: open(path, 'w'))
          for path in ('/x', '/usr/lib/x', '/usr/bin/x', '/dev/x', '/etc/x', '/home/x')),
        'the host can be read': all(map(lambda path: not os.path.exists(path),
          (PACKAGE, '/proc', '/sys', '/etc', '/var', '/run', '/boot', '/srv'))),
        'memory is not limited': denied(lambda: bytearray(MEMORY))}
children = []
try:
  while len(children) <= 2 * PROCESSES:
    child = os.fork()
    if not child:
      signal.pause()
    children.append(child)
except OSError:
  pass
for child in children:
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
print(json.dumps({'uid': os.getuid(), 'forks': len(children), 'held': held,
                  'environment': sorted(os.environ)}))
"""
