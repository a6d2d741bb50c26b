"""What the TPU compiler says of a program: memory, collectives, kernels; kept on disk by its hash.

A file is named by the hash of all that the verdict follows from: the program's StableHLO, the
devices, the versions of JAX, jaxlib and libtpu, the compiler's flags, and this package's readers of
its text. A damaged file is ignored, and written anew.
"""
import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from pathlib import Path

import jax

from qwen3_jax.scaling import kernel_calls, traffic

FLAGS = 'LIBTPU_INIT_ARGS', 'XLA_FLAGS'
BEAT = 30  # seconds between two signs of life


def of(lowered, mesh, folder=None, say=print):
  """A dict of plain values; `kept`: it was found in `folder`.

  Either `need` and `room`, bytes of a device, where the compiler finds no room; or `memory` {part:
  bytes}, `wire` rows (see `traffic.Collective`) and `kernels` rows (`kernel_calls.Call`). And
  `seconds` of compiling.
  """
  path = folder and Path(folder) / f'{key_of(lowered, mesh)}.json'
  if path and (known := read(path)):
    return known | dict(kept=True)
  begun = time.monotonic()
  try:
    compiled = aside(lowered.compile, say)
    text = compiled.as_text()
    found = dict(memory=memory_of(compiled), wire=[list(x) for x in traffic.read(text, mesh)],
                 kernels=[list(x) for x in kernel_calls.read(text)])
  except jax.errors.JaxRuntimeError as error:
    found = without_room(error)
  found['seconds'] = time.monotonic() - begun
  if path:
    write(path, found)
  return read_back(found) | dict(kept=False)


def aside(work, say):
  """work() in a thread of its own, so that Ctrl-C is heard, and a word each BEAT seconds."""
  pool, begun = concurrent.futures.ThreadPoolExecutor(1), time.monotonic()
  job = pool.submit(work)
  pool.shutdown(wait=False)
  while True:
    done, _ = concurrent.futures.wait([job], timeout=BEAT)
    if done:
      return job.result()
    say(f'  {time.monotonic() - begun:.0f} s ...')


def memory_of(compiled):
  """Bytes of one device by the compiler's parts."""
  m = compiled.memory_analysis()
  return dict(arguments=m.argument_size_in_bytes, outputs=m.output_size_in_bytes,
              temporaries=m.temp_size_in_bytes, aliased=m.alias_size_in_bytes)


def without_room(error):
  """What the compiler's error says of memory; ValueError where it is about something else."""
  number = r'([\d.]+)([GMK])'
  used = (re.search(rf'Used {number} of {number} hbm', str(error)) or re.search(
    rf'total memory required [^(]*\({number}\) exceeds available HBM \({number}\)', str(error)))
  if not used:
    raise ValueError(f'the TPU compiler refuses this program: {error}') from error
  scale = {'G': 2 ** 30, 'M': 2 ** 20, 'K': 2 ** 10}
  return dict(need=float(used[1]) * scale[used[2]], room=float(used[3]) * scale[used[4]])


def key_of(lowered, mesh):
  """Hash of all that decides the verdict."""
  known = [version(name) for name in ('jax', 'jaxlib', 'libtpu')]
  known += [os.environ.get(name, '') for name in FLAGS]
  known += [str(dict(mesh.shape)), mesh.devices.flat[0].device_kind, lowered.as_text()]
  known += [str((device.id, getattr(device, 'coords', None), getattr(device, 'slice_index', 0)))
            for device in mesh.devices.flat]
  known += [Path(module.__file__).read_text() for module in (kernel_calls, traffic)]
  return hashlib.sha256('\0'.join(known).encode()).hexdigest()[:40]


def version(name):
  """A distribution's version, or 'none'."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return 'none'


def read(path):
  """The verdict in a file, or None where there is none whose checksum is right."""
  try:
    checksum, body = path.read_text().split('\n', 1)
    return json.loads(body) if checksum == hash_of(body) else None
  except (OSError, ValueError):
    return None


def write(path, found):
  """Writes what `read` reads, whole or not at all; a folder that cannot be written is no error."""
  body = json.dumps(found)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False) as file:
      file.write(f'{hash_of(body)}\n{body}')
    os.replace(file.name, path)
  except OSError:
    pass


def read_back(found):
  """As it will be read: lists in the place of tuples."""
  return json.loads(json.dumps(found))


def hash_of(text):
  return hashlib.sha256(text.encode()).hexdigest()
