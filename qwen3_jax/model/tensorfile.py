"""Safetensors files, read and written one tensor at a time.

The format is a little-endian length, a JSON header and the bytes. The library of that name maps
whole files into memory (each page read then counts as the process's own), wants local files, and
writes only what it holds complete; this reads ranges and writes a stream, locally or on gs://.
"""
import contextlib
import dataclasses
import json
import math

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
          'BF16': np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where one tensor lies: `offset` in bytes from the start of the file."""
  path: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int


def find_tensors(folder):
  """Every tensor of `folder` by name, from `model.safetensors` or the files of its index.

  Raises FileNotFoundError where a file is missing, ValueError where one is cut short or no
  safetensors file, each naming it.
  """
  folder = epath.Path(folder)
  index = folder / 'model.safetensors.index.json'
  if (folder / 'model.safetensors').exists():
    return read_header(folder / 'model.safetensors')
  if not index.exists():
    raise FileNotFoundError(f'{folder} holds neither model.safetensors nor {index.name}; '
                            'want a model folder in safetensors format')
  try:
    home = dict(json.loads(index.read_text())['weight_map'])
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(f'{index} is not an index of safetensors ({e!r}); '
                     'is the download complete?') from e
  found = {}
  for file in sorted(set(home.values())):
    if not (folder / file).exists():
      raise FileNotFoundError(f'{folder / file} is missing, the index names it; '
                              'is the download complete?')
    found |= read_header(folder / file)
  for name, file in home.items():
    if name not in found or found[name].path.name != file:
      raise ValueError(f'{folder / file} has no tensor {name}, though {index.name} says so')
  return found


def read_header(path):
  """The tensors of one file by name. Raises ValueError if it is damaged or cut short."""
  path = epath.Path(path)
  size = path.stat().length
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise ValueError(f'{path} is cut short or no safetensors file: it has {size} bytes')
    raw = file.read(length)
  try:
    header = json.loads(raw)
    header.pop('__metadata__', None)
    rows = {name: (each['dtype'], tuple(each['shape']), *each['data_offsets'])
            for name, each in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f'{path} is no safetensors file: its header cannot be read ({e!r})') from e
  end = 8 + length + max((stop for *_, stop in rows.values()), default=0)
  if size != end:
    raise ValueError(f'{path} has {size} bytes, its header says {end}; is the download complete?')
  found = {}
  for name, (code, shape, start, stop) in rows.items():
    if code not in DTYPES:
      raise ValueError(f'{path}: {name} has type {code}; want one of {", ".join(DTYPES)}')
    if stop - start != math.prod(shape) * DTYPES[code].itemsize:
      raise ValueError(f'{path}: {name} has {stop - start} bytes, wrong for {code} {shape}')
    found[name] = Stored(path, DTYPES[code], shape, 8 + length + start)
  return found


class Reader:
  """Reads tensors, whole or some rows; a context that keeps its files open."""

  def __init__(self):
    self._files = contextlib.ExitStack()
    self._open = {}

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._files.close()

  def read(self, stored, rows=slice(None)):
    """`rows` of the first axis as a numpy array."""
    start, stop, _ = rows.indices(stored.shape[0])
    width = math.prod(stored.shape[1:])
    if stored.path not in self._open:
      self._open[stored.path] = self._files.enter_context(stored.path.open('rb'))
    file = self._open[stored.path]
    file.seek(stored.offset + start * width * stored.dtype.itemsize)
    out = np.empty((stop - start, *stored.shape[1:]), stored.dtype)
    raw = out.reshape(-1).view(np.uint8)
    if file.readinto(raw) != len(raw):
      raise ValueError(f'{stored.path} ended early; did it change while it was read?')
    return out


def write(path, tensors, arrays):
  """Writes `tensors`, {name: (numpy dtype, shape)}, in their order from the iterator `arrays`.

  Each of `arrays` is an iterable of consecutive parts of one tensor.
  """
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name, (dtype, shape) in tensors.items():
    stop = offset + math.prod(shape) * dtype.itemsize
    header[name] = dict(dtype=CODES[dtype], shape=list(shape), data_offsets=[offset, stop])
    offset = stop
  raw = json.dumps(header, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % 8)
  with epath.Path(path).open('wb') as file:
    file.write(len(raw).to_bytes(8, 'little') + raw)
    for (name, (dtype, shape)), parts in zip(tensors.items(), arrays):
      size = 0
      for part in parts:
        assert part.dtype == dtype, f'{name}: {part.dtype}'
        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        size += part.size
      assert size == math.prod(shape), f'{name}: {size} elements for {shape}'
