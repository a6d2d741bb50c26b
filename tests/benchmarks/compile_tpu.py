"""Compiles the training step of a released size for a TPU topology, here, and prints its memory.

python tests/benchmarks/compile_tpu.py [--size 0.6b] [--topology v5p:4x4x2] [--rows 8]
The real XLA:TPU compiler (`pip install 'jax[tpu]'`) on a CPU host; nothing is run. 4x4x2 is the 32
chips of a v5p-64. HBM = arguments + temporaries + outputs - aliased, of one chip.
"""
import argparse
import os
import time

os.environ |= dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')


def compile_step(size, topology, rows, length, remat, micro_batches=1, mesh_shape=None):
  """The compiled training step of `rows` rows a chip: bfloat16 compute, float32 state, AdamW."""
  import functools

  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from qwen3_jax import mesh as alphabet
  from qwen3_jax.model import transformer
  from qwen3_jax.spec import Spec
  from qwen3_jax.training import losses, optim
  from qwen3_jax.training import step as training
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = alphabet.make_mesh(mesh_shape, devices)
  spec = Spec.named(size)
  optimizer = optim.adamw()

  def make():
    return training.state_of(transformer.make(spec), optimizer)

  def abstract(tree):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                        alphabet.shardings(tree, mesh))
  state = abstract(jax.eval_shape(make))
  shape = (rows * len(devices), length)
  batch = {f'{name}_BT': jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dict(
      tokens=jnp.int32, segment=jnp.int32, position=jnp.int32, weight=jnp.float32).items()}
  loss = functools.partial(losses.next_token, remat=remat, dtype=jnp.bfloat16,
                           balance=0.008 if spec.experts else 0.0)
  step = training.make_step(loss, optimizer, lambda step: 3e-4, micro_batches)
  out = jax.tree.map(lambda x: x.sharding, state), None
  step = jax.jit(step, donate_argnums=0, out_shardings=out)
  with jax.set_mesh(mesh):
    return step.lower(state, abstract(batch)).compile()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', default='0.6b')
  parser.add_argument('--topology', default='v5p:4x4x2')
  parser.add_argument('--rows', type=int, default=8, help='rows of one chip')
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--remat', default='full')
  parser.add_argument('--hlo', help='write the optimised HLO text here')
  args = parser.parse_args()
  start = time.perf_counter()
  compiled = compile_step(args.size, args.topology, args.rows, args.length, args.remat)
  m = compiled.memory_analysis()
  arguments, temporaries, outputs, aliased = (size / 2**30 for size in (
      m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes,
      m.alias_size_in_bytes))
  print(f'{args.size} {args.topology} {args.rows} x {args.length} remat {args.remat}: '
        f'HBM {arguments + temporaries + outputs - aliased:.2f} GiB a chip '
        f'(arguments {arguments:.2f}, temporaries {temporaries:.2f}); '
        f'compiled in {time.perf_counter() - start:.0f} s')
  if args.hlo:
    with open(args.hlo, 'w') as file:
      file.write(compiled.as_text())


if __name__ == '__main__':
  main()
