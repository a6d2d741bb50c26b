"""Compiles an update of on-policy distillation with both models' logits whole, for comparison.

What the stage itself runs takes the two heads chunk by chunk: `python -m qwen3_jax plan
--config=configs/distill_on.py:8b --teacher=32b --topology=v5p:4x4x2` prints it. Here is the same
update with the divergence's plain meaning on logits (B, T, V), differentiated by JAX. The real TPU
compiler (`pip install 'jax[tpu]'`) on a CPU host; nothing is run.

  python tests/benchmarks/compile_distill.py --batch=32 --length=32768
"""
import argparse
import os
import sys

os.environ |= dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax.numpy as jnp  # noqa: E402

from qwen3_jax import mesh as alphabet  # noqa: E402
from qwen3_jax.commands import config as configs  # noqa: E402
from qwen3_jax.kernels import reference  # noqa: E402
from qwen3_jax.scaling import chips, describe, plan, programs  # noqa: E402
from qwen3_jax.training import distillation  # noqa: E402


def whole_logits(params, batch, head_VD, *, settings, remat, dtype):
  """`distillation.loss` by the plain meaning of the divergence."""
  hidden_BTD = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], remat=remat,
                      dtype=dtype).hidden_BTD
  weight_BT = jnp.roll(batch['weight_BT'], -1, axis=1).at[:, -1].set(0)
  total, _ = reference.divergence(hidden_BTD, params.head(), batch['teacher_BTD'], head_VD,
                                  weight_BT, 'reverse_kl')
  sums = dict.fromkeys(('distilled', 'distilled_kl', 'distilled_entropy', 'max_kl'), total)
  return total / batch['total_weight'], sums | dict(distilled_tokens=weight_BT.sum())


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='8b')
  parser.add_argument('--teacher', default='32b')
  parser.add_argument('--topology', default='v5p:4x4x2')
  parser.add_argument('--batch', type=int, default=32, help='rows of all chips')
  parser.add_argument('--length', type=int, default=32768, help='tokens of a row')
  args = parser.parse_args()
  config = configs.load_config(f'configs/distill_on.py:{args.size}', [
    f'--config.data.batch={args.batch}', f'--config.data.length={args.length}'])
  distillation.loss = whole_logits
  mesh = alphabet.make_mesh(devices=plan.get_devices(args.topology))
  (update, *_) = programs.of_stage(config, mesh, teacher=args.teacher)
  generation, chip = chips.find(args.topology)
  found = plan.estimate(update._replace(beside={}), chip, generation,
                        say=lambda text: print(text, file=sys.stderr))
  print('\n'.join(describe.describe(found, chip)))


if __name__ == '__main__':
  main()
