"""Small models trained on a weighing of labelled documents, and their held-out loss by domain.

All proxies of one size share one compiled step; `parallel` of them train in one (stacked, by vmap),
which fills an accelerator. On a CPU one at a time is faster.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.data import files, mixture, packing, sources, weighting
from qwen3_jax.model import transformer
from qwen3_jax.stages import load, records
from qwen3_jax.training import losses, optim
from qwen3_jax.training import step as training


@dataclasses.dataclass(frozen=True)
class Documents:
  """Labelled documents as token ids: `source` gives them by index, `labels` are in its order."""
  source: sources.Source
  labels: list

  @property
  def domains(self):
    return sorted({each['domain'] for each in self.labels})


def read_rows(specs):
  """Iterates over (name, record, labels) of the JSONL files that `specs` name.

  The name is the record's `id`, else its file and line. ValueError names the line of a record
  without a text or with labels that are no labels.
  """
  for _, name, line, data in records.Rows(specs).read(records.START):
    try:
      record = records.load_line(data)
      weighting.read_label(record.get('labels'))
      records.text_of(record)
    except ValueError as e:
      raise ValueError(f'{name}, line {line}: {e}') from e
    yield record.get('id', f'{name}:{line}'), record, record['labels']


def read_texts(specs, share, heldout, seed=0):
  """(training, held-out) lists of (text, labels); which is which follows from the text's hash.

  `share` of the texts are used. Where `heldout.files` name no files of their own, `heldout.share`
  of the texts are held out: those of at least `heldout.least_education` are what the proxies are
  measured on, the others go unused.
  """
  rows, kept = [], []
  for _, record, labels in read_rows(specs):
    text = records.text_of(record)
    part = files.hash_text(f'{seed} {text}'.encode()) / 2 ** 64
    if part >= share:
      continue
    if not heldout.files and part < share * heldout.share:
      if labels['education'] >= heldout.least_education:
        kept.append((text, labels))
    else:
      rows.append((text, labels))
  if heldout.files:
    kept = [(records.text_of(record), labels) for _, record, labels in read_rows(heldout.files)]
  if not rows or not kept:
    raise ValueError(f'{len(rows)} documents to train on and {len(kept)} held out: give more '
                     'documents, or change config.heldout or config.share')
  return rows, kept


def tokenise(rows, encode, name):
  """`Documents` of (text, labels) pairs."""
  ids = [np.asarray(encode(text), np.int32) for text, _ in rows]
  source = sources.Source(name, ids.__getitem__, np.array([len(text) for text, _ in rows]),
                          np.array([files.hash_text(text.encode()) for text, _ in rows], np.uint64))
  return Documents(source, [labels for _, labels in rows])


class Proxy:
  """Trains the small model of a config on weighed documents and measures it by domain."""

  def __init__(self, config, training_documents, heldout, eod_id):
    self.config, self.documents, self.eod_id = config, training_documents, eod_id
    self.spec, self._step = load.spec_from(config.model), functools.cache(self._make_step)
    fixed = functools.partial(
      packing.fixed_batches, encode=None, batch=config.batch, length=config.length,
      count=config.heldout.batches, eod_id=eod_id)
    self.batches = {}
    for domain in heldout.domains:
      own = [i for i, each in enumerate(heldout.labels) if each['domain'] == domain]
      self.batches[domain] = list(fixed(heldout.source.take(own)))
    self._evaluate = jax.jit(jax.vmap(lambda params, batch: losses.next_token(params, batch)[1],
                                      in_axes=(0, None)))

  @functools.cached_property
  def _optimizer(self):
    o = self.config.optim
    return optim.adamw(o.b1, o.b2, o.eps, o.weight_decay, o.clip)

  def _make_step(self, steps):
    o = self.config.optim
    rate = optim.schedule(o.schedule, o.peak_lr, steps, o.warmup, o.final, o.decay)
    step = training.make_step(losses.next_token, self._optimizer, rate)
    return jax.jit(jax.vmap(step), donate_argnums=0)

  def measure(self, weightings, steps, seeds):
    """For each of `weightings` (arrays of weights of the documents): {domain: held-out loss}.

    `seeds` (one each) decide the model's random weights and the order of the documents.
    """
    config = self.config
    state, step = self._first(jnp.array(seeds)), self._step(steps)
    views = [weighting.weighted(self.documents.source, weights, seed=seed)
             for weights, seed in zip(weightings, seeds, strict=True)]
    loaders = [packing.Loader(mixture.Mixture([view], np.ones(1), seed), None, config.batch,
                              config.length, self.eod_id) for view, seed in zip(views, seeds)]
    try:
      for _ in range(steps):
        batches = [next(loader) for loader in loaders]
        state, _ = step(state, {name: np.stack([each[name] for each in batches])
                                for name in batches[0]})
    finally:
      for loader in loaders:
        loader.close()
    return self._losses(state.params, len(seeds))

  @functools.cached_property
  def _first(self):
    return jax.jit(jax.vmap(lambda seed: training.state_of(
      transformer.make(self.spec, jax.random.key(seed)), self._optimizer)))

  def _losses(self, params, count):
    found = [{} for _ in range(count)]
    for domain, batches in self.batches.items():
      sums = [self._evaluate(params, batch) for batch in batches]
      nll, weight = (np.asarray(sum(each[name] for each in sums)) for name in ('nll', 'weight'))
      for one, value in zip(found, nll / weight):
        one[domain] = float(value)
    return found
