"""Compiles a call of the rollout engine for a TPU topology, here, and prints its memory.

python tests/benchmarks/compile_rollout.py [--size 30b-a3b] [--topology v5p:4x4x2] [--tensor 4]
The real XLA:TPU compiler (`pip install 'jax[tpu]'`) on a CPU host; nothing is run. 4x4x2 is the 32
chips of a v5p-64. Weights and cache are bfloat16, sharded as in training; a row may hold
`positions` tokens, and the pages of a data shard hold `held` tokens a row on average. HBM =
arguments + temporaries + outputs - aliased, of one chip.
"""
import argparse
import functools
import os
import time

os.environ |= dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')


def compile_decode(size, topology, tensor, rows, positions, held, page=128, chunk=32):
  """The compiled loop of `rows` rows a data shard at temperature 1, routes kept if sparse."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies

  from qwen3_jax import mesh as alphabet
  from qwen3_jax.generation import decode
  from qwen3_jax.generation.sampling import Sampling, Settings
  from qwen3_jax.model import transformer
  from qwen3_jax.model.cache import Pool
  from qwen3_jax.spec import Spec
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = alphabet.make_mesh(dict(tensor=tensor), devices)
  spec, shards = Spec.named(size), len(devices) // tensor
  B, C = rows * shards, positions // page

  def abstract(build):
    tree = jax.eval_shape(build)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                        alphabet.shardings(tree, mesh))
  zero = np.zeros(B, np.int32)
  state = decode.Rows(zero, zero, zero, zero, zero == 0, zero == 1, np.zeros((B, 4), np.int32),
                      Settings.make([Sampling()] * B, range(B), spec.vocab), None, None, None)
  with jax.set_mesh(mesh):
    model = abstract(lambda: transformer.cast(transformer.make(spec), jnp.bfloat16))
    pool = abstract(functools.partial(
      Pool.make, spec, shards * (rows * held // page + 1), page, jnp.bfloat16))
    return decode.decode.lower(
      decode.Decoder(model), pool, state, np.zeros((B, C), np.int32),
      np.zeros((B, (chunk + page - 2) // page + 1), np.int32), np.int32(chunk), np.int32(1), chunk,
      bool(spec.experts)).compile()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', default='30b-a3b')
  parser.add_argument('--topology', default='v5p:4x4x2')
  parser.add_argument('--tensor', type=int, default=4)
  parser.add_argument('--rows', type=int, default=128, help='rows of one data shard')
  parser.add_argument('--positions', type=int, default=32_768, help='tokens that a row may hold')
  parser.add_argument('--held', type=int, default=8192, help='tokens that pages hold, a row')
  args = parser.parse_args()
  start = time.perf_counter()
  compiled = compile_decode(args.size, args.topology, args.tensor, args.rows, args.positions,
                            args.held)
  m = compiled.memory_analysis()
  arguments, temporaries, outputs, aliased = (size / 2**30 for size in (
      m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes,
      m.alias_size_in_bytes))
  print(f'{args.size} {args.topology} tensor {args.tensor}, {args.rows} rows a data shard to '
        f'{args.positions} positions, {args.held} held: '
        f'HBM {arguments + temporaries + outputs - aliased:.2f} GiB a chip '
        f'(arguments {arguments:.2f}, temporaries {temporaries:.2f}); '
        f'compiled in {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  main()
