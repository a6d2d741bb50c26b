"""The alphabet: the letters that end an array's name are its shape, its einsum and its sharding.

| letter | meaning | | letter | meaning |
|---|---|---|---|---|
| B | batch (rows) | | F | mlp or expert width |
| T | query time | | V | vocabulary |
| S | key time | | E | experts |
| D | model width | | X | chosen experts per token |
| N | query heads | | M | flattened tokens |
| K | kv heads | | R | samples per prompt |
| H | head width | | G | query heads per kv head |
| U | rank of an adapter | | | |

`q_BTNH` is an array over (B, T, N, H). The stacked-layers axis leads and is never in a name.
"""
import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')

ROWS = 'data', 'fsdp', 'expert'
RULES = dict(B=ROWS, M=ROWS, R=ROWS, T=('context',), D=('fsdp', 'expert'), E=('expert', 'fsdp'),
             N=('tensor',), K=('tensor',), F=('tensor',), V=('tensor',))


def make_mesh(shape=None, devices=None):
  """A mesh over all devices; `shape` maps axis names to sizes, the missing rest goes to `fsdp`.

  TPU slices, joined by a slower network, split the `data` axis first, which when missing has one
  part for each. Raises ValueError for an unknown axis, sizes whose product is not the number of
  devices, and a `data` axis that slices cannot split.
  """
  shape = dict(shape or {})
  devices = devices if devices is not None else jax.devices()
  tpu = devices[0].platform == 'tpu'
  slices = len({getattr(d, 'slice_index', 0) for d in devices}) if tpu else 1
  shape.setdefault('data', slices)
  unknown = set(shape) - set(AXES)
  if unknown:
    raise ValueError(f'mesh axes {sorted(unknown)} do not exist; want some of {AXES}')
  given = math.prod(shape.values())
  if 'fsdp' not in shape:
    shape['fsdp'] = max(1, len(devices) // given)
  sizes = tuple(shape.get(axis, 1) for axis in AXES)
  if math.prod(sizes) != len(devices):
    raise ValueError(f'mesh {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, there are '
                     f'{len(devices)}; change the sizes in config.mesh (fsdp, when left out, takes '
                     'what remains)')
  if sizes[0] % slices:
    raise ValueError(f'config.mesh.data is {sizes[0]}, there are {slices} slices: want a multiple')
  inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
  if slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices,
                                                allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def letters(name):
  """The shape letters of an array's name: 'gate_EDF' -> 'EDF'; '' where there are none."""
  match = re.search(r'_([A-Z]+)$', name)
  return match.group(1) if match else ''


def partition(names, shape, mesh, rules=None):
  """PartitionSpec of an array whose last axes are `names` (letters) and whose sizes are `shape`.

  Each mesh axis is used once, by the first letter that claims it; an axis that does not divide its
  dimension is dropped, so that small models run on any mesh, and so is one of a single device. Axes
  before the letters stay whole.
  """
  rules = RULES if rules is None else rules
  used, spec = set(), [None] * (len(shape) - len(names))
  for letter, size in zip(names, shape[len(shape) - len(names):]):
    chosen = []
    for axis in rules.get(letter, ()):
      ways = math.prod(mesh.shape[a] for a in chosen) * mesh.shape.get(axis, 1)
      if axis not in used and mesh.shape.get(axis, 1) > 1 and size % ways == 0:
        chosen.append(axis)
    used.update(chosen)
    spec.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
  return PartitionSpec(*spec)


def shardings(tree, mesh, rules=None):
  """NamedShardings of a pytree of arrays, by the last name with letters on each leaf's path."""
  def one(path, leaf):
    names = [letters(str(getattr(key, 'name', getattr(key, 'key', '')))) for key in path]
    names = next((n for n in reversed(names) if n), '')
    names = names[-leaf.ndim:] if leaf.ndim else ''
    return NamedSharding(mesh, partition(names, leaf.shape, mesh, rules))
  return jax.tree_util.tree_map_with_path(one, tree)


def count_row_ways(mesh):
  """Into how many parts a mesh splits a batch's rows."""
  return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def is_alone():
  """Whether one device works: no mesh is set, or one of a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or math.prod(mesh.shape.values()) == 1


def constrain(x, names):
  """Tells the partitioner the layout of `x` by its letters; on one device, nothing."""
  if is_alone():
    return x
  return jax.lax.with_sharding_constraint(
    x, partition(names, x.shape, jax.sharding.get_abstract_mesh()))


def owned_rows(batch, mesh):
  """The rows of a global batch of `batch` whose arrays live on this process's devices, sorted."""
  sharding = NamedSharding(mesh, partition('B', (batch,), mesh))
  slices = sharding.addressable_devices_indices_map((batch,)).values()
  return sorted({row for (s,) in slices for row in range(*s.indices(batch))})


def to_global(batch, rows, total, mesh):
  """Global arrays from this process's `rows` (see `owned_rows`) of a batch of `total` rows.

  `batch` maps names with letters ('tokens_BT') to numpy arrays whose first axis is B.
  """
  place = {row: i for i, row in enumerate(rows)}

  def one(name, local):
    shape = (total, *local.shape[1:])
    sharding = NamedSharding(mesh, partition(letters(name), shape, mesh))

    def part(index):
      wanted = range(*index[0].indices(total))
      return local[[place[row] for row in wanted]][(slice(None), *index[1:])]
    return jax.make_array_from_callback(shape, sharding, part)
  return {name: one(name, local) for name, local in batch.items()}
