"""Keeping a policy's entropy: a bonus that a controller sets, tokens that covariance picks. Numpy.

Qwen3 controls entropy "to increase steadily or remain stable" (2505.09388, 4.2), by what is not
published. Clipping higher is in `policy.Policy`; the rest is here.
"""
import math

import numpy as np


class Controller:
  """Sets the coefficient of the entropy bonus by steps, to hold entropy in a band about a target.

  Skywork-OR1's adaptive control (2505.22312): below the band the coefficient grows by `delta`, up
  to `most`; above it, it falls by `delta`, down to `least` (negative: entropy is pushed down). In
  the band it stays. The band is target * (1 - width) to target * (1 + width); without `target` the
  first entropy seen is it. The target rises by `rise` nats an update. Raises ValueError.
  """

  def __init__(self, target=None, width=0.1, delta=0.005, start=0.0, least=0.0, most=0.1, rise=0.0):
    for name, value, good, wanted in (
        ('target', target, target is None or target > 0, 'more than 0 nats, or None'),
        ('width', width, 0 <= width < 1, 'in [0, 1)'), ('delta', delta, delta > 0, 'more than 0'),
        ('start', start, least <= start <= most, 'between least and most'),
        ('rise', rise, rise >= 0, '0 or more: entropy is to be steady or to rise')):
      if not good:
        raise ValueError(f'{name} of the entropy control is {value}; it must be {wanted}')
    self.target, self.coefficient = target, start
    self.width, self.delta, self.least, self.most, self.rise = width, delta, least, most, rise

  def band(self):
    """(low, high) in nats; (0, inf) before anything was seen."""
    if self.target is None:
      return 0.0, math.inf
    return self.target * (1 - self.width), self.target * (1 + self.width)

  def update(self, entropy):
    """The coefficient for the next update, after one whose policy had mean `entropy`.

    An entropy that is not finite (a skipped update) changes nothing.
    """
    entropy = float(entropy)
    if not math.isfinite(entropy):
      return self.coefficient
    if self.target is None:
      self.target = entropy
    low, high = self.band()
    if entropy < low:
      self.coefficient = min(self.coefficient + self.delta, self.most)
    elif entropy > high:
      self.coefficient = max(self.coefficient - self.delta, self.least)
    self.target += self.rise
    return self.coefficient

  def state(self):
    """What a resumed run needs, as JSON."""
    return dict(target=self.target, coefficient=self.coefficient)

  def restore(self, state):
    """Goes on from `state()`."""
    self.target, self.coefficient = state['target'], state['coefficient']


def select(batch, method, seed, share=2e-4, band=(1.0, 5.0)):
  """covariance_BT: 1 at the tokens whose covariance of log-probability and advantage is large.

  cov = (A - mean A) (log p - mean log p) over the trained tokens of the whole `batch` (numpy), p
  being the policy that the batch began with (2505.22617, eq. 8, where it is the current one: so
  the choice is the same for any cut into micro-batches). 'clip_cov': a random `share` of all
  tokens among those with cov in `band`; 'kl_cov': the `share` with the largest cov. At least one.
  Raises ValueError for another method, or a batch without log-probabilities.
  """
  if method not in ('clip_cov', 'kl_cov'):
    raise ValueError(f"entropy is {method!r}; tokens are chosen for 'clip_cov' and 'kl_cov'")
  logp_BT = batch.get('old_logp_BT', batch.get('rollout_logp_BT'))
  if logp_BT is None:
    raise ValueError(f'{method} wants old_logp_BT or rollout_logp_BT in the batch')
  place = np.flatnonzero(np.asarray(batch['weight_BT']) > 0)
  chosen_BT = np.zeros(batch['weight_BT'].shape, np.float32)
  if not len(place):
    return chosen_BT
  A, logp = (np.asarray(x, np.float64).ravel()[place] for x in (batch['advantage_BT'], logp_BT))
  cov = (A - A.mean()) * (logp - logp.mean())
  count = max(1, int(share * len(place)))
  if method == 'kl_cov':
    picked = np.argsort(-cov, kind='stable')[:count]
  else:
    within = np.flatnonzero((cov >= band[0]) & (cov <= band[1]))
    picked = np.random.default_rng(seed).permutation(within)[:count]
  chosen_BT.ravel()[place[picked]] = 1
  return chosen_BT
