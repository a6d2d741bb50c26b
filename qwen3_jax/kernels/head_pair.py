"""Divergences of two heads on one TPU device: both models' logits are tiles in VMEM: `head_tpu`.

A KL needs no more than running sums, and takes one pass; the terms of a JSD are of normalised
probabilities, so a second pass follows. The gradient is one more. Meaning: `reference.divergence`.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import head_gradient, head_tpu
from qwen3_jax.kernels.head_tpu import BITS, SUBLANES, place

BLOCKS = dict(tokens=256, rows=256, part=128)  # where the table knows nothing


class Pair(NamedTuple):
  """Of each token, float32 (M,): divergence and the student's entropy in nats; for the gradient
  both log-sum-exps in units of log 2 and the sum of the scores (p times the slope by p)."""
  value: jax.Array
  entropy: jax.Array
  bits: jax.Array
  other_bits: jax.Array
  score: jax.Array


def statistics(sides, kind, compare, limit=None, *, temperature=1.0, vocab_axes=(), blocks=None,
               interpret=None):
  """`Pair` of the first `limit` rows of both heads; `sides` are (hidden_MD, head_VD) of each.

  The first is the student's, widths may differ. `compare(logp, logq)` gives each outcome's term and
  score, as `divergence.compare`. Raises ValueError where the blocks exceed VMEM.
  """
  sizes = choose('pair_statistics', BLOCKS, sides, blocks)
  scale = BITS / temperature
  sums = functools.partial(_sums, scale=scale, kind=kind)
  starts = [head_tpu.LOWEST, 0.0, 0.0, head_tpu.LOWEST, 0.0] + [0.0] * (kind != 'jsd')
  found = head_tpu.accumulate('pair_statistics', sums, starts, sides, [], limit, sizes, interpret)
  pair = merge(*found, kind=kind, vocab_axes=vocab_axes)
  if kind != 'jsd':
    return pair
  terms = functools.partial(_terms, scale=scale, compare=compare)
  value, score = head_tpu.accumulate('pair_terms', terms, [0.0, 0.0], sides,
                                     [pair.bits, pair.other_bits], limit, sizes, interpret)
  value, score = (x.sum(0) for x in (value, score))
  if vocab_axes:
    value, score = (jax.lax.psum(x, vocab_axes) for x in (value, score))
  return pair._replace(value=value, score=score)


def merge(top, norm, mean, other_top, other_norm, gap=None, *, kind, vocab_axes=()):
  """`Pair` from the partial results of every sublane and shard, (8, M)."""
  def total(x):
    return jax.lax.psum(x.sum(0), vocab_axes) if vocab_axes else x.sum(0)
  def highest(x):
    return jax.lax.pmax(x.max(0), vocab_axes) if vocab_axes else x.max(0)
  best, other_best = highest(top), highest(other_top)
  drop, other_drop = top - best, other_top - other_best
  share, other_share = jnp.exp2(drop), jnp.exp2(other_drop)
  norm_M, other_norm_M = total(share * norm), total(other_share * other_norm)
  entropy = jnp.log(norm_M) - total(share * (mean + norm * drop)) / norm_M / BITS
  value = score = jnp.zeros_like(norm_M)
  log_ratio = jnp.log(norm_M) - jnp.log(other_norm_M)
  if kind == 'reverse_kl':
    value = total(share * (gap + norm * (drop - other_drop))) / norm_M / BITS - log_ratio
    score = value
  elif kind == 'forward_kl':
    moved = gap + other_norm * (other_drop - drop)
    value = total(other_share * moved) / other_norm_M / BITS + log_ratio
  return Pair(value, entropy, best + jnp.log2(norm_M), other_best + jnp.log2(other_norm_M), score)


def _sums(logits, others, limit, first, top_ref, norm_ref, mean_ref, other_top_ref, other_norm_ref,
          gap_ref=None, *, scale, kind):
  """Adds a part's logits to the running sums: of both distributions, of p log p, of the KL."""
  parts, other_parts = (head_tpu.in_bits(x, limit, scale) for x in (logits, others))
  norm, other_norm, mean = norm_ref[...], other_norm_ref[...], mean_ref[...]
  top, shrink, drop = head_tpu.raise_top(parts, top_ref)
  other_top, other_shrink, other_drop = head_tpu.raise_top(other_parts, other_top_ref)
  if kind == 'reverse_kl':
    gap = shrink * (gap_ref[...] + norm * (drop - other_drop))
  elif kind == 'forward_kl':
    gap = other_shrink * (gap_ref[...] + other_norm * (other_drop - drop))
  mean = shrink * (mean + norm * drop)
  norm, other_norm = shrink * norm, other_shrink * other_norm
  for bits, other in zip(parts, other_parts):
    below, other_below = bits - top, other - other_top
    p, q = jnp.exp2(below), jnp.exp2(other_below)
    norm, other_norm, mean = norm + p, other_norm + q, mean + p * below
    if kind == 'reverse_kl':
      gap += p * (below - other_below)
    elif kind == 'forward_kl':
      gap += q * (other_below - below)
  norm_ref[...], other_norm_ref[...], mean_ref[...] = norm, other_norm, mean
  if gap_ref is not None:
    gap_ref[...] = gap


def _compared(logits, others, limit, bits_ref, other_bits_ref, scale, compare):
  """Eight rows at a time: log2 p, term and score, what is masked with a probability of 0."""
  shape = SUBLANES, logits.shape[1]
  bits, other_bits = (jnp.broadcast_to(ref[...], shape) for ref in (bits_ref, other_bits_ref))
  for at in range(0, len(logits), SUBLANES):
    real = place(shape) < limit - at
    logp, logq = (jnp.where(real, x[at:at + SUBLANES] * scale - norm, head_tpu.NEVER)
                  for x, norm in ((logits, bits), (others, other_bits)))
    yield logp, *compare(logp / BITS, logq / BITS)


def _terms(logits, others, limit, first, bits_ref, other_bits_ref, value_ref, score_ref, *, scale,
           compare):
  """Adds a part's terms and scores to their sums."""
  value, score = value_ref[...], score_ref[...]
  for _, term, slope in _compared(logits, others, limit, bits_ref, other_bits_ref, scale, compare):
    value, score = value + term, score + slope
  value_ref[...], score_ref[...] = value, score


def gradient(sides, pair, weight_M, compare, limit=None, *, temperature=1.0, blocks=None,
             interpret=None):
  """Gradients (M, D) and (V, D), float32, of sum(weight * divergence) for the student.

  As `head_gradient.gradient`: one pass, which multiplies four times.
  """
  sizes = choose('pair_gradient', BLOCKS, sides, blocks)
  slope = functools.partial(_slope, scale=BITS / temperature, compare=compare)
  rows = [pair.bits, pair.other_bits, weight_M / temperature, pair.score]
  return head_gradient.sweep('pair_gradient', slope, sides, rows, limit, sizes, interpret)


def _slope(logits, others, limit, first, bits_ref, other_bits_ref, weight_ref, score_ref, *, scale,
           compare):
  """weight (score - p sum(score)), the gradient by a part's logits."""
  weight, total = weight_ref[...], score_ref[...]
  return jnp.concatenate([
    weight * (score - jnp.exp2(logp) * total) for logp, _, score in
    _compared(logits, others, limit, bits_ref, other_bits_ref, scale, compare)])


def choose(kernel, default, sides, given):
  """Block sizes at the shapes of the student and the width of the teacher."""
  other = sides[1][0].shape[1]
  return head_tpu.choose(kernel, default, *sides[0], given, other=other)
