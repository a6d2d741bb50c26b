"""Verifiers in child processes, killed when one takes too long and replaced when one dies.

What a model wrote can keep a regular expression busy for hours, and no thread can be stopped. This
file is also the program of a child: it reads [name, record, response, seconds] as a JSON line and
answers [number, null], or [null, why it cannot tell].
"""
import collections
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START, GRACE, RECYCLE = 60.0, 2.0, 5000


@dataclasses.dataclass(frozen=True)
class Missing:
  """A number that could not be had, for a reason that lies in the machinery."""
  reason: str


class Pool:
  """`workers` child processes; started when first needed, ended by `close`."""

  def __init__(self, workers=2):
    self.workers = [_Worker() for _ in range(workers)]

  def run(self, jobs, deadline):
    """For each (name, record, response) a float or Missing; `deadline(name)` is its seconds.

    The start of a child is not counted. A job whose child dies is given to another once. Raises
    RuntimeError where children do not start.
    """
    try:
      return self._run(jobs, deadline)
    except BaseException:
      self.close()  # what is under way would answer the next question
      raise

  def _run(self, jobs, deadline):
    lines = [_encode(*job, deadline(job[0])) for job in jobs]
    results = [line if isinstance(line, Missing) else None for line in lines]
    left = collections.deque(i for i, result in enumerate(results) if result is None)
    died, busy = collections.Counter(), {}
    with selectors.DefaultSelector() as selector:
      while left or busy:
        for worker in self.workers:
          if left and worker not in busy:
            busy[worker] = left.popleft()
            worker.begin(lines[busy[worker]], deadline(jobs[busy[worker]][0]))
            selector.register(worker.socket, selectors.EVENT_READ, worker)
        wait = min(worker.until for worker in busy) - time.monotonic()
        ready = [key.data for key, _ in selector.select(max(wait, 0))]
        for worker in [w for w in busy if w in ready or w.until < time.monotonic()]:
          answer = worker.go_on(worker in ready)
          if answer is None:
            continue
          selector.unregister(worker.socket)
          place, started = busy.pop(worker), worker.sent
          if worker.finish(answer) and not died[place]:
            died[place] += 1
            left.appendleft(place)
          elif not started and 'ended with -' not in answer.reason:  # no signal killed it
            raise RuntimeError(f'processes for verifiers do not start ({answer.reason}); try: '
                               f'{sys.executable} -c "import qwen3_jax.rewards.verifiers"')
          else:
            results[place] = answer
    return results

  def close(self):
    """Ends the children."""
    for worker in self.workers:
      worker.stop()


def _encode(name, record, response, seconds):
  """The line that a child reads; Missing where there is none, as of calls nested too deep."""
  fields = {field.name: getattr(response, field.name) for field in dataclasses.fields(response)}
  try:
    return json.dumps([name, record, fields, seconds]).encode() + b'\n'
  except (TypeError, ValueError, RecursionError) as error:
    return Missing(f'cannot be sent to a verifier: {error}'[:300])


class _Worker:
  """One child: starting (its first line is `ready`), working on a job, or idle."""

  def __init__(self):
    self.process, self.socket, self.until, self.jobs = None, None, 0.0, 0

  def begin(self, line, seconds):
    """Gives a job to the child, which may be starting."""
    self.line, self.seconds, self.sent, self.read = line, seconds, False, b''
    if self.process is None or self.process.poll() is not None or self.jobs >= RECYCLE:
      self.stop()
      self.start()
      self.until = time.monotonic() + START
    else:
      self.send()
    self.jobs += 1

  def start(self):
    self.socket, theirs = socket.socketpair()
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1',
                   'PYTHONPATH': os.pathsep.join(filter(None, (
                     str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH'))))}
    with theirs:
      self.process = subprocess.Popen(
        [sys.executable, '-P', '-m', __name__], stdin=theirs, stdout=theirs,
        stderr=subprocess.DEVNULL, start_new_session=True, env=environment)
    self.jobs = 0

  def send(self):
    self.sent, self.until = True, time.monotonic() + self.seconds + GRACE
    with contextlib.suppress(OSError):  # a dead child is seen when its end of the line is read
      self.socket.settimeout(self.seconds)
      self.socket.sendall(self.line)

  def go_on(self, ready):
    """The answer, if it is there; Missing at the deadline or the child's end."""
    if not ready:
      return Missing('deadline' if self.sent else 'no start')
    try:
      data = self.socket.recv(65536)
    except OSError:
      data = b''
    if not data:
      code = self.process.wait()
      return Missing('deadline' if code == -signal.SIGALRM else f'worker ended with {code}')
    self.read += data
    if not self.read.endswith(b'\n'):
      return None
    value, reason = json.loads(self.read)
    self.read = b''
    if not self.sent:
      return self.send()
    return value if reason is None else Missing(reason)

  def finish(self, answer):
    """Clears up after an answer; True where the child died and the job may be tried again."""
    ended = isinstance(answer, Missing) and (
      self.process.poll() is not None or answer.reason in ('deadline', 'no start'))
    if ended:
      self.stop()
    return ended and answer.reason.startswith('worker ended')

  def stop(self):
    """Kills the child and what it started."""
    if self.process is not None:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()
      self.socket.close()
    self.process = self.socket = None


def serve():
  """The child. A job that runs `seconds` ends it by SIGALRM, which no computation holds up."""
  import resource

  from qwen3_jax.rewards import verifiers
  from qwen3_jax.rewards.response import Response, Unscored
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  out = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run ends its children itself
  print('[null, "ready"]', file=out)
  for line in sys.stdin:
    name, record, response, seconds = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
      said = float(verifiers.verify(name, record, Response(**response))), None
    except Unscored as error:
      said = None, f'unscored: {error}'[:300]
    except Exception as error:  # a fault of the verifier, which the model is not to pay for
      said = None, f'{type(error).__name__}: {error}'[:300]
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(said), file=out)


if __name__ == '__main__':
  serve()
