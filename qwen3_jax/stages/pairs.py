"""What reward modelling and DPO share: pairs of answers, packed so that none is split."""
import re

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import mixture, packing, preferences
from qwen3_jax.stages import load, pretrain
from qwen3_jax.stages import run as stage
from qwen3_jax.stages.sft import count_steps, describe
from qwen3_jax.training import preference


def open_pairs(config, tokenizer):
  """([(pairs, share of tokens)] to train on, {name: held-out pairs}); reports what was left out."""
  def open_one(spec, split):
    pairs = preferences.Pairs(preferences.read(spec, split), tokenizer, config.data.length)
    print(f'{pairs.name}: {describe(pairs.report)}', flush=True)
    return pairs
  opened = [(open_one(spec, 'train'), share) for spec, share in pretrain.source_shares(config)]
  heldout = {}
  for spec in config.data.heldout or ():
    label = re.sub(r'\W+', '_', re.sub(r',?\b(size|seed)=\w+', '', spec)).strip('_')
    heldout[f'heldout_{label}' if heldout else 'heldout_loss'] = open_one(spec, 'heldout')
  return opened, heldout


def bind(config, loss, **options):
  """loss(params, batch) of a config: compute type, recomputation, balance terms, `options`."""
  dtype, cast = stage.compute_dtype(config), stage.make_cast(config)

  def bound(params, batch):
    return loss(cast(params), batch, remat=config.remat, dtype=dtype,
                balance=config.balance or 0.0, router_z=config.router_z or 0.0, **options)
  return bound


def train(config, workdir, tokenizer, opened, heldout, loss, **options):
  """`stages.run.train` on pairs; without `config.steps`, `config.epochs` says how long."""
  spec, data = load.spec_from(config.model), config.data
  stage.check_vocabulary(tokenizer, spec)
  if not config.steps:
    with config.unlocked():
      config.steps = count_steps(config, opened)
  documents = mixture.mixture(opened, config.seed)
  packed = dict(keep_whole=data.keep_whole, whole=True, assemble=preferences.make_batch)

  def open_loader(mesh):
    return packing.Loader(documents, tokenizer.encode, data.batch, data.length, tokenizer.eod_id,
                          rows=alphabet.owned_rows(data.batch, mesh), **packed)

  def batches(mesh, pairs):
    rows = alphabet.owned_rows(data.batch, mesh)
    return [alphabet.to_global(batch, rows, data.batch, mesh) for batch in packing.fixed_batches(
      pairs, tokenizer.encode, data.batch, data.length, data.heldout_batches, tokenizer.eod_id,
      rows, **packed)]
  return stage.train(
    config, workdir, spec=spec, loss=loss, open_loader=open_loader, report=preference.report,
    heldout=lambda mesh: {name: batches(mesh, pairs) for name, pairs in heldout.items()}, **options)
