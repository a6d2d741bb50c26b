"""Compiles an update of reinforcement learning for a TPU topology, here, and prints its memory.

python tests/benchmarks/compile_policy.py [--size 30b-a3b] [--topology v5p:4x4x2] [--length 40960]
GSPO with the rollout's routes replayed, entropy bonus and KL to a reference, all layers
rematerialised. The real XLA:TPU compiler (`pip install 'jax[tpu]'`) on a CPU host; nothing is run.
4x4x2 is the 32 chips of a v5p-64, of 95 GiB each. HBM = arguments + temporaries + outputs - aliased
of one chip; the state is the float32 weights and both of Adam's moments.
"""
import argparse
import functools
import os
import time

os.environ |= dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from qwen3_jax import mesh as alphabet  # noqa: E402
from qwen3_jax.model import transformer  # noqa: E402
from qwen3_jax.spec import Spec  # noqa: E402
from qwen3_jax.training import optim, policy  # noqa: E402
from qwen3_jax.training import step as training  # noqa: E402

INTS = ('tokens_BT', 'segment_BT', 'position_BT')
FLOATS = ('weight_BT', 'scale_BT', 'advantage_BT', 'old_logp_BT', 'rollout_logp_BT',
          'reference_logp_BT')


def shapes_of_batch(spec, rows, length):
  """The batch of `rows` rows as the stage makes it, without data."""
  make = jax.ShapeDtypeStruct
  batch = {name: make((rows, length), jnp.int32) for name in INTS}
  batch |= {name: make((rows, length), jnp.float32) for name in FLOATS}
  batch |= {name: make((rows,), jnp.float32) for name in ('fresh_B', 'bonus_B')}
  sparse = sum(map(spec.sparse, range(spec.layers)))
  if sparse:
    batch['routes_BTLX'] = make((rows, length, sparse, spec.chosen), jnp.uint8)
  return batch


def compile_update(spec, mesh, rows, length, remat):
  """The compiled step of `rows` rows in all: bfloat16 compute, float32 state."""
  optimizer = optim.adamw()
  settings = policy.Policy('gspo', beta=1e-3, entropy='bonus')

  def abstract(tree):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                        alphabet.shardings(tree, mesh))

  def loss(params, batch):
    return policy.loss(transformer.cast(params, jnp.bfloat16), batch, settings, remat=remat,
                       dtype=jnp.bfloat16)
  make = functools.partial(transformer.make, spec)
  state = abstract(jax.eval_shape(lambda: training.state_of(make(), optimizer)))
  step = training.make_step(loss, optimizer, lambda step: 1e-6, report=policy.report)
  out = jax.tree.map(lambda x: x.sharding, state), None
  with jax.set_mesh(mesh):
    step = jax.jit(step, donate_argnums=0, out_shardings=out)
    return step.lower(state, abstract(shapes_of_batch(spec, rows, length))).compile()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', default='30b-a3b')
  parser.add_argument('--topology', default='v5p:4x4x2')
  parser.add_argument('--rows', type=int, default=1, help='rows of one chip')
  parser.add_argument('--length', type=int, default=40960, help='tokens of a row')
  parser.add_argument('--remat', default='full')
  args = parser.parse_args()
  devices = topologies.get_topology_desc(platform='tpu', topology_name=args.topology).devices
  start = time.perf_counter()
  compiled = compile_update(Spec.named(args.size), alphabet.make_mesh(devices=devices),
                            args.rows * len(devices), args.length, args.remat)
  m = compiled.memory_analysis()
  arguments, temporaries, outputs, aliased = (size / 2**30 for size in (
    m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes))
  print(f'{args.size} {args.topology} GSPO with replay, {args.rows} x {args.length} a chip, remat '
        f'{args.remat}: HBM {arguments + temporaries + outputs - aliased:.2f} GiB a chip '
        f'(arguments {arguments:.2f}, temporaries {temporaries:.2f}); '
        f'compiled in {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  main()
