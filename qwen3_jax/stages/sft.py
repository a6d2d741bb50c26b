"""Supervised fine-tuning: conversations, of which only what the model itself writes is learnt.

Cold start and thinking-mode fusion (Qwen3 Technical Report, sections 4.1 and 4.3) are this stage on
different data. The loss is that of pretraining; the data differ by their weights.
"""
import functools
import math

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import conversations, mixture, packing
from qwen3_jax.stages import load, pretrain
from qwen3_jax.stages.run import check_vocabulary, train


def open_examples(config, tokenizer, split):
  """[(examples, share of tokens)] of `config.data.sources`; what was left out is printed."""
  opened = []
  for spec, share in pretrain.source_shares(config):
    source = conversations.read(spec, split, skip_bad=config.data.skip_bad)
    examples = conversations.Examples(source, tokenizer, config.data.length, config.data.too_long)
    print(f'{spec}: {describe(examples.report)}', flush=True)
    opened += _by_length(config, examples, share) if split == 'train' else [(examples, share)]
  return opened


def _by_length(config, examples, share):
  """The examples as they are, or by `length_mix`: shares of tokens by length, in parts of a row."""
  length, mix = config.data.length, config.data.length_mix
  if not mix:
    return [(examples, share)]
  return [(examples.by_tokens(int(low * length), int(high * length)), share * part)
          for part, (low, high) in mix]


def describe(report):
  """A report of `conversations.Examples` as a line of text."""
  return ', '.join(f'{count:,} {name.replace("_", " ")}' for name, count in report.items() if count)


def make_loader(documents, config, tokenizer, mesh):
  """The stream of batches on this host; no conversation is split over two rows."""
  data = config.data
  return packing.Loader(documents, tokenizer.encode, data.batch, data.length, tokenizer.eod_id,
                        rows=alphabet.owned_rows(data.batch, mesh), keep_whole=data.keep_whole,
                        whole=True)


def heldout_batches(config, tokenizer, mesh):
  """{name: batches} of held-out conversations, the same at every evaluation."""
  data = config.data
  rows = alphabet.owned_rows(data.batch, mesh)
  batches = {}
  for spec in data.heldout or ():
    examples = conversations.Examples(
      conversations.read(spec, 'heldout', skip_bad=data.skip_bad), tokenizer, data.length)
    name = f'heldout_{len(batches)}' if batches else 'heldout_loss'
    batches[name] = [
      alphabet.to_global(batch, rows, data.batch, mesh) for batch in packing.fixed_batches(
        examples, tokenizer.encode, data.batch, data.length, data.heldout_batches,
        tokenizer.eod_id, rows, keep_whole=data.keep_whole, whole=True)]
  return batches


def count_steps(config, opened):
  """Steps of `config.epochs` rounds through the examples, their tokens filling the rows."""
  tokens = sum(examples.sizes.sum() for examples, _ in opened)
  return max(1, math.ceil(config.epochs * tokens / (config.data.batch * config.data.length)))


def run(config, workdir, tokenizer):
  """Trains one supervised stage in `workdir`; see `stages.run`.

  Without `config.steps`, `config.epochs` says how long.
  """
  spec = load.spec_from(config.model)
  check_vocabulary(tokenizer, spec)
  opened = open_examples(config, tokenizer, 'train')
  if not config.steps:
    with config.unlocked():
      config.steps = count_steps(config, opened)
  documents = mixture.mixture(opened, config.seed)
  return train(
    config, workdir, spec=spec, loss=pretrain.make_loss(config),
    open_loader=functools.partial(make_loader, documents, config, tokenizer),
    heldout=functools.partial(heldout_batches, config, tokenizer))
