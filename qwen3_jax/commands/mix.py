"""Weighs documents by their labels, so that a small model trained on them predicts best.

--input takes JSON lines of texts with labels, as the annotate stage of `filter` leaves them:
{"text": ..., "labels": {"education": 0 to 5, "domain": ..., "safety": ...}}. Small proxies learn
from differently weighed documents and are measured on held-out ones of each domain; a regression
says which weights are best. That is done for weights of whole domains and of single documents, with
equal trials and budgets, and both are compared with unweighted documents over several seeds.

The workdir then holds trials.jsonl, mix.json (theta, predictions, results) and weights.jsonl: `id`
and `weight` (mean 1) of each input record, in order, for the last of config.levels. Run the same
command again and it goes on at the trial where it was.

Examples:
  python -m qwen3_jax mix --config=configs/mix.py:tiny --input=runs/text/annotate/accepted.jsonl \\
    --workdir=runs/mix
  python -m qwen3_jax mix --config=configs/mix.py:proxy --input='labelled/*.jsonl.gz' \\
    --heldout=wanted.jsonl --workdir=runs/mix --config.targets="(('mathematics', 2.0),)"
"""
import functools
import json

from etils import epath

from qwen3_jax.commands import config as configs


def add_arguments(parser):
  parser.add_argument('--config', required=True, metavar='FILE:ARG',
                      help='e.g. configs/mix.py:tiny')
  parser.add_argument('--input', required=True, action='append', metavar='FILES',
                      help='labelled JSON lines; may be repeated')
  parser.add_argument('--heldout', action='append', metavar='FILES',
                      help='labelled texts that the model should predict; default: a part of the '
                      'input, of high education value (config.heldout)')
  parser.add_argument('--workdir', required=True, metavar='DIR')


def main(args):
  config = configs.load_given(args)
  with config.unlocked():
    config.heldout.files = (*config.heldout.files, *(args.heldout or ()))
  run(config, args.input, epath.Path(args.workdir))
  return 0


def run(config, inputs, workdir):
  """Tunes, compares, prints the table and writes the weights."""
  from qwen3_jax.scaling import mixing, proxy
  claim(workdir, config, inputs)
  rows, kept = proxy.read_texts(inputs, config.share, config.heldout, config.seed)
  tokenizer = open_tokenizer(config, workdir, [text for text, _ in rows])
  encode = functools.partial(tokenizer.encode, special=False)
  documents = proxy.tokenise(rows, encode, 'documents')
  heldout = proxy.tokenise(kept, encode, 'held out')
  print(f'{len(rows):,} documents to train on, {len(kept):,} held out, in '
        f'{len(heldout.domains)} domains; {config.trials} trials a level of '
        f'{config.steps * config.batch * config.length:,} tokens', flush=True)
  small = proxy.Proxy(config, documents, heldout, tokenizer.eod_id)
  log = mixing.Log(workdir / 'trials.jsonl')
  report = lambda line: print(line, flush=True)
  tuned = [mixing.tune_level(small, log, level, config, report) for level in config.levels]
  table = mixing.summarise(mixing.compare(small, log, tuned, config, report), config.targets)
  (workdir / 'mix.json').write_text(json.dumps(dict(levels=tuned, results=table), indent=2) + '\n')
  write_weights(inputs, documents.labels, tuned[-1], workdir / 'weights.jsonl')
  print('\n'.join(describe(tuned, table)))


def claim(workdir, config, inputs):
  """Writes what the run is into its workdir; ValueError where another's trials lie there.

  Only the number of final `seeds` may change: more of them make the comparison surer.
  """
  from qwen3_jax.stages import records
  what = json.loads(configs.to_json(dict(
    config=config.to_dict(), input=records.Rows(inputs).describe(),
    heldout=records.Rows(config.heldout.files).describe())))
  path = workdir / 'config.json'
  if path.exists() and (workdir / 'trials.jsonl').exists():
    other = [line for line in configs.diff(json.loads(path.read_text()), what)
             if not line.startswith('config.config.seeds:')]
    if other:
      raise ValueError(f'{workdir} holds the trials of another run ({"; ".join(other[:4])}). Use '
                       'the same settings and files to continue it, or another --workdir')
  workdir.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(what, indent=2) + '\n')


def open_tokenizer(config, workdir, texts):
  """That of the config, else one trained once on the texts."""
  from qwen3_jax.text import tokenizer
  if config.tokenizer:
    return tokenizer.Tokenizer(config.tokenizer)
  if not (workdir / 'tokenizer').exists():
    (workdir / 'tokenizer.new').rmtree(missing_ok=True)
    tokenizer.train(texts, config.tokenizer_size, workdir / 'tokenizer.new')
    (workdir / 'tokenizer.new').rename(workdir / 'tokenizer')
  return tokenizer.Tokenizer(workdir / 'tokenizer')


def write_weights(inputs, labels, level, path):
  """weights.jsonl: `id` and `weight` of every input record, the mean over `labels` being 1."""
  import numpy as np

  from qwen3_jax.data import weighting
  from qwen3_jax.scaling import proxy
  mean = np.exp(weighting.features(labels, level['names']) @ level['theta']).mean()
  new = path.parent / f'{path.name}.new'
  with new.open('w') as file:
    for name, _, each in proxy.read_rows(inputs):
      score = weighting.features([each], level['names'])[0] @ level['theta']
      file.write(json.dumps(dict(id=name, weight=float(np.exp(score) / mean))) + '\n')
  new.replace(path)


def describe(tuned, table):
  """Lines for a person: what was found, and how sure that is."""
  for level in tuned:
    shown = ', '.join(f'{name} {theta:+.2f}' for name, theta in zip(level['names'], level['theta']))
    yield (f'{level["level"]}: theta {shown}; predicted loss {level["predicted"]:.4f}, unweighted '
           f'{level["unweighted"]:.4f}; the fit explains {max(0, level["explained"]):.0%} of the '
           "trials' variance, one left out")
  for row in table:
    domains = ', '.join(f'{name} {mean:.3f}' for name, (mean, _) in row['domains'].items())
    yield f'{row["name"]:12} held-out loss {row["loss"]:.4f} +- {row["half"]:.4f} ({domains})'
    for other, (mean, half) in row['against'].items():
      verdict = 'lower' if mean + half < 0 else 'higher' if mean - half > 0 else 'not different'
      yield f'{"":12} against {other}: {mean:+.4f} +- {half:.4f} ({verdict}, 95 %)'
