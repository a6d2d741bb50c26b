"""Turns a trained model into a Hugging Face folder, and back.

--from takes a Hugging Face folder, the workdir of a training run, or that of a recipe (its last
stage); the adapters of a LoRA run are merged into the model they were trained on. The Hugging Face
folder that is written holds safetensors, config.json and the tokenizer's files, and transformers
loads it. --as run writes what a training run leaves instead: a workdir with
one checkpoint of the weights, for --init and --model (which read Hugging Face folders too).
Nothing half-written is left: --to appears when everything is in it.

Examples:
  python -m qwen3_jax convert --from runs/s3 --to exported --dtype bfloat16
  python -m qwen3_jax convert --from Qwen3-0.6B --to runs/qwen3 --as run
"""
import dataclasses
import json
import os

from etils import epath

DTYPES = ('bfloat16', 'float16', 'float32')


def add_arguments(parser):
  parser.add_argument('--from', dest='source', required=True, metavar='DIR', help='the model')
  parser.add_argument('--to', required=True, metavar='DIR', help='a new or empty folder')
  parser.add_argument('--as', dest='kind', choices=('hf', 'run'), default='hf',
                      help='Hugging Face folder or workdir of a run')
  parser.add_argument('--dtype', choices=DTYPES, help='type of all weights; default: as they are')


def main(args):
  import jax

  from qwen3_jax.mesh import make_mesh
  from qwen3_jax.stages import load
  target = epath.Path(args.to)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(f'--to {target} exists and is not an empty folder; name a new one')
  kind, source = load.find(args.source)
  tokenizer = open_tokenizer(source if kind == 'hf' else source / 'tokenizer')
  mesh = make_mesh() if jax.device_count() > 1 else None
  model = load.load(source, mesh, dtype=None)
  if tokenizer is not None and not model.spec.stop_ids:
    model.spec = dataclasses.replace(model.spec, stop_ids=tokenizer.stop_ids)
  write = write_hf if args.kind == 'hf' else write_run
  write(model, target, args.dtype, tokenizer)
  beside = source / 'generation_config.json'
  if kind == args.kind == 'hf' and beside.exists():  # sampling defaults that a Spec does not hold
    (target / beside.name).write_text(beside.read_text())
  print(f'{target}: {model.spec.parameters():,} weights'
        f'{"" if tokenizer else f", no tokenizer: {source} has none"}')


def open_tokenizer(folder):
  """The tokenizer in `folder`, or None."""
  from qwen3_jax.text.tokenizer import Tokenizer
  try:
    return Tokenizer(folder)
  except FileNotFoundError:
    return None


def write_hf(model, target, dtype, tokenizer):
  from qwen3_jax.model import hf
  hf.save(model, target, dtype, tokenizer=tokenizer)


def write_run(model, target, dtype, tokenizer):
  """A workdir as training leaves it, with the weights as checkpoint 0."""
  import jax

  from qwen3_jax.training.checkpoint import Checkpoints
  scratch = target.parent / f'{target.name}.tmp-{os.getpid()}'
  config = dict(model=dataclasses.asdict(model.spec))
  params = jax.tree.map(lambda w: w.astype(dtype or w.dtype), model)
  try:
    scratch.mkdir(parents=True)
    checkpoints = Checkpoints(scratch / 'checkpoints')
    checkpoints.save(0, dict(params=params), data={}, config=config)
    checkpoints.close()
    (scratch / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    if tokenizer is not None:
      tokenizer.save(scratch / 'tokenizer')
    if target.exists():
      target.rmdir()
    scratch.rename(target)
  except BaseException:
    scratch.rmtree(missing_ok=True)
    raise
