"""Writes qwen3_jax/scaling/kernel_times.json: how long the kernels' schedules take, for `plan`.

`--scorer` as of `kernels.py`: a program that compiles a builder ahead of time and prints what its
schedule says, as JSON. Shapes are those of the released models; a kernel's time is the longer of
its schedule and its HBM bytes. Static estimates: nothing runs on a TPU. What is in the table is not
scored again without `--again`, so that an interrupted run goes on.

  python tests/benchmarks/kernel_times.py --scorer=tpu_static.py
"""
import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ |= dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                   TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8')

import jax  # noqa: E402
import kernels  # noqa: E402  (beside this file)
from jax.experimental import topologies  # noqa: E402

from qwen3_jax import mesh as alphabet  # noqa: E402
from qwen3_jax.scaling import kernel_calls  # noqa: E402

CHIPS = {'v5e': ('v5e:2x2', 98304), 'v5p': ('v5p:2x2x1', 61440), 'v6e': ('v6e:2x2', 98304)}
HEADS = {'0.6b, 1.7b': (16, 8), '4b, 8b': (32, 8), '14b': (40, 8), '32b': (64, 8),
         '30b-a3b': (32, 4), '235b-a22b': (64, 4)}
CASES = [
  *(('attention', 'forward', dict(N=N, K=K), models) for models, (N, K) in HEADS.items()),
  *(('backward', 'backward', dict(N=N, K=K), models) for models, (N, K) in HEADS.items()),
  ('attention', 'forward', dict(N=32, K=8, S=32768), '8b at 32,768'),
  ('backward', 'backward', dict(N=32, K=8, S=32768), '8b at 32,768'),
  ('attention', 'forward', dict(N=16, K=8, running=True), 'without a bound'),
  *(('head', 'kept', dict(D=D), f'width {D}') for D in (1024, 2048, 4096)),
  ('experts', 'forward', dict(save=True), '30b-a3b, balanced'),
  ('experts_backward', 'backward', {}, '30b-a3b, balanced'),
  ('router', 'route', {}, '8,192 tokens'), ('router', 'plan', {}, '8,192 tokens')]


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--scorer', type=Path, required=True)
  parser.add_argument('--chip', action='append', choices=CHIPS, help='only these')
  parser.add_argument('--again', action='store_true')
  args = parser.parse_args()
  path = kernel_calls.TABLE
  whole = json.loads(path.read_text()) if path.exists() else {}
  times = whole.setdefault('times', {})
  whole['about'] = ("Static scores of the TPU compiler's schedule, microseconds; nothing ran on a "
                    'TPU. Made by tests/benchmarks/kernel_times.py')
  for chip in args.chip or CHIPS:
    for family, builder, kwargs, models in CASES:
      source = f'{family}.{builder} {json.dumps(kwargs)}'
      known = times.setdefault(chip, {})
      if not args.again and any(source in each['source'] for each in sum(known.values(), [])):
        continue
      print(f'{chip}: {source} ...', flush=True)
      for kernel, entry in score(chip, family, builder, kwargs, args.scorer).items():
        entry['source'] = f'{source} ({models}); {versions()}'
        rest = [each for each in known.get(kernel, ()) if source not in each['source']]
        known[kernel] = [*rest, entry]
        print(f'  {kernel}: {entry["us"]} us', flush=True)
      path.write_text(json.dumps(whole, indent=1, sort_keys=True) + '\n')


def versions():
  return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'libtpu'))


def score(chip, family, builder, kwargs, scorer):
  """{kernel: dict(shape, flops, bytes, us)} of a case; empty, with a word, where it fails."""
  topology, limit = CHIPS[chip]
  file = Path(__file__).with_name('kernel_cases') / f'{family}.py'
  done = subprocess.run(
    [sys.executable, scorer, f'{file}:{builder}', '-t', topology, '--kwargs', json.dumps(kwargs),
     f'--flags=--xla_tpu_scoped_vmem_limit_kib={limit}', '--json'],
    capture_output=True, text=True, check=False)
  if done.returncode:
    print('  failed: ' + (done.stderr.strip().splitlines() or ['?'])[-1][:200])
    return {}
  scores = json.loads(done.stdout)['kernels']
  found = {}
  for call in calls(topology, file, builder, kwargs):
    mine = [each for each in scores if each['kernel'].startswith(call.kernel)]
    exact = [each for each in mine if not each['kernel'][len(call.kernel):].startswith('_')]
    if exact:
      us = max(sum(each['est_us'] for each in exact), sum(each['hbm_us'] or 0 for each in exact))
      found[call.kernel] = dict(shape=call.shape, flops=call.flops, bytes=call.bytes,
                                us=round(us, 1))
  return found


def calls(topology, file, builder, kwargs):
  """The kernels' calls, from the compiled program itself."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[:1]
  mesh = alphabet.make_mesh(dict(fsdp=1), devices)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask which chip it is
    built = getattr(kernels.load(file), builder)(**kwargs)
  with jax.set_mesh(mesh):
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
                        built['args'])
    return kernel_calls.read(jax.jit(built['fn']).lower(*args).compile().as_text())


if __name__ == '__main__':
  main()
