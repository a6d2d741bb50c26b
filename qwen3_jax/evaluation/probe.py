"""Held-out loss by position in long rows: does a model read further than it was first trained?"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.data import mixture, packing, sources
from qwen3_jax.kernels import head

BINS = 32


@jax.jit
def _nll(params, batch):
  hidden = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT']).hidden_BTD
  target_BT = jnp.roll(batch['tokens_BT'], -1, axis=1)
  weight_BT = jnp.roll(batch['weight_BT'], -1, axis=1).at[:, -1].set(0)
  return -head.token_logp(hidden, params.head(), target_BT) * weight_BT, weight_BT


def long_batches(spec, tokenizer, batch, length, count):
  """Batches of held-out documents of more than half a row, one document a row as far as they go."""
  encode = functools.partial(tokenizer.encode, special=False)
  source = sources.open_source(spec, 'heldout')
  documents = mixture.by_length(source, encode, length // 2, length, cut=True)
  rows = [[np.append(documents[i], tokenizer.eod_id).astype(np.int32)[:length]]
          for i in range(min(len(documents), batch * count))]
  return [packing.make_batch(rows[i:i + batch], length)
          for i in range(0, len(rows) - batch + 1, batch)]


def loss_by_position(params, batches):
  """Mean loss at each position over the batches: (sum of nll, sum of weights), each (T,)."""
  sums = [_nll(params, batch) for batch in batches]
  return (np.sum([np.asarray(n).sum(0) for n, _ in sums], 0),
          np.sum([np.asarray(w).sum(0) for _, w in sums], 0))


def probe(models, batches, old_length):
  """What the report draws: {'positions', 'losses': {name: [...]}, 'old_length', 'beyond': {...}}.

  `models` maps a name to its parameters; `beyond` is the mean loss past `old_length`.
  """
  losses, beyond = {}, {}
  for name, params in models.items():
    nll, weight = loss_by_position(params, batches)
    bins = np.array_split(np.arange(len(nll)), BINS)
    losses[name] = [float(nll[b].sum() / max(weight[b].sum(), 1)) for b in bins]
    beyond[name] = float(nll[old_length:].sum() / max(weight[old_length:].sum(), 1))
  return dict(positions=[float(b.mean()) for b in bins], losses=losses, beyond=beyond,
              old_length=old_length)
