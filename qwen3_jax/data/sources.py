"""Documents by index: the standard library, generated tasks, text, JSONL, ArrayRecord, Parquet.

A text file is a document; one longer than 128 KiB is cut at blank lines into documents of about
that size, so that a book in one file can be shuffled. JSONL and Parquet documents are the field
`text` of their records; an ArrayRecord document is the record itself, as UTF-8.
"""

import array
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path

import grain
import numpy as np

from qwen3_jax.data import files, tasks

TEXT_BYTES = 128 * 1024
INDEX_BYTES = 4 * 1024 * 1024  # from this size on a file's index is kept


@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to documents, as grain wants it: `len(source)` and `source[i]`, mostly a text.

  `sizes` are UTF-8 bytes, `hashes` 64 bits of the text, `groups` equal numbers for neighbours that
  may be joined (one folder, one file), or None.
  """
  name: str
  read: Callable[[int], object]
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
    return dataclasses.replace(
      self, name=name or self.name, read=lambda i: self.read(int(indices[i])),
      sizes=self.sizes[indices], hashes=self.hashes[indices],
      groups=None if self.groups is None else self.groups[indices])


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
    source = _open_files(spec, cache)
  return choose(source, source.hashes, split, heldout, 0.02 if kind == 'stdlib' else 0.01)


def choose(source, keys, split, heldout=None, usual=0.01):
  """The part of `source` that `split` names; held out are the first `heldout` of all keys."""
  if split not in (None, 'train', 'heldout'):
    raise ValueError(f"split must be 'train', 'heldout' or None, got {split!r}")
  if split is None:
    return source
  share = usual if heldout is None else heldout
  out = keys < np.uint64(min(share * 2.0 ** 64, 2.0 ** 64 - 2048))
  chosen = np.flatnonzero(out if split == 'heldout' else ~out)
  if not len(chosen):
    raise ValueError(f'{source.name}: none of its {len(source)} documents falls into the {split} '
                     f'part at a held-out share of {share:g}; change the share or give more '
                     'documents')
  return source.take(chosen, f'{source.name}:{split}')


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
    key = files.hash_text(data)
    if text.strip() and key not in seen:
      seen.add(key)
      package = path.parent.relative_to(root).as_posix()
      found.append((files.hash_text(package.encode()), text, len(data), key))
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
  parts = [part for path in files.find(spec) if len(part := _open_file(path, cache))]
  if not parts:
    raise ValueError(f'{spec}: there is no text in it; name files with documents')
  return join(parts, spec)


def join(parts, name):
  """The documents of several sources, one source after the other."""
  ends = np.cumsum([len(part) for part in parts])

  def read(i):
    k = int(np.searchsorted(ends, i, side='right'))
    return parts[k].read(i - int(ends[k]) + len(parts[k]))

  return Source(name, read, *(np.concatenate([getattr(part, key) for part in parts])
                              for key in ('sizes', 'hashes', 'groups')))


def _open_file(path, cache):
  """The documents of one file, by the ending of its name; what has no known ending is text."""
  name, kind = os.fspath(path), files.split_name(path)[0]
  kind = kind if kind in ('jsonl', 'parquet', 'array_record', 'arrayrecord') else 'text'
  local, folder = files.fetch(path, cache)
  if kind == 'text':
    scan, read = _scan_text, _read_text
  elif kind in ('jsonl', 'parquet'):
    scan, read = _scan_lines, _read_line
  else:
    scan, read = _scan_records, _read_record
  offsets, sizes, hashes = _index(folder / 'index.npz', local, lambda: scan(local, name))
  if not len(sizes) and kind != 'text':
    raise ValueError(f'{name}: the file is empty; give it documents or leave it out')
  folder = files.hash_text(str(path.parent).encode())
  groups = hashes if kind != 'text' else np.full_like(hashes, folder)
  return Source(name, lambda i: read(local, int(offsets[i]), int(sizes[i])), sizes, hashes, groups)


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
    with files.replace(path) as file:
      np.savez(file, **index)
  return tuple(index.values())


def _scan_text(local, name):
  """Documents of a text file, cut at a blank line (past twice the size at any line end)."""
  start, data = 0, b''
  for offset, _, line, text in files.lines(local, name):
    size = offset - start
    if (size >= TEXT_BYTES and not text.strip()) or size >= 2 * TEXT_BYTES:
      yield start, size, files.hash_text(data)
      start, data = offset, b''
    data += line
  if data.strip():
    yield start, len(data), files.hash_text(data)


def _read_text(local, offset, size):
  with open(local, 'rb') as file:
    file.seek(offset)
    return file.read(size).decode('utf-8-sig').strip('\n')


def _scan_lines(local, name):
  for offset, number, data, line in files.lines(local, name):
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
    yield offset, len(content), files.hash_text(content)


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
      yield i, len(data), files.hash_text(data)
  except UnicodeDecodeError as error:
    raise ValueError(f'{name}, record {i}: not UTF-8; each record must be the text of one '
                     'document') from error
  except RuntimeError as error:
    raise ValueError(f'{name}: not an ArrayRecord file, or a damaged one ({error})') from error


def _read_record(local, index, _):
  return _records(local)[index].decode()
