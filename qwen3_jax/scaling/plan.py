"""Does a stage fit a TPU slice, how fast can it be, and why: from the real compiler, before paying.

Memory, collectives and FLOPs are those of the compiled program. Times are a roofline, no
measurement: each of matrix units, HBM and interconnect at its published peak, with nothing lost,
and each assumption stated in the output.
"""
import collections
import math
import re
import time
from typing import NamedTuple

import jax

from qwen3_jax.scaling import chips, programs, traffic, work

GIB = 2 ** 30


class Estimate(NamedTuple):
  """One compiled program. Bytes and FLOPs are a chip's; times in seconds."""
  name: str
  parts: dict  # HBM by what it holds
  hbm: float
  room: float
  tokens: int
  useful: float
  executed: float
  wire: dict  # {(kind, axes): (runs, bytes)}
  compute_s: float
  memory_s: float
  ici_s: float
  dcn_s: float
  compiled_s: float
  fault: str = ''

  @property
  def seconds(self):
    """The longer of computing, HBM and interconnect: full overlap."""
    return max(self.compute_s, self.memory_s, self.ici_s, self.dcn_s)

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
  except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    text = str(error).splitlines()[0]
    raise ValueError(f"no TPU compiler for {topology} here ({text}): pip install 'jax[tpu]'; it "
                     'runs on any x86 Linux host') from error


def check(config, topology, count):
  """ValueError, in seconds and without a compiler, for what can never fit `count` devices.

  The float32 weights, Adam's moments and a gradient of each must lie somewhere.
  """
  from qwen3_jax.stages import load
  _, chip = chips.find(topology)
  spec = load.spec_from(config.model)
  trained = 0 if config.lora.rank else 16
  least = spec.parameters() * (trained + (2 if config.lora.rank else 0)) / count
  room = chip.usable / chip.devices
  if least > room:
    raise ValueError(
      f'does not fit: weights, moments and gradients of {spec.parameters() / 1e9:.1f} billion '
      f'parameters take {least / GIB:.1f} GiB of each of {count} devices, which have '
      f'{room / GIB:.1f}. Take at least {math.ceil(count * least / room)} of them, a smaller '
      'model, or adapters (--config.lora.rank=16)')
  if config.data.batch % count and count % config.data.batch:
    raise ValueError(f'config.data.batch is {config.data.batch} rows: no multiple of {count} '
                     'devices; set --config.data.batch')


def estimate(program, mesh, topology, slices=1):
  """The `Estimate` of one program; where the compiler finds no room for it, with its `fault`."""
  _, chip = chips.find(topology)
  devices = mesh.size
  begun = time.monotonic()
  with jax.set_mesh(mesh):
    traced = program.fn.trace(*program.args)
    executed = program.turns * work.of_jaxpr(traced.jaxpr.jaxpr) / devices
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      return _without_room(program, chip, devices, executed, error, time.monotonic() - begun)
  memory = compiled.memory_analysis()
  hbm = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
         - memory.alias_size_in_bytes)
  wire = collections.defaultdict(lambda: (0, 0.0))
  for each in traffic.read(compiled.as_text(), mesh):
    runs, size = wire[each.kind, each.axes]
    times = each.runs * program.turns
    wire[each.kind, each.axes] = runs + times, size + times * each.bytes
  parts = dict(program.parts)
  parts['other arguments'] = memory.argument_size_in_bytes - sum(parts.values())
  parts['temporaries'] = memory.temp_size_in_bytes
  parts['outputs'] = memory.output_size_in_bytes - memory.alias_size_in_bytes
  crossing = sum(size for (_, axes), (_, size) in wire.items() if slices > 1 and 'data' in axes)
  inside = sum(size for _, size in wire.values()) - crossing
  share = 1 / chip.devices
  return Estimate(
    program.name, parts, hbm, chip.usable * share, program.tokens, program.useful / devices,
    executed, dict(wire), executed / (chip.flops * share), hbm_traffic(program, memory) / (
      chip.bandwidth * share), inside / (chip.ici * share), crossing / (chip.dcn * share),
    time.monotonic() - begun)


def hbm_traffic(program, memory):
  """Least bytes over HBM: arguments read once, outputs written once, temporaries both."""
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          + 2 * memory.temp_size_in_bytes)


def _without_room(program, chip, devices, executed, error, seconds):
  used = re.search(r'Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm', str(error))
  if not used:
    raise error
  scale = {'G': GIB, 'M': 2 ** 20}
  need, room = float(used[1]) * scale[used[2]], float(used[3]) * scale[used[4]]
  return Estimate(program.name, dict(program.parts), need, room, program.tokens,
                  program.useful / devices, executed, {}, 0, 0, 0, 0, seconds,
                  f'short by {(need - room) / GIB:.1f} GiB a device')


def describe(estimate, chip, budget=None, count=1, price=None):
  """Lines of text about one estimate; `budget` tokens of the stage, `price` of a chip-hour."""
  e, share = estimate, chip.devices
  short = e.fault or f'short by {(e.hbm - e.room) / GIB:.1f} GiB a device'
  yield (f'{e.name}: {e.hbm / GIB:.2f} of {e.room / GIB:.2f} GiB of HBM a device'
         + ('' if e.fits else f': DOES NOT FIT, {short}'))
  for name, size in e.parts.items():
    yield f'  {name:18} {size / GIB:8.2f} GiB'
  if e.fault:
    yield '  ' + advice(e)
    return
  yield (f'  FLOPs a device     {e.executed / 1e12:8.1f} T executed, {e.useful / 1e12:.1f} T '
         f'useful ({e.useful / max(e.executed, 1):.2f})')
  for (kind, axes), (runs, size) in sorted(e.wire.items(), key=lambda each: -each[1][1]):
    yield f'  {kind:18} {size / 1e9:8.2f} GB over {axes}, {runs} runs'
  yield (f'  roofline           {e.seconds:8.3f} s: compute {e.compute_s:.3f}, HBM >= '
         f'{e.memory_s:.3f}, ICI {e.ici_s:.3f}, DCN {e.dcn_s:.3f}, all overlapped')
  rate = e.tokens / e.seconds
  mfu = e.useful / (e.seconds * chip.flops / share)
  yield f'  at best            {rate:,.0f} tokens/s, MFU {mfu:.2f}'
  if budget:
    hours = budget / rate / 3600
    cost = f', {hours * count / share * price:,.0f} at {price} a chip-hour' if price else ''
    yield (f'  {budget:.3g} tokens  at best {hours / 24:,.1f} days, '
           f'{hours * count / share:,.0f} chip-hours{cost}')
  if not e.fits:
    yield '  ' + advice(e)


def advice(e):
  """What to try where there is no room."""
  largest = max((name for name in e.parts), key=e.parts.get)
  if e.fault or largest == 'temporaries':
    return ('most of it are temporaries: try --config.micro_batches=2 (or more), '
            '--config.remat=full, or a shorter --config.data.length')
  return f'most of it are {largest}: take more chips, or --config.lora.rank=16'


def as_json(e):
  """An estimate as a dict of plain values."""
  return e._asdict() | {'wire': [dict(kind=kind, axes=axes, runs=runs, bytes=size)
                                 for (kind, axes), (runs, size) in e.wire.items()],
                        'seconds': e.seconds, 'fits': e.fits}


def run(config, topology, slices=1, teacher=None, say=print):
  """[Estimate] of every program of the stage of `config` on a slice, one line said for each."""
  from qwen3_jax import mesh as alphabet
  devices = get_devices(topology, slices)
  check(config, topology, len(devices))
  shape = {axis: size for axis, size in config.mesh.items() if size}
  mesh = alphabet.make_mesh(shape, devices)
  found = []
  for program in programs.of_stage(config, mesh, teacher):
    say(f'compiling {program.name} for {len(devices)} devices '
        f'({", ".join(f"{k} {v}" for k, v in mesh.shape.items() if v > 1)}) ...')
    found.append(estimate(program, mesh, topology, slices))
    say(f'  took {found[-1].compiled_s:.0f} s')
  return found
