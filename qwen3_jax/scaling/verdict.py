"""What the TPU compiler makes of a program: its text and its memory, kept on disk by the hash.

A file is named by the hash of all that the outcome follows from: the program's StableHLO, the
devices, the versions of JAX, jaxlib and libtpu, and the compiler's flags. A damaged file is
ignored, and written anew.
"""
import concurrent.futures
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax

FLAGS = 'LIBTPU_INIT_ARGS', 'XLA_FLAGS'
BEAT = 30  # seconds between two signs of life


class Verdict(NamedTuple):
  """Bytes of one device by the compiler's parts and the compiled program's text, without kernels'
  bodies; or where it finds no room, what is needed of the room there is. Seconds of compiling, and
  whether it was known."""
  memory: dict | None
  text: str
  need: float
  room: float
  seconds: float
  kept: bool = False


def of(lowered, mesh, folder=None, say=print):
  """The `Verdict` on a lowered program, known from `folder` or compiled now.

  Raises ValueError where the compiler refuses the program for another reason than memory.
  """
  path = folder and Path(folder) / f'{key_of(lowered, mesh)}.json.gz'
  if path and (known := read(path)):
    return known._replace(kept=True)
  begun, memory, text, need, room = time.monotonic(), None, '', 0.0, 0.0
  try:
    compiled = aside(lowered.compile, say)
    memory, text = memory_of(compiled), strip(compiled.as_text())
  except jax.errors.JaxRuntimeError as error:
    need, room = without_room(error)
  found = Verdict(memory, text, need, room, time.monotonic() - begun)
  if path:
    write(path, found)
  return found


def strip(text):
  """A program's text without what is long and says nothing: kernels' bodies and their sources."""
  return re.sub(r'"(body|debug_locations)":"[^"]*"', r'"\1":""', text)


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
  """(needed, there is) in bytes, by the compiler's error; ValueError for another error."""
  number = r'([\d.]+)([GMK])'
  used = (re.search(rf'Used {number} of {number} hbm', str(error)) or re.search(
    rf'total memory required [^(]*\({number}\) exceeds available HBM \({number}\)', str(error)))
  if not used:
    raise ValueError(f'the TPU compiler refuses this program: {error}') from error
  scale = {'G': 2 ** 30, 'M': 2 ** 20, 'K': 2 ** 10}
  return float(used[1]) * scale[used[2]], float(used[3]) * scale[used[4]]


def key_of(lowered, mesh):
  """Hash of all that decides."""
  known = [version(name) for name in ('jax', 'jaxlib', 'libtpu')]
  known += [os.environ.get(name, '') for name in FLAGS]
  known += [str(dict(mesh.shape)), mesh.devices.flat[0].device_kind, lowered.as_text()]
  known += [str((device.id, getattr(device, 'coords', None), getattr(device, 'slice_index', 0)))
            for device in mesh.devices.flat]
  return hashlib.sha256('\0'.join(known).encode()).hexdigest()[:40]


def version(name):
  """A distribution's version, or 'none'."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return 'none'


def read(path):
  """The `Verdict` in a file, or None where there is none whose checksum is right."""
  try:
    checksum, body = gzip.decompress(path.read_bytes()).decode().split('\n', 1)
    return Verdict(*json.loads(body)) if checksum == hash_of(body) else None
  except (OSError, EOFError, ValueError, zlib.error):
    return None


def write(path, found):
  """Writes what `read` reads, whole or not at all; a folder that cannot be written is no error."""
  body = json.dumps(found)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      file.write(gzip.compress(f'{hash_of(body)}\n{body}'.encode(), 6))
    os.replace(file.name, path)
  except OSError:
    pass


def hash_of(text):
  return hashlib.sha256(text.encode()).hexdigest()
