"""The machine a program is traced for: platform, TPU generation, memory; and what runs on it.

Under a mesh (`jax.set_mesh`) its devices decide, so that a program compiled ahead of time on a host
without a TPU gets a TPU's kernels; without one, the default device.
"""
import functools
import logging
from typing import NamedTuple

import jax


class Chip(NamedTuple):
  """One JAX device of a TPU generation. VMEM in bytes is a core's."""
  vmem: int
  cores: int


CHIPS = {'v5e': Chip(128 << 20, 1), 'v5p': Chip(64 << 20, 2), 'v6e': Chip(128 << 20, 1),
         'tpu7x': Chip(64 << 20, 1)}
KINDS = {'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
         'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e', 'TPU7x': 'tpu7x', 'TPU v7': 'tpu7x',
         'TPU v7x': 'tpu7x'}

UNKNOWN = Chip(16 << 20, 1)  # of a TPU that is not listed: the least VMEM that any has


def device():
  """The mesh's (abstract) device at trace time, else the default device."""
  mesh = jax.sharding.get_abstract_mesh()
  abstract = None if mesh.empty else mesh.abstract_device
  if abstract is not None:
    return abstract
  default = jax.config.jax_default_device
  if default is None or isinstance(default, str):
    return jax.devices(default)[0]
  return default


def platform():
  """'tpu', 'gpu' or 'cpu'."""
  name = device().platform
  return 'gpu' if name in ('cuda', 'rocm') else name


def kind():
  """'v5e', 'v5p', 'v6e' or 'tpu7x'; of a TPU that is not listed, and of others, its own name."""
  name = device().device_kind
  return KINDS.get(name, name)


def vmem():
  """Bytes of VMEM that a TPU core has; of other devices those of the largest, for tests."""
  if platform() != 'tpu':
    return CHIPS['v6e'].vmem
  return CHIPS.get(kind(), UNKNOWN).vmem


def cores():
  """TensorCores that one JAX device drives: 2 on v5p (its parallel grid axes are split), else 1."""
  return CHIPS.get(kind(), UNKNOWN).cores


def report(operation, form, reason=None):
  """Logs, once for each device kind, the `form` that `operation` runs as.

  With a `reason` why it is not the fast form, it is a warning.
  """
  _log_once(operation, form, reason, platform(), kind())


@functools.cache
def _log_once(operation, form, reason, platform, kind):
  log = logging.getLogger(__name__)
  where = platform if platform == kind else f'{platform} ({kind})'
  if reason is None:
    log.info('%s on %s: %s', operation, where, form)
  else:
    log.warning('%s on %s: %s, because %s', operation, where, form, reason)
