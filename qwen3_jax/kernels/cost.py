"""What a kernel takes, for XLA, which hides transfers behind it, and for the planner's count."""
from jax.experimental import pallas as pl


def cost(flops, arrays, exponentials=0):
  """A `pl.CostEstimate` of `flops` and of reading or writing each of `arrays` once."""
  return pl.CostEstimate(flops=int(flops), transcendentals=int(exponentials), bytes_accessed=int(
    sum(x.size * x.dtype.itemsize for x in arrays)))
