"""The language-model head inside the loss: logits exist one chunk at a time, never as (B, T, V).

`cross_entropy` is a weighted sum, so its gradient is known as soon as a chunk's logits are: the
forward pass under differentiation computes both, and the backward pass only scales. `token_logp`
and `token_entropy` give each token's log-probability (and the entropy of the distribution it comes
from), of which a loss may be any function: their backward pass computes the logits again. Meaning:
`reference.cross_entropy`, `reference.token_logp`, `reference.token_entropy`.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import exchange, head_gradient, head_kept, head_tpu

TOKENS = 1024  # tokens of one chunk on one device
UNROLLED = 4  # chunks; fewer are no loop (XLA:CPU runs a loop's body on one thread)

NEVER = -1e30  # finite: 0 * log 0 is then 0


@jax.custom_vjp
def cross_entropy(hidden_BTD, head_VD, target_BT, weight_BT):
  """sum over tokens of weight * -log softmax(head hidden)[target]; float32 scalar.

  Under a mesh (`jax.set_mesh`) each device gathers its share of the head once, runs over its own
  tokens, and the head's gradient is reduce-scattered once.
  """
  return sharded(_local, lambda scalar, *_: scalar, hidden_BTD, head_VD, target_BT, weight_BT)


def _forward(*inputs):
  return sharded(functools.partial(_local, gradients=True),
                  lambda scalar, rows, *weights: (scalar, weights), *inputs)


def _backward(saved, ct):
  d_hidden, d_head = saved
  return ((ct * d_hidden).astype(d_hidden.dtype), (ct * d_head).astype(d_head.dtype), None, None)


cross_entropy.defvjp(_forward, _backward)


def token_logp(hidden_BTD, head_VD, target_BT, temperature=1.0, size=None):
  """log softmax(head hidden / temperature)[target] of every token, float32 (B, T).

  Sharded as `cross_entropy`. `temperature` is a plain number. With `size`, the ids from there on
  are in no softmax: rows of the head that the tokenizer has no token for, and nobody can draw.
  """
  return _values(hidden_BTD, head_VD, target_BT, temperature, size, False)[0]


def token_entropy(hidden_BTD, head_VD, target_BT, temperature=1.0, size=None):
  """`token_logp`, and the entropy of softmax(head hidden / temperature) in nats: two (B, T).

  An entropy of which no gradient is taken costs nothing in the backward pass.
  """
  return _values(hidden_BTD, head_VD, target_BT, temperature, size, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _values(hidden_BTD, head_VD, target_BT, temperature, size, entropy):
  local = functools.partial(_local_values, temperature=temperature, size=size, entropy=entropy)
  return sharded(local, lambda scalar, rows, *_: (rows,) * (1 + entropy),
                  hidden_BTD, head_VD, target_BT)


def _values_forward(hidden_BTD, head_VD, target_BT, temperature, size, entropy):
  inputs = [x.value for x in (hidden_BTD, head_VD, target_BT)]
  local = functools.partial(_local_values, temperature=temperature, size=size, entropy=entropy,
                            normaliser=True)
  *values, bits_BT = sharded(local, lambda scalar, rows, *_: (rows,) * (2 + entropy), *inputs)
  return tuple(values), (inputs, [bits_BT, values[-1]])


def _values_backward(temperature, size, _, saved, cotangents):
  """The gradient of sum(ct * logp) + sum(ct * entropy): a cross-entropy of weights -ct, and more.

  A cotangent that is zero by construction arrives as a `SymbolicZero`, and is left out.
  """
  ct_BT, *ct_entropy = cotangents
  zero = jax.custom_derivatives.SymbolicZero
  if isinstance(ct_BT, zero):
    ct_BT = jnp.zeros(ct_BT.shape, ct_BT.dtype)
  ct_entropy = [ct for ct in ct_entropy if not isinstance(ct, zero)]
  local = functools.partial(_local, gradients=True, temperature=temperature, size=size, known=True)
  inputs, known = saved
  _, (d_hidden, d_head) = sharded(local, lambda scalar, rows, *weights: (scalar, weights),
                                  *inputs, -ct_BT, *ct_entropy, *known)
  return d_hidden, d_head, None


_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)


def sharded(local, layout, hidden_BTD, head_VD, *of_tokens, other_VD=None):
  """`local` on each device's tokens (`of_tokens` are (B, T, ...)) and its part of the head.

  `layout(scalar, rows, hidden, head)` chooses the PartitionSpecs of what it returns. `other_VD`,
  the head of another model, is its last argument, and comes with its own `other_axes` of the width.
  """
  mesh = jax.sharding.get_abstract_mesh()
  others = () if other_VD is None else (other_VD,)
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return local(hidden_BTD, head_VD, *of_tokens, *others)
  rows = alphabet.partition('BT', hidden_BTD.shape[:2], mesh)
  head, *other = (alphabet.partition('VD', x.shape, mesh) for x in (head_VD, *others))
  axes = exchange.axes_of
  body = functools.partial(local, vocab_axes=axes(head[0]), width_axes=axes(head[1]),
                           token_axes=axes(rows[0]) + axes(rows[1]))
  if others:
    body = functools.partial(body, other_axes=axes(other[0][1]))
  hidden, scalar = PartitionSpec(*rows, None), PartitionSpec()
  tokens = [PartitionSpec(*rows, *(None,) * (x.ndim - 2)) for x in of_tokens]
  return jax.shard_map(
    body, in_specs=(hidden, head, *tokens, *other), check_vma=False,
    out_specs=layout(scalar, rows, hidden, head))(hidden_BTD, head_VD, *of_tokens, *others)


def _local(hidden_BTD, head_VD, target_BT, weight_BT, *bonus, gradients=False, temperature=1.0,
           size=None, known=False, vocab_axes=(), width_axes=(), token_axes=()):
  """One device's tokens against its rows of the head; sums over the named mesh axes.

  With `gradients`: (loss, (d_hidden, d_head)), else the loss. `bonus` (B, T), if there is one,
  weighs the tokens' entropies, whose gradient is then added. With `known` the last two arguments
  are what a forward pass found: log-sum-exps in units of log 2, and entropies if there is a bonus.
  """
  bonus, known = (bonus[:-2], bonus[-2:]) if known else (bonus, ())
  dtype = head_VD.dtype
  head_VD, first = gather(head_VD, hidden_BTD.dtype, vocab_axes, width_axes)
  run = _over_chunks
  if head_tpu.serves(hidden_BTD, head_VD):
    run = functools.partial(_in_kernels, known=known)
  total, *found = run(hidden_BTD, target_BT, weight_BT, *bonus, head_VD=head_VD, first=first,
                      vocab_axes=vocab_axes, gradients=gradients, temperature=temperature,
                      size=size)
  total = jax.lax.psum(total, token_axes) if token_axes else total
  if not gradients:
    return total
  d_hidden, d_head = found
  return total, reduce(d_hidden, d_head, width_axes, token_axes, dtype)


def _over_chunks(hidden_BTD, *of_tokens, gradients, **options):
  """The loss of a device's tokens and, with `gradients`, both gradients, the head's float32."""
  step = functools.partial(_chunk, gradients=gradients, **options)
  chunks = [in_chunks(x) for x in (hidden_BTD, *of_tokens)]
  scan = functools.partial(jax.lax.scan, unroll=len(chunks[0]) <= UNROLLED)
  total = jnp.zeros((), jnp.float32)
  if not gradients:
    return scan(lambda t, c: (t + step(*c)[0], None), total, chunks)[:1]

  def visit(carry, chunk):
    total, d_head = carry
    loss, d_hidden, d_head_chunk = step(*chunk)
    return (total + loss, d_head + d_head_chunk), d_hidden
  d_head = jnp.zeros(options['head_VD'].shape, jnp.float32)
  (total, d_head), d_hidden = scan(visit, (total, d_head), chunks)
  return total, from_chunks(d_hidden, *hidden_BTD.shape[:2]), d_head


def _in_kernels(hidden_BTD, *of_tokens, head_VD, first, vocab_axes, gradients, temperature, size,
                known):
  """`_over_chunks` on a TPU: a pass over the vocabulary, and one with `gradients`.

  Where the first is `known`, the loss is not looked at by anyone, and is 0.
  """
  hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
  target_M, weight_M, *bonus = (x.reshape(-1) for x in of_tokens)
  options = dict(limit=None if size is None else size - first, temperature=temperature)
  total = jnp.zeros((), jnp.float32)
  if gradients and not bonus and not known and head_kept.serves(hidden_MD, head_VD):
    total, d_hidden, d_head = head_kept.cross_entropy(
      hidden_MD, head_VD, target_M - first, weight_M, vocab_axes=vocab_axes, **options)
    return total, d_hidden.reshape(hidden_BTD.shape), d_head
  if known:
    bits_M, entropy_M = (x.reshape(-1) for x in known)
  else:
    logp_M, entropy_M, bits_M = head_tpu.statistics(
      hidden_MD, head_VD, target_M - first, entropy=bool(bonus), vocab_axes=vocab_axes, **options)
    total = -jnp.sum(weight_M * logp_M)
  if not gradients:
    return total,
  d_hidden, d_head = head_gradient.gradient(
    hidden_MD, head_VD, target_M - first, weight_M, bits_M, *bonus, *[entropy_M] * len(bonus),
    **options)
  d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
  return total, d_hidden.astype(hidden_MD.dtype).reshape(hidden_BTD.shape), d_head


def _local_values(hidden_BTD, head_VD, target_BT, temperature, size, entropy, normaliser=False,
                  vocab_axes=(), width_axes=(), token_axes=()):
  """One device's log-probabilities (B, T), and with `entropy` its entropies.

  With `normaliser` the log-sum-exp in units of log 2 comes last.
  """
  head_VD, first = gather(head_VD, hidden_BTD.dtype, vocab_axes, width_axes)
  if head_tpu.serves(hidden_BTD, head_VD):
    found = head_tpu.statistics(
      hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head_VD, target_BT.reshape(-1) - first,
      None if size is None else size - first, temperature=temperature, entropy=entropy,
      vocab_axes=vocab_axes)
    found = found.logp, *[found.entropy] * entropy, *[found.bits] * normaliser
    return tuple(x.reshape(target_BT.shape) for x in found)

  def visit(_, chunk):
    hidden_MD, target_M = chunk
    logits_MV, top_M, norm_M, entropy_M = softmax(hidden_MD, head_VD, first, vocab_axes,
                                                  temperature, size)
    logit_M1, *_ = look_up(logits_MV, target_M[:, None], first, vocab_axes)
    lse_M = top_M + norm_M
    return None, (logit_M1[:, 0] - lse_M, *[entropy_M] * entropy,
                  *[lse_M * head_tpu.BITS] * normaliser)
  chunks = in_chunks(hidden_BTD), in_chunks(target_BT)
  _, values = jax.lax.scan(visit, None, chunks, unroll=len(chunks[0]) <= UNROLLED)
  return tuple(from_chunks(x, *target_BT.shape) for x in values)


def gather(head_VD, dtype, vocab_axes, width_axes):
  """The device's rows of the head at full width, and the number of the first of them."""
  head_VD = exchange.gather(head_VD.astype(dtype), width_axes, 1)
  return head_VD, jax.lax.axis_index(vocab_axes) * head_VD.shape[0] if vocab_axes else 0


def reduce(d_hidden_BTD, d_head_VD, width_axes, token_axes, dtype):
  """d_hidden, and the sum over all devices' tokens of the gradient of what `gather` gave, in parts.

  In `dtype`, which is what is sent. The sum is done when d_hidden goes on: no layer's backward pass
  finds the whole gradient in memory.
  """
  d_head_VD = exchange.scatter_sum(d_head_VD.astype(dtype), width_axes, 1)
  rest = tuple(axis for axis in token_axes if axis not in width_axes)
  d_head_VD = jax.lax.psum(d_head_VD, rest) if rest else d_head_VD
  return jax.lax.optimization_barrier((d_hidden_BTD, d_head_VD.astype(dtype)))


def in_chunks(x_BT):
  """(B, T, ...) -> (chunks, M, ...) with about TOKENS rows M, padded with zeros (weight 0).

  Every chunk takes a stretch of T from all of B.
  """
  B, T = x_BT.shape[:2]
  size = min(T, max(1, TOKENS // B))
  x = jnp.pad(x_BT, [(0, 0), (0, -T % size)] + [(0, 0)] * (x_BT.ndim - 2))
  x = x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(len(x), B * size, *x.shape[3:])


def from_chunks(x, B, T):
  """(chunks, M, ...) -> (B, T, ...), undoing `in_chunks`."""
  x = x.reshape(len(x), B, -1, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(B, -1, *x.shape[3:])[:, :T]


def _chunk(hidden_MD, target_M, weight_M, bonus_M=None, *, head_VD, first, vocab_axes, gradients,
           temperature, size):
  """Loss of one chunk and, with `gradients`, its gradients (and those of bonus * entropy)."""
  logits_MV, top_M, norm_M, entropy_M = softmax(hidden_MD, head_VD, first, vocab_axes, temperature,
                                                size)
  lse_M = top_M + norm_M
  logit_M1, here_M1, index_M1 = look_up(logits_MV, target_M[:, None], first, vocab_axes)
  loss = jnp.sum(weight_M * (lse_M - logit_M1[:, 0]))
  if not gradients:
    return loss, None, None
  hit_MV = (jnp.arange(head_VD.shape[0]) == index_M1) & here_M1
  logp_MV = logits_MV - lse_M[:, None]
  d_MV = weight_M[:, None] * (jnp.exp(logp_MV) - hit_MV)
  if bonus_M is not None:
    d_MV -= bonus_M[:, None] * jnp.exp(logp_MV) * (logp_MV + entropy_M[:, None])
  d_MV = (d_MV / temperature).astype(hidden_MD.dtype)
  d_hidden = dot('MV,VD->MD', d_MV, head_VD)
  d_hidden = jax.lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
  return loss, d_hidden.astype(hidden_MD.dtype), dot('MV,MD->VD', d_MV, hidden_MD)


def softmax(hidden_MD, head_VD, first, vocab_axes, temperature, size):
  """Logits on this shard of V; over all shards the largest, log-sum-exp less that, entropy."""
  logits_MV = dot('MD,VD->MV', hidden_MD, head_VD) / temperature
  if size is not None:
    logits_MV = jnp.where(first + jnp.arange(head_VD.shape[0]) < size, logits_MV, NEVER)
  top_M = logits_MV.max(-1)
  top_M = jax.lax.pmax(top_M, vocab_axes) if vocab_axes else top_M
  below_MV = logits_MV - top_M[:, None]
  norm_M, mean_M = jnp.exp(below_MV).sum(-1), (jnp.exp(below_MV) * below_MV).sum(-1)
  if vocab_axes:
    norm_M, mean_M = (jax.lax.psum(x, vocab_axes) for x in (norm_M, mean_M))
  log_norm_M = jnp.log(norm_M)
  return logits_MV, top_M, log_norm_M, log_norm_M - mean_M / norm_M


def look_up(logits_MV, id_MX, first, vocab_axes):
  """The ids' logits, of whichever shard; which ids are on this one, and their rows here (or 0)."""
  here_MX = (id_MX >= first) & (id_MX < first + logits_MV.shape[1])
  index_MX = jnp.where(here_MX, id_MX - first, 0)
  logit_MX = jnp.where(here_MX, jnp.take_along_axis(logits_MV, index_MX, 1), 0)
  return jax.lax.psum(logit_MX, vocab_axes) if vocab_axes else logit_MX, here_MX, index_MX


def dot(letters, a, b):
  """An einsum that accumulates in float32."""
  return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)
