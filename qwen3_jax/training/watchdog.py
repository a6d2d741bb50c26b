"""Ends a process that hangs: heartbeats come from a thread of JAX and go on beside a stuck step."""
import contextlib
import faulthandler
import os
import sys
import threading
import time

EXIT_CODE = 75  # hung: start again, and count it
LEAST = 600.0  # seconds; QWEN3_JAX_HANG_SECONDS sets another least limit
TIMES = 20  # as long as the longest turn so far may a turn take


class Watchdog:
  """`with Watchdog() as watch:` and `watch.beat()` after every turn of a loop.

  Where the next beat takes longer than `limit`, every thread's stack is written to stderr and the
  process ends with EXIT_CODE. The first turn, which compiles, has no limit; nor has what runs in
  `watch.paused()`. `end(code)` stands for the process's end.
  """

  def __init__(self, least=None, end=os._exit):
    self._least = float(least or os.environ.get('QWEN3_JAX_HANG_SECONDS') or LEAST)
    self._end, self._last, self._paused = end, None, 0
    self._first, self._longest = None, 0.0
    self._over = threading.Event()

  def __enter__(self):
    self._last = time.monotonic()
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._over.set()

  def beat(self):
    now = time.monotonic()
    turn, self._last = now - self._last, now
    if self._first is None:
      self._first = turn
    else:
      self._longest = max(self._longest, turn)

  @contextlib.contextmanager
  def paused(self):
    """What runs within is no part of a turn, however long it takes."""
    self._paused += 1
    begun = time.monotonic()
    try:
      yield
    finally:
      self._last += time.monotonic() - begun
      self._paused -= 1

  @property
  def limit(self):
    """Seconds: TIMES the longest turn but the first, twice the first, and no less than `least`."""
    return max(self._least, TIMES * self._longest, 2 * (self._first or 0))

  def _watch(self):
    while not self._over.wait(min(self._least / 10, 5)):
      waited = time.monotonic() - self._last
      if self._first is None or self._paused or waited < self.limit:
        continue
      print(f'error: no step ended for {waited:.0f} s (limit {self.limit:.0f} s; '
            'QWEN3_JAX_HANG_SECONDS sets the least): this process hangs and ends with exit code '
            f'{EXIT_CODE}. Its threads:', file=sys.stderr, flush=True)
      faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
      self._end(EXIT_CODE)
      return
