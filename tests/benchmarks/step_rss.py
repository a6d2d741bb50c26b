"""Trains steps of a full-size random model on this machine and prints the peak memory of it.

python tests/benchmarks/step_rss.py [--size 0.6b] [--rows 1] [--length 256] [--steps 2]
bfloat16 compute, float32 weights and AdamW (12 bytes a weight), every layer recomputed. 0.6b takes
minutes and about 13 GiB on two cores. Peak RSS is that of the whole process, compilation included.
"""
import argparse
import functools
import os
import resource
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def peak_gib():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', default='0.6b')
  parser.add_argument('--rows', type=int, default=1)
  parser.add_argument('--length', type=int, default=256)
  parser.add_argument('--steps', type=int, default=2)
  args = parser.parse_args()
  import jax
  import numpy as np
  from ml_collections import ConfigDict

  from qwen3_jax.data import packing
  from qwen3_jax.model import transformer
  from qwen3_jax.spec import Spec
  from qwen3_jax.stages import pretrain
  from qwen3_jax.training import optim
  from qwen3_jax.training import step as training
  spec, optimizer = Spec.named(f'{args.size}-base'), optim.adamw()
  clock = time.perf_counter()

  def report(what):
    nonlocal clock
    now = time.perf_counter()
    print(f'{what}: {now - clock:.0f} s, peak RSS {peak_gib():.2f} GiB', flush=True)
    clock = now

  state = training.initial_state(functools.partial(transformer.make, spec), optimizer)
  jax.block_until_ready(state)
  report(f'{args.size}, {spec.parameters():,} weights and their Adam moments '
         f'({12 * spec.parameters() / 2**30:.2f} GiB)')
  loss = pretrain.make_loss(ConfigDict(dict(
    dtype='bfloat16', remat='full', balance=0.008 * bool(spec.experts), router_z=None)))
  step = jax.jit(training.make_step(loss, optimizer, lambda step: 1e-4), donate_argnums=0)
  rng = np.random.default_rng(0)
  batch = packing.make_batch(
    [[rng.integers(0, 150_000, args.length)] for _ in range(args.rows)], args.length)
  compiled = step.lower(state, batch).compile()
  report('compiled')
  for number in range(1, args.steps + 1):
    state, values = compiled(state, batch)
    jax.block_until_ready(state)
    report(f'step {number} of {args.rows} x {args.length} tokens, loss {values["loss"]:.3f}, '
           f'gradient norm {values["grad_norm"]:.2f}')
    assert not values['skipped']
  print(f'peak RSS {peak_gib():.2f} GiB, within 16 GiB: {peak_gib() <= 16}')


if __name__ == '__main__':
  main()
