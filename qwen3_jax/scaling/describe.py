"""An estimate as text and as JSON: memory by part, FLOPs, collectives, kernels, roofline, cost."""
from qwen3_jax.scaling import verdict

GIB = 2 ** 30

ASSUMED = """\
HBM, collectives and their bytes, kernels and FLOPs are exact: those of the compiled program.
Every time is an estimate: nothing here has run on a TPU. Products outside of kernels run at the
chip's peak; kernels as long as the compiler's schedule of them says where it was scored
('schedule'; 'like': another shape was, time goes with FLOPs), else at the peak of FLOPs or HBM
('bound'); HBM moves arguments, outputs, temporaries and gathered weights once a micro-batch;
collectives use all of a chip's links, or its share of the host's network across slices (DCN).
Collectives that start and end apart overlap with all of that, others with nothing. Waiting,
latencies, input and checkpoints are not counted."""


def describe(estimate, chip, budget=None, count=1, price=None):
  """Lines of text about one estimate; `budget` tokens of the stage, `price` of a chip-hour.

  `count`: devices of the whole plan.
  """
  e = estimate
  yield (f'{e.name}: {e.hbm / GIB:.2f} of {e.room / GIB:.2f} GiB of HBM a device, '
         + ('it fits' if e.fits else f'DOES NOT FIT: {shortage(e)}'))
  for name, size in e.parts.items():
    if size:
      yield f'  {name:24} {measure(size / GIB, "GiB", "MiB", 1024)}'
  if e.fault:
    yield '  ' + advice(e)
    return
  yield (f'  {"FLOPs a device":24} {measure(e.executed / 1e12, "T", "G")} executed, '
         f'{e.useful / max(e.executed, 1):.2f} of them useful')
  for each in e.wire:
    over = {'permute': 'neighbours', 'none': 'no axis'}.get(each.axes, each.axes)
    yield (f'  {each.kind:24} {measure(each.bytes / 1e9, "GB", "MB")} over {over}'
           f'{" (DCN)" if each.dcn else ""}, {each.runs} runs, '
           f'{"overlapped" if each.hidden else "exposed"}')
  for each in e.kernels:
    yield f'  {each.kernel:24} {measure(each.seconds, "s", "ms")}, {each.runs} runs, by {each.by}'
  yield from roofline(e, chip, budget, count, price)
  if not e.fits:
    yield '  ' + advice(e)


def roofline(e, chip, budget, count, price):
  """Lines about time and cost."""
  dcn = f', DCN {e.dcn_s:.3g}' if e.dcn_s else ''
  yield (f'  {"roofline":24} {measure(e.seconds, "s", "ms")} a step; in s: products '
         f'{e.products_s:.3g} + kernels {e.kernels_s:.3g}, HBM {e.memory_s:.3g}, ICI '
         f'{e.ici_s:.3g}{dcn}, of them {e.exposed_s:.3g} exposed; {e.serial_s:.3g} if nothing '
         'overlaps')
  rate = e.tokens / e.seconds
  mfu = e.useful / (e.seconds * chip.flops / chip.devices)
  yield f'  {"at best":24} {rate:,.0f} tokens/s, MFU {mfu:.2f}'
  if budget:
    hours = budget / rate / 3600
    spent = hours * count / chip.devices
    cost = f', {spent * price:,.0f} at {price} a chip-hour' if price else ''
    yield (f'  {f"{budget:.3g} tokens":24} at best {hours / 24:,.1f} days, {spent:,.0f} '
           f'chip-hours{cost}')


def measure(value, unit, smaller, factor=1000):
  """A number of nine columns with its unit, or the `smaller` one of which `factor` make one."""
  return f'{value:9.2f} {unit}' if value >= 0.1 else f'{value * factor:9.2f} {smaller}'


def shortage(e):
  return e.fault or f'short by {(e.hbm - e.room) / GIB:.1f} GiB a device'


def advice(e):
  """What to try where there is no room."""
  largest = max(e.parts, key=e.parts.get)
  if e.fault or largest == 'temporaries':
    return ('most of it are temporaries: more --config.micro_batches, --config.remat=full, or a '
            'shorter --config.data.length (--search finds settings)')
  if largest.startswith('beside: '):
    return (f'most of it lies beside ({largest[8:]}): take more chips, or give training and '
            'rollouts chips of their own (--config.placement.kind=split)')
  return f'most of it are {largest}: take more chips, or --config.lora.rank=16'


def as_json(e):
  """An estimate as a dict of plain values."""
  return e._asdict() | dict(
    wire=[each._asdict() for each in e.wire], kernels=[each._asdict() for each in e.kernels],
    kernels_s=e.kernels_s, seconds=e.seconds, serial_s=e.serial_s, fits=e.fits)


def versions():
  """A line: by which compiler."""
  return ', '.join(f'{name} {verdict.version(name)}' for name in ('jax', 'libtpu'))
