"""TPU slices by generation: which shapes exist, and what Google Cloud calls them.

The user writes a generation and either chips or a topology: 'v5p:16', 'v6e:4x8'. Names and runtime
versions are those of Google's documentation in 2026; tpu7x is reached through GKE only.
"""
import math
from typing import NamedTuple


class Generation(NamedTuple):
  """`hosts` maps a topology of one host to its machine; larger slices have 4 chips a host."""
  prefix: str  # of the accelerator type
  units: int  # that the accelerator type counts in one chip
  runtime: str | None  # software version of a TPU VM
  label: str  # of GKE's node selector
  machine: str  # of a host of a larger slice, on GKE
  hosts: dict
  shapes: tuple  # the topologies of more than one host that an accelerator type names


def _cubes(*texts):
  return tuple(tuple(map(int, text.split('x'))) for text in texts)


FLAT = _cubes('4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = _cubes('2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16',
               '16x16x16', '16x16x24')

GENERATIONS = {
  'v5e': Generation('v5litepod', 1, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice',
                    'ct5lp-hightpu-4t', {(1, 1): 'ct5lp-hightpu-1t', (2, 2): 'ct5lp-hightpu-4t',
                                         (2, 4): 'ct5lp-hightpu-8t'}, FLAT),
  'v5p': Generation('v5p', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice', 'ct5p-hightpu-4t',
                    {(2, 2, 1): 'ct5p-hightpu-4t'}, CUBES),
  'v6e': Generation('v6e', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice', 'ct6e-standard-4t',
                    {(1, 1): 'ct6e-standard-1t', (2, 2): 'ct6e-standard-4t',
                     (2, 4): 'ct6e-standard-8t'}, FLAT),
  'tpu7x': Generation('tpu7x', 2, None, 'tpu7x', 'tpu7x-standard-4t',
                      {(2, 2, 1): 'tpu7x-standard-4t'}, CUBES),
}


class Slice(NamedTuple):
  """One TPU slice."""
  generation: str
  topology: tuple

  @property
  def chips(self):
    return math.prod(self.topology)

  @property
  def hosts(self):
    return 1 if self.topology in GENERATIONS[self.generation].hosts else self.chips // 4

  @property
  def grid(self):
    """The topology as Google writes it."""
    return 'x'.join(map(str, self.topology))

  @property
  def accelerator(self):
    """The accelerator type of the TPU API, e.g. 'v5p-32' for 16 chips of v5p."""
    known = GENERATIONS[self.generation]
    return f'{known.prefix}-{self.chips * known.units}'

  @property
  def named(self):
    """Whether an accelerator type means this topology; gcloud takes no other for v5e and later."""
    known = GENERATIONS[self.generation]
    return self.topology in known.hosts or self.topology in known.shapes

  @property
  def machine(self):
    known = GENERATIONS[self.generation]
    return known.hosts.get(self.topology, known.machine)

  def describe(self):
    cores = self.chips * (2 if self.generation in ('v5p', 'tpu7x') else 1)
    return (f'{self.generation} {self.grid}: {self.chips} chips, {cores} cores, '
            f'{self.hosts} host{"s" if self.hosts > 1 else ""} ({self.accelerator})')


def parse(text):
  """The slice of 'v5p:16', 'v5p:16chips' or 'v5p:2x2x4'.

  Raises ValueError, with the nearest shapes, for one that does not exist.
  """
  generation, _, size = text.partition(':')
  if generation not in GENERATIONS or not size:
    raise ValueError(f'{text!r} is no TPU slice: want GENERATION:CHIPS or GENERATION:TOPOLOGY with '
                     f'a generation of {", ".join(GENERATIONS)}, e.g. v5p:16 or v6e:4x8 (an '
                     "accelerator type such as 'v5p-32' counts cores, so chips are asked for)")
  known = GENERATIONS[generation]
  shapes = (*known.hosts, *known.shapes)
  if 'x' not in size:
    number = size.removesuffix('chips')
    found = [s for s in shapes if number.isdigit() and math.prod(s) == int(number)]
    if not found:
      raise ValueError(f'{generation} has no slice of {size} chips; there are '
                       f'{", ".join(str(math.prod(s)) for s in shapes)}')
    return Slice(generation, found[0])
  try:
    topology = tuple(map(int, size.split('x')))
  except ValueError:
    topology = ()
  if topology not in shapes and not _is_torus(topology, known):
    raise ValueError(f'{generation} has no topology {size}; there are '
                     f'{", ".join("x".join(map(str, s)) for s in shapes)}'
                     + (' and AxBxC of multiples of 4 with A <= B <= C' if len(shapes[0]) == 3
                        else ''))
  return Slice(generation, topology)


def _is_torus(topology, known):
  """Three sides of multiples of 4 in ascending order, no larger than the largest slice."""
  return (len(topology) == 3 and len(known.shapes[0]) == 3 and list(topology) == sorted(topology)
          and all(side and side % 4 == 0 for side in topology)
          and math.prod(topology) <= math.prod(known.shapes[-1]))
