"""Searches block sizes of a TPU kernel by its static score and keeps the best in blocks.json.

`--scorer` as for kernels.py. A search is one of SEARCHES: the builder of kernel_cases that takes
`blocks`, its shapes, and the values to try. What does not compile (too much VMEM, say) is passed
over. Nothing is run on a TPU.

  python tests/benchmarks/tune_kernels.py --scorer=tpu_static.py --kernel=head_statistics --chip=v6e
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import kernels

TABLE = Path(__file__).resolve().parents[2] / 'qwen3_jax/kernels/blocks.json'
WIDTHS = [(dict(D=D), dict(D=D, dtype='bfloat16')) for D in (1024, 2048, 4096)]

# kernel: (family, builder, [(the builder's arguments, the shape noted)], {block: values})
SEARCHES = {
  'head_statistics': ('head', 'forward', WIDTHS, dict(
    tokens=(512, 1024), rows=(256, 512, 1024, 2048), part=(256,))),
  'head_gradient': ('head', 'backward', WIDTHS, dict(
    tokens=(256, 512), rows=(512, 768, 1024, 1536, 2048), part=(256,))),
  'flash_forward': ('attention', 'forward', [
    (dict(N=N, K=K), dict(N=N, K=K, H=128, S=4096, dtype='bfloat16'))
    for N, K in ((16, 8), (32, 8), (64, 4))], dict(queries=(128, 256, 512), keys=(256, 512))),
  'flash_backward': ('backward', 'backward', [
    (dict(N=N, K=K), dict(N=N, K=K, H=128, S=4096, dtype='bfloat16'))
    for N, K in ((16, 8), (32, 8), (64, 4))], dict(queries=(256, 512, 1024), keys=(256, 512))),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--scorer', type=Path, required=True)
  parser.add_argument('--python', default=sys.executable, help='runs the scorer; has jax[tpu]')
  parser.add_argument('--kernel', choices=SEARCHES, required=True)
  parser.add_argument('--chip', choices=kernels.FLAGS, required=True)
  args = parser.parse_args()
  family, builder, shapes, values = SEARCHES[args.kernel]
  for given, shape in shapes:
    best = None
    for sizes in itertools.product(*values.values()):
      blocks = dict(zip(values, sizes))
      case = dict(builder=builder, kwargs=given | dict(blocks=blocks), only='',
                  topology='v5p:2x2x1' if args.chip == 'v5p' else f'{args.chip}:2x2',
                  file=str(kernels.HERE / f'kernel_cases/{family}.py'),
                  flags=kernels.FLAGS[args.chip])
      found = kernels.score(case, args)
      print(given, blocks, found.get('error') or f'{found["bound_us"]:.1f} us', flush=True)
      if 'error' not in found and (best is None or found['bound_us'] < best[0]):
        best = found['bound_us'], blocks
    if best:
      record(args.kernel, args.chip, shape, best[1])


def record(kernel, chip, shape, blocks):
  """Puts a shape's best blocks into the table, in place of what it had."""
  table = json.loads(TABLE.read_text())
  rows = table.setdefault(kernel, {}).setdefault(chip, [])
  rows[:] = [row for row in rows if row['shape'] != shape] + [dict(shape=shape, blocks=blocks)]
  TABLE.write_text(as_text(table))


def as_text(table):
  """JSON with one line for each shape."""
  def chip_text(chip, rows):
    lines = ',\n'.join(f'   {json.dumps(row)}' for row in rows)
    return f'  "{chip}": [\n{lines}\n  ]'
  kernels_text = (f' "{kernel}": {{\n' + ',\n'.join(itertools.starmap(chip_text, chips.items()))
                  + '\n }' for kernel, chips in table.items())
  return '{\n' + ',\n'.join(kernels_text) + '\n}\n'


if __name__ == '__main__':
  main()
