"""Notices that the machine is about to be taken away (SIGTERM), so that the run saves and stops."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 42  # preempted and saved: start again at once


class Preemption:
  """From entry to exit SIGTERM sets a flag instead of ending the process; a second one ends it.

  On many hosts the flag is JAX's own, which it raises on all of them at the same step whichever
  host was told.
  """

  def __enter__(self):
    self._noticed = False
    self._previous = None
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *_):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _notice(self, *_):
    self._noticed = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def should_stop(self, step):
    """Whether to save after `step` and exit with EXIT_CODE; every process asks at every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noticed
