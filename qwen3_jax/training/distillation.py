"""Losses of on-policy distillation: a student's own answers, scored by a teacher.

A row holds samples as segments, each whole. What belongs to a token lies at the token's own place
(B, T, ...), as in `policy`: `weight_BT` (1: the student drew it), log-probabilities. Only
`teacher_BTD`, the teacher's final hidden states, lies as the model gives it: place t predicts the
token at t + 1.
"""
import dataclasses

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import divergence
from qwen3_jax.training import policy
from qwen3_jax.training.losses import expert_terms


@dataclasses.dataclass(frozen=True)
class Distillation:
  """How the teacher's distribution becomes a gradient.

  `kind`: over the whole vocabulary 'reverse_kl', KL(student || teacher), 'forward_kl',
  KL(teacher || student), or 'jsd', of both with their mixture, in which the teacher has the weight
  `mix` (see `kernels.divergence`). `temperature` divides the logits of both. Raises ValueError.
  """
  kind: str = 'reverse_kl'
  mix: float = 0.5
  temperature: float = 1.0

  def __post_init__(self):
    divergence.check(self.kind, self.mix, self.temperature)


def loss(params, batch, teacher_head_VD, settings, *, size=None, remat='none', dtype=None,
         balance=0.0, router_z=0.0):
  """This batch's share of the mean divergence per trained token, and sums for `report`.

  `batch` holds tokens_BT, segment_BT, position_BT, weight_BT, teacher_BTD, and in a training step
  the totals (see `losses.next_token`, also for `balance` and `router_z`); perhaps routes_BTLX.
  `size`: how many ids the tokenizer has; the heads' rows beyond are in no distribution.
  """
  out = policy.forward(params, batch, remat, dtype)
  weight_BT = _predicting(batch['weight_BT'])
  total, kl_BT, entropy_BT = divergence.divergence_entropy(
    out.hidden_BTD, params.head(), batch['teacher_BTD'], teacher_head_VD, weight_BT, settings.kind,
    settings.mix, settings.temperature, size)
  share = total / batch.get('total_weight', 1)
  sums = dict(distilled=share, distilled_tokens=weight_BT.sum(), distilled_kl=total,
              distilled_entropy=jnp.sum(weight_BT * entropy_BT),
              max_kl=jnp.max(kl_BT, where=weight_BT > 0, initial=0))
  term, more = expert_terms(out, batch, balance, router_z)
  return share + term, jax.lax.stop_gradient(sums | more)


def _predicting(x_BT):
  """From the tokens' own places to those that predict them; a row's last place predicts none."""
  return jnp.roll(x_BT, -1, axis=1).at[:, -1].set(0)


def report(sums):
  """Values of a step from the sums over its batches; names in `max_` are maxima, not sums.

  Means over trained tokens, in nats: `kl`, the divergence to the teacher (`kl_max`: the largest of
  one token), and `entropy` of the student.
  """
  tokens = jnp.maximum(sums['distilled_tokens'], 1)
  return dict(loss=sums['distilled'], kl=sums['distilled_kl'] / tokens, kl_max=sums['max_kl'],
              entropy=sums['distilled_entropy'] / tokens)


def teacher_states(teacher, batch, *, dtype=None):
  """The teacher's final hidden states (B, T, D), for `teacher_BTD`; `dtype` is the forward's."""
  return teacher(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'],
                 dtype=dtype).hidden_BTD
