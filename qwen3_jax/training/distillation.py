"""Losses of on-policy distillation: a student's own answers, scored by a teacher.

A row holds samples as segments, each whole. What belongs to a token lies at the token's own place
(B, T, ...), as in `policy`: `weight_BT` (1: the student drew it), log-probabilities, the few ids
that the teacher has told of. Only `teacher_BTD`, the teacher's final hidden states, lies as the
model gives it: place t predicts the token at t + 1.
"""
import dataclasses

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import divergence, head, top
from qwen3_jax.training import policy
from qwen3_jax.training.losses import expert_terms

FEW = dict(teacher_top='forward_kl', student_top='reverse_kl')
SAMPLED = 'sampled'


@dataclasses.dataclass(frozen=True)
class Distillation:
  """How the teacher's distribution becomes a gradient.

  `kind`: over the whole vocabulary 'reverse_kl', KL(student || teacher), 'forward_kl',
  KL(teacher || student), or 'jsd', of both with their mixture, in which the teacher has the weight
  `mix` (see `kernels.divergence`). Where the teacher tells little: 'teacher_top' and 'student_top'
  compare at its or the student's likeliest ids and the tail (`kernels.top`), by `few`, one of the
  divergences (forward_kl for the teacher's ids, reverse_kl for the student's). 'sampled' is a
  policy gradient whose advantage is log teacher - log student of the drawn token: in expectation
  over the student's draws the gradient of reverse_kl, where the log ratio as a loss would have none
  of the teacher's; `correction` as in `policy.Policy`. `temperature` divides all logits, and of
  'sampled' is the one that the tokens were drawn at. Raises ValueError.
  """
  kind: str = 'reverse_kl'
  mix: float = 0.5
  temperature: float = 1.0
  few: str | None = None
  correction: str | None = 'token_tis'

  def __post_init__(self):
    known = (*divergence.KINDS, SAMPLED, *FEW)
    if self.kind not in known:
      raise ValueError(f'kind is {self.kind!r}; it must be one of {", ".join(known)}')
    if self.few is not None and self.kind not in FEW:
      raise ValueError(f'few is {self.few!r}, but {self.kind} knows the teacher at no few ids; '
                       f'leave it None, or take one of {", ".join(FEW)}')
    divergence.check(self.divergence, self.mix, self.temperature)
    self.policy()

  @property
  def divergence(self):
    """The one that is minimised."""
    return self.few or FEW.get(self.kind, 'reverse_kl' if self.kind == SAMPLED else self.kind)

  def policy(self):
    """The policy-gradient loss of 'sampled'."""
    return policy.Policy('dapo', correction=self.correction, temperature=self.temperature)


def loss(params, batch, teacher_head_VD, settings, *, size=None, remat='none', dtype=None,
         balance=0.0, router_z=0.0):
  """This batch's share of the mean loss per trained token, and sums for `report`.

  `batch` holds tokens_BT, segment_BT, position_BT, weight_BT, and in a training step the totals
  (see `losses.next_token`, also for `balance` and `router_z`); perhaps routes_BTLX. Of the teacher
  teacher_BTD; for the few ids top_ids_BTX and its log-probabilities top_logp_BTX; for 'sampled'
  teacher_logp_BT, with rollout_logp_BT of the engine and what else a policy's batch may hold. Only
  with teacher_BTD is there a `teacher_head_VD`. `size`: how many ids the tokenizer has; the heads'
  rows beyond are in no distribution. Raises ValueError if something is lacking.
  """
  wanted = {SAMPLED: ('teacher_logp_BT',)}.get(
    settings.kind, ('top_ids_BTX', 'top_logp_BTX') if settings.kind in FEW else ('teacher_BTD',))
  for key in wanted:
    if key not in batch:
      raise ValueError(f'the loss is {settings.kind}, and the batch has no {key}')
  out = policy.forward(params, batch, remat, dtype)
  form = _sampled if settings.kind == SAMPLED else _divergence
  share, sums = form(params, out, batch, teacher_head_VD, settings, size)
  term, more = expert_terms(out, batch, balance, router_z)
  return share + term, jax.lax.stop_gradient(sums | more)


def _divergence(params, out, batch, teacher_head_VD, settings, size):
  weight_BT = _predicting(batch['weight_BT']).at[:, -1].set(0)
  if settings.kind in FEW:
    inputs = [_predicting(batch[key]) for key in ('top_ids_BTX', 'top_logp_BTX')]
    measure = top.tail_divergence
  else:
    inputs, measure = (batch['teacher_BTD'], teacher_head_VD), divergence.divergence_entropy
  total, kl_BT, entropy_BT = measure(
    out.hidden_BTD, params.head(), *inputs, weight_BT, settings.divergence, settings.mix,
    settings.temperature, size)
  share = total / batch.get('total_weight', 1)
  return share, dict(distilled=share, distilled_tokens=weight_BT.sum(), distilled_kl=total,
                     distilled_entropy=jnp.sum(weight_BT * entropy_BT),
                     max_kl=jnp.max(kl_BT, where=weight_BT > 0, initial=0))


def _sampled(params, out, batch, _, settings, size):
  target_BT = _predicting(batch['tokens_BT'])
  values = head.token_entropy(out.hidden_BTD, params.head(), target_BT, settings.temperature, size)
  logp_BT, entropy_BT = (_own_place(x) for x in values)
  weight_BT = batch['weight_BT'].at[:, 0].set(0)
  gap_BT = jax.lax.stop_gradient(
    jnp.where(weight_BT > 0, batch['teacher_logp_BT'] - logp_BT, 0))
  batch = batch | dict(weight_BT=weight_BT, advantage_BT=gap_BT,
                       scale_BT=1 / batch.get('total_weight', 1))
  share, sums = policy.objective(logp_BT, entropy_BT, batch, settings.policy())
  return share, sums | dict(distilled_kl=-jnp.sum(weight_BT * gap_BT))


def _predicting(x_BT):
  """From the tokens' own places to those that predict them."""
  return jnp.roll(x_BT, -1, axis=1)


def _own_place(x_BT):
  """From the places that predict tokens to those of the tokens; a row's first has no meaning."""
  return jnp.roll(x_BT, 1, axis=1)


def report(sums):
  """Values of a step from the sums over its batches; names in `max_` are maxima, not sums.

  Means over trained tokens, in nats: `kl`, the divergence that is minimised (`kl_max`: the largest
  of one token; of 'sampled' `kl` is the estimate log student - log teacher of the drawn tokens, if
  the student as it is now drew them), and `entropy` of the student. 'sampled' has the values of
  `policy.report` too, and its `loss` is the surrogate's.
  """
  if 'policy_tokens' in sums:
    tokens = jnp.maximum(sums['policy_tokens'], 1)
    return policy.report(sums) | dict(kl=sums['distilled_kl'] / tokens)
  tokens = jnp.maximum(sums['distilled_tokens'], 1)
  return dict(loss=sums['distilled'], kl=sums['distilled_kl'] / tokens, kl_max=sums['max_kl'],
              entropy=sums['distilled_entropy'] / tokens)


def teacher_states(teacher, batch, *, dtype=None):
  """The teacher's final hidden states (B, T, D), for `teacher_BTD`; `dtype` is the forward's."""
  return teacher(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'],
                 dtype=dtype).hidden_BTD


def teacher_logp(teacher, batch, *, temperature=1.0, size=None, dtype=None):
  """The teacher's log-probability of each token at its own place (B, T): `teacher_logp_BT`."""
  logp_BT = head.token_logp(teacher_states(teacher, batch, dtype=dtype), teacher.head(),
                            _predicting(batch['tokens_BT']), temperature, size)
  return jnp.where(batch['weight_BT'] > 0, _own_place(logp_BT), 0)


def teacher_top(teacher, batch, count, *, temperature=1.0, size=None, dtype=None):
  """(top_ids_BTX, top_logp_BTX): at each place the `count` ids that the teacher finds likeliest.

  For 'student_top' give it the student, of which the ids are used, and the ids to `teacher_at`.
  """
  ids, logp = top.likeliest(teacher_states(teacher, batch, dtype=dtype), teacher.head(), count,
                            temperature, size)
  return _own_place(ids), _own_place(logp)


def teacher_at(teacher, batch, top_ids_BTX, *, temperature=1.0, size=None, dtype=None):
  """The teacher's log-probabilities of the ids given at each place: `top_logp_BTX`."""
  return _own_place(top.logp_at(teacher_states(teacher, batch, dtype=dtype), teacher.head(),
                                _predicting(top_ids_BTX), temperature, size))
