"""Generations with their scores on disk: found by what decided them, kept line by line.

A part is one model on one benchmark in one mode under one sampling and budget; its folder's name
ends in the hash of these. In it `about.json` says what was hashed, and generations.jsonl has a JSON
line for each generation, whose `key` is the hash of its record and number, and one for its score.
Lines are only appended; of one key's, later fields count.
"""
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path


def digest(*what, size=16):
  """Hex digits that change with `what`, values as JSON has them."""
  text = json.dumps(what, sort_keys=True, ensure_ascii=True)
  return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


class Part:
  """The generations of a part in a folder below `root`, read when opened; a context manager.

  `lines` maps keys to dicts. A last line that a killed process left unfinished is cut off, a line
  that is no JSON object with a key (a disk's fault) is passed over and counted in `damaged`. Raises
  ValueError where another process has the part open.
  """

  def __init__(self, root, name, about):
    self.about = json.loads(json.dumps(about))
    short = re.sub(r'[^\w.-]+', '-', name).strip('-')[:80]
    self.folder = Path(root) / f'{short}-{digest(self.about, size=6)}'
    self.folder.mkdir(parents=True, exist_ok=True)
    write_json(self.folder / 'about.json', self.about)
    self.path, self.lines, self.damaged = self.folder / 'generations.jsonl', {}, 0
    self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
      fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      os.close(self.file)
      raise ValueError(f'{self.folder} is being written by another evaluation: let that one end, '
                       'or give another folder') from None
    self._read()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def close(self):
    """Lets others write."""
    if self.file is not None:
      os.close(self.file)
      self.file = None

  def add(self, lines):
    """Appends dicts with a `key`, each by one write; what is added is there after a kill."""
    for line in lines:
      data = json.dumps(line, ensure_ascii=True).encode() + b'\n'
      written = os.write(self.file, data)
      if written != len(data):  # a disk that is full: half a line must not meet the next one
        os.ftruncate(self.file, os.fstat(self.file).st_size - written)
        raise OSError(28, 'No space left on device', str(self.path))
      self._take(line)

  def _take(self, line):
    self.lines[line['key']] = self.lines.get(line['key'], {}) | line

  def _read(self):
    data = self.path.read_bytes()
    whole = data.rfind(b'\n') + 1
    if whole < len(data):
      os.ftruncate(self.file, whole)
    for text in data[:whole].split(b'\n')[:-1]:
      try:
        self._take(json.loads(text))
      except (ValueError, TypeError, KeyError):
        self.damaged += 1


def write_json(path, value):
  """Writes `value` to `path`, whole or not at all."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def write_text(path, text):
  """Writes `text` to `path`, whole or not at all."""
  new = path.with_name(f'{path.name}.new')
  new.write_text(text, encoding='utf-8')
  new.replace(path)


def read_json(path):
  """The content of a JSON file; ValueError names a broken one."""
  try:
    return json.loads(Path(path).read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); delete it and evaluate again') from None
