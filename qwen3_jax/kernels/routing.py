"""A mixture's router on TPU: chosen experts, their gates and the balance statistics in one pass.

Meaning: `reference.route`. Logits lie with experts first. A block of 1,024 tokens is one vector
register for each expert, so that nothing crosses lanes: a network of maxima and minima finds the
best 8 logits, a second pass asks whose they are. Only a block in which equal logits leave that open
inserts each expert into a sorted list instead, which keeps ties in the order of ids. The gradient
is a few elementwise operations on (M, E) that XLA fuses. Where the rows of the chosen experts go:
`dispatch.py`.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import target

LANES, SUBLANES = 128, 8
TOKENS = LANES * SUBLANES  # of one block
LOWEST = float(jnp.finfo(jnp.float32).min)  # stands for -inf and NaN: every expert has a place
UNROLL = 32  # experts in one turn of a loop: a turn begins and ends with some 40 idle cycles


class Routing(NamedTuple):
  """What a router decided. The sums are over real tokens; float32 but for the ids."""
  chosen_MX: jax.Array  # int32
  gate_MX: jax.Array
  count_E: jax.Array  # assignments; no gradient
  probability_E: jax.Array  # softmax over all experts
  z: jax.Array  # logsumexp(logits)^2


def fits(experts, chosen):
  """Whether the kernel takes this mixture."""
  return experts % SUBLANES == 0 and chosen <= min(SUBLANES, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def route(logits_ME, real_M, chosen, renormalise, interpret=None):
  """The `chosen` largest logits (the lower id of equal ones first), gates and sums: `Routing`.

  Logits, not rounded probabilities, are compared; -0 and 0 are equal.

  `real_M` (0 or 1) says which tokens the sums count; every token is routed. Raises ValueError where
  the kernel does not fit.
  """
  return _forward(logits_ME, real_M, chosen, renormalise, interpret)


def _forward(logits_ME, real_M, chosen, renormalise, interpret):
  M, E = logits_ME.shape
  check(E, chosen)
  if interpret is None:
    interpret = target.platform() != 'tpu'
  blocks = pl.cdiv(M, TOKENS)
  cores = math.gcd(blocks, target.cores())  # each has sums of its own
  pad = blocks * TOKENS - M
  logits_EM = jnp.pad(logits_ME.astype(jnp.float32).T, ((0, 0), (0, pad)))
  real = jnp.pad(real_M.astype(jnp.float32), (0, pad)).reshape(-1, LANES)
  turns = blocks // cores

  def block(core, turn):
    return core * turns + turn
  strided, flat = (pltpu.VMEM((SUBLANES * n, LANES), jnp.float32) for n in (stride(E), E))
  of_core = pl.BlockSpec((1, E, LANES), lambda c, i: (c, 0, 0))
  of_tokens = pl.BlockSpec((chosen, SUBLANES, LANES), lambda c, i: (0, block(c, i), 0))
  narrow = (chosen, blocks * SUBLANES, LANES)
  ids, gate, count, probability, z = pl.pallas_call(
      functools.partial(_body, renormalise=renormalise,
                        unroll=1 if interpret else math.gcd(UNROLL, E)),
      name='router', grid=(cores, turns),
      in_specs=[pl.BlockSpec((E, TOKENS), lambda c, i: (0, block(c, i))),
                pl.BlockSpec((SUBLANES, LANES), lambda c, i: (block(c, i), 0))],
      out_specs=[of_tokens, of_tokens, of_core, of_core,
                 pl.BlockSpec((1, SUBLANES, LANES), lambda c, i: (c, 0, 0))],
      out_shape=[jax.ShapeDtypeStruct(narrow, jnp.int32), jax.ShapeDtypeStruct(narrow, jnp.float32),
                 *(jax.ShapeDtypeStruct((cores, n, LANES), jnp.float32) for n in (E, E, SUBLANES))],
      scratch_shapes=[strided, flat, flat, flat, flat],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret)(logits_EM, real)
  ids, gate = (x.reshape(chosen, -1)[:, :M].T for x in (ids, gate))
  return Routing(ids, gate, count.sum((0, 2)), probability.sum((0, 2)), z.sum())


def check(experts, chosen):
  """Raises ValueError, with the numbers, where the kernel does not fit."""
  if not fits(experts, chosen):
    raise ValueError(f'{chosen} of {experts} experts: want at most {SUBLANES} of a multiple of '
                     f'{SUBLANES}; elsewhere use the plain form (reference.route)')
  needs = 4 * LANES * SUBLANES * (stride(experts) + 7 * experts + 4 * chosen)
  if needs > target.vmem():
    raise ValueError(f'the router of {experts} experts needs {needs} bytes of VMEM for a block of '
                     f'{TOKENS} tokens, this core has {target.vmem()}')


def stride(experts):
  """Rows between two groups of 128 tokens: 8 times an odd number, so that no two meet in a bank."""
  return experts + SUBLANES if experts // SUBLANES % 2 == 0 else experts


def _body(logits_ref, real_ref, id_ref, gate_ref, count_ref, probability_ref, z_ref, strided_ref,
          flat_ref, exp_ref, counts_ref, probabilities_ref, *, renormalise, unroll):
  """One block: (E, 1024) logits, tokens as 8 groups of 128 lanes."""
  experts, chosen = logits_ref.shape[0], id_ref.shape[0]

  @pl.when(pl.program_id(1) == 0)
  def _():
    for ref in (counts_ref, probabilities_ref, z_ref):
      ref[...] = jnp.zeros_like(ref)
  _regroup(logits_ref, strided_ref)
  best = _best(strided_ref, flat_ref, exp_ref, unroll)[:chosen]
  total, undecided = _identify(flat_ref, exp_ref, id_ref, best, unroll)
  real = real_ref[...]
  exps = [jnp.exp(value - best[0]) for value in best]
  scale = 1 / (sum(exps) if renormalise else total)
  for k, e in enumerate(exps):
    gate_ref[k] = e * scale
  z_ref[0] += real * (best[0] + jnp.log(total)) ** 2

  @pl.when(jnp.any(undecided))
  def _():
    _insert(flat_ref, id_ref)
    _lower(flat_ref, best[-1], id_ref[chosen - 1])
  _add_sums(flat_ref, exp_ref, real, real / total, best[-1], counts_ref, probabilities_ref,
            unroll)

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _():
    for sums_ref, out_ref in ((counts_ref, count_ref), (probabilities_ref, probability_ref)):
      out_ref[0] = sum(sums_ref[pl.ds(n, experts, stride=SUBLANES), :] for n in range(SUBLANES))


def _regroup(logits_ref, strided_ref):
  """Lays the groups of 128 tokens so that a strided load brings one expert's 8 rows."""
  experts = logits_ref.shape[0]
  for group in range(SUBLANES):
    x = logits_ref[:, group * LANES:(group + 1) * LANES]
    strided_ref[pl.ds(group * stride(experts), experts), :] = jnp.where(x > LOWEST, x, LOWEST)


def _rows(expert):
  """One expert's value for 1,024 tokens, as one register."""
  return pl.ds(pl.multiple_of(expert * SUBLANES, SUBLANES), SUBLANES), slice(None)


SORT = (((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 2), (1, 3), (4, 6), (5, 7)), ((1, 2), (5, 6)),
        ((0, 4), (1, 5), (2, 6), (3, 7)), ((2, 4), (3, 5)), ((1, 2), (3, 4), (5, 6)))  # Batcher's
MERGE = (((0, 4), (1, 5), (2, 6), (3, 7)), ((0, 2), (1, 3), (4, 6), (5, 7)),
         ((0, 1), (2, 3), (4, 5), (6, 7)))  # of a list that rises, then falls


def _order(values, network):
  values = list(values)
  for a, b in (pair for layer in network for pair in layer):
    values[a], values[b] = (jnp.maximum(values[a], values[b]), jnp.minimum(values[a], values[b]))
  return values


def _best(strided_ref, flat_ref, sorted_ref, unroll):
  """The 8 largest logits of each token, largest first: eight by eight sorted, and merged.

  Copies the logits to `flat_ref`, 8 rows for each expert. Sorted lists go through memory: older
  compilers for CPU, where this is interpreted, fuse the networks and grow exponentially.
  """
  experts = flat_ref.shape[0] // SUBLANES

  def merge(piece, best):
    new = []
    for expert in (piece * 8 + n for n in range(8)):
      new.append(strided_ref[pl.ds(expert, SUBLANES, stride=stride(experts)), :])
      flat_ref[_rows(expert)] = new[-1]
    for n, value in enumerate(_order(new, SORT)):
      sorted_ref[_rows(n)] = value
    new = [sorted_ref[_rows(n)] for n in range(8)]
    return tuple(_order(map(jnp.maximum, best, new[::-1]), MERGE))
  lowest = (jnp.full((SUBLANES, LANES), -jnp.inf, jnp.float32),) * 8
  return jax.lax.fori_loop(0, experts // 8, merge, lowest, unroll=unroll // 8 or 1)


def _identify(flat_ref, exp_ref, id_ref, best, unroll):
  """Writes whose the `best` logits are, and exp(logit - best) of all experts.

  Returns the sum of these, and whether equal logits leave a token's ids undecided.
  """
  chosen = len(best)

  def compare(n, carry):
    total, met, ids = carry
    x = flat_ref[_rows(n)]
    e = jnp.exp(x - best[0])
    exp_ref[_rows(n)] = e
    same = [x == value for value in best]
    ids = tuple(jnp.where(hit, n + 1, index) for hit, index in zip(same, ids))
    return total + e, met + jnp.where(same[-1], n + 1, 0), ids
  zero = jnp.zeros((SUBLANES, LANES), jnp.int32)
  total, met, ids = jax.lax.fori_loop(
      0, flat_ref.shape[0] // SUBLANES, compare,
      (zero.astype(jnp.float32), zero, (zero,) * chosen), unroll=unroll)
  undecided = met != ids[-1]
  for k in range(chosen):
    id_ref[k] = ids[k] - 1
    if k:
      undecided |= best[k - 1] == best[k]
  return total, undecided


def _insert(flat_ref, id_ref):
  """Writes the ids where logits are equal: each expert goes behind those that are as good."""
  chosen = id_ref.shape[0]

  def insert(expert, top):
    x = flat_ref[_rows(expert)]
    above = [x > value for value, _ in top]
    best = [(jnp.maximum(top[0][0], x), jnp.where(above[0], expert, top[0][1]))]
    for k in range(1, chosen):
      value, index = top[k]
      best.append((jnp.maximum(value, jnp.minimum(top[k - 1][0], x)), jnp.where(
          above[k - 1], top[k - 1][1], jnp.where(above[k], expert, index))))
    return tuple(best)
  empty = (jnp.full((SUBLANES, LANES), -jnp.inf, jnp.float32),
           jnp.zeros((SUBLANES, LANES), jnp.int32))
  top = jax.lax.fori_loop(0, flat_ref.shape[0] // SUBLANES, insert, (empty,) * chosen)
  for k in range(chosen):
    id_ref[k] = top[k][1]


def _lower(flat_ref, last, index):
  """Puts what equals the last chosen logit but has a higher id out of the way of `_add_sums`."""
  def lower(expert, carry):
    x = flat_ref[_rows(expert)]
    flat_ref[_rows(expert)] = jnp.where((x == last) & (expert > index), -jnp.inf, x)
    return carry
  jax.lax.fori_loop(0, flat_ref.shape[0] // SUBLANES, lower, 0)


def _add_sums(flat_ref, exp_ref, real, scale, last, counts_ref, probabilities_ref, unroll):
  """Adds each expert's real assignments and probabilities, token by token of the block."""
  def add(expert, carry):
    rows = _rows(expert)
    counts_ref[rows] += jnp.where(flat_ref[rows] >= last, real, 0)
    probabilities_ref[rows] += exp_ref[rows] * scale
    return carry
  jax.lax.fori_loop(0, flat_ref.shape[0] // SUBLANES, add, 0, unroll=unroll)


def _route_forward(logits_ME, real_M, chosen, renormalise, interpret):
  out = _forward(logits_ME, real_M, chosen, renormalise, interpret)
  return out, (logits_ME, real_M, out.chosen_MX, out.gate_MX)


def _route_backward(chosen, renormalise, interpret, saved, d):
  """softmax's gradient of the sums, and of the gates: among the chosen alone if renormalised."""
  logits_ME, real_M, chosen_MX, gate_MX = saved
  x_ME, real_M1 = logits_ME.astype(jnp.float32), real_M.astype(jnp.float32)[:, None]
  norm_M1 = jax.nn.logsumexp(x_ME, -1, keepdims=True)
  p_ME = jnp.exp(x_ME - norm_M1)
  d_gate = d.gate_MX.astype(jnp.float32)
  d_chosen = gate_MX * (d_gate - jnp.sum(gate_MX * d_gate, -1, keepdims=True))
  d_probability = real_M1 * d.probability_E
  d_norm = 2 * real_M1 * norm_M1 * d.z
  if not renormalise:
    d_chosen = gate_MX * d_gate
    d_norm -= d_chosen.sum(-1, keepdims=True)
  inner = jnp.sum(p_ME * d_probability, -1, keepdims=True)
  d_logits = p_ME * (d_probability - inner + d_norm)
  expert_E = jnp.arange(x_ME.shape[-1])
  for k in range(chosen):
    d_logits += jnp.where(chosen_MX[:, k:k + 1] == expert_E, d_chosen[:, k:k + 1], 0)
  return d_logits.astype(logits_ME.dtype), None


route.defvjp(_route_forward, _route_backward)
