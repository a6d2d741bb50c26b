"""Losses of pairs of answers, one preferred to the other: Bradley-Terry rewards, and DPO.

A row holds pairs as neighbouring segments: the chosen answer of pair k (from 1) with its prompt is
segment 2k - 1, the rejected one 2k. `pair_BC` is 1 for each pair k - 1 that a row holds, 0 beyond.
Everything is summed over pairs and divided once by the step's `total_pairs`.
"""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import head
from qwen3_jax.training.losses import expert_terms


def bradley_terry(params, batch, *, centre=None, remat='none', dtype=None, balance=0.0,
                  router_z=0.0):
  """-log sigmoid(r+ - r- - margin) of the rewards at the last tokens (Bradley and Terry 1952).

  `params` is a `RewardModel`. `margin_BC` says how much better the chosen answer must be (Llama 2,
  2307.09288, eq. 2), 0 where nobody said. `centre` adds centre * (r+ + r-)^2, which fixes the
  constant that the loss leaves free (Eisenstein et al. 2023, 2312.09244). Returns this batch's
  share of the mean loss of a pair, and sums for `report`.
  """
  out = _forward(params, batch, remat, dtype)
  reward_BT = params.reward(out.hidden_BTD)
  following_BT = jnp.pad(batch['segment_BT'][:, 1:], ((0, 0), (0, 1)))
  reward_BT = jnp.where(batch['segment_BT'] != following_BT, reward_BT, 0)
  chosen_BC, rejected_BC = by_segment(reward_BT, batch)
  loss_BC = -jax.nn.log_sigmoid(chosen_BC - rejected_BC - batch['margin_BC'])
  if centre:
    loss_BC += centre * (chosen_BC + rejected_BC) ** 2
  term, more = expert_terms(out, batch, balance, router_z)
  loss, sums = _compare(loss_BC, chosen_BC, rejected_BC, batch)
  return loss + term, sums | more


def dpo(params, batch, *, beta, remat='none', dtype=None, balance=0.0, router_z=0.0):
  """-log sigmoid(beta [log pi/ref (y+) - log pi/ref (y-)]) (Rafailov et al. 2023, eq. 7).

  arXiv 2305.18290. `reference_BT` is the reference model's log-probability of each token at the
  token's own place; what counts are the tokens of weight 1, the answers'. The rewards reported are
  beta log pi/ref. Returns this batch's share of the mean loss of a pair, and sums for `report`.
  """
  out = _forward(params, batch, remat, dtype)
  logp_BT = answer_logp(params, out, batch)
  ratio_BT = logp_BT - batch['weight_BT'] * batch['reference_BT']
  chosen_BC, rejected_BC = (beta * x_BC for x_BC in by_segment(ratio_BT, batch))
  loss_BC = -jax.nn.log_sigmoid(chosen_BC - rejected_BC)
  term, more = expert_terms(out, batch, balance, router_z)
  loss, sums = _compare(loss_BC, chosen_BC, rejected_BC, batch)
  chosen_logp_BC, rejected_logp_BC = by_segment(logp_BT, batch)
  more |= dict(chosen_logp=chosen_logp_BC.sum(), rejected_logp=rejected_logp_BC.sum(),
               k1=-ratio_BT.sum(), k3=(jnp.exp(ratio_BT) - 1 - ratio_BT).sum())
  return loss + term, sums | jax.lax.stop_gradient(more)


def _forward(params, batch, remat, dtype):
  return params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], remat=remat,
                dtype=dtype)


def answer_logp(params, out, batch):
  """weight * log-probability of each token, at the token's own place (B, T)."""
  target_BT = jnp.roll(batch['tokens_BT'], -1, axis=1)
  logp_BT = head.token_logp(out.hidden_BTD, params.head(), target_BT)
  return jnp.roll(logp_BT, 1, axis=1) * batch['weight_BT']  # a segment's first token weighs 0


def by_segment(x_BT, batch):
  """The sums of `x_BT` over each segment: (B, C) of the chosen answers, (B, C) of the rejected."""
  number = jnp.arange(1, 2 * batch['pair_BC'].shape[1] + 1)
  here = batch['segment_BT'][:, :, None] == number
  sums = jnp.where(here, x_BT[:, :, None], 0).sum(1)
  return sums[:, 0::2], sums[:, 1::2]


def _compare(loss_BC, chosen_BC, rejected_BC, batch):
  """The loss divided by the step's pairs, and the sums of what `report` reports."""
  pair_BC = batch['pair_BC']
  loss = jnp.sum(pair_BC * loss_BC)
  gap_BC = chosen_BC - rejected_BC
  right_BC = (jnp.sign(gap_BC) + 1) / 2  # a tie is half right
  length_chosen_BC, length_rejected_BC = by_segment(batch['weight_BT'], batch)
  longer_BC = length_chosen_BC - length_rejected_BC
  each = dict(
    pairs=1, right=right_BC, gap=gap_BC, chosen=chosen_BC, rejected=rejected_BC,
    longer=longer_BC > 0, right_longer=right_BC * (longer_BC > 0),
    shorter=longer_BC < 0, right_shorter=right_BC * (longer_BC < 0),
    gap_gap=gap_BC ** 2, gap_length=gap_BC * longer_BC, length_length=longer_BC ** 2,
    chosen_tokens=length_chosen_BC, rejected_tokens=length_rejected_BC)
  sums = {name: jnp.sum(pair_BC * x) for name, x in each.items()}
  return loss / batch.get('total_pairs', 1), jax.lax.stop_gradient(sums | dict(pair_loss=loss))


def report(sums):
  """Values of a step or an evaluation from the sums over all its batches.

  `accuracy` is the share of pairs in which the chosen answer has the larger reward, `margin` the
  mean of r+ - r-. For the bias towards length: the accuracy where the chosen answer is the longer
  and where it is the shorter (NaN where there is none), and `length_correlation` of reward and
  length within pairs, -1 to 1, in tokens of the answers; `longer` is the share of pairs with a
  longer chosen answer, without which the correlation says little.
  DPO: mean log-probabilities of a token of either answer, and two estimates a token of
  KL(reference || policy), as if the answers had been drawn from the reference: with
  x = log pi/ref, `kl_k1` is the mean of -x and `kl_k3` of exp(x) - 1 - x, which is never negative.
  """
  n, tokens = sums['pairs'], sums['chosen_tokens'] + sums['rejected_tokens']
  values = dict(
    loss=sums['pair_loss'] / n, accuracy=sums['right'] / n, margin=sums['gap'] / n,
    chosen_reward=sums['chosen'] / n, rejected_reward=sums['rejected'] / n,
    longer=sums['longer'] / n,
    accuracy_longer=sums['right_longer'] / sums['longer'],
    accuracy_shorter=sums['right_shorter'] / sums['shorter'],
    length_correlation=sums['gap_length'] / jnp.sqrt(sums['gap_gap'] * sums['length_length']),
    pairs=n)
  if 'k1' in sums:
    values |= dict(kl_k1=sums['k1'] / tokens, kl_k3=sums['k3'] / tokens,
                   chosen_logp=sums['chosen_logp'] / sums['chosen_tokens'],
                   rejected_logp=sums['rejected_logp'] / sums['rejected_tokens'])
  return values
