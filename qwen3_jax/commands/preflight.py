"""Checks, before a long run, hosts, chips, versions, the network and the folder to write to.

On many hosts run it on each (`python -m launch preflight` does). Every line is a fact; the exit
code is 0 where all is well, 78 where something is not.

Examples:
  python -m qwen3_jax preflight --workdir=gs://bucket/run --chips=16
"""
import sys
import time
import uuid

from qwen3_jax.training import hosts

FAULT = 78


def add_arguments(parser):
  parser.add_argument('--workdir', metavar='DIR', help='a folder that the run is to write to')
  parser.add_argument('--chips', type=int, help='devices that there must be in all')


def main(args):
  index, count = hosts.join()
  import jax
  devices = jax.devices()
  facts = hosts.describe()
  print(f'host {index} of {count}: {jax.local_device_count()} of {len(devices)} devices, '
        f'{devices[0].device_kind}; ' + ', '.join(f'{k} {v}' for k, v in facts.items()), flush=True)
  faults = []
  if args.chips and args.chips != len(devices):
    faults.append(f'{len(devices)} devices, {args.chips} were wanted')
  faults += add_over_all(devices)
  if args.workdir:
    faults += write_and_read(args.workdir, index)
  for fault in faults:
    print(f'error: {fault}', file=sys.stderr, flush=True)
  return FAULT if faults else 0


def add_over_all(devices):
  """What is wrong with a sum over all devices, which crosses every link."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec
  mesh = jax.make_mesh((len(devices),), ('all',), devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,))
  ones = jax.make_array_from_callback((len(devices),), NamedSharding(mesh, PartitionSpec('all')),
                                      lambda _: jnp.ones(1))
  begun = time.monotonic()
  total = int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
  print(f'a sum over {len(devices)} devices took {time.monotonic() - begun:.1f} s', flush=True)
  return [] if total == len(devices) else [f'the sum over {len(devices)} ones is {total}']


def write_and_read(workdir, index):
  """What is wrong with writing to, reading from and deleting in a folder."""
  from etils import epath
  name = epath.Path(workdir) / f'preflight-{index}-{uuid.uuid4().hex}'
  try:
    name.parent.mkdir(parents=True, exist_ok=True)
    name.write_text(name.name)
    same = name.read_text() == name.name
    name.unlink()
  except Exception as error:
    return [f'cannot write to {workdir}: {type(error).__name__}: {error}']
  print(f'{workdir} can be written, read and deleted in', flush=True)
  return [] if same else [f'{workdir} gives back other bytes than were written']
