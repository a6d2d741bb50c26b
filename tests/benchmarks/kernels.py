"""Scores the TPU kernels, and public ones beside them, from the real compiler's schedule.

No TPU is needed and none is used: figures are static estimates. `--scorer` is a program that
compiles a builder ahead of time and prints what its schedule says, as JSON (`SCORER FILE.py:BUILDER
-t TOPOLOGY --kwargs JSON --flags FLAGS --json`); `--public` a file with builders of public kernels.
Cases are the CASES of `kernel_cases/*.py`. Scores are kept in a JSON file, case by case: an
interrupted run goes on, and `--write` puts the table of all that is kept into the kernels' README.

  python tests/benchmarks/kernels.py --scorer=tpu_static.py --public=kernel_builders.py --write
  python tests/benchmarks/kernels.py --scorer=tpu_static.py --family=attention --again
"""
import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / 'qwen3_jax/kernels/README.md'
BEGIN, END = '<!-- scores -->', '<!-- end of scores -->'

# family: {chip: [(builder, arguments, kernels to add up: all, or those whose name contains this)]}
PUBLIC = {
  'attention': {
    'v6e': [('tsplash', dict(bq=1024, bkv=1024, bkvc=512, bwd=False), 'fwd'),
            ('splash', dict(bq=1024, bkv=1024, bkvc=512, bwd=False), 'fwd')],
    'v5p': [('splash', dict(bq=1024, bkv=1024, bkvc=512, bwd=False), 'fwd')]},
  'backward': {
    'v6e': [('tsplash', dict(bq=1024, bkv=1024, bkvc=512), 'dkv')],
    'v5p': [('tsplash', dict(bq=1024, bkv=1024, bkvc=512), 'dkv')]},
  'decode': {'v6e': [('rpa', {}, '')], 'v5p': [('rpa', {}, '')]},
  'experts': {
    'v6e': [('gmm_v2', dict(fuse='silu', tile=[512, 2048, 768, 128]), ''),
            ('gmm_v2', dict(K=768, N=2048), '')],
    'v5p': [('gmm', dict(tm=128, tk=2048, tn=768), ''),
            ('gmm', dict(K=768, N=2048, tm=128, tk=768, tn=1024), '')]},
  'experts_backward': {
    'v6e': [('tgmm', dict(tm=512, tk=2048, tn=768), '')],
    'v5p': [('tgmm', dict(tm=512, tk=2048, tn=768), '')]},
}
FLAGS = {'v6e': '--xla_tpu_scoped_vmem_limit_kib=98304',
         'v5p': '--xla_tpu_scoped_vmem_limit_kib=61440'}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--scorer', type=Path, help='the program that scores a builder')
  parser.add_argument('--public', type=Path, help='a file with builders of public kernels')
  parser.add_argument('--python', default=sys.executable, help='runs the scorer; has jax[tpu]')
  parser.add_argument('--family', action='append', help='only these of kernel_cases')
  parser.add_argument('--keep', type=Path, default=HERE / 'kernel_scores.json')
  parser.add_argument('--again', action='store_true', help='score also what is kept')
  parser.add_argument('--write', action='store_true', help=f'write the table into {README.name}')
  args = parser.parse_args()
  for path in (args.scorer, args.public):
    if path and not path.exists():
      sys.exit(f'error: no file {path}')
  kept = json.loads(args.keep.read_text()) if args.keep.exists() else {}
  for case in cases(args.family, args.public):
    name = f'{case["family"]}: {case["label"]} @ {case["topology"]}'
    if args.scorer and (args.again or name not in kept):
      print(f'{name} ...', flush=True)
      kept[name] = keep(case) | score(case, args)
      args.keep.write_text(json.dumps(kept, indent=1, sort_keys=True) + '\n')
  text = '\n'.join(table(kept))
  print(text)
  if args.write:
    old = README.read_text()
    head, _, rest = old.partition(BEGIN)
    README.write_text(f'{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}')


def cases(families, public):
  """Every case as a dict: ours, then the public kernels on the same work."""
  for path in sorted((HERE / 'kernel_cases').glob('*.py')):
    if families and path.stem not in families:
      continue
    for case in load(path).CASES:
      yield case | dict(family=path.stem, file=str(path), ours=True, only=case.get('only', ''))
    for chip, builders in (PUBLIC.get(path.stem, {}) if public else {}).items():
      topology = 'v5p:2x2x1' if chip == 'v5p' else f'{chip}:2x2'
      for builder, kwargs, only in builders:
        words = ' '.join(f'{k}={v}' for k, v in kwargs.items())
        yield dict(family=path.stem, label=f'public {builder} {words}'.strip(), builder=builder,
                   kwargs=kwargs, topology=topology, flags=FLAGS[chip], file=str(public),
                   ours=False, only=only)


def load(path):
  if str(path.parent) not in sys.path:
    sys.path.insert(0, str(path.parent))  # cases share what they count
  spec = importlib.util.spec_from_file_location(f'kernel_case_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def keep(case):
  return {k: case.get(k) for k in ('family', 'label', 'topology', 'ours', 'target_us',
                                   'best_public_us')}


def score(case, args):
  """What the schedule says of all of a case's kernels, added up; or its error's last line."""
  builder = getattr(case['builder'], '__name__', case['builder'])
  command = [args.python, args.scorer, f'{case["file"]}:{builder}', '-t', case['topology'],
             '--kwargs', json.dumps(case['kwargs']), f'--flags={case.get("flags", "")}', '--json']
  done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if 'Error' in line] or ['failed']
    return dict(error=said[-1].strip()[:200])
  kernels = [k for k in json.loads(done.stdout)['kernels'] if case['only'] in k['kernel']]
  widest = max(kernels, key=lambda k: k['est_us'])
  tight = max(widest['regions'], key=lambda r: r['cycles'] * r['execs'], default={})
  return dict(
    us=sum(k['est_us'] for k in kernels), hbm_us=sum(k.get('hbm_us') or 0 for k in kernels),
    bound_us=sum(k.get('bound_us') or k['est_us'] for k in kernels),
    mxu_ratio=sum((k.get('mxu_ratio') or 0) * k['est_us'] for k in kernels)
    / sum(k['est_us'] for k in kernels),
    spills=sum(k['spills'] for k in kernels), fills=sum(k['fills'] for k in kernels),
    cores=min(k['cores'] for k in kernels),
    tightest=f'{tight.get("tightest", "-")} {tight.get("bound_over_cycles", 0):.2f}')


def table(kept):
  """Markdown lines."""
  yield ('| kernel | chip | est us | HBM us | MXU | tightest | spills / fills | cores | target us |'
         ' best public us |')
  yield '|---|---|---|---|---|---|---|---|---|---|'
  for row in sorted(kept.values(), key=lambda r: (r['family'], r['topology'], not r['ours'],
                                                  r['label'])):
    name = f'{row["family"]}: {row["label"]}'
    chip = row['topology'].partition(':')[0]
    if 'error' in row:
      yield f'| {name} | {chip} | does not compile: {row["error"]} |||||||'
      continue
    yield (f'| {name} | {chip} | {row["us"]:.0f} | {row["hbm_us"]:.0f} | {row["mxu_ratio"]:.2f} | '
           f'{row["tightest"]} | {row["spills"]} / {row["fills"]} | {row["cores"]} | '
           f'{row["target_us"] or ""} | {row["best_public_us"] or ""} |')


if __name__ == '__main__':
  main()
