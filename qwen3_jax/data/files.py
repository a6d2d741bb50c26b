"""Files by path, folder or glob, local or remote; compressed ones expanded once; their lines."""

import contextlib
import gzip
import hashlib
import json
import os
import secrets
import zlib
from pathlib import Path

from etils import epath

LINE_BYTES = 256 * 1024 * 1024


def find(spec):
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


def hash_text(data):
  """64 bits of the content of a document, given as UTF-8 bytes."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


def split_name(path):
  """The ending that says what a file holds, and that of its compression or ''."""
  name = os.fspath(path)
  stem, _, packed = name.rpartition('.') if name.endswith(('.gz', '.zst')) else (name, '', '')
  return stem.rpartition('.')[2], packed


def cache_folder(key, cache=None):
  """The folder of `cache` (see `fetch`) for what was made of something that `key`, JSON, names."""
  cache = Path(cache or os.environ.get('QWEN3_JAX_CACHE') or '~/.cache/qwen3_jax').expanduser()
  return cache / hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()


def fetch(path, cache=None):
  """The file at `path` as a local one, unpacked, and the folder in which to keep what it gives.

  Compressed, remote and Parquet files are expanded once into `cache` (default $QWEN3_JAX_CACHE,
  else ~/.cache/qwen3_jax), the latter as JSON lines.
  """
  name, (kind, packed) = os.fspath(path), split_name(path)
  try:
    stat = path.stat()
    with path.open('rb') as file:
      key = [name, stat.length, stat.mtime, hash_text(file.read(2 ** 20))]
  except OSError as error:
    raise type(error)(f'{name}: cannot be read ({error}); check its permissions') from error
  folder = cache_folder(key, cache)
  if not (packed or kind == 'parquet' or '://' in name):
    return Path(name), folder
  local = folder / 'documents'
  if not local.exists():
    chunks = _parquet_lines(path) if kind == 'parquet' else _chunks(path, packed)
    with replace(local) as file:
      file.writelines(chunks)
  return local, folder


@contextlib.contextmanager
def replace(path):
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


def lines(local, name, refuse=None, limit=None):
  """(offset, number from 1, bytes, text) of each line; lines end at \\n only.

  A line of `limit` bytes (default LINE_BYTES), of which no more is read into memory, or one that is
  not UTF-8 is a ValueError or, with `refuse`, left out after `refuse(number, complaint)`.
  """
  limit = limit or LINE_BYTES
  offset = number = 0
  with open(local, 'rb') as file:
    while data := file.readline(limit):
      number, start, complaint = number + 1, offset, None
      offset += len(data)
      if len(data) == limit:
        complaint = f'longer than {limit:,} bytes; split it'
      else:
        try:
          text = data.decode('utf-8' if start else 'utf-8-sig')
        except UnicodeDecodeError as error:
          complaint = (f'not UTF-8: byte {data[error.start]:#04x} at column {error.start + 1}; '
                       'convert the file to UTF-8')
      if not complaint:
        yield start, number, data, text
      elif not refuse:
        raise ValueError(f'{name}, line {number}: {complaint}')
      else:
        refuse(number, complaint)
        while len(data) == limit and data[-1:] != b'\n':
          data = file.readline(limit)
          offset += len(data)
