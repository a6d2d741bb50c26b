"""DPO: direct preference optimisation against a reference model that is run once, before training.

The reference's log-probability of every token of an answer is kept in the workdir, 4 bytes each, so
that the reference needs no memory while training, and none of it is computed twice.
"""
import dataclasses
import hashlib
import json
import logging
import time
import zlib

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import preferences
from qwen3_jax.stages import load, pairs
from qwen3_jax.stages import run as stage
from qwen3_jax.training import preference

log = logging.getLogger(__name__)


def run(config, workdir, tokenizer):
  """Trains `config.init` in `workdir`; the reference is `config.reference`, by default the same."""
  if not config.init:
    raise ValueError('DPO improves a model that follows instructions: give one with --init=DIR')
  spec = load.spec_from(config.model)
  stage.check_vocabulary(tokenizer, spec)
  opened, heldout = pairs.open_pairs(config, tokenizer)
  attach_reference(config, spec, workdir / 'reference', [
    *(source for source, _ in opened), *heldout.values()])
  return pairs.train(config, workdir, tokenizer, opened, heldout,
                     pairs.bind(config, preference.dpo, beta=config.beta))


def attach_reference(config, spec, folder, sources):
  """Gives each of the `preferences.Pairs` its reference log-probabilities, kept in `folder`.

  A file counts only with its note of size and checksum, whose name says which pairs, model and
  settings it belongs to; anything else is computed again.
  """
  mesh = alphabet.make_mesh({axis: size for axis, size in config.mesh.items() if size})
  reference = config.reference or config.init
  what = [fingerprint(reference), dataclasses.asdict(spec), config.dtype]
  paths = [folder / hashlib.blake2b(json.dumps([*what, source.fingerprint]).encode(),
                                    digest_size=12).hexdigest() for source in sources]
  missing = [i for i, path in enumerate(paths) if not is_intact(path)]
  if missing:
    folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
      params = load.load_params(reference, spec, mesh, stage.compute_dtype(config))
      for i in missing:
        write(paths[i], reference_logp(config, params, sources[i], mesh))
      del params
  for path, source in zip(paths, sources):
    remote = '://' in str(path)
    source.reference = (np.frombuffer(path.read_bytes(), '<f4') if remote
                        else np.memmap(path, '<f4', 'r'))


def reference_logp(config, params, source, mesh):
  """Arrays of the log-probabilities of all trained tokens, in the order of the pairs; progress."""
  B, T = config.data.batch, config.data.length
  dtype = stage.compute_dtype(config)

  def one(params, batch):
    out = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], dtype=dtype)
    return preference.answer_logp(params, out, batch)
  one = jax.jit(one, out_shardings=NamedSharding(mesh, PartitionSpec()))
  rows, done, shown = [[]], 0, time.monotonic()
  for i in range(len(source) + 1):
    last = i == len(source)
    pair = None if last else source[i]
    if not last and sum(map(len, rows[-1])) + len(pair) > T:
      rows.append([])
    if last or len(rows) > B:
      batch = preferences.make_batch((rows[:B] + [[]] * B)[:B], T)
      values = one(params, alphabet.to_global(batch, range(B), B, mesh))
      yield np.asarray(values)[batch['weight_BT'] > 0]
      rows, done = [[]], i
    if last or time.monotonic() > shown + 10:
      shown = time.monotonic()
      print(f'reference log-probabilities: {done:,} of {len(source):,} pairs', flush=True)
    if not last:
      rows[-1].append(pair)


def write(path, arrays):
  """Writes what `is_intact` accepts; on many hosts process 0 does, and the others wait."""
  new, size, crc = path.parent / f'{path.name}.new', 0, 0
  writes = jax.process_index() == 0
  with (new if writes else epath.Path('/dev/null')).open('wb') as file:
    for array in arrays:
      data = array.astype('<f4').tobytes()
      size, crc = size + len(data), zlib.crc32(data, crc)
      file.write(data)
  if writes:
    new.replace(path)
    note = path.parent / f'{path.name}.json.new'
    note.write_text(json.dumps(dict(size=size, crc32=crc)))
    note.replace(path.parent / f'{path.name}.json')
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(str(path))


def is_intact(path):
  """Whether the file is the one its note describes."""
  note = path.parent / f'{path.name}.json'
  if not note.exists() or not path.exists():
    return False
  size = crc = 0
  with path.open('rb') as file:
    while data := file.read(1 << 24):
      size, crc = size + len(data), zlib.crc32(data, crc)
  intact = json.loads(note.read_text()) == dict(size=size, crc32=crc)
  if not intact:
    log.warning('%s is damaged; its log-probabilities are computed again', path)
  return intact


def fingerprint(folder):
  """Changes with the model in `folder`, of which only the ends of the files are read.

  For a run it is the newest manifest of checksums (and the note on the base of its adapters).
  """
  kind, folder = load.find(folder)
  if kind == 'run':
    manifests = sorted((folder / 'checkpoints').glob('*/MANIFEST.json'),
                       key=lambda path: int(path.parent.name))
    files = [*manifests[-1:], *folder.glob('base.json')]
  else:
    files = [folder / 'config.json', *sorted(folder.glob('*.safetensors'))]
  digest = hashlib.blake2b(digest_size=12)
  for path in files:
    with path.open('rb') as file:
      digest.update(path.name.encode() + file.read(1 << 20))
      file.seek(max(0, path.stat().length - (1 << 20)))
      digest.update(file.read() + str(path.stat().length).encode())
  return digest.hexdigest()
