"""What one chip must hold, told before anything is allocated: an estimate, part by part, in bytes.

Weights, moments, gradients and pages follow from shapes. Activations are the arrays that a layer's
forward pass makes, twice (each has a gradient); what the compiler adds or fuses away is not known.
Compiled by libtpu for one v5e, a step of 0.6b took 13.4 GiB where this says 12.8 (4 rows of 2,048,
remat 'full'). For 32 v5p a step of 8b (4 rows of 4,096 a chip) took 43.0 GiB more with 'dots' than
with 'full', where this says 42.8.
"""
import math
import os

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import head
from qwen3_jax.model import lora, transformer

CHIPS = {'TPU v5 lite': 16, 'TPU v6 lite': 32}  # GiB of HBM: Colab's v5e-1 and v6e-1
GIB = 2 ** 30


def training(spec, rows, length, dtype=jnp.bfloat16, remat='full', rank=None):
  """{part: bytes} of an AdamW step on `rows` rows of `length` tokens at once, on one chip.

  With `rank` the model is frozen, in `dtype`, and adapters (LoRA) alone are trained. Raises
  ValueError for a `remat` that does not exist.
  """
  if remat not in transformer.POLICIES:
    raise ValueError(f'remat is {remat!r}; want one of {", ".join(transformer.POLICIES)}')
  trained = weights(spec, jnp.float32)
  parts = {'weights': trained}
  if rank is not None:
    adapters = jax.eval_shape(lambda: lora.make(spec, rank, 32.0))
    trained = _size(adapters)
    parts = {'weights': weights(spec, dtype), 'adapters': trained}
  elif jnp.dtype(dtype) != jnp.float32:
    parts[f'weights in {jnp.dtype(dtype).name}'] = weights(spec, dtype)
  return parts | {"Adam's moments": 2 * trained, 'gradients': trained} | activations(
    spec, rows * length, jnp.dtype(dtype).itemsize, remat, rank is not None)


def state(kind, moments):
  """Bytes of a trained parameter: its weight and gradient in float32, and what the optimizer keeps
  (of Adam's moments, where factored, the first in bfloat16)."""
  return 8 + {'float32': 8, 'bfloat16': 4, 'factored': 2}[moments] // (2 if kind == 'muon' else 1)


def activations(spec, tokens, itemsize=2, remat='full', frozen=False):
  """{part: bytes} of what a step on `tokens` tokens at once makes beside weights and gradients."""
  layer, kept = layer_sizes(spec, remat)
  logits = 2 * 4 * spec.vocab * min(tokens, head.TOKENS)  # and their gradient
  table = 0 if frozen else 4 * spec.vocab * spec.width  # the head's gradient, once more
  return {'saved activations': tokens * itemsize * spec.layers * kept,
          'one layer': 2 * tokens * itemsize * layer, 'head': logits + table}


def generation(spec, rows, length, dtype=jnp.bfloat16, page=128):
  """{part: bytes} of drawing `rows` texts of up to `length` tokens, prompt and answer, at once.

  On one CPU the engine keeps the weights once more.
  """
  pages = 1 + rows * math.ceil(length / page)
  token = 2 * spec.layers * spec.kv_heads * spec.head_width * jnp.dtype(dtype).itemsize
  return {'weights to draw with': weights(spec, dtype), 'keys and values': pages * page * token,
          'logits': 3 * 4 * rows * spec.vocab}  # in float32, filtered, sorted


def weights(spec, dtype):
  """Bytes of a model's weights, its matrices in `dtype`."""
  return _size(jax.eval_shape(lambda: transformer.cast(transformer.make(spec), dtype)))


def layer_sizes(spec, remat):
  """(numbers a token that one layer computes, numbers a token and layer kept by `remat`)."""
  D, F = spec.width, spec.mlp
  heads, kv = spec.heads * spec.head_width, 2 * spec.kv_heads * spec.head_width
  experts = 0
  if spec.experts:  # each chosen expert has a copy of the token, and an answer
    F, experts = spec.chosen * spec.expert_mlp, 2 * spec.chosen * D
  layer = 4 * D + 2 * heads + kv + 3 * F + experts
  products = heads + kv + (0 if spec.experts else 2 * F)  # experts keep none under 'dots'
  kept = {'offload': 0, 'full': D, 'attention_out': 2 * D + heads, 'none': D + layer,
          'dots': 2 * D + heads + products}
  return layer, kept[remat]


def available():
  """(name of the first device, bytes of its memory that are free); on a CPU those of the machine.

  Asks the device where it tells; a TPU that does not is looked up in CHIPS. Bytes are None where
  neither knows.
  """
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return 'CPU', os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return device.device_kind, stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  known = CHIPS.get(device.device_kind)
  return device.device_kind, known and known * GIB


def describe(parts, name, room):
  """A table of `parts`, their sum, and whether `room` bytes of the device `name` hold it."""
  total = sum(parts.values())
  width = max(len(part) for part in (*parts, 'estimate'))
  size_of, unit = (GIB, 'GiB') if total >= GIB else (2 ** 20, 'MiB')
  lines = [f'{part:{width}}  {size / size_of:8.2f} {unit}'
           for part, size in (parts | {'estimate': total}).items()]
  verdict = 'of unknown memory'
  if room is not None:
    verdict = f'{room / GIB:.2f} GiB free: ' + (
      'it should fit' if total <= 0.9 * room else 'it may just fit' if total <= room else
      'it will hardly fit. Take a smaller model, fewer or shorter rows, or adapters (LoRA)')
  return '\n'.join([*lines, f'{name}, {verdict}'])


def _size(tree):
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
