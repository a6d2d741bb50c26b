"""Compiles an update of on-policy distillation for a TPU topology, here, and prints its memory.

python tests/benchmarks/compile_distill.py [--program chunks|whole|teacher] [--length 32768]
  chunks   the student's update: KL over the full vocabulary, both heads chunk by chunk; all weights
           trained by AdamW; of the teacher its hidden states in the batch, and its head
  whole    the same update with the logits of both models as (B, T, V), differentiated by JAX
  teacher  the forward pass of the teacher that gives the hidden states, weights in bfloat16
The real XLA:TPU compiler (`pip install 'jax[tpu]'`) on a CPU host; nothing is run. 4x4x2 is the 32
chips of a v5p-64, of 95 GiB each. HBM = arguments + temporaries + outputs - aliased of one chip; of
a program that does not fit, the figure is the compiler's own, from its error.
"""
import argparse
import functools
import os
import re
import time

os.environ |= dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from qwen3_jax import mesh as alphabet  # noqa: E402
from qwen3_jax.kernels import reference  # noqa: E402
from qwen3_jax.model import transformer  # noqa: E402
from qwen3_jax.spec import Spec  # noqa: E402
from qwen3_jax.training import distillation, losses, optim  # noqa: E402
from qwen3_jax.training import step as training  # noqa: E402

BFLOAT16 = jnp.bfloat16


def abstract(tree, mesh, dtype=None):
  """Shapes in the place of arrays, sharded; matrices in `dtype`, if one is given."""
  if dtype:
    tree = jax.eval_shape(functools.partial(transformer.cast, dtype=dtype), tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                      alphabet.shardings(tree, mesh))


def shapes_of_batch(rows, length, width=None):
  """The batch of `rows` rows, with hidden states of `width` if it is given."""
  make = jax.ShapeDtypeStruct
  batch = {name: make((rows, length), jnp.int32)
           for name in ('tokens_BT', 'segment_BT', 'position_BT')}
  if width:
    batch |= dict(weight_BT=make((rows, length), jnp.float32),
                  teacher_BTD=make((rows, length, width), BFLOAT16))
  return batch


def whole_logits(params, batch, head_VD, *, remat, dtype):
  """`distillation.loss` by the plain meaning of the divergence."""
  hidden_BTD = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], remat=remat,
                      dtype=dtype).hidden_BTD
  weight_BT = jnp.roll(batch['weight_BT'], -1, axis=1).at[:, -1].set(0)
  total, _ = reference.divergence(hidden_BTD, params.head(), batch['teacher_BTD'], head_VD,
                                  weight_BT, 'reverse_kl')
  return total / batch['total_weight'], dict(nll=total, weight=weight_BT.sum())


def compile_update(spec, teacher, mesh, rows, length, remat, whole):
  """The compiled step of `rows` rows in all: bfloat16 compute, float32 state."""
  optimizer = optim.adamw()
  inner = whole_logits if whole else functools.partial(
    distillation.loss, settings=distillation.Distillation())

  def loss(params, batch, head_VD):
    return inner(transformer.cast(params, BFLOAT16), batch, head_VD, remat=remat, dtype=BFLOAT16)
  make = functools.partial(transformer.make, spec)
  state = abstract(jax.eval_shape(lambda: training.state_of(make(), optimizer)), mesh)
  step = training.make_step(loss, optimizer, lambda step: 1e-6,
                            report=losses.report if whole else distillation.report)
  batch = abstract(shapes_of_batch(rows, length, teacher.width), mesh)
  shape = jax.ShapeDtypeStruct((teacher.vocab, teacher.width), BFLOAT16)
  head_VD = abstract(dict(head_VD=shape), mesh)['head_VD']
  out = jax.tree.map(lambda x: x.sharding, state), None
  with jax.set_mesh(mesh):
    return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch, head_VD).compile()


def compile_teacher(teacher, mesh, rows, length):
  """The compiled forward pass that gives `teacher_BTD`."""
  params = abstract(jax.eval_shape(functools.partial(transformer.make, teacher)), mesh, BFLOAT16)
  run = functools.partial(distillation.teacher_states, dtype=BFLOAT16)
  with jax.set_mesh(mesh):
    return jax.jit(run).lower(params, abstract(shapes_of_batch(rows, length), mesh)).compile()


def memory(make):
  """Of what `make()` compiles, as text."""
  try:
    m = make().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r'Used ([\d.]+[GM]) of ([\d.]+[GM]) hbm', str(error))
    if not used:
      raise
    return f'does not fit: needs HBM {used[1]} of {used[2]} a chip'
  arguments, temporaries, outputs, aliased = (size / 2**30 for size in (
    m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes))
  return (f'HBM {arguments + temporaries + outputs - aliased:.2f} GiB a chip '
          f'(arguments {arguments:.2f}, temporaries {temporaries:.2f})')


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--program', choices=('chunks', 'whole', 'teacher'), default='chunks')
  parser.add_argument('--size', default='8b')
  parser.add_argument('--teacher', default='32b')
  parser.add_argument('--topology', default='v5p:4x4x2')
  parser.add_argument('--rows', type=int, default=1, help='rows of one chip')
  parser.add_argument('--length', type=int, default=32768, help='tokens of a row')
  parser.add_argument('--remat', default='full')
  args = parser.parse_args()
  devices = topologies.get_topology_desc(platform='tpu', topology_name=args.topology).devices
  mesh, rows = alphabet.make_mesh(devices=devices), args.rows * len(devices)
  student, teacher = Spec.named(args.size), Spec.named(args.teacher)
  start = time.perf_counter()
  if args.program == 'teacher':
    text = memory(lambda: compile_teacher(teacher, mesh, rows, args.length))
  else:
    text = memory(lambda: compile_update(student, teacher, mesh, rows, args.length, args.remat,
                                         args.program == 'whole'))
  print(f'{args.size} <- {args.teacher} {args.topology} {args.program}, '
        f'{args.rows} x {args.length} a chip, remat {args.remat}: {text}; '
        f'compiled in {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  main()
