"""Policy-gradient losses of sampled answers: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, SAPO.

A row holds samples as segments, each whole. Everything of a token lies at the token's own place
(B, T): its log-probability under the policy, the engine, the reference, its advantage. `scale_BT`
has the aggregation's denominator in it (`advantage.aggregate`), so the loss is a plain sum, exact
under packing and accumulation. The ratio is pi / pi_old, pi_old the trainer's own policy when the
rollouts were taken up; the engine that drew the tokens has its say in `mismatch`.
"""
import dataclasses
import logging

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import head
from qwen3_jax.training import mismatch
from qwen3_jax.training.losses import expert_terms

# Published settings: what clips the ratio, which advantages (`advantage.advantages`), which mean.
KINDS = dict(
  grpo=dict(clip_low=0.2, clip_high=0.2, advantage='group', aggregation='sequence'),  # 2402.03300
  dr_grpo=dict(clip_low=0.2, clip_high=0.2, advantage='dr', aggregation='dr'),  # 2503.20783
  dapo=dict(clip_low=0.2, clip_high=0.28, advantage='group', aggregation='token'),  # 2503.14476
  gspo=dict(clip_low=3e-4, clip_high=4e-4, advantage='group', aggregation='sequence'),  # 2507.18071
  gspo_token=dict(clip_low=3e-4, clip_high=4e-4, advantage='group', aggregation='sequence'),
  cispo=dict(clip_low=1.0, clip_high=4.0, advantage='group', aggregation='token'),  # 2506.13585
  sapo=dict(clip_low=None, clip_high=None, advantage='group', aggregation='sequence'))  # 2511.20347
KL = ('k1', 'k2', 'k3', 'unbiased')
ENTROPY = (None, 'bonus', 'clip_cov', 'kl_cov')
WIDE = 0.05  # a clip of a sequence's mean ratio beyond this never clips
LARGEST = 20.0, 10.0  # |log ratio| of a token, log ratio of a sequence: beyond, no gradient

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Policy:
  """How answers are turned into a gradient; None takes what the kind's paper has.

  `clip_low`, `clip_high`: the ratio is clipped to [1 - low, 1 + high] ('cispo' clips its weight,
  and a low of 1 is no lower bound; 'sapo' has gates of temperatures `gate` for A > 0 and A <= 0
  instead). `dual_clip` c bounds the loss of A < 0 at ratio c.
  `beta` weighs KL(pi || reference). As a loss, 'k2' and 'unbiased' (ratio * k3) have its gradient
  where the tokens come from the policy; 'k3' has that of KL(reference || pi); 'k1' has none, and so
  it is taken from the advantage, token by token, where its gradient is right.
  `correction`: see `mismatch.weights`. `temperature` is the one that the tokens were drawn at.
  `entropy`: 'bonus' adds bonus_B * entropy; 'clip_cov' leaves out and 'kl_cov' holds back (by
  `cov_penalty` * |log ratio|) the tokens of `covariance_BT` (`entropy.select`). `advantage` and
  `aggregation` are for the host that makes the batch. Raises ValueError.
  """
  kind: str = 'dapo'
  clip_low: float | None = None
  clip_high: float | None = None
  dual_clip: float | None = None
  gate: tuple[float, float] = (1.0, 1.05)
  beta: float = 0.0
  kl: str = 'unbiased'
  correction: str | None = 'token_tis'
  correction_low: float | None = None
  correction_high: float | None = None
  temperature: float = 1.0
  entropy: str | None = None
  cov_penalty: float = 1.0
  advantage: str | None = None
  aggregation: str | None = None

  def __post_init__(self):
    _one_of('kind', self.kind, tuple(KINDS))
    _one_of('kl', self.kl, KL)
    _one_of('entropy', self.entropy, ENTROPY)
    _one_of('correction', self.correction, (None, *mismatch.BOUNDS))
    low, high = mismatch.BOUNDS.get(self.correction, (None, None))
    given = KINDS[self.kind] | dict(correction_low=low, correction_high=high)
    for name, value in given.items():
      if getattr(self, name) is None:
        object.__setattr__(self, name, value)
    self._check()

  def _check(self):
    sapo = self.kind == 'sapo'
    for name, good, wanted in (
        ('clip_low', sapo or 0 < self.clip_low <= 1, 'in (0, 1]'),
        ('clip_high', sapo or self.clip_high > 0, 'more than 0'),
        ('clip_low', not sapo or self.clip_low is None, 'None: sapo has gates'),
        ('clip_high', not sapo or self.clip_high is None, 'None: sapo has gates'),
        ('dual_clip', self.dual_clip is None or self.kind not in ('sapo', 'cispo'),
         f'None: {self.kind} has no clipped minimum to bound'),
        ('dual_clip', self.dual_clip is None or sapo or self.dual_clip > 1 + self.clip_high,
         'more than 1 + clip_high'),
        ('gate', len(self.gate) == 2 and min(self.gate) > 0, 'two numbers more than 0'),
        ('beta', self.beta >= 0, '0 (off) or more'),
        ('temperature', self.temperature > 0, 'more than 0'),
        ('cov_penalty', self.cov_penalty > 0, 'more than 0'),
        ('correction_low', self.correction is None or
         0 <= self.correction_low < self.correction_high, 'in [0, correction_high)')):
      if not good:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be {wanted}')
    if self.kind.startswith('gspo') and max(self.clip_low, self.clip_high) > WIDE:
      log.warning('%s clips the mean ratio of a whole answer: %g and %g will hardly ever clip '
                  '(published: 3e-4 and 4e-4)', self.kind, self.clip_low, self.clip_high)


def _one_of(name, value, wanted):
  if value not in wanted:
    raise ValueError(f'{name} is {value!r}; it must be one of {", ".join(map(str, wanted))}')


def loss(params, batch, settings, *, size=None, remat='none', dtype=None, balance=0.0,
         router_z=0.0):
  """This batch's share of the policy loss, and sums for `report` (see `losses.next_token`).

  `batch` holds tokens_BT, segment_BT, position_BT; weight_BT (1: drawn by the model, trained),
  scale_BT, advantage_BT. What it may hold: old_logp_BT (without it every update is on-policy) and
  fresh_B (1: this row's pi_old is the policy as it is now); rollout_logp_BT (engine); of the
  reference reference_logp_BT; routes_BTLX, replayed; bonus_B; covariance_BT.
  `size`: how many ids the tokenizer has, if the engine draws from these and the head has more rows.
  Raises ValueError if something is lacking that `settings` need.
  """
  out = forward(params, batch, remat, dtype)
  logp_BT, entropy_BT = _values(params, out, batch, settings.temperature, size)
  share, sums = objective(logp_BT, entropy_BT, batch, settings)
  term, more = expert_terms(out, batch, balance, router_z)
  return share + term, sums | jax.lax.stop_gradient(more)


def forward(params, batch, remat='none', dtype=None):
  """The model's `Output`, with the batch's routes replayed (recomputed layers included)."""
  routes = batch.get('routes_BTLX')
  if routes is not None:
    routes = routes.transpose(2, 0, 1, 3).astype(jnp.int32)
  return params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], routes=routes,
                remat=remat, dtype=dtype)


def token_values(params, batch, *, temperature=1.0, size=None, remat='none', dtype=None):
  """(log-probability, entropy in nats) of each token at its own place (B, T), and the routes.

  For old and reference log-probabilities, as `loss` has them: 0 where weight_BT is 0. The routes
  (MoE layers, B, T, X), None of a dense model, are those of this forward.
  """
  out = forward(params, batch, remat, dtype)
  logp_BT, entropy_BT = (jnp.where(batch['weight_BT'] > 0, x, 0)
                         for x in _values(params, out, batch, temperature, size))
  return logp_BT, entropy_BT, out.routes


def route_agreement(params, batch, *, dtype=None):
  """How far the router's own choices now are those of routes_BTLX: {'equal_L', 'overlap_L'}.

  Of each MoE layer the share of tokens with the same set of experts, and the mean share of the set
  that is the same, over the tokens that predict another. Nothing is replayed here.
  """
  own = forward(params, {key: x for key, x in batch.items() if key != 'routes_BTLX'}, dtype=dtype)
  given = batch['routes_BTLX'].transpose(2, 0, 1, 3)
  segment_BT = batch['segment_BT']
  counted_BT = (segment_BT > 0) & (segment_BT == jnp.pad(segment_BT[:, 1:], ((0, 0), (0, 1))))
  common = (own.routes[..., :, None] == given[..., None, :]).any(-1).mean(-1)  # (layers, B, T)

  def mean(x):
    return jnp.sum(jnp.where(counted_BT, x, 0), axis=(1, 2)) / jnp.maximum(counted_BT.sum(), 1)
  return dict(equal_L=mean(common == 1), overlap_L=mean(common))


def _values(params, out, batch, temperature, size):
  target_BT = jnp.roll(batch['tokens_BT'], -1, axis=1)
  values = head.token_entropy(out.hidden_BTD, params.head(), target_BT, temperature, size)
  return [jnp.roll(x, 1, axis=1) for x in values]  # a segment's first token has weight 0


def objective(logp_BT, entropy_BT, batch, settings):
  """The loss as a function of log-probabilities and entropies: (sum, sums for `report`)."""
  weight_BT = batch['weight_BT']
  trained_BT = weight_BT > 0
  logp_BT, entropy_BT = (jnp.where(trained_BT, x, 0) for x in (logp_BT, entropy_BT))
  old_BT = _old(logp_BT, batch, trained_BT)
  log_ratio_BT = jnp.clip(logp_BT - old_BT, -LARGEST[0], LARGEST[0])
  ratio_BT = _ratio(log_ratio_BT, batch, settings)
  advantage_BT, penalty_BT, sums = _against_reference(logp_BT, ratio_BT, batch, settings)
  value_BT = _surrogate(ratio_BT, advantage_BT, logp_BT, settings)
  if 'rollout_logp_BT' in batch:
    gap_BT = jnp.where(trained_BT, jax.lax.stop_gradient(old_BT) - batch['rollout_logp_BT'], 0)
    correction_BT, more = mismatch.weights(gap_BT, batch, settings)
    value_BT, sums = value_BT * correction_BT, sums | more
  if settings.entropy in ('clip_cov', 'kl_cov'):
    chosen_BT = _wanted(batch, 'covariance_BT', f'entropy {settings.entropy!r}')
    if settings.entropy == 'clip_cov':
      value_BT = value_BT * (1 - chosen_BT)
    else:
      value_BT += settings.cov_penalty * chosen_BT * jnp.abs(log_ratio_BT)
  value_BT += penalty_BT
  if settings.entropy == 'bonus':
    value_BT -= _wanted(batch, 'bonus_B', "entropy 'bonus'")[:, None] * entropy_BT
  share = jnp.sum(batch['scale_BT'] * weight_BT * value_BT)
  sums |= _sums(share, log_ratio_BT, ratio_BT, entropy_BT, batch, settings)
  return share, jax.lax.stop_gradient(sums)


def _wanted(batch, key, what):
  if key not in batch:
    raise ValueError(f'the policy has {what}, and the batch has no {key}')
  return batch[key]


def _old(logp_BT, batch, trained_BT):
  """log pi_old: given, or in fresh rows the policy of this very moment, without its gradient."""
  now_BT = jax.lax.stop_gradient(logp_BT)
  if 'old_logp_BT' not in batch:
    return now_BT
  old_BT = jnp.where(trained_BT, batch['old_logp_BT'], 0)
  if 'fresh_B' in batch:
    old_BT = jnp.where(batch['fresh_B'][:, None] > 0, now_BT, old_BT)
  return old_BT


def _ratio(log_ratio_BT, batch, settings):
  """pi / pi_old of tokens; for GSPO the geometric mean over the sample, at each of its tokens."""
  if not settings.kind.startswith('gspo'):
    return jnp.exp(log_ratio_BT)
  mean_BT = mismatch.sample_mean(log_ratio_BT, batch)
  if settings.kind == 'gspo_token':  # the sample's value, the token's own gradient
    stop = jax.lax.stop_gradient
    mean_BT = log_ratio_BT - stop(log_ratio_BT) + stop(mean_BT)
  return jnp.exp(jnp.minimum(mean_BT, LARGEST[1]))


def _surrogate(ratio_BT, advantage_BT, logp_BT, settings):
  """The loss of each token, to be minimised."""
  if settings.kind == 'sapo':
    gate_BT = jnp.where(advantage_BT > 0, *settings.gate)
    return -4 / gate_BT * jax.nn.sigmoid(gate_BT * (ratio_BT - 1)) * advantage_BT
  clipped_BT = jnp.clip(ratio_BT, 1 - settings.clip_low, 1 + settings.clip_high)
  if settings.kind == 'cispo':
    return -jax.lax.stop_gradient(clipped_BT) * advantage_BT * logp_BT
  value_BT = jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
  if settings.dual_clip is not None:
    least_BT = jnp.maximum(value_BT, settings.dual_clip * advantage_BT)
    value_BT = jnp.where(advantage_BT < 0, least_BT, value_BT)
  return -value_BT


def _against_reference(logp_BT, ratio_BT, batch, settings):
  """(advantages, penalties, sums) with the KL to the reference in one of the first two."""
  advantage_BT, weight_BT = batch['advantage_BT'], batch['weight_BT']
  if settings.beta:
    _wanted(batch, 'reference_logp_BT', f'beta {settings.beta}')
  elif 'reference_logp_BT' not in batch:
    return advantage_BT, 0.0, {}
  gap_BT = jnp.where(weight_BT > 0, logp_BT - batch['reference_logp_BT'], 0)
  k3_BT = jnp.exp(jnp.clip(-gap_BT, -LARGEST[0], LARGEST[0])) - 1 + gap_BT
  sums = dict(reference_k1=jnp.sum(weight_BT * gap_BT), reference_k3=jnp.sum(weight_BT * k3_BT))
  if settings.kl == 'k1':
    return advantage_BT - settings.beta * jax.lax.stop_gradient(gap_BT), 0.0, sums
  kl_BT = dict(k2=gap_BT ** 2 / 2, k3=k3_BT, unbiased=ratio_BT * k3_BT)[settings.kl]
  return advantage_BT, settings.beta * kl_BT, sums


def _sums(share, log_ratio_BT, ratio_BT, entropy_BT, batch, settings):
  weight_BT, advantage_BT = batch['weight_BT'], batch['advantage_BT']
  trained_BT = weight_BT > 0

  def total(x_BT):
    return jnp.sum(weight_BT * x_BT)
  sums = dict(
    policy_loss=share, policy_tokens=weight_BT.sum(), entropy=total(entropy_BT),
    ratio=total(ratio_BT), max_ratio=jnp.max(ratio_BT, where=trained_BT, initial=0),
    max_inverse=jnp.max(1 / ratio_BT, where=trained_BT, initial=0),
    old_k1=total(-log_ratio_BT), old_k3=total(jnp.exp(log_ratio_BT) - 1 - log_ratio_BT))
  if settings.kind != 'sapo':
    sums |= dict(clip_low=total((advantage_BT < 0) & (ratio_BT < 1 - settings.clip_low)),
                 clip_high=total((advantage_BT > 0) & (ratio_BT > 1 + settings.clip_high)))
  if settings.dual_clip is not None:
    sums['clip_dual'] = total((advantage_BT < 0) & (ratio_BT > settings.dual_clip))
  return sums


def report(sums):
  """Values of a step from the sums over its batches; names in `max_` are maxima, not sums.

  Means over trained tokens: `entropy` (nats) of the policy, `ratio` (and its extremes), the shares
  `clip_low` (A < 0, ratio below the band) and `clip_high` (A > 0, above it) without a gradient (in
  'cispo' with a bounded one), `clip_dual`. KL(old || pi) and KL(pi || reference), as if the tokens
  came from old and from pi: `_k1` is the mean log ratio, `_k3` never negative. Of the engine's
  distribution against pi_old: see `mismatch.report`.
  """
  tokens = jnp.maximum(sums['policy_tokens'], 1)
  names = ('entropy', 'ratio', 'clip_low', 'clip_high', 'clip_dual')
  values = {name: sums[name] / tokens for name in names if name in sums}
  kl = {f'kl_{name}': sums[name] / tokens for name in (
    'old_k1', 'old_k3', 'reference_k1', 'reference_k3') if name in sums}
  return dict(loss=sums['policy_loss'], **values, ratio_max=sums['max_ratio'],
              ratio_min=1 / sums['max_inverse'], **kl, **mismatch.report(sums, tokens))
