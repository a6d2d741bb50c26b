"""One sandboxed process: starts it, moves bounded data, keeps its clock, leaves nothing behind."""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time

from qwen3_jax.rewards import cgroup
from qwen3_jax.rewards.response import Unscored

FRAME = 4 * 2 ** 20  # bytes of one message on the channel
PATIENCE = 10.0  # a starved program's clock may run this many times its seconds


@dataclasses.dataclass(frozen=True)
class Result:
  """What a program did. `seconds` is by the clock; `exit_code` None where it was ended by us."""
  stdout: str
  stderr: str
  status: str  # 'ok', 'error', 'time', 'memory', 'output' or 'killed'
  exit_code: int | None
  seconds: float


@dataclasses.dataclass(frozen=True)
class Limits:
  """What bubblewrap and the kernel's limits per process do not see to."""
  output: int  # bytes of stdout and of stderr
  processor: int  # seconds, as the kernel was told
  memory: int  # bytes of all processes together
  tasks: int  # as many as are needed; with more, waiting for a processor counts


class Child:
  """A running program and its pipes; a context manager whose end leaves no process or descriptor.

  `command` is bubblewrap with its arguments (bytes: handed over as a descriptor), `program` what
  runs inside. With `channel`, two more descriptors, whose numbers end the program's arguments,
  carry lines from and to `ask`. After `wait` or the end, `result` says what happened. Raises
  Unscored where the program never began.
  """

  def __init__(self, command, program, stdin, files, channel, limits):
    self.allowed = limits
    self.group = cgroup.take(limits.memory)
    self.kills = cgroup.count_kills(self.group) if self.group else 0
    self.started, self.result, self.flooded = time.monotonic(), None, False
    self.process = self.inside = None
    self.selector, self.buffers, self.limits = selectors.DefaultSelector(), {}, {}
    self.requests = None
    with contextlib.ExitStack() as theirs:
      try:
        self._spawn(command, program, stdin, files, channel, theirs)
      except BaseException as error:
        if self.process:
          self.process.kill()
          self.process.wait()
        self._close()
        if isinstance(error, OSError):
          raise Unscored(f'cannot start a sandbox: {error}') from error
        raise

  def _spawn(self, command, program, stdin, files, channel, theirs):
    def memory(data):
      data = data.encode('utf-8', 'surrogatepass') if isinstance(data, str) else data
      fd = os.memfd_create('sandbox')
      theirs.callback(os.close, fd)
      with open(fd, 'wb', closefd=False) as file:
        file.write(data)
      os.lseek(fd, 0, os.SEEK_SET)
      return fd

    def pipe(name, limit):
      ours, end = os.pipe()
      theirs.callback(os.close, end)
      self._listen(ours, name, limit)
      return end

    passed = []

    def place(part):
      passed.append(memory(part))
      return str(passed[-1])

    options = []
    for name, data in files.items():
      options += ['--file', place(data), f'/tmp/{name}']
    passed += [pipe('status', 65536)]
    options += ['--json-status-fd', str(passed[-1])]
    numbers = []
    if channel:
      end, self.requests = os.pipe()
      theirs.callback(os.close, end)
      os.set_blocking(self.requests, False)
      numbers = [end, pipe('reply', FRAME)]
    command = [*(cgroup.enter(self.group) if self.group else []), *command]
    command = [place(part) if isinstance(part, bytes) else part for part in command]
    self.process = subprocess.Popen(
      [*command, *options, '--remount-ro', '/', '--', *program, *map(str, numbers)],
      stdin=memory(stdin), stdout=pipe('stdout', self.allowed.output),
      stderr=pipe('stderr', self.allowed.output), env={}, cwd='/', pass_fds=[*passed, *numbers])
    self.selector.register(os.pidfd_open(self.process.pid), selectors.EVENT_READ, 'ended')

  def _listen(self, fd, name, limit):
    os.set_blocking(fd, False)
    self.buffers[name], self.limits[name] = bytearray(), limit
    self.selector.register(fd, selectors.EVENT_READ, name)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.end()

  def ask(self, message, seconds):
    """Sends one line of bytes; the line that comes back, or None where the program failed.

    None also past the time or the size allowed; `result` then has the status.
    """
    if self.result:
      return None
    waiting = memoryview(message + b'\n')
    reply = self.buffers['reply']
    self.selector.register(self.requests, selectors.EVENT_WRITE, 'request')

    def done():
      return b'\n' in reply

    def write():
      nonlocal waiting
      with contextlib.suppress(BlockingIOError):
        waiting = waiting[os.write(self.requests, waiting):]
      return bool(waiting)

    try:
      status = self._move(done, seconds, write)
    finally:
      with contextlib.suppress(KeyError):
        self.selector.unregister(self.requests)
    if status or not done():
      self.end(status)
      return None
    line, _, rest = bytes(reply).partition(b'\n')
    reply[:] = rest
    return line

  def take(self):
    """(stdout, stderr) written since the last time."""
    self._drain()
    texts = [self.buffers[name].decode('utf-8', 'replace') for name in ('stdout', 'stderr')]
    for name in ('stdout', 'stderr'):
      self.buffers[name].clear()
    return texts

  def wait(self, seconds):
    """Waits for the end of the program, at most `seconds`."""
    self.end(self._move(lambda: False, seconds))

  def end(self, status=None):
    """Kills what still runs, closes everything and settles `result`."""
    if self.process is None:
      return
    elapsed = time.monotonic() - self.started
    alive = self.process.poll() is None
    try:
      self._drain()
      if alive and self.inside is not None:
        signal.pidfd_send_signal(self.inside, signal.SIGKILL)  # bubblewrap then reaps, and ends
      elif alive:
        self.process.kill()
      self._reap()
      self._drain()
    finally:
      self._close()
    if self.result is None:
      self.result = self._judge(status or ('killed' if alive else None), elapsed)

  def _move(self, done, seconds, write=None):
    """Reads and writes until done() or the program's end (None), 'time' or 'output'."""
    start, limit = time.monotonic(), seconds
    while not done():
      left = start + limit - time.monotonic()
      for key, _ in self.selector.select(max(0.0, left)):  # what came in time though we are late
        if key.data == 'ended':
          self._drain()
          return None
        if key.data == 'request':
          try:
            more = write()
          except OSError:
            more = False
          if not more:
            self.selector.unregister(key.fd)
        elif not self._read(key):
          return 'output'
      if left <= 0 and not done():
        more = self._extend(time.monotonic() - start, seconds)
        if not more:
          return 'time'
        limit = time.monotonic() - start + more
    return None

  def _read(self, key):
    """Takes what a pipe holds; False where that is more than allowed."""
    try:
      data = os.read(key.fd, 65536)
    except BlockingIOError:
      return True
    if not data:
      self.selector.unregister(key.fd)
      os.close(key.fd)
    buffer = self.buffers[key.data]
    buffer += data
    if key.data == 'status':
      self._find_inside()
    if len(buffer) > self.limits[key.data]:
      del buffer[self.limits[key.data]:]
      self.flooded = True
      return False
    return True

  def _extend(self, elapsed, seconds):
    """Seconds that a program starved by a busy machine may go on; 0 where its time is used up.

    One with more tasks than expected may have starved itself, and gets nothing.
    """
    ran, waited, tasks, wanting = measure_tree(self.process.pid)
    used = elapsed - waited
    if ran >= 0.9 * seconds or tasks > self.allowed.tasks or used >= 0.9 * seconds and not wanting:
      return 0.0
    if elapsed >= PATIENCE * seconds:
      raise Unscored(f'a program of {seconds:g} s got {ran:.1f} s of processor in {elapsed:.0f} s')
    return max(0.1 * seconds, seconds - used)

  def _find_inside(self):
    """Opens the sandbox's first process as soon as bubblewrap names it."""
    if self.inside is None and b'}' in self.buffers['status']:
      first = bytes(self.buffers['status']).partition(b'}')[0] + b'}'
      with contextlib.suppress(OSError, ValueError, KeyError):
        self.pid = json.loads(first)['child-pid']
        self.inside = os.pidfd_open(self.pid)

  def _reap(self):
    """Waits for both of bubblewrap's processes, the outer by force if need be."""
    try:
      self.process.wait(5.0)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    if self.inside is not None:
      with contextlib.suppress(OSError):
        signal.pidfd_send_signal(self.inside, signal.SIGKILL)
      with selectors.DefaultSelector() as selector:
        selector.register(self.inside, selectors.EVENT_READ)
        selector.select(5.0)
      with contextlib.suppress(ChildProcessError):
        os.waitpid(self.pid, os.WNOHANG)  # ours only where we adopt orphans

  def _drain(self):
    for key in list(self.selector.get_map().values()):
      while key.data in self.buffers and key.fd in self.selector.get_map():
        before = len(self.buffers[key.data])
        if not self._read(key) or len(self.buffers[key.data]) == before:
          break

  def _close(self):
    for key in list((self.selector.get_map() or {}).values()):
      if key.data != 'request':
        os.close(key.fd)
    self.selector.close()
    for fd in (self.requests, self.inside):
      if fd is not None:
        os.close(fd)
    self.process = self.requests = self.inside = None
    if self.group:
      self.kills = cgroup.count_kills(self.group) - self.kills
      cgroup.give(self.group)
      self.group = None

  def _judge(self, status, elapsed):
    """The Result, or Unscored where the program never began."""
    stdout, stderr = (self.buffers[name].decode('utf-8', 'replace')
                      for name in ('stdout', 'stderr'))
    found = bytes(self.buffers['status']).rpartition(b'"exit-code":')
    code = int(found[2].strip(b' }\n')) if found[1] else None
    if status in (None, 'killed') and (self.kills or self.flooded):
      status = 'memory' if self.kills else 'output'
    if status is None and code is None:
      raise Unscored(f'bubblewrap did not begin: {stderr.strip()[-300:]}')
    if status is None:
      if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL) and elapsed >= self.allowed.processor:
        status = 'time'
      elif code > 128:
        status = 'killed'
      elif code and 'MemoryError' in stderr.strip().rpartition('\n')[2]:
        status = 'memory'
      else:
        status = 'error' if code else 'ok'
      return Result(stdout, stderr, status, code, elapsed)
    return Result(stdout, stderr, status, None, elapsed)


def measure_tree(pid):
  """What a process and its descendants did: (seconds run, seconds waited, tasks, tasks that wait).

  Waited for a processor: of the task that waited longest in each generation, all generations
  together. Of those that wait now, or for the disk, the kernel has not yet counted the time. From
  /proc/PID/task/TID/schedstat, stat and children; what the kernel does not tell counts as 0.
  """
  ran, waited, tasks, wanting, generation = 0, 0, 0, 0, [pid]
  while generation:
    longest, following = 0, []
    for parent in generation:
      with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f'/proc/{parent}/task'):
          folder = f'/proc/{parent}/task/{task}'
          run, wait = map(int, _read_text(f'{folder}/schedstat').split()[:2])
          state = _read_text(f'{folder}/stat').rpartition(')')[2].split()[0]
          ran, longest, tasks = ran + run, max(longest, wait), tasks + 1
          wanting += state in 'RD'
          following += map(int, _read_text(f'{folder}/children').split())
    waited, generation = waited + longest, following
  return ran / 1e9, waited / 1e9, tasks, wanting


def _read_text(path):
  with open(path) as file:
    return file.read()
