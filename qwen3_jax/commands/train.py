"""Trains one stage: `--config` says which, `--workdir` keeps everything it writes.

Run the same command again and it continues from its last checkpoint, bit for bit. Any field of the
config can be set: --config.optim.peak_lr=1e-4. Exit codes: 0 done, 42 stopped by SIGTERM and saved,
78 something in the config is wrong, 2 other bad input.

Examples:
  python -m qwen3_jax train --config=configs/s1.py:tiny --workdir=runs/s1
  python -m qwen3_jax train --config=configs/s3.py:0.6b --workdir=runs/s3 --init=Qwen3-0.6B-Base
"""
import json
import sys

from etils import epath

from qwen3_jax.commands import config as configs

CONFIG_ERROR = 78


def add_arguments(parser):
  parser.add_argument('--config', required=True, metavar='FILE:ARG', help='e.g. configs/s1.py:0.6b')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='checkpoints, metrics, config and tokenizer go here')
  parser.add_argument('--init', metavar='DIR', help='start from the weights of a workdir, a recipe or '
                      'a Hugging Face folder (and use its tokenizer)')
  parser.add_argument('--tokenizer', metavar='DIR', help='tokenizer folder or file; default: that of '
                      '--init, else one is trained on the data')


def main(args):
  try:
    config = configs.load_config(args.config, args.overrides)
  except (ValueError, FileNotFoundError) as e:
    print(f'error: {e}', file=sys.stderr)
    return CONFIG_ERROR
  with config.unlocked():
    config.init = args.init or config.init
    config.data.tokenizer = args.tokenizer or config.data.tokenizer
  return train(config, epath.Path(args.workdir))


def train(config, workdir):
  """Runs the stage of `config` in `workdir`; returns the exit code."""
  from qwen3_jax.stages import pretrain
  from qwen3_jax.training.fit import Preempted
  from qwen3_jax.training.preemption import EXIT_CODE
  claim(workdir, config)
  tokenizer = prepare_tokenizer(config, workdir)
  try:
    pretrain.run(config, workdir, tokenizer)
  except Preempted as e:
    print(e, file=sys.stderr)
    return EXIT_CODE
  return 0


def claim(workdir, config):
  """Writes the config into a new workdir; ValueError where it holds another run's.

  `steps` may grow, and what only concerns reporting may change, in a run that is continued.
  """
  path = workdir / 'config.json'
  if path.exists():
    free = ('config.steps:', 'config.save_every:', 'config.keep:', 'config.evaluate_every:')
    other = [line for line in configs.diff(json.loads(path.read_text()), config)
             if not line.startswith(free)]
    if other:
      raise ValueError(f'{workdir} belongs to a run with another config:\n  ' + '\n  '.join(other) +
                       '\nUse the same settings to continue it, or another --workdir')
  workdir.mkdir(parents=True, exist_ok=True)
  new = path.parent / 'config.json.new'
  new.write_text(configs.to_json(config))
  new.replace(path)


def prepare_tokenizer(config, workdir):
  """The run's tokenizer, in workdir/tokenizer: the one given, that of `init`, or one trained now."""
  from qwen3_jax.data import sources
  from qwen3_jax.stages import load
  from qwen3_jax.text import tokenizer as text
  folder = workdir / 'tokenizer'
  if folder.exists():
    return text.Tokenizer(folder)
  if config.data.tokenizer:
    text.Tokenizer(config.data.tokenizer).save(folder)
  elif config.init:
    kind, found = load.find(config.init)
    text.Tokenizer(found if kind == 'hf' else found / 'tokenizer').save(folder)
  else:
    print(f'training a tokenizer of {config.data.tokenizer_size} ids on the data', flush=True)
    if not config.data.sources:
      raise ValueError('config.data.sources is None: say what to train on')
    opened = [sources.open_source(spec, 'train') for spec, _ in config.data.sources]
    texts = (source[i] for source in opened for i in range(min(len(source), 20_000)))
    return text.train(texts, config.data.tokenizer_size, folder)
  return text.Tokenizer(folder)
