"""Distributions known at a few ids of each token: divergences with a tail, and how to know them.

For a teacher that only tells its likeliest ids, or the log-probabilities of given ones. Both
distributions are over these ids and one more outcome, any other id: what a model gives to the tail
is neither dropped nor spread over the rest, so the student's mass there has a gradient. Nothing is
(B, T, V); everything is sharded as `head.cross_entropy`.
"""
import functools
import math

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import divergence, head

LEAST = 1e-7  # of a tail: the teacher's log-probabilities, in float32, say no more of it


def tail_divergence(hidden_BTD, head_VD, id_BTX, teacher_logp_BTX, weight_BT, kind, mix=0.5,
                    temperature=1.0, size=None):
  """`divergence.divergence_entropy` over `id_BTX` and the tail; a lower bound of the whole one's.

  `teacher_logp_BTX` are the teacher's log-probabilities of these ids, all different, at the same
  temperature; an id of -1 is none. Raises ValueError.
  """
  divergence.check(kind, mix, temperature)
  return _divergence(hidden_BTD, head_VD, id_BTX, teacher_logp_BTX, weight_BT, kind, mix,
                     temperature, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _divergence(hidden_BTD, head_VD, id_BTX, teacher_BTX, weight_BT, *settings):
  local = functools.partial(_local, settings=settings, gradients=False)
  return head.sharded(local, lambda scalar, rows, *_: (scalar, rows, rows), hidden_BTD, head_VD,
                      weight_BT, id_BTX, teacher_BTX)


def _forward(hidden_BTD, head_VD, id_BTX, teacher_BTX, weight_BT, *settings):
  local = functools.partial(_local, settings=settings, gradients=True)
  total, *values, d_hidden, d_head = head.sharded(
    local, lambda scalar, rows, *weights: (scalar, rows, rows, *weights), hidden_BTD, head_VD,
    weight_BT, id_BTX, teacher_BTX)
  return (total, *values), (d_hidden, d_head)


def _backward(kind, mix, temperature, size, saved, cotangents):
  return *divergence.scale(saved, cotangents[0]), None, None, None


_divergence.defvjp(_forward, _backward)


def _local(*inputs, settings, vocab_axes=(), **options):
  kind, mix, temperature, size = settings

  def slope(logp_MV, first, id_MX, teacher_MX):
    logp_MX, here_MX, index_MX = head.look_up(logp_MV, id_MX, first, vocab_axes)
    rows_M1 = jnp.arange(len(id_MX))[:, None]
    index_MX = jnp.where(here_MX, index_MX, logp_MV.shape[1])  # beyond the end: dropped
    rest_MV = logp_MV.at[rows_M1, index_MX].set(head.NEVER, mode='drop')
    none_MX = id_MX < 0
    logp_MX, teacher_MX = (jnp.where(none_MX, head.NEVER, x) for x in (logp_MX, teacher_MX))
    tail_M1 = _log_sum(rest_MV, vocab_axes)
    other_M1 = jnp.log(jnp.maximum(1 - jnp.exp(teacher_MX).sum(-1, keepdims=True), LEAST))
    logp_MX = jnp.concatenate([logp_MX, jnp.maximum(tail_M1, math.log(LEAST))], -1)
    term_MX, score_MX = divergence.compare(
      logp_MX, jnp.concatenate([teacher_MX, other_M1], -1), kind, mix)
    d_MX = score_MX - jnp.exp(logp_MX) * score_MX.sum(-1, keepdims=True)
    share_MV = jnp.where(rest_MV > head.NEVER / 2, jnp.exp(rest_MV - tail_M1), 0)
    d_MV = (share_MV * d_MX[:, -1:]).at[rows_M1, index_MX].set(d_MX[:, :-1], mode='drop')
    return term_MX.sum(-1), d_MV
  return divergence.over_chunks(slope, *inputs, temperature=temperature, size=size,
                                vocab_axes=vocab_axes, **options)


def _log_sum(logp_MV, vocab_axes):
  """log of the sum of exp over all shards, (M, 1)."""
  top_M1 = logp_MV.max(-1, keepdims=True)
  top_M1 = jax.lax.pmax(top_M1, vocab_axes) if vocab_axes else top_M1
  sum_M1 = jnp.exp(logp_MV - top_M1).sum(-1, keepdims=True)
  return top_M1 + jnp.log(jax.lax.psum(sum_M1, vocab_axes) if vocab_axes else sum_M1)


def likeliest(hidden_BTD, head_VD, count, temperature=1.0, size=None):
  """The `count` likeliest ids of each token, in order, and their log-probabilities: (B, T, X)."""
  def pick(logp_MV, first, vocab_axes):
    logp_MX, index_MX = jax.lax.top_k(logp_MV, min(count, logp_MV.shape[1]))
    if vocab_axes:
      logp_MX, id_MX = (jax.lax.all_gather(x, vocab_axes, axis=1, tiled=True)
                        for x in (logp_MX, first + index_MX))
      logp_MX, index_MX = jax.lax.top_k(logp_MX, count)
      return jnp.take_along_axis(id_MX, index_MX, 1), logp_MX
    return index_MX, logp_MX
  return _look(pick, hidden_BTD, head_VD, temperature=temperature, size=size, outputs=2)


def logp_at(hidden_BTD, head_VD, id_BTX, temperature=1.0, size=None):
  """The log-probabilities (B, T, X) of the ids given for each token; there is no gradient."""
  def pick(logp_MV, first, vocab_axes, id_MX):
    return head.look_up(logp_MV, id_MX, first, vocab_axes)[:1]
  return _look(pick, hidden_BTD, head_VD, id_BTX, temperature=temperature, size=size, outputs=1)[0]


def _look(pick, hidden_BTD, head_VD, *of_tokens, temperature, size, outputs):
  """What `pick(logp_MV, first, vocab_axes, *of_tokens)` gives of each chunk, `outputs` arrays."""
  def local(hidden_BTD, head_VD, *of_tokens, vocab_axes=(), width_axes=(), token_axes=()):
    head_VD, first = head.gather(head_VD, hidden_BTD.dtype, vocab_axes, width_axes)

    def visit(_, chunk):
      hidden_MD, *rest = chunk
      logp_MV, _ = divergence.log_softmax(hidden_MD, head_VD, first, vocab_axes, temperature, size)
      return None, pick(logp_MV, first, vocab_axes, *rest)
    chunks = [head.in_chunks(x) for x in (hidden_BTD, *of_tokens)]
    _, found = jax.lax.scan(visit, None, chunks, unroll=len(chunks[0]) <= head.UNROLLED)
    return tuple(head.from_chunks(x, *hidden_BTD.shape[:2]) for x in found)
  return head.sharded(local, lambda scalar, rows, hidden, _: (hidden,) * outputs,
                      *jax.lax.stop_gradient((hidden_BTD, head_VD, *of_tokens)))
