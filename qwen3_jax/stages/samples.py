"""Samples of a rollout as training batches: packed into rows, one segment a sample."""
import collections
import dataclasses

import numpy as np

FLOATS = ('weight_BT', 'scale_BT', 'advantage_BT', 'rollout_logp_BT', 'old_logp_BT',
          'reference_logp_BT')
ALWAYS = FLOATS[:4]  # also where there is no sample
INTS = ('tokens_BT', 'segment_BT', 'position_BT')


@dataclasses.dataclass
class Sample:
  """An answer to train on. Arrays have an entry for every token of prompt and answer, T in all."""
  tokens: np.ndarray
  weight: np.ndarray  # 1 where the model drew the token and it counts
  rollout_logp: np.ndarray  # 0 in the prompt
  routes: np.ndarray | None = None  # (T, MoE layers, X)
  group: int = 0
  teacher: int = 0  # the number of the one that scores it
  advantage: float | np.ndarray = 0.0
  scale: float = 0.0  # see `training.advantage.aggregate`
  old_logp: np.ndarray | None = None
  reference_logp: np.ndarray | None = None

  def __len__(self):
    return len(self.tokens)


def rows_of(samples, length):
  """The samples as rows of at most `length` tokens: the longest first, each where it first fits.

  Raises ValueError for a sample longer than a row.
  """
  rows, room = [], []
  for sample in sorted(samples, key=len, reverse=True):
    if len(sample) > length:
      raise ValueError(f'a sample has {len(sample)} tokens, config.data.length is {length}; set '
                       'config.rollout.max_tokens lower, or rows longer')
    place = next((i for i, left in enumerate(room) if left >= len(sample)), len(rows))
    if place == len(rows):
      rows.append([])
      room.append(length)
    rows[place].append(sample)
    room[place] -= len(sample)
  return rows


def count_rows(needed, least):
  """`least` times 1, 2, 3, 4, 6, 8, 12 ...: few sizes, so that few programs are compiled."""
  parts = -(-max(needed, 1) // least)
  size = 1
  while size < parts:
    size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else -(-size * 4 // 3)
  return size * least


def make_batch(rows, count, length):
  """Arrays (count, length) of `rows`, lists of samples; what no sample has is left out."""
  samples = [sample for row in rows for sample in row]
  batch = {name: np.zeros((count, length), np.int32) for name in INTS}
  names = [name for name in FLOATS if name in ALWAYS or
           samples and getattr(samples[0], name.removesuffix('_BT')) is not None]
  batch |= {name: np.zeros((count, length), np.float32) for name in names}
  if samples and samples[0].routes is not None:
    routes = samples[0].routes
    batch['routes_BTLX'] = np.zeros((count, length, *routes.shape[1:]), routes.dtype)
    batch['routes_BTLX'][...] = np.arange(routes.shape[-1], dtype=routes.dtype)  # for padding
  for b, row in enumerate(rows):
    start = 0
    for number, sample in enumerate(row, 1):
      part = np.s_[b, start:start + len(sample)]
      batch['tokens_BT'][part], batch['segment_BT'][part] = sample.tokens, number
      batch['position_BT'][part] = np.arange(len(sample))
      for name in names:
        batch[name][part] = getattr(sample, name.removesuffix('_BT'))
      if sample.routes is not None:
        batch['routes_BTLX'][part] = sample.routes
      start += len(sample)
  return batch


def take_back(rows, values_BT, name):
  """Gives each sample its part of `values_BT`, an array over the rows it was packed into."""
  for b, row in enumerate(rows):
    start = 0
    for sample in row:
      setattr(sample, name, np.array(values_BT[b, start:start + len(sample)]))
      start += len(sample)


def to_arrays(samples):
  """A dict of arrays for each sample, for `save`."""
  return [{name: np.asarray(value) for name, value in vars(sample).items() if value is not None}
          for sample in samples]


def from_arrays(dicts):
  """The samples that `to_arrays` took apart."""
  return [Sample(**{name: value if value.ndim else value.item() for name, value in each.items()})
          for each in dicts]


def save(path, dicts):
  """Writes a list of dicts of arrays, whole or not at all; returns the file's name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.parent / f'{path.name}.new'
  with new.open('wb') as file:
    np.savez(file, **{f'{n}/{name}': value for n, each in enumerate(dicts)
                      for name, value in each.items()})
  new.replace(path)
  return path.name


def load(path):
  """What `save` wrote."""
  found = collections.defaultdict(dict)
  with path.open('rb') as file, np.load(file) as arrays:
    for key in arrays:
      number, _, name = key.partition('/')
      found[int(number)][name] = arrays[key]
  return [found[number] for number in sorted(found)]
