"""Block sizes of the TPU kernels, from `blocks.json`: by kernel, chip and the nearest known shape.

The table is a JSON object {kernel: {chip: [{"shape": {...}, "blocks": {...}}]}}; chips are those of
`target.kind`, and "any" holds what no chip's own entries say.
"""
import functools
import json
import math
from pathlib import Path

from qwen3_jax.kernels import target

TABLE = Path(__file__).with_name('blocks.json')
LIKE = {'v5e': ('v5p',), 'v5p': ('v5e',), 'tpu7x': ('v6e',)}  # the same matrix unit


def choose(kernel, **shape):
  """Block sizes (a new dict) for `kernel` at `shape`, on the chip that the program is traced for.

  The nearest shape of this chip, else of one with its matrix unit, else of "any", else {}: the
  kernel's own defaults. Numbers are compared by the logarithm of their ratio, other values by
  equality; a name that only one side has says nothing.
  """
  table = read().get(kernel, {})
  kind = target.kind()
  entries = next((table[k] for k in (kind, *LIKE.get(kind, ()), 'any') if table.get(k)), ())
  nearest = min(entries, key=lambda entry: _distance(entry['shape'], shape), default=None)
  return dict(nearest['blocks']) if nearest else {}


@functools.cache
def read():
  """The whole table."""
  return json.loads(TABLE.read_text())


def _distance(known, wanted):
  def one(a, b):
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
      return abs(math.log2(max(a, 1) / max(b, 1)))
    return 0 if a == b else 16
  return sum(one(known[name], wanted[name]) for name in known.keys() & wanted.keys())
