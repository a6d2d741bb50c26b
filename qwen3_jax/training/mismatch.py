"""The engine that drew the tokens against the trainer that learns from them: weights and measures.

rho = pi_old / mu, of the trainer's policy and the engine's, both at the weights that drew the
tokens. It would be 1 if both computed the same numbers; where they do not, rho corrects what is
expected, and its spread says how far one may trust it.
"""
import jax
import jax.numpy as jnp

# Corrections and the band of rho (of a token, a sample, or a sample's mean) that they leave alone.
BOUNDS = dict(token_tis=(0.0, 2.0), sequence_tis=(0.0, 3.0), mask=(0.5, 5.0),
              sequence_mask=(0.0, 3.0), geometric_mask=(0.99, 1.01))
LARGEST = 20.0


def sample_sum(x_BT, batch):
  """At each token the sum over its sample (the tokens of its segment in its row) of weight * x."""
  def row(x_T, segment_T):
    return jax.ops.segment_sum(x_T, segment_T, num_segments=len(x_T) + 1)[segment_T]
  return jax.vmap(row)(batch['weight_BT'] * x_BT, batch['segment_BT'])


def sample_mean(x_BT, batch):
  """At each token the mean over its sample's trained tokens."""
  count_BT = sample_sum(jnp.ones_like(batch['weight_BT']), batch)
  return sample_sum(x_BT, batch) / jnp.maximum(count_BT, 1)


def weights(gap_BT, batch, settings):
  """What each token's loss is multiplied by, no gradient in it, and sums for `report`.

  `gap_BT` = log rho, 0 at tokens not trained. 'token_tis' clips rho of the token into the band
  (truncated importance sampling), 'sequence_tis' the product over the sample; 'mask' (IcePop) and
  'sequence_mask' take rho within the band and 0 outside of it; 'geometric_mask' takes 1 where the
  sample's geometric mean lies in the band, else 0.
  """
  weight_BT, kind = batch['weight_BT'], settings.correction
  rho_BT = _exp(gap_BT)
  sums = dict(rollout_gap=jnp.sum(weight_BT * jnp.abs(gap_BT)),
              max_rollout_gap=jnp.max(jnp.abs(gap_BT), where=weight_BT > 0, initial=0),
              rollout_k3=jnp.sum(weight_BT * (rho_BT - 1 - gap_BT)),
              rho=jnp.sum(weight_BT * rho_BT), rho_rho=jnp.sum(weight_BT * rho_BT ** 2))
  if kind is None:
    return jnp.ones_like(gap_BT), sums
  low, high = settings.correction_low, settings.correction_high
  if kind.startswith('sequence'):
    rho_BT = _exp(sample_sum(gap_BT, batch))
  elif kind == 'geometric_mask':
    rho_BT = _exp(sample_mean(gap_BT, batch))
  inside_BT = (rho_BT >= low) & (rho_BT <= high)
  sums['corrected'] = jnp.sum(weight_BT * ~inside_BT)
  if kind.endswith('tis'):
    return jnp.clip(rho_BT, low, high), sums
  return jnp.where(inside_BT, 1.0 if kind == 'geometric_mask' else rho_BT, 0.0), sums


def _exp(x):
  return jnp.exp(jnp.clip(x, -LARGEST, LARGEST))


def report(sums, tokens):
  """Values of a step: how far engine and trainer are apart on the trained tokens.

  `mismatch` and `mismatch_max` of |log rho|; `mismatch_ratio`, the mean of rho, below 1 where the
  engine's log-probabilities are of a truncated distribution (top-p); `mismatch_k3`, the estimate of
  KL(mu || pi_old) that is never negative; `effective_sample`, (sum rho)^2 / (n sum rho^2), 1 if
  they agree; `corrected`, the share of tokens whose weight was truncated or masked.
  """
  if 'rollout_gap' not in sums:
    return {}
  values = dict(mismatch=sums['rollout_gap'] / tokens, mismatch_max=sums['max_rollout_gap'],
                mismatch_ratio=sums['rho'] / tokens,
                mismatch_k3=sums['rollout_k3'] / tokens,
                effective_sample=sums['rho'] ** 2 / (tokens * jnp.maximum(sums['rho_rho'], 1e-9)))
  return values | ({'corrected': sums['corrected'] / tokens} if 'corrected' in sums else {})
