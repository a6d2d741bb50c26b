"""Which chips train and which draw: all of them both, a part each, or whole slices each."""
import jax

from qwen3_jax import mesh as alphabet

KINDS = ('colocated', 'split', 'by_slice')


def place(kind='colocated', fraction=None, slices=None, shape=None, rollout_shape=None,
          devices=None):
  """(train mesh, rollout mesh) over `devices`, by default all; every device has its task.

  'colocated': both over all devices. 'split': the first `fraction` of the devices train, the others
  draw. 'by_slice': `slices` (train, rollout) counts whole slices. `shape` is the train mesh's (see
  `mesh.make_mesh`), `rollout_shape` the other's, by default the same with fsdp taking what remains.
  Raises ValueError for devices left over or wanted twice, and for placements that one process
  cannot drive.
  """
  devices = list(jax.devices() if devices is None else devices)
  train, draw = divide(kind, fraction, slices, devices)
  shape = dict(shape or {})
  mesh = alphabet.make_mesh(shape, train)
  if kind == 'colocated' and not rollout_shape:
    return mesh, mesh
  rest = {axis: size for axis, size in shape.items() if axis != 'fsdp'}
  return mesh, alphabet.make_mesh(rollout_shape or rest, draw)


def divide(kind, fraction, slices, devices):
  """(devices that train, devices that draw); see `place`."""
  if kind not in KINDS:
    raise ValueError(f'there is no placement {kind!r}; want one of {", ".join(KINDS)}')
  for name, value, owner in (('fraction', fraction, 'split'), ('slices', slices, 'by_slice')):
    if (value is not None) != (kind == owner):
      raise ValueError(f'config.placement.{name} is {value}, the placement {kind!r}; '
                       f'{owner!r} wants it, and no other')
  if kind == 'colocated':
    return devices, devices
  processes = {device.process_index for device in devices}
  if len(processes) > 1 and 'proxy' not in (jax.config.jax_platforms or ''):
    raise ValueError(
      f'placement {kind!r} over {len(processes)} processes: each process of JAX must run the same '
      'programs in the same order, so trainer and engine cannot go their own ways. Use '
      "'colocated', or one process for all chips: one host, or Pathways (JAX_PLATFORMS=proxy)")
  return (_by_fraction if kind == 'split' else _by_slices)(fraction or slices, devices)


def _by_fraction(fraction, devices):
  count = fraction * len(devices)
  if not 0 < fraction < 1 or abs(count - round(count)) > 1e-6:
    last = devices[min(max(int(count), 0), len(devices) - 1)]
    raise ValueError(
      f'{fraction} of {len(devices)} devices is {count:g}: {last} would be left over or wanted '
      f'twice. config.placement.fraction must be k / {len(devices)}, with 0 < k < {len(devices)}')
  return devices[:round(count)], devices[round(count):]


def _by_slices(slices, devices):
  groups = {}
  for device in devices:
    groups.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  if len(slices) != 2 or min(slices) < 1:
    raise ValueError(f'config.placement.slices is {tuple(slices)}; want how many train and how '
                     'many draw, at least 1 each')
  names = sorted(groups)
  if sum(slices) != len(names):
    over = names[sum(slices):]
    what = (f'slices {over} ({", ".join(str(d) for n in over for d in groups[n])}) would be left '
            'over' if over else 'some would be wanted twice')
    raise ValueError(f'config.placement.slices {tuple(slices)} of {len(names)}: {what}')
  return ([device for name in names[:slices[0]] for device in groups[name]],
          [device for name in names[slices[0]:] for device in groups[name]])


def hand_over(params, mesh):
  """The weights laid out on the rollout mesh: the same buffers where they lie so already.

  A step that donates its state takes these buffers with it: hand over again after it.
  """
  return jax.device_put(params, alphabet.shardings(params, mesh))
