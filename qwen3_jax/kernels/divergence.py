"""Divergences between the distributions of two heads: neither's logits exist as (B, T, V).

A student's head and a teacher's, of different widths, run over the same chunk of tokens. The sum
over tokens is weighted and linear in the divergences, so the student's gradient is known as soon as
a chunk's logits are, as in `head.cross_entropy`: the backward pass only scales. Meaning:
`reference.divergence`.
"""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import head, head_pair, head_tpu

KINDS = ('reverse_kl', 'forward_kl', 'jsd')


def divergence(hidden_BTD, head_VD, teacher_BTD, teacher_head_VD, weight_BT, kind, mix=0.5,
               temperature=1.0, size=None):
  """(sum over tokens of weight * divergence, divergences (B, T)) of student and teacher; float32.

  'reverse_kl' is KL(student || teacher), 'forward_kl' KL(teacher || student); 'jsd' is
  mix KL(teacher || m) + (1 - mix) KL(student || m), m = mix teacher + (1 - mix) student (GKD,
  2306.13649). Both distributions are softmax(logits / temperature), and nothing is multiplied by
  the temperature's square. The gradient is that of the sum, to the student's states and head alone.
  With `size`, the ids from there on are in neither distribution; then the heads may have different
  numbers of rows. Sharded as `head.cross_entropy`. Raises ValueError.
  """
  return divergence_entropy(hidden_BTD, head_VD, teacher_BTD, teacher_head_VD, weight_BT, kind, mix,
                            temperature, size)[:2]


def divergence_entropy(hidden_BTD, head_VD, teacher_BTD, teacher_head_VD, weight_BT, kind, mix=0.5,
                       temperature=1.0, size=None):
  """`divergence`, and the entropies (B, T) of the student in nats, of which there is no gradient.
  """
  check(kind, mix, temperature)
  head_VD, teacher_head_VD = _as_many_rows(head_VD, teacher_head_VD, size)
  return _divergence(hidden_BTD, head_VD, teacher_BTD, teacher_head_VD, weight_BT, kind, mix,
                     temperature, size)


def check(kind, mix, temperature):
  """Raises ValueError for what is no divergence."""
  if kind not in KINDS:
    raise ValueError(f'the divergence is {kind!r}; want one of {", ".join(KINDS)}')
  if not 0 < mix < 1:
    raise ValueError(f'mix is {mix}; it must be between 0 and 1, the weight of the teacher in '
                     "the mixture of 'jsd' (for its limits take forward_kl or reverse_kl)")
  if not temperature > 0:
    raise ValueError(f'temperature is {temperature}; it must be more than 0')


def _as_many_rows(head_VD, teacher_VD, size):
  own, other = len(head_VD), len(teacher_VD)
  if own == other:
    return head_VD, teacher_VD
  if size is None or size > min(own, other):
    raise ValueError(f"the student's head has {own} rows and the teacher's {other}; both need a "
                     f"row for each of the tokenizer's ids, whose number (size) is {size}")
  return [jnp.pad(x, ((0, max(own, other) - len(x)), (0, 0))) for x in (head_VD, teacher_VD)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _divergence(hidden_BTD, head_VD, teacher_BTD, teacher_VD, weight_BT, *settings):
  local = functools.partial(_local, settings=settings, gradients=False)
  return head.sharded(local, lambda scalar, rows, *_: (scalar, rows, rows), hidden_BTD, head_VD,
                      weight_BT, teacher_BTD, other_VD=teacher_VD)


def _forward(hidden_BTD, head_VD, teacher_BTD, teacher_VD, weight_BT, *settings):
  local = functools.partial(_local, settings=settings, gradients=True)
  total, *values, d_hidden, d_head = head.sharded(
    local, lambda scalar, rows, *weights: (scalar, rows, rows, *weights), hidden_BTD, head_VD,
    weight_BT, teacher_BTD, other_VD=teacher_VD)
  return (total, *values), (d_hidden, d_head)


def _backward(kind, mix, temperature, size, saved, cotangents):
  d_hidden, d_head = scale(saved, cotangents[0])
  return d_hidden, d_head, None, None, None


_divergence.defvjp(_forward, _backward)


def scale(saved, ct):
  """The gradients that the forward pass found, times the sum's cotangent, in their own types."""
  return [(ct * d).astype(d.dtype) for d in saved]


def _local(hidden_BTD, head_VD, weight_BT, teacher_BTD, teacher_VD, *, settings, gradients,
           vocab_axes=(), width_axes=(), token_axes=(), other_axes=()):
  kind, mix, temperature, size = settings
  teacher_VD, _ = head.gather(teacher_VD, teacher_BTD.dtype, vocab_axes, other_axes)
  if head_tpu.serves(hidden_BTD, head_VD) and head_tpu.serves(teacher_BTD, teacher_VD):
    return _in_kernels(hidden_BTD, head_VD, weight_BT, teacher_BTD, teacher_VD, settings=settings,
                       gradients=gradients, vocab_axes=vocab_axes, width_axes=width_axes,
                       token_axes=token_axes)

  def slope(logp_MV, first, teacher_MD):
    logq_MV, _ = log_softmax(teacher_MD, teacher_VD, first, vocab_axes, temperature, size)
    term_MV, score_MV = compare(logp_MV, logq_MV, kind, mix)
    value_M, score_M = term_MV.sum(-1), score_MV.sum(-1)
    if vocab_axes:
      value_M, score_M = (jax.lax.psum(x, vocab_axes) for x in (value_M, score_M))
    return value_M, score_MV - jnp.exp(logp_MV) * score_M[:, None]
  return over_chunks(slope, hidden_BTD, head_VD, weight_BT, teacher_BTD, temperature=temperature,
                     size=size, gradients=gradients, vocab_axes=vocab_axes, width_axes=width_axes,
                     token_axes=token_axes)


def _in_kernels(hidden_BTD, head_VD, weight_BT, teacher_BTD, teacher_VD, *, settings, gradients,
                vocab_axes, width_axes, token_axes):
  """`over_chunks` on a TPU: a pass over the vocabulary ('jsd': two), one more with `gradients`."""
  kind, mix, temperature, size = settings
  dtype, shape = head_VD.dtype, weight_BT.shape
  head_VD, first = head.gather(head_VD, hidden_BTD.dtype, vocab_axes, width_axes)
  sides = [(x.reshape(-1, x.shape[-1]), y) for x, y in
           ((hidden_BTD, head_VD), (teacher_BTD, teacher_VD))]
  options = dict(limit=None if size is None else size - first, temperature=temperature,
                 compare=functools.partial(compare, kind=kind, mix=mix, expm1=expm1))
  pair = head_pair.statistics(sides, kind, vocab_axes=vocab_axes, **options)
  weight_M = weight_BT.reshape(-1)
  total = jnp.sum(weight_M * pair.value)
  total = jax.lax.psum(total, token_axes) if token_axes else total
  values = pair.value.reshape(shape), pair.entropy.reshape(shape)
  if not gradients:
    return total, *values
  d_hidden, d_head = head_pair.gradient(sides, pair, weight_M, **options)
  d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
  d_hidden = d_hidden.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)
  return (total, *values, *head.reduce(d_hidden, d_head, width_axes, token_axes, dtype))


def expm1(x):
  """In a kernel, which has no other; its error near 0 is 6e-8, not relative to the result."""
  return jnp.exp(x) - 1


def log_softmax(*inputs):
  """Log-probabilities on this shard of V, those near 0 without rounding of logits; entropies."""
  logits_MV, top_M, norm_M, entropy_M = head.softmax(*inputs)
  return (logits_MV - top_M[:, None]) - norm_M[:, None], entropy_M


def compare(logp, logq, kind, mix, expm1=jnp.expm1):
  """What each outcome adds to the divergence of p and q, and p times its derivative by p.

  The derivative is up to a constant, which cancels in the gradient by the logits, score - p
  sum(score). The terms of a KL have q - p in them, whose sum is 0: none is then negative, and an
  error of a log-sum-exp cancels in first order. Both are 0 where p is q.
  """
  p, q, gap = jnp.exp(logp), jnp.exp(logq), logq - logp
  if kind == 'reverse_kl':
    return q - p - p * gap, -p * gap
  if kind == 'forward_kl':
    return p - q + q * gap, p - q
  far = jnp.log1p(jnp.where(gap > 0, 1 - mix, mix) * expm1(-jnp.abs(gap)))
  logm = jnp.maximum(logp, logq) + far
  score = (1 - mix) * p * (logp - logm)
  return mix * q * (logq - logm) + score, score


def over_chunks(slope, hidden_BTD, head_VD, weight_BT, *of_tokens, temperature, size, gradients,
                vocab_axes=(), width_axes=(), token_axes=()):
  """One device's (sum, values, entropies), and with `gradients` those of the states and the head.

  `slope(logp_MV, first, *of_tokens)` gives each token's value and its gradient by the student's
  logits / temperature, on this shard of V, whose first id is `first`.
  """
  shape, dtype = hidden_BTD.shape[:2], head_VD.dtype
  head_VD, first = head.gather(head_VD, hidden_BTD.dtype, vocab_axes, width_axes)

  def visit(carry, chunk):
    total, d_head = carry
    hidden_MD, weight_M, *rest = chunk
    logp_MV, entropy_M = log_softmax(hidden_MD, head_VD, first, vocab_axes, temperature, size)
    value_M, d_MV = slope(logp_MV, first, *rest)
    total += jnp.sum(weight_M * value_M)
    if not gradients:
      return (total, d_head), (value_M, entropy_M)
    d_MV = (weight_M[:, None] * d_MV / temperature).astype(hidden_MD.dtype)
    d_hidden = head.dot('MV,VD->MD', d_MV, head_VD)
    d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
    return ((total, d_head + head.dot('MV,MD->VD', d_MV, hidden_MD)),
            (value_M, entropy_M, d_hidden.astype(hidden_MD.dtype)))
  d_head = jnp.zeros(head_VD.shape if gradients else (), jnp.float32)
  chunks = [head.in_chunks(x) for x in (hidden_BTD, weight_BT, *of_tokens)]
  (total, d_head), values = jax.lax.scan(visit, (jnp.zeros((), jnp.float32), d_head), chunks,
                                         unroll=len(chunks[0]) <= head.UNROLLED)
  total = jax.lax.psum(total, token_axes) if token_axes else total
  values = [head.from_chunks(x, *shape) for x in values]
  if not gradients:
    return total, *values
  return (total, *values[:-1],
          *head.reduce(values[-1], d_head, width_axes, token_axes, dtype))
