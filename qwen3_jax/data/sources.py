"""Documents by index: the standard library, generated tasks, text, JSONL, ArrayRecord, Parquet.

A text file is a document; one longer than 128 KiB is cut at blank lines into documents of about
that size, so that a book in one file can be shuffled. JSONL and Parquet documents are the field
`text` of their records; an ArrayRecord document is the record itself, as UTF-8.
"""

import array
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import inspect
import json
import os
import re
import secrets
import sysconfig
import tokenize
import zlib
from collections.abc import Callable
from pathlib import Path

import grain
import numpy as np
from etils import epath

from qwen3_jax.data import tasks

TEXT_BYTES = 128 * 1024
LINE_BYTES = 256 * 1024 * 1024
INDEX_BYTES = 4 * 1024 * 1024  # from this size on a file's index is kept


@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to documents, as grain wants it: `len(source)` and `source[i] -> str`.

  `sizes` are UTF-8 bytes, `hashes` 64 bits of the text, `groups` equal numbers for neighbours that
  may be joined (one folder, one file), or None.
  """
  name: str
  read: Callable[[int], str]
  sizes: np.ndarray
  hashes: np.ndarray
  groups: np.ndarray | None = None

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'document {i} of {len(self)} in source {self.name}')
    return self.read(int(i))

  @property
  def fingerprint(self):
    """Changes with the documents or their order."""
    return hashlib.blake2b(self.hashes.tobytes(), digest_size=8).hexdigest()

  def take(self, indices, name=None):
    """The documents at `indices`, in that order."""
    indices = np.asarray(indices)
    return Source(name or self.name, lambda i: self.read(int(indices[i])), self.sizes[indices],
                  self.hashes[indices], None if self.groups is None else self.groups[indices])


def open_source(spec, split=None, heldout=None, cache=None):
  """The source that `spec` names: 'stdlib[:code|:prose]', 'tasks[:options]', a path or a glob.

  Paths are local or gs://; a folder means all files in it (and below it, where it is local).
  `split` is 'train', 'heldout' or None (all): a document is held out where the hash of its content
  falls into the first `heldout` of all hashes (default 1 %, the standard library 2 %), whatever the
  order or number of files. Compressed and remote files are expanded once into `cache` (default
  $QWEN3_JAX_CACHE, else ~/.cache/qwen3_jax). All data is read and checked here: FileNotFoundError
  or ValueError names the file, the line and what to do.
  """
  if split not in (None, 'train', 'heldout'):
    raise ValueError(f"split must be 'train', 'heldout' or None, got {split!r}")
  kind, _, options = spec.partition(':')
  if kind == 'tasks':
    return tasks.open_tasks(options, split)
  if kind == 'stdlib':
    if options not in ('', 'code', 'prose'):
      raise ValueError(f"{spec!r}: the kinds are 'stdlib:code', 'stdlib:prose' and 'stdlib' (both)")
    source = _standard_library(options)
  else:
    source = _open_files(spec, Path(cache or os.environ.get('QWEN3_JAX_CACHE')
                                    or '~/.cache/qwen3_jax').expanduser())
  if split is None:
    return source
  share = (0.02 if kind == 'stdlib' else 0.01) if heldout is None else heldout
  out = source.hashes < np.uint64(min(share * 2.0 ** 64, 2.0 ** 64 - 2048))
  chosen = np.flatnonzero(out if split == 'heldout' else ~out)
  if not len(chosen):
    raise ValueError(f'{spec}: none of its {len(source)} documents falls into the {split} part at '
                     f'a held-out share of {share:g}; change the share or give more documents')
  return source.take(chosen, f'{spec}:{split}')


def hash_text(data):
  """64 bits of the content of a document, given as UTF-8 bytes."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


# The standard library.

def _standard_library(kind):
  """Modules of this machine's Python, and the English in them, in the order of their paths.

  Documents are distinct modules ('code') and, for each, its comments and docstrings as one text
  ('prose', from 200 characters). Both carry the hash of the module, so they are never split.
  """
  rows = [*(_modules() if kind != 'prose' else ()), *(_prose() if kind != 'code' else ())]
  groups, texts, sizes, hashes = zip(*rows)
  return Source(f'stdlib:{kind}' if kind else 'stdlib', texts.__getitem__,
                np.array(sizes, np.int64), np.array(hashes, np.uint64), np.array(groups, np.uint64))


@functools.cache
def _modules():
  """(package, text, size, hash) of each module; the package as a number."""
  root = Path(sysconfig.get_paths()['stdlib'])
  found, seen = [], set()
  for path in sorted(root.rglob('*.py')):
    if {'site-packages', 'dist-packages'} & set(path.parts):
      continue
    try:
      with tokenize.open(path) as file:
        text = file.read()
      data = text.encode()
    except (SyntaxError, UnicodeError, OSError):
      continue
    key = hash_text(data)
    if text.strip() and key not in seen:
      seen.add(key)
      package = path.parent.relative_to(root).as_posix()
      found.append((hash_text(package.encode()), text, len(data), key))
  if not found:
    raise FileNotFoundError(f'no Python sources in {root}: install them (on some systems a package '
                            'of their own) or name other data')
  return found


_ENGLISH = re.compile(r'^[ \t]*(?:#+ ?(?P<comment>[^\n]*)|'
                      r'[rRuU]?(?P<quote>"""|\'\'\')(?P<docstring>.*?)(?P=quote))', re.M | re.S)


@functools.cache
def _prose():
  found, seen = [], set()
  for package, text, _, key in _modules():
    parts, end = [], 0
    for match in _ENGLISH.finditer(text):
      if match['comment'] is None:
        parts += ['', inspect.cleandoc(match['docstring'])]
      else:
        parts += [match['comment']] if match.start() == end + 1 else ['', match['comment']]
      end = match.end()
    prose = '\n'.join(parts).strip()
    if len(prose) >= 200 and prose not in seen:
      seen.add(prose)
      found.append((package ^ 1, prose, len(prose.encode()), key))
  return found


# Files.

def _open_files(spec, cache):
  parts = [part for path in _find(spec) if len(part := _open_file(path, cache))]
  if not parts:
    raise ValueError(f'{spec}: there is no text in it; name files with documents')
  ends = np.cumsum([len(part) for part in parts])

  def read(i):
    k = int(np.searchsorted(ends, i, side='right'))
    return parts[k].read(i - int(ends[k]) + len(parts[k]))

  return Source(spec, read, *(np.concatenate([getattr(part, key) for part in parts])
                              for key in ('sizes', 'hashes', 'groups')))


def _find(spec):
  """Files that a path, folder or glob names, sorted; hidden ones are left out."""
  parts = spec.split('/')
  wild = next((k for k, part in enumerate(parts) if set(part) & set('*?[')), len(parts))
  remote = '://' in spec
  if remote and '**' in parts:
    raise ValueError(f"{spec}: '**' is not possible in a remote path; name the folder")
  try:
    root = '/'.join(parts[:wild]) or ('/' if spec.startswith('/') else '.')
    root = epath.Path(root) if remote else Path(root).expanduser()
    if wild < len(parts):
      paths = root.glob('/'.join(parts[wild:]))
    elif root.is_dir():
      paths = root.glob('*' if remote else '**/*')
    else:
      paths = [root] if root.exists() else []
    paths = [path for path in paths if not path.is_dir()]
  except ImportError as error:
    raise ValueError(f"{spec}: remote files need: pip install 'etils[epath-gcs]'") from error
  paths = sorted((epath.Path(path) for path in paths if not any(
    part.startswith('.') for part in path.relative_to(root).parts)), key=os.fspath)
  if not paths:
    raise FileNotFoundError(f'{spec}: no such file, and no file that the pattern fits')
  return paths


def _open_file(path, cache):
  """The documents of one file, by the ending of its name; what has no known ending is text."""
  name = os.fspath(path)
  stem, _, packed = name.rpartition('.') if name.endswith(('.gz', '.zst')) else (name, '', '')
  kind = stem.rpartition('.')[2]
  kind = kind if kind in ('jsonl', 'parquet', 'array_record', 'arrayrecord') else 'text'
  try:
    stat = path.stat()
    with path.open('rb') as file:
      key = [name, stat.length, stat.mtime, hash_text(file.read(2 ** 20))]
  except OSError as error:
    raise type(error)(f'{name}: cannot be read ({error}); check its permissions') from error
  folder = cache / hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
  local = Path(name)
  if packed or kind == 'parquet' or '://' in name:
    local = folder / 'documents'
    if not local.exists():
      chunks = _parquet_lines(path) if kind == 'parquet' else _chunks(path, packed)
      with _replace(local) as file:
        file.writelines(chunks)
  if kind == 'text':
    scan, read = _scan_text, _read_text
  elif kind in ('jsonl', 'parquet'):
    scan, read = _scan_lines, _read_line
  else:
    scan, read = _scan_records, _read_record
  offsets, sizes, hashes = _index(folder / 'index.npz', local, lambda: scan(local, name))
  if not len(sizes) and kind != 'text':
    raise ValueError(f'{name}: the file is empty; give it documents or leave it out')
  groups = hashes if kind != 'text' else np.full_like(hashes, hash_text(str(path.parent).encode()))
  return Source(name, lambda i: read(local, int(offsets[i]), int(sizes[i])), sizes, hashes, groups)


@contextlib.contextmanager
def _replace(path):
  """A file that appears under `path` only when it was written whole."""
  temporary = path.with_name(f'{path.name}.{secrets.token_hex(4)}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, 'wb') as file:
      yield file
    os.replace(temporary, path)
  except OSError as error:
    if error.filename is None or str(error.filename).startswith(str(path.parent)):
      raise OSError(f'cannot write the data cache {path}: {error}; set QWEN3_JAX_CACHE to a folder '
                    'with room') from error
    raise
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


def _index(path, local, scan):
  """Offsets, sizes, hashes of the documents of a file; kept beside it where a scan takes long."""
  if path.exists():
    with np.load(path) as saved:
      return saved['offsets'], saved['sizes'], saved['hashes']
  offsets, sizes, hashes = array.array('q'), array.array('q'), array.array('Q')
  for offset, size, key in scan():
    offsets.append(offset)
    sizes.append(size)
    hashes.append(key)
  index = {'offsets': np.array(offsets, np.int64), 'sizes': np.array(sizes, np.int64),
           'hashes': np.array(hashes, np.uint64)}
  if local.stat().st_size > INDEX_BYTES:
    with _replace(path) as file:
      np.savez(file, **index)
  return tuple(index.values())


def _chunks(path, packed):
  """The bytes of a file, unpacked; an incomplete archive is a ValueError."""
  try:
    with path.open('rb') as file:
      if packed == 'zst':
        yield from _unpack_zst(file)
      else:
        source = gzip.GzipFile(fileobj=file) if packed else file
        while chunk := source.read(2 ** 20):
          yield chunk
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'{path}: damaged or incomplete ({error}); fetch the file again') from error


def _unpack_zst(file):
  try:
    import zstandard
  except ImportError as error:
    raise ValueError('reading .zst files needs: pip install zstandard') from error
  frame = None
  while chunk := file.read(2 ** 20):
    while chunk:
      frame = frame or zstandard.ZstdDecompressor().decompressobj()
      try:
        yield frame.decompress(chunk)
      except zstandard.ZstdError as error:
        raise EOFError(error) from error
      chunk, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
  if frame:
    raise EOFError('the last frame does not end')


def _parquet_lines(path):
  try:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
  except ImportError as error:
    raise ValueError(f'{path}: reading Parquet needs: pip install pyarrow') from error
  try:
    with path.open('rb') as file:
      table, row = parquet.ParquetFile(file), 0
      if 'text' not in table.schema_arrow.names:
        raise ValueError(f"{path}: no column 'text' among {table.schema_arrow.names}; rename the "
                         'one that holds the documents')
      for batch in table.iter_batches(batch_size=1024, columns=['text']):
        for text in batch.column(0).to_pylist():
          row += 1
          if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, row {row}: no text in column 'text'; fill or drop the row")
          yield json.dumps({'text': text}).encode() + b'\n'
  except arrow.ArrowInvalid as error:
    raise ValueError(f'{path}: not a Parquet file ({error}); fetch the file again') from error


def _lines(local, name):
  """(offset, number from 1, bytes, text) of each line; lines end at \\n only."""
  offset = number = 0
  with open(local, 'rb') as file:
    while data := file.readline(LINE_BYTES):
      number += 1
      if len(data) == LINE_BYTES:
        raise ValueError(f'{name}, line {number}: longer than {LINE_BYTES >> 20} MiB; split it')
      try:
        yield offset, number, data, data.decode('utf-8-sig' if not offset else 'utf-8')
      except UnicodeDecodeError as error:
        raise ValueError(f'{name}, line {number}: not UTF-8 (byte {data[error.start]:#04x} at '
                         f'column {error.start + 1}); convert the file to UTF-8') from error
      offset += len(data)


def _scan_text(local, name):
  """Documents of a text file, cut at a blank line (past twice the size at any line end)."""
  start, data = 0, b''
  for offset, _, line, text in _lines(local, name):
    size = offset - start
    if (size >= TEXT_BYTES and not text.strip()) or size >= 2 * TEXT_BYTES:
      yield start, size, hash_text(data)
      start, data = offset, b''
    data += line
  if data.strip():
    yield start, len(data), hash_text(data)


def _read_text(local, offset, size):
  with open(local, 'rb') as file:
    file.seek(offset)
    return file.read(size).decode('utf-8-sig').strip('\n')


def _scan_lines(local, name):
  for offset, number, data, line in _lines(local, name):
    if data.isspace():
      continue
    try:
      text = json.loads(line)['text']
      content = text.encode()
      if not text.strip():
        raise KeyError
    except UnicodeEncodeError as error:
      raise ValueError(f'{name}, line {number}: the text has a lone surrogate (\\ud800 to '
                       '\\udfff); it is not Unicode text: repair or drop the line') from error
    except ValueError as error:
      raise ValueError(f'{name}, line {number}: not JSON ({error}); each line must be one JSON '
                       'object with a field "text"') from error
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{name}, line {number}: the record has no text; it needs a field "text" '
                       'that holds a string which is not blank: fill or drop the line') from error
    yield offset, len(content), hash_text(content)


def _read_line(local, offset, _):
  with open(local, 'rb') as file:
    file.seek(offset)
    return json.loads(file.readline().decode('utf-8-sig'))['text']


@functools.lru_cache(64)
def _records(local):
  return grain.sources.ArrayRecordDataSource(os.fspath(local))


def _scan_records(local, name):
  try:
    records = _records(local)
    for i in range(len(records)):
      data = records[i]
      data.decode()
      if not data.strip():
        raise ValueError(f'{name}, record {i}: no text; drop the record')
      yield i, len(data), hash_text(data)
  except UnicodeDecodeError as error:
    raise ValueError(f'{name}, record {i}: not UTF-8; each record must be the text of one '
                     'document') from error
  except RuntimeError as error:
    raise ValueError(f'{name}: not an ArrayRecord file, or a damaged one ({error})') from error


def _read_record(local, index, _):
  return _records(local)[index].decode()
