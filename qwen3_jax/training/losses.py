"""Losses of a batch: next-token cross-entropy, expert balance, router z."""
import jax.numpy as jnp

from qwen3_jax.kernels import head


def next_token(params, batch, *, remat='none', dtype=None, balance=0.0, router_z=0.0):
  """This batch's share of the mean next-token loss, and sums for the metrics.

  `batch` holds tokens_BT, segment_BT, position_BT, weight_BT (weight of a token as a target) and,
  in a training step, the whole step's totals: `total_weight`, `total_tokens`, and `count_LE`, the
  experts' assignments counted in the step's earlier micro-batches. Dividing by the step's totals
  makes gradient accumulation a plain sum, exact for ragged weights. Without totals nothing is
  divided, and only the sums mean anything. `balance` and `router_z` are coefficients; 0 leaves the
  term out.
  """
  out = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], remat=remat,
               dtype=dtype)
  target_BT = jnp.roll(batch['tokens_BT'], -1, axis=1)
  weight_BT = jnp.roll(batch['weight_BT'], -1, axis=1).at[:, -1].set(0)
  nll = head.cross_entropy(out.hidden_BTD, params.head(), target_BT, weight_BT)
  loss, sums = nll / batch.get('total_weight', 1), dict(nll=nll, weight=weight_BT.sum())
  term, more = expert_terms(out, batch, balance, router_z)
  return loss + term, sums | more


def expert_terms(out, batch, balance, router_z):
  """What a mixture of experts adds to any loss, and its sums; (0, {}) for a dense model."""
  if out.balance is None:
    return 0.0, {}
  count_LE, probability_LE = out.balance.count_E, out.balance.probability_E
  tokens = batch.get('total_tokens', 1)
  term = balance_loss(count_LE + batch.get('count_LE', 0), probability_LE, tokens).mean()
  z = out.balance.z.mean() / tokens
  return (balance * term + router_z * z,
          dict(router_z=z, count_LE=count_LE, probability_LE=probability_LE))


def report(sums):
  """Values of a step or an evaluation from the sums of `next_token` over all its batches."""
  return dict(loss=sums['nll'] / sums['weight'])


def merge(sums, more):
  """The sums of two batches in one: added, or where a name begins with `max_` the larger."""
  return {name: (jnp.maximum if name.startswith('max_') else jnp.add)(value, more[name])
          for name, value in sums.items()}


def balance_loss(count_E, probability_E, tokens):
  """Global-batch load-balancing loss of MoE layers (Qiu et al. 2025, 2501.11873, eq. 4).

  E * sum_i f_i P_i with f_i the fraction of assignments that went to expert i and P_i the sum of
  its softmax probabilities over `tokens`. `count_E` (..., E) is counted over the whole global
  batch: all devices, and with gradient accumulation the micro-batches so far (their Algorithm 1),
  so that experts may specialise by domain; it carries no gradient. `tokens` are those of the whole
  step, so the terms of micro-batches add up. Uniform routing gives 1, where Hugging Face's
  convention (`hf_balance_loss`) gives the number chosen: its coefficient 0.001 is 0.008 here.
  """
  f_E = count_E / jnp.maximum(count_E.sum(-1, keepdims=True), 1)
  return count_E.shape[-1] * jnp.sum(f_E * probability_E, axis=-1) / tokens


def hf_balance_loss(balance):
  """Hugging Face's `load_balancing_loss_func`: all layers pooled, uniform routing gives `chosen`.

  Not used in training: pooling layers lets one layer's imbalance hide another's. For comparing.
  """
  tokens = balance.tokens.sum()
  f_E, p_E = balance.count_E.sum(0) / tokens, balance.probability_E.sum(0) / tokens
  return balance.count_E.shape[-1] * jnp.sum(f_E * p_E)
