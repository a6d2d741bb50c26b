"""Finds mesh, recomputation and micro-batches for a stage on a TPU slice.

All combinations are ranked by arithmetic (memory by parts as `scaling.memory` has them, time as a
roofline of matrix products and of the collectives that a mesh implies); the best few are compiled.
"""
import itertools
import math
from typing import NamedTuple

from qwen3_jax.model import transformer
from qwen3_jax.scaling import chips, memory
from qwen3_jax.stages import load

# Executed by useful FLOPs of a step, by what is computed again: all of the forward pass (8 of 6),
# all but attention, next to nothing.
AGAIN = {'full': 8 / 6, 'attention_out': 1.3, 'dots': 1.04, 'none': 1.0}
SPARE = 0.9  # of the room: what arithmetic does not see


class Choice(NamedTuple):
  """Settings of a step; bytes and seconds a device, by arithmetic."""
  tensor: int
  context: int
  remat: str
  micro_batches: int
  bytes: float
  seconds: float

  @property
  def overrides(self):
    """What to add to a command line."""
    return [f'--config.mesh.tensor={self.tensor}', f'--config.mesh.context={self.context}',
            f'--config.remat={self.remat}', f'--config.micro_batches={self.micro_batches}']


def candidates(config, topology, count):
  """[Choice] of everything that seems to fit `count` devices, the fastest first."""
  _, chip = chips.find(topology)
  spec, room = load.spec_from(config.model), chip.usable / chip.devices
  found = []
  for tensor, context in itertools.product(_powers(min(spec.kv_heads, 8)), _powers(8)):
    ways = count // (tensor * context)
    if tensor * context > count or count % (tensor * context) or config.data.batch % ways:
      continue
    if context > 1 and config.data.length // context < 4096:
      continue  # shorter pieces only add traffic
    rows = config.data.batch // ways
    for micro in (m for m in _powers(rows) if rows % m == 0):
      for remat in transformer.POLICIES:
        if remat not in AGAIN:
          continue
        size = bytes_of(spec, config, rows // micro, tensor, context, remat, count)
        if size < SPARE * room:
          found.append(Choice(tensor, context, remat, micro, size, seconds_of(
            spec, config, chip, tensor, context, remat, micro, count)))
  return sorted(found, key=rank)


def rank(choice):
  """The fastest first; of as fast ones those of fewer parts."""
  return choice.seconds, choice.micro_batches, choice.tensor * choice.context, choice.bytes


def bytes_of(spec, config, rows, tensor, context, remat, count):
  """Of one device: its share of weights, moments and gradients, and its rows' activations."""
  activations = sum(memory.activations(
    spec, rows * config.data.length // context, remat=remat).values())
  gathered = 4 * spec.parameters() * 2 / spec.layers / tensor  # two layers' weights, twice
  return 16 * spec.parameters() / count + activations / tensor + gathered


def seconds_of(spec, config, chip, tensor, context, remat, micro, count):
  """The longer of matrix products and interconnect."""
  tokens = config.data.batch * config.data.length / count
  compute = tokens * spec.flops_per_token(config.data.length) * AGAIN[remat] / (
    chip.flops / chip.devices)
  passes = 2 if remat == 'none' else 3  # forward, again, backward
  wire = micro * spec.parameters() / tensor * (2 * passes + 4)  # gathers in bfloat16, sums in f32
  if tensor > 1:
    wire += 2 * passes * 2 * spec.layers * tokens * tensor * spec.width * 2
  if context > 1:
    wire += passes * spec.layers * 2 * tokens * context * 2 * spec.kv_heads * spec.head_width
  return max(compute, wire / (chip.ici / chip.devices))


def _powers(limit):
  return [2 ** i for i in range(int(math.log2(max(limit, 1))) + 1)]


def search(config, topology, slices=1, most=3, say=print):
  """[(Choice, Estimate)] of the `most` best candidates, compiled; those that fit first, by time.

  Raises ValueError where arithmetic finds nothing that fits.
  """
  from qwen3_jax.scaling import plan
  count = len(plan.get_devices(topology, slices))
  plan.check(config, topology, count)
  found = candidates(config, topology, count)
  if not found:
    raise ValueError(f'by arithmetic nothing fits {topology}: take more chips, shorter rows '
                     '(--config.data.length), or adapters (--config.lora.rank=16)')
  say(f'{len(found)} settings seem to fit; compiling the {min(most, len(found))} best')
  tried = []
  for choice in found[:most]:
    say(f'{" ".join(choice.overrides)}: by arithmetic {choice.bytes / 2**30:.1f} GiB, '
        f'{choice.seconds:.2f} s')
    one = config.copy_and_resolve_references()
    with one.unlocked():
      one.mesh.tensor, one.mesh.context = choice.tensor, choice.context
      one.remat, one.micro_batches = choice.remat, choice.micro_batches
    tried.append((choice, plan.run(one, topology, slices, say=say)[0]))
  return sorted(tried, key=lambda each: (not each[1].fits, each[1].seconds))
