"""Finds mesh, recomputation and micro-batches for a stage on a TPU slice.

All combinations are ranked by arithmetic (memory by parts as `scaling.memory` has them, time as a
roofline of matrix products and of the collectives that a mesh implies); the best few are compiled.
"""
import itertools
import math
from typing import NamedTuple

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.scaling import chips, memory
from qwen3_jax.stages import load

# Executed by useful FLOPs of a step, by what is computed again: the forward pass, all of it but
# attention, next to nothing. As compiled for 8b.
AGAIN = {'full': 1 / 0.8, 'offload': 1 / 0.8, 'attention_out': 1 / 0.85, 'dots': 1.02, 'none': 1.0}
# libtpu 0.0.50 took 56 and 104 GiB for 0.6b without recomputation, arithmetic 42 and 79.
SEEN = {'none': 1.35}
# Arrays kept of the model's width.
WHOLE = {'full': 1, 'offload': 0, 'attention_out': 2, 'dots': 2, 'none': 5}
SPARE = 0.9  # of the room: what arithmetic does not see
MOST = 16  # ways to split experts, so that a token's copies go to few places


class Choice(NamedTuple):
  """Settings of a step; bytes and seconds a device, by arithmetic. `mesh`: ((axis, size), ...)."""
  mesh: tuple
  remat: str
  micro_batches: int
  bytes: float
  seconds: float

  @property
  def overrides(self):
    """What to add to a command line."""
    return [*(f'--config.mesh.{axis}={size}' for axis, size in self.mesh),
            f'--config.remat={self.remat}', f'--config.micro_batches={self.micro_batches}']

  def apply(self, config):
    """A config of its own with these settings."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
      config.mesh.update(dict(self.mesh))
      config.remat, config.micro_batches = self.remat, self.micro_batches
    return config


def candidates(config, topology, count, slices=1):
  """[Choice] of everything that seems to fit `count` devices of `slices` slices, fastest first."""
  _, chip = chips.find(topology)
  spec, room = load.spec_from(config.model), chip.usable / chip.devices
  found = []
  for mesh in meshes(spec, config, count, slices):
    ways = math.prod(mesh[axis] for axis in alphabet.RULES['B'])
    if config.data.batch % ways:
      continue
    rows = config.data.batch // ways
    for remat, micro in itertools.product(
        (name for name in transformer.POLICIES if name in AGAIN),
        (m for m in _powers(rows) if rows % m == 0)):
      size = bytes_of(spec, config, rows, mesh, remat, count, micro)
      if size < SPARE * room:
        seconds = seconds_of(spec, config, chip, mesh, remat, micro, count)
        given = tuple((axis, size) for axis, size in mesh.items() if axis != 'fsdp')
        found.append(Choice(given, remat, micro, size, seconds))
  return sorted(found, key=rank)


def advise(config, topology, count, slices, estimate):
  """A line: the fastest settings that fit by arithmetic, or what else to take.

  Where arithmetic was wrong about the present settings, by their `estimate`, it is corrected.
  """
  def is_present(choice):
    return (config.remat, config.micro_batches) == (choice.remat, choice.micro_batches) and all(
      config.mesh[axis] in (size, None) for axis, size in choice.mesh)
  found = candidates(config, topology, count, slices)
  tried = [(choice, estimate) for choice in found if is_present(choice)]
  found = [choice for choice in found if is_worth(choice, tried)]
  if not found:
    return 'by arithmetic nothing fits these chips: take more, or --config.lora.rank=16'
  return (f'by arithmetic this fits, in {found[0].bytes / 2**30:.1f} GiB: '
          + ' '.join(found[0].overrides))


def meshes(spec, config, count, slices):
  """{axis: size} of every mesh worth trying; slices split the data axis."""
  experts = min(spec.experts, MOST) if 'expert' in alphabet.AXES else 1
  for tensor, context, expert in itertools.product(
      _powers(min(spec.kv_heads, 8)), _powers(8), _powers(experts)):
    inner = tensor * context * expert * slices
    if count % inner or context > 1 and config.data.length // context < 4096:
      continue  # shorter pieces only add traffic
    mesh = dict(data=slices, fsdp=count // inner, context=context, tensor=tensor)
    yield mesh | (dict(expert=expert) if 'expert' in alphabet.AXES else {})


def rank(choice):
  """The fastest first; of as fast ones those of fewer parts."""
  return (choice.seconds, choice.micro_batches, math.prod(size for _, size in choice.mesh),
          choice.bytes)


def bytes_of(spec, config, rows, mesh, remat, count, micro=1):
  """Of one device: its share of weights, moments and gradients, and its rows' activations.

  Slices each have all weights. They lie once more in bfloat16, and of several micro-batches the
  gradients do beside their sum.
  """
  activations = SEEN.get(remat, 1) * activations_of(
    spec, rows // micro * config.data.length // mesh['context'], remat, mesh['tensor'])
  dense, routed = weights_of(spec)
  gathered = 4 * 2 / spec.layers * (dense + routed / mesh.get('expert', 1)) / mesh['tensor']
  trained = 2 + 4 * (micro > 1) + memory.state(config.optim.kind, config.optim.moments)
  # Gathered are two layers, twice.
  return trained * spec.parameters() * mesh['data'] / count + activations + gathered


def activations_of(spec, tokens, remat, tensor):
  """Bytes of what a step on so many tokens keeps and computes; what has the model's width lies on
  every part of a tensor axis, the rest is split."""
  parts = memory.activations(spec, tokens, remat=remat)
  layer, kept = memory.layer_sizes(spec, remat)
  shares = {'saved activations': WHOLE[remat] * spec.width / max(kept, 1),
            'one layer': (4 + 2 * (spec.chosen or 0)) * spec.width / layer, 'head': 0}
  return sum(size * (shares[part] + (1 - shares[part]) / tensor) for part, size in parts.items())


def weights_of(spec):
  """(parameters of all but experts, those of experts)."""
  routed = 3 * spec.experts * spec.width * (spec.expert_mlp or 0) * sum(
    map(spec.sparse, range(spec.layers)))
  return spec.parameters() - routed, routed


def seconds_of(spec, config, chip, mesh, remat, micro, count):
  """The longest of matrix products, interconnect and, across slices, network."""
  tokens = config.data.batch * config.data.length / count
  compute = tokens * spec.flops_per_token(config.data.length) * AGAIN[remat] / (
    chip.flops / chip.devices)
  tensor, context, expert = mesh['tensor'], mesh['context'], mesh.get('expert', 1)
  passes = 2 if remat == 'none' else 3  # forward, again, backward
  dense, routed = weights_of(spec)
  wire = micro * dense / tensor * (2 * passes + 4)  # gathers in bfloat16, sums in float32
  wire += micro * routed / expert / tensor * (2 * 2 + 2)  # gathered twice; sums in bfloat16
  if expert > 1:  # a token goes once to each other part that has one of its experts: expected
    copies = (expert - 1) * (1 - (1 - 1 / expert) ** spec.chosen)
    wire += 5 * spec.layers * tokens * copies * spec.width * 2  # there and back, there, both back
  if tensor > 1:
    wire += 2 * passes * 2 * spec.layers * tokens * tensor * spec.width * 2
  if context > 1:
    wire += passes * spec.layers * 2 * tokens * context * 2 * spec.kv_heads * spec.head_width
  network = 8 * spec.parameters() * mesh['data'] / count if mesh['data'] > 1 else 0
  return max(compute, wire / (chip.ici / chip.devices), network / (chip.dcn / chip.devices))


def _powers(limit):
  return [2 ** i for i in range(int(math.log2(max(limit, 1))) + 1)]


def search(config, topology, slices=1, most=3, say=print, folder=None):
  """[(Choice, Estimate)] of the `most` best candidates, compiled; those that fit first, by time.

  Verdicts are kept in `folder`. Raises ValueError where arithmetic finds nothing that fits.
  """
  from qwen3_jax.scaling import plan
  count = len(plan.get_devices(topology, slices))
  plan.check(config, topology, count)
  found = candidates(config, topology, count, slices)
  if not found:
    raise ValueError(f'by arithmetic nothing fits {topology}: take more chips, shorter rows '
                     '(--config.data.length), or adapters (--config.lora.rank=16)')
  say(f'{len(found)} settings seem to fit; compiling the {min(most, len(found))} best')
  tried = []
  while len(tried) < most and (choice := next(
      (choice for choice in found if is_worth(choice, tried)), None)):
    say(f'{len(tried) + 1}: {" ".join(choice.overrides)}; by arithmetic '
        f'{choice.bytes / 2**30:.1f} GiB, {choice.seconds:.2f} s')
    tried.append((choice, plan.run(choice.apply(config), topology, slices, say=say,
                                   folder=folder)[0]))
  return sorted(tried, key=lambda each: (not each[1].fits, each[1].seconds))


def is_worth(choice, tried):
  """Whether to compile it, after what others were: not where the like of it fits with fewer
  micro-batches, nor where it is as short of memory as the like of it was."""
  for other, estimate in tried:
    if other.remat == choice.remat and (
        estimate.fits and other.mesh == choice.mesh or
        choice.bytes * estimate.hbm / other.bytes > estimate.room):
      return False
  return True


def tabulate(tried):
  """Lines: what was compiled, the best first, and what to set for it."""
  yield f'{"GiB":>7} {"said":>7} {"s":>8} {"said":>8}           settings'
  for choice, each in tried:
    verdict = 'fits' if each.fits else 'too large'
    seconds = f'{each.seconds:8.3f}' if not each.fault else f'{"-":>8}'
    yield (f'{each.hbm / 2**30:7.1f} {choice.bytes / 2**30:7.1f} {seconds} {choice.seconds:8.3f} '
           f'{verdict:9} {" ".join(choice.overrides)}')
  choice, best = tried[0]
  yield ('set: ' + ' '.join(choice.overrides)) if best.fits else (
    'none of these fits: --search with a larger number compiles more')
