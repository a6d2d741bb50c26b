"""Does a stage fit a TPU slice, how fast can it be, and why: from the real compiler, before paying.

Memory, collectives and kernels are those of the compiled program, FLOPs those of its jaxpr. Times
are a roofline, no measurement (see `scaling.describe.ASSUMED`): nothing has run on a TPU.
"""
import collections
import math
from typing import NamedTuple

import jax

from qwen3_jax import mesh as alphabet
from qwen3_jax.scaling import chips, kernel_calls, memory, programs, traffic, verdict, work
from qwen3_jax.stages import load, placement

GIB = 2 ** 30


class Wire(NamedTuple):
  """Collectives of a kind over the same axes: runs and bytes of one device.

  `hidden`: other work may go on beside them; `dcn`: they leave the slice.
  """
  kind: str
  axes: str
  hidden: bool
  dcn: bool
  runs: int
  bytes: float


class Estimate(NamedTuple):
  """One compiled program. Bytes and FLOPs are a device's; times in seconds.

  `hbm` and `parts` include what lies beside it; of ICI and DCN, `exposed_s` is what nothing hides.
  """
  name: str
  parts: dict  # HBM by what it holds
  hbm: float
  room: float
  tokens: int
  useful: float
  executed: float
  wire: list
  kernels: list  # kernel_calls.Time
  products_s: float  # of FLOPs outside of kernels
  memory_s: float
  ici_s: float
  dcn_s: float
  exposed_s: float
  compiled_s: float
  kept: bool
  fault: str = ''

  @property
  def kernels_s(self):
    return sum(each.seconds for each in self.kernels)

  @property
  def seconds(self):
    """The longest of computing, HBM and hidden collectives, then what nothing hides."""
    return max(self.products_s + self.kernels_s, self.memory_s,
               self.ici_s + self.dcn_s - self.exposed_s) + self.exposed_s

  @property
  def serial_s(self):
    """Where nothing overlaps."""
    return self.products_s + self.kernels_s + self.memory_s + self.ici_s + self.dcn_s

  @property
  def fits(self):
    return not self.fault and self.hbm <= self.room


def get_devices(topology, slices=1):
  """The described devices of `slices` slices; ValueError without the compiler or the topology."""
  from jax.experimental import topologies
  chips.find(topology)
  more = {'num_slices': slices} if slices > 1 else {}
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **more).devices
  except (RuntimeError, NotImplementedError) as error:  # the first is of what the compiler says
    text = str(error).splitlines()[0]
    if verdict.version('libtpu') == 'none':
      raise ValueError(f"no TPU compiler here ({text}): pip install 'jax[tpu]'; it runs on any x86 "
                       'Linux host') from error
    raise ValueError(f'the compiler knows no topology {topology} ({text}); take the grid of a '
                     'slice that exists, e.g. v5e:4x4, v5p:4x4x4, v6e:8x8') from error


def check(config, topology, count):
  """ValueError, in seconds and without a compiler, for what can never fit `count` devices.

  The float32 weights, what the optimizer keeps and a gradient of each must lie somewhere.
  """
  _, chip = chips.find(topology)
  spec = load.spec_from(config.model)
  adapted = config.lora.rank is not None
  trained = memory.state(config.optim.kind, config.optim.moments)
  least = spec.parameters() * (2 if adapted else trained) / count
  room = chip.usable / chip.devices
  if least > room:
    what, more = ('weights', '') if adapted else (
      'weights, moments and gradients', ', or adapters (--config.lora.rank=16)')
    raise ValueError(
      f'does not fit: {what} of {spec.parameters() / 1e9:.1f} billion parameters take '
      f'{least / GIB:.1f} GiB of each of {count} devices, short by {(least - room) / GIB:.1f} GiB '
      f'of the {room / GIB:.2f} they have. Take at least {math.ceil(count * least / room)} of '
      f'them, a smaller model{more}')


def check_rows(config, mesh):
  """ValueError where the batch's rows cannot be split over all devices that share them."""
  ways = math.prod(mesh.shape.get(axis, 1) for axis in alphabet.RULES['B'])
  if config.data.batch % ways:
    near = max(ways, round(config.data.batch / ways) * ways)
    raise ValueError(f'config.data.batch is {config.data.batch} rows, no multiple of the {ways} '
                     f'devices that share them: some would repeat the work of others. Set '
                     f'--config.data.batch={near}')


def make_meshes(config, topology, slices):
  """(train mesh, rollout mesh) on described devices."""
  devices = get_devices(topology, slices)
  check(config, topology, len(devices))
  shape = {axis: size for axis, size in config.mesh.items() if size}
  if 'placement' not in config:
    mesh = alphabet.make_mesh(shape, devices)
    return mesh, mesh
  p = config.placement
  return placement.place(p.kind, p.fraction, p.slices, shape, p.rollout_mesh, devices)


def run(config, topology, slices=1, teacher=None, say=print, folder=None):
  """[Estimate] of every program of the stage of `config` on `slices` slices.

  `say` is told what goes on; verdicts are kept in `folder`. Raises ValueError for what cannot be.
  """
  mesh, draw_mesh = make_meshes(config, topology, slices)
  check_rows(config, mesh)
  _, chip = chips.find(topology)
  generation = topology.partition(':')[0]
  found = []
  for program in programs.of_stage(config, mesh, draw_mesh, teacher):
    shape = ', '.join(f'{k} {v}' for k, v in program.mesh.shape.items() if v > 1)
    say(f'{program.name} for {program.mesh.size} devices ({shape}): compiling ...')
    found.append(estimate(program, chip, generation, say, folder))
    say('  was compiled before' if found[-1].kept else
        f'  compiled in {found[-1].compiled_s:.0f} s')
  return found


def estimate(program, chip, generation, say=print, folder=None):
  """The `Estimate` of one program; where the compiler finds no room for it, with its `fault`."""
  mesh, share = program.mesh, 1 / chip.devices
  with jax.set_mesh(mesh):
    traced = program.fn.trace(*program.args)
    executed = program.turns * work.of_jaxpr(traced.jaxpr.jaxpr) / mesh.size
    lowered = traced.lower()
  found = verdict.of(lowered, mesh, folder, say)
  numbers = dict(name=program.name, room=chip.usable * share, tokens=program.tokens,
                 useful=program.useful / mesh.size, executed=executed,
                 compiled_s=found.seconds, kept=found.kept)
  if found.memory is None:
    return Estimate(parts=program.parts | program.beside, hbm=found.need, wire=[], kernels=[],
                    products_s=0, memory_s=0, ici_s=0, dcn_s=0, exposed_s=0,
                    fault=f'short by {(found.need - found.room) / GIB:.1f} GiB a device',
                    **numbers)
  calls = [call._replace(runs=call.runs * program.turns)
           for call in kernel_calls.read(found.text)]
  slices = len({getattr(device, 'slice_index', 0) for device in mesh.devices.flat})
  peak, bandwidth = chip.flops * share, chip.bandwidth * share
  wire = sum_wire(traffic.read(found.text, mesh, slices), program)
  sent = {dcn: sum(each.bytes for each in wire if each.dcn == dcn) for dcn in (False, True)}
  exposed = sum(each.bytes / ((chip.dcn if each.dcn else chip.ici) * share)
                for each in wire if not each.hidden)
  parts = parts_of(program, found.memory)
  return Estimate(
    parts=parts, hbm=sum(parts.values()), wire=wire,
    kernels=kernel_calls.price(calls, generation, peak, bandwidth),
    products_s=max(0, executed - kernel_calls.counted(calls)) / peak,
    memory_s=hbm_traffic(program, found.memory, wire) / bandwidth,
    ici_s=sent[False] / (chip.ici * share), dcn_s=sent[True] / (chip.dcn * share),
    exposed_s=exposed, **numbers)


def parts_of(program, memory):
  """Bytes of one device by what holds them: the compiler's sum, and what lies beside."""
  parts = dict(program.parts)
  parts['other arguments'] = memory['arguments'] - sum(parts.values())
  parts['temporaries'] = memory['temporaries']
  parts['outputs'] = memory['outputs'] - memory['aliased']
  return parts | {f'beside: {name}': size for name, size in program.beside.items()}


def sum_wire(rows, program):
  """[Wire], the largest first, from [traffic.Collective]."""
  total = collections.defaultdict(lambda: (0, 0.0))
  for each in rows:
    key = each.kind, each.axes, each.hidden, each.axes == 'slices'
    runs = each.runs * program.turns
    total[key] = total[key][0] + runs, total[key][1] + runs * each.bytes
  return sorted((Wire(*key, *value) for key, value in total.items()), key=lambda each: -each.bytes)


def hbm_traffic(program, memory, wire):
  """Bytes over HBM: arguments read, outputs written, temporaries and gathered weights both."""
  gathered = sum(each.bytes for each in wire if each.kind == 'all-gather')
  return (program.turns * memory['arguments'] + memory['outputs']
          + 2 * program.rounds * memory['temporaries'] + 2 * gathered)
