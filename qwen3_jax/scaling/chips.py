"""What a TPU chip has, by generation: published peaks, from which a roofline follows.

Google's documentation of 2026 (cloud.google.com/tpu/docs: v5e, v5p, v6e, tpu7x). Bandwidths of the
interconnect are all of a chip's links together, both directions; that between slices (DCN) is a
host's network card divided by its chips, as commonly sold.
"""
import math
from typing import NamedTuple


class Chip(NamedTuple):
  """Bytes, bfloat16 FLOP/s and bytes/s of one chip; JAX devices in it, chips of one host."""
  hbm: float
  usable: float  # of it, bytes: what the compiler may give a program
  flops: float
  bandwidth: float
  ici: float
  dcn: float
  devices: int
  host: int


GIB = 2 ** 30
CHIPS = {
  'v5e': Chip(16 * GIB, 15.75 * GIB, 197e12, 0.82e12, 200e9, 6.25e9, 1, 4),
  'v5p': Chip(95 * GIB, 95.74 * GIB, 459e12, 2.765e12, 600e9, 6.25e9, 1, 4),
  'v6e': Chip(32 * GIB, 31.25 * GIB, 918e12, 1.64e12, 448e9, 6.25e9, 1, 4),
  'tpu7x': Chip(192 * GIB, 189 * GIB, 2307e12, 7.38e12, 1200e9, 12.5e9, 2, 4)}


def find(topology):
  """(generation, Chip) of a topology's name such as 'v5p:4x4x4'; ValueError for another one."""
  generation, colon, grid = topology.partition(':')
  if generation not in CHIPS or not colon or not all(side.isdigit() for side in grid.split('x')):
    raise ValueError(f'no topology {topology!r}: want GENERATION:GRID with a generation of '
                     f'{", ".join(CHIPS)}, e.g. v5p:4x4x4 or v6e:8x8')
  return generation, CHIPS[generation]


def count(topology):
  """Chips of one slice."""
  find(topology)
  return math.prod(map(int, topology.partition(':')[2].split('x')))
