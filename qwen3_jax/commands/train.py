"""Trains one stage: `--config` says which, `--workdir` keeps everything it writes.

Run the same command again and it continues from its last checkpoint, bit for bit. Any field of the
config can be set: --config.optim.peak_lr=1e-4.

Exit codes: 0 done; 42 stopped by SIGTERM and saved, run it again; 78 the config cannot be read (no
such file, size or key, a value of the wrong type); 2 anything else that is wrong with the input
(values that do not fit, data, tokenizer, checkpoints, a full disk); 3 training cannot go on: it
diverged, or of reinforcement learning engine and trainer disagree or no answer teaches anything; 75
the data that the config asks for could not all be made, or a step hung, or hosts did not come: run
it again.

On many hosts run the same command on each, with QWEN3_JAX_HOSTS, QWEN3_JAX_COORDINATOR and
QWEN3_JAX_HOST set (`python -m launch run` does it), and --workdir where all can reach it.

Examples:
  python -m qwen3_jax train --config=configs/s1.py:tiny --workdir=runs/s1
  python -m qwen3_jax train --config=configs/s3.py:0.6b --workdir=runs/s3 --init=Qwen3-0.6B-Base \\
    --config.data.sources="(('/data/*.jsonl', 1.0),)"
"""
import importlib
import json
import sys

from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands.prepare import prepare
from qwen3_jax.scaling import flags
from qwen3_jax.training import hosts

STUCK = 3

METHODS = {'pretrain': 'qwen3_jax.stages.pretrain', 'sft': 'qwen3_jax.stages.sft',
           'reward': 'qwen3_jax.stages.reward', 'dpo': 'qwen3_jax.stages.dpo',
           'rl': 'qwen3_jax.stages.rl', 'distill': 'qwen3_jax.stages.distill'}

# What a run that is continued may change: how far, how often, on which machine; not what it learns.
FREE = ('steps', 'epochs', 'stop_loss', 'save_every', 'keep', 'evaluate_every', 'mesh', 'remat',
        'xla', 'micro_batches', 'micro_rows', 'measure', 'measure_reward', 'parity')


def add_arguments(parser):
  parser.add_argument('--config', required=True, metavar='FILE:ARG', help='e.g. configs/s1.py:0.6b')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='checkpoints, metrics, config and tokenizer go here')
  parser.add_argument('--init', metavar='DIR', help='start from the weights of a workdir, a recipe '
                      'or a Hugging Face folder (and use its tokenizer)')
  parser.add_argument('--tokenizer', metavar='DIR', help='tokenizer folder or file; default: that '
                      'of --init, else one is trained on the data')


def main(args):
  config = configs.load_given(args)
  hosts.join()
  with config.unlocked():
    config.init = args.init or config.init
    config.data.tokenizer = args.tokenizer or config.data.tokenizer
  return train(config, epath.Path(args.workdir))


def train(config, workdir):
  """Runs the stage of `config` in `workdir`; returns the exit code."""
  flags.use(config.xla)
  from qwen3_jax.training.fit import Preempted, Stuck
  from qwen3_jax.training.preemption import EXIT_CODE
  with hosts.in_turn(f'prepare {workdir}'):
    claim(workdir, config)
    tokenizer = prepare_tokenizer(config, workdir)
    code = prepare(config, workdir)
  if code:
    return code
  try:
    importlib.import_module(METHODS[config.method]).run(config, workdir, tokenizer)
  except Preempted as e:
    print(e, file=sys.stderr)
    return EXIT_CODE
  except (FloatingPointError, Stuck) as e:
    print(f'error: {e}', file=sys.stderr)
    return STUCK
  return 0


def claim(workdir, config):
  """Writes the config into a workdir; ValueError where it holds another run's.

  Fields in FREE may differ. A run that never saved a checkpoint has no claim: what it left (a
  tokenizer, perhaps of other data) goes.
  """
  from qwen3_jax.training import checkpoint
  path = workdir / 'config.json'
  if path.exists():
    free = tuple(f'config.{field}{end}' for field in FREE for end in '.:')
    other = [line for line in configs.diff(json.loads(path.read_text()), config)
             if not line.startswith(free)]
    if other and checkpoint.steps(workdir / 'checkpoints'):
      shown = '; '.join(other[:4] + [f'and {len(other) - 4} more'] * (len(other) > 4))
      raise ValueError(f'{workdir} belongs to a run with another config ({shown}). Use the same '
                       'settings to continue it, or another --workdir')
    if other:
      (workdir / 'tokenizer').rmtree(missing_ok=True)
  workdir.mkdir(parents=True, exist_ok=True)
  text, new = configs.to_json(config), path.parent / 'config.json.new'
  if not path.exists() or path.read_text() != text:
    new.write_text(text)
    new.replace(path)


def prepare_tokenizer(config, workdir):
  """The run's tokenizer, in workdir/tokenizer: that given, that of `init`, or one trained now."""
  from qwen3_jax.data import sources
  from qwen3_jax.stages import load, pretrain
  from qwen3_jax.text import tokenizer as text
  folder, new = workdir / 'tokenizer', workdir / 'tokenizer.new'
  if folder.exists():
    return text.Tokenizer(folder)
  new.rmtree(missing_ok=True)
  if config.data.tokenizer:
    text.Tokenizer(config.data.tokenizer).save(new)
  elif config.init:
    kind, found = load.find(config.init)
    text.Tokenizer(found if kind == 'hf' else found / 'tokenizer').save(new)
  elif not config.data.tokenizer_size:
    raise ValueError('no tokenizer: give --tokenizer=DIR (that of a Qwen3 checkpoint, say), or set '
                     'config.data.tokenizer_size to train one on the data')
  else:
    opened = [sources.open_source(spec, 'train') for spec, _ in pretrain.source_shares(config)]
    print(f'training a tokenizer of {config.data.tokenizer_size} ids on the data', flush=True)
    texts = (source[i] for source in opened for i in range(min(len(source), 20_000)))
    text.train(texts, config.data.tokenizer_size, new)
  new.rename(folder)
  return text.Tokenizer(folder)
