"""math-verify in a process of its own, which is killed when a comparison takes too long.

The library's time limits rest on signals that long C calls ignore, and what it compares is hostile.
So it runs in a child with an address-space limit, is given pairs as JSON lines, and is replaced
after a kill, a crash or `RECYCLE` pairs. This file is also the child's program: it imports nothing
of the package.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time

RECYCLE, START, MEMORY = 2000, 60.0, 2 * 1024 ** 3
LOADED = 10  # how much slower a computation may be on a busy machine
_lock = threading.Lock()
_child = {'process': None, 'owner': None, 'pairs': 0}


def available():
  """Whether math-verify is installed."""
  return importlib.util.find_spec('math_verify') is not None


def compare(prediction, reference, deadline=1.0):
  """What math-verify says of the two texts: True or False, or None after `deadline` seconds.

  They are seconds of the child's processor, so that a busy machine makes nothing wrong, and at most
  LOADED times as long. None also where the child died. The start of a child (a second or two) is
  not counted.
  """
  with _lock:
    process = _get_process()
    _child['pairs'] += 1
    try:
      process.stdin.write(json.dumps([prediction, reference]).encode() + b'\n')
      process.stdin.flush()
      answer = _read_line(process, deadline)
    except OSError:
      answer = None
    if answer is None:
      stop()
    return None if answer is None else json.loads(answer)


def stop():
  """Kills the child, if there is one."""
  process, owner = _child['process'], _child['owner']
  _child.update(process=None, pairs=0)
  if process is not None and owner == os.getpid():
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _get_process():
  """The running child of this process; a forked process starts its own."""
  if _child['owner'] != os.getpid() or _child['pairs'] >= RECYCLE:
    stop()
  if _child['process'] is None:
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
    # -P: the script's own folder, with its math.py, stays off the path.
    process = subprocess.Popen([sys.executable, '-P', os.path.abspath(__file__)], bufsize=0,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=environment)
    _child.update(process=process, owner=os.getpid(), pairs=0)
    if _read_line(process, START) != b'"ready"':
      stop()
      raise RuntimeError(f'the process for math-verify did not start within {START:g} s; '
                         f'try: {sys.executable} -c "import math_verify"')
  return _child['process']


def _read_line(process, seconds):
  """The child's next line, or None at the deadline or its end. Lines are shorter than a pipe."""
  start, end = _spent(process), time.monotonic() + LOADED * seconds
  while True:
    left = min(seconds - _spent(process) + start, end - time.monotonic())
    if select.select([process.stdout], [], [], max(left, 0))[0]:
      return process.stdout.readline().rstrip(b'\n') or None
    if left <= 0:
      return None


def _spent(process):
  """Seconds of processor time that the child has had."""
  try:
    with open(f'/proc/{process.pid}/stat') as file:
      fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  except OSError:  # it has ended, or this system has no /proc
    return time.monotonic()


def serve():
  """The child: reads [prediction, reference], writes true or false."""
  import resource
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  out = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  import logging
  logging.disable(logging.CRITICAL)
  from math_verify import parse, verify
  print(json.dumps('ready'), file=out)
  for line in sys.stdin:
    same = False
    with contextlib.suppress(Exception):
      prediction, reference = (parse(text, parsing_timeout=None) for text in json.loads(line))
      same = bool(verify(reference, prediction, timeout_seconds=None))
    print(json.dumps(same), file=out)


if __name__ == '__main__':
  serve()
else:
  atexit.register(stop)
