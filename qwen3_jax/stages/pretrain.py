"""Pretraining stages S1, S2, S3: packed text and next-token loss; a stage is two functions."""
import functools
import json
import re

from etils import epath

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import mixture, packing, sources, weighting
from qwen3_jax.stages import load
from qwen3_jax.stages.run import check_vocabulary, compute_dtype, make_cast, train
from qwen3_jax.training import losses


def make_loss(config):
  """loss(params, batch) of a config: compute type, recomputation, balance terms."""
  dtype, cast = compute_dtype(config), make_cast(config)

  def loss(params, batch):
    return losses.next_token(cast(params), batch, remat=config.remat, dtype=dtype,
                             balance=config.balance or 0.0, router_z=config.router_z or 0.0)
  return loss


def source_shares(config):
  """[(source, share of tokens)] of `config.data.sources`, which may also be one source's name."""
  given = config.data.sources
  if not given:
    raise ValueError(
      'config.data.sources is None: say what to train on, e.g. --config.data.sources='
      "\"(('/data/*.jsonl', 1.0),)\", or \"(('stdlib', 1.0),)\" for this machine's Python library")
  if isinstance(given, str):
    return [(given, 1.0)]
  for pair in given:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
            and isinstance(pair[1], (int, float))):
      raise ValueError(f'config.data.sources holds {pair!r}; want pairs of a source and its share '
                       "of the tokens, e.g. (('/data/*.jsonl', 1.0),)")
  return [tuple(pair) for pair in given]


def open_documents(config, tokenizer, split):
  """The mixture of `config.data.sources`, each by length where asked."""
  data = config.data
  encode = functools.partial(tokenizer.encode, special=False)
  parts = []
  for spec, share in source_shares(config):
    source = sources.open_source(spec, split)
    if split == 'train' and spec in (weights := dict(data.weights)):
      source = weigh(source, sources.open_source(spec), weights[spec])
    if data.length_mix and split == 'train':
      views = mixture.length_mix(source, encode, data.length, data.length_mix)
      parts += [(view, share * part) for view, part in views]
    else:
      parts.append((source, share))
  return mixture.mixture(parts, config.seed, encode)


def weigh(source, whole, path):
  """The documents of `source`, each as often as the lines of `path` say (see the command `mix`).

  `whole` is the source with its held-out part, which has a line for each document, in order.
  """
  weights = [json.loads(line)['weight'] for line in epath.Path(path).read_text().splitlines()]
  if len(weights) != len(whole):
    raise ValueError(f'{path} has {len(weights)} weights, {whole.name} has {len(whole)} documents; '
                     'they must be those that `mix` weighed, in their order')
  of = dict(zip(whole.hashes.tolist(), weights))
  return weighting.weighted(source, [of[key] for key in source.hashes.tolist()])


def make_loader(config, tokenizer, mesh):
  """The stage's stream of batches on this host: the rows its devices hold."""
  data = config.data
  return packing.Loader(
      open_documents(config, tokenizer, 'train'),
      functools.partial(tokenizer.encode, special=False), data.batch, data.length,
      tokenizer.eod_id, rows=alphabet.owned_rows(data.batch, mesh),
      keep_whole=8 if data.length_mix else 0)


def heldout_batches(config, tokenizer, mesh):
  """{name: batches} of held-out text, the same at every evaluation.

  The first source is `heldout_loss`, which compares stages; others are `heldout_<source>`.
  """
  data = config.data
  rows = alphabet.owned_rows(data.batch, mesh)
  encode = functools.partial(tokenizer.encode, special=False)
  batches = {}
  for spec in data.heldout or ():
    source = sources.open_source(spec, 'heldout')
    label = re.sub(r'\W+', '_', re.sub(r':\w+=.*', '', spec)).strip('_')
    batches[f'heldout_{label}' if batches else 'heldout_loss'] = [
      alphabet.to_global(batch, rows, data.batch, mesh) for batch in packing.fixed_batches(
        source, encode, data.batch, data.length, data.heldout_batches, tokenizer.eod_id, rows)]
  return batches


def run(config, workdir, tokenizer):
  """Trains one pretraining stage in `workdir`; see `stages.run`."""
  spec = load.spec_from(config.model)
  check_vocabulary(tokenizer, spec)
  return train(
    config, workdir, spec=spec, loss=make_loss(config),
    open_loader=functools.partial(make_loader, config, tokenizer),
    heldout=functools.partial(heldout_batches, config, tokenizer))
