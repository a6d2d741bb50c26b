"""Calls of Pallas kernels in a compiled program, and how long each takes by the kernels' schedules.

`kernel_times.json` holds static scores of the compiler's schedule, by kernel, chip and shape, with
where they come from (`tests/benchmarks/kernel_times.py` makes it). No kernel has run on a TPU.
"""
import collections
import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from qwen3_jax.scaling import traffic

TABLE = Path(__file__).with_name('kernel_times.json')
_NAME = re.compile(r'(?:jvp_|transpose_|vmap_)*([a-z_]+[a-z])')  # what JAX made of it comes first
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\[([\d,]*)\]')


class Call(NamedTuple):
  """A kernel's call, `runs` of it; FLOPs and bytes of one run are the kernel's own count, or 0.

  `shape` tells calls of one kernel apart, but for their rows (the first axis): the other axes of
  its larger operands. `branch` as of `traffic.Step`.
  """
  kernel: str
  shape: str
  runs: int
  flops: float
  bytes: float
  branch: tuple | None = None


class Time(NamedTuple):
  """Seconds of all runs of a kernel; `by` says how they were told: see `price`."""
  kernel: str
  runs: int
  seconds: float
  by: str


def read(text):
  """[Call] of every Pallas kernel in a compiled program's text."""
  found = []
  for step in traffic.walk(text):
    if step.opcode == 'custom-call' and 'custom_call_target="tpu_custom_call"' in step.tail:
      operands = re.search(r'operand_layout_constraints=\{(.*?\})\}', step.tail)
      flops, size = (_estimate(step.tail, key) for key in ('flops', 'bytes_accessed'))
      found.append(Call(_NAME.match(step.name)[1], shape_of(operands[1]), step.runs,
                        flops, size or sum(traffic.sizes(operands[1] + step.shape)), step.branch))
  return found


def shape_of(operands):
  """Operands of two axes or more, without the first: 'bf16 1x4096x4096, bf16 1x4096x512'."""
  return ', '.join(f'{kind} {"x".join(dims.split(",")[1:])}'
                   for kind, dims in _ARRAY.findall(operands)
                   if dims.count(',') and kind not in ('s32', 'u32', 'pred'))


def _estimate(tail, key):
  found = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"(\d+)"', tail)
  return float(found[1]) if found else 0.0


def price(calls, chip, flops, bandwidth):
  """[Time] of each kernel, and of each way its time was told, the longest first.

  'schedule': the table has the shape on that chip; 'like': it has another shape of the kernel, from
  which time goes with the FLOPs (or bytes); 'bound': it has none, so FLOPs at the peak of `flops` a
  second or bytes at `bandwidth`, the longer. No score is better than that bound. Of a conditional's
  branches the one that takes longest counts.
  """
  known = table().get(chip, {})
  branches = collections.defaultdict(lambda: collections.defaultdict(list))
  for call in calls:
    seconds, by = _one(call, known.get(call.kernel, ()), flops, bandwidth)
    name, place = call.branch or (None, None)
    branches[name][place].append(Time(call.kernel, call.runs, call.runs * seconds, by))
  total = collections.defaultdict(lambda: (0, 0.0))
  for places in branches.values():
    for time in max(places.values(), key=lambda times: sum(each.seconds for each in times)):
      runs, seconds = total[time.kernel, time.by]
      total[time.kernel, time.by] = runs + time.runs, seconds + time.seconds
  return sorted((Time(kernel, runs, seconds, by) for (kernel, by), (runs, seconds)
                 in total.items()), key=lambda time: -time.seconds)


def _one(call, entries, flops, bandwidth):
  """(seconds of one run, how they were told)."""
  least = max(call.flops / flops, call.bytes / bandwidth)
  work = 'flops' if call.flops else 'bytes'
  entries = [each for each in entries if each[work]]
  if not entries:
    return least, 'bound'
  nearest = min(entries, key=lambda each: (
    each['shape'] != call.shape, abs(math.log(each[work] / max(getattr(call, work), 1)))))
  seconds = nearest['us'] * 1e-6 * getattr(call, work) / nearest[work]
  return max(least, seconds), 'schedule' if nearest['shape'] == call.shape else 'like'


def counted(calls):
  """FLOPs that the kernels themselves count, of a conditional's branches the larger."""
  branches = collections.defaultdict(lambda: collections.defaultdict(float))
  for call in calls:
    name, place = call.branch or (None, None)
    branches[name][place] += call.runs * call.flops
  return sum(max(places.values()) for places in branches.values())


@functools.cache
def table():
  """{chip: {kernel: [{shape, flops, bytes, us, source}]}}; empty without the file."""
  return json.loads(TABLE.read_text())['times'] if TABLE.exists() else {}
