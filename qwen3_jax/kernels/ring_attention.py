"""Causal attention of rows whose tokens are split over a mesh axis; to be called in `shard_map`.

Of n devices, device r holds the r-th part of each row: in natural order the last one has 2n - 1
times the first one's work. Cut into 2n stretches, stretches h and 2n - 1 - h make equal work, with
every other such pair too ("zigzag"). So devices r and n - 1 - r first exchange their second halves,
half of what a full re-ordering moves. Then either the keys go round a ring while the queries work
on what is here (Liu et al. 2023, 2310.01889), partial results merged by their log-sum-exp, or all
keys are gathered (Dubey et al. 2024, 2407.21783, section 3.3.2): one kernel call and no merging.
"""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import flash_attention, flash_backward

GATHERED = 256 << 20  # bytes of gathered keys and values; more go round the ring
STRETCH = 128  # an exchanged stretch is a multiple of this long, so that blocks need no padding


def uses_ring(k_BTKH, axis):
  """Whether these keys, one device's, go round the ring."""
  return 2 * k_BTKH.nbytes * jax.lax.axis_size(axis) > GATHERED and is_balanced(k_BTKH)


def is_balanced(k_BTKH):
  """Whether the rows' parts are exchanged, so that all devices have equal work."""
  return k_BTKH.shape[1] % (2 * STRETCH) == 0


def forward(q_BTNH, k_BTKH, v_BTKH, segment_BT, axis, *, ring, bound=None):
  """o (B, T, N, H) of this device's tokens, and what `backward` wants of it.

  Causal within segments over the whole row, whose r-th part the r-th device along the mesh axis
  `axis` has. `ring`: keys go round, else are gathered.
  """
  q_start_X, swap, swap_back = _place(q_BTNH, axis)
  q, q_segment = swap(q_BTNH), swap(segment_BT)
  keys = k_BTKH, v_BTKH, segment_BT
  attend = functools.partial(flash_attention.forward, q, bound=bound)
  if ring:
    keys = tuple(swap(x) for x in keys)
    o, lse = _go_round(attend, q, keys, q_segment, q_start_X, axis)
  else:
    k, v, k_segment = (_gather(x, axis) for x in keys)
    o, lse = attend(k, v, q_segment, k_segment, q_start_X, jnp.zeros(1, jnp.int32))
  return swap_back(o), (q, *keys[:2], q_segment, keys[2], o, lse)


def _go_round(attend, q, keys, q_segment, q_start_X, axis):
  """All keys seen by `q` in n turns; the next keys travel while a turn's are worked on."""
  n, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

  def turn(carry, number):
    o, lse_BNT, keys = carry
    following = _pass_on(keys, axis)
    k, v, k_segment = keys
    k_start_Y = _starts((here - number) % n, n, k.shape[1])
    new, new_lse_BNT = attend(k, v, q_segment, k_segment, q_start_X, k_start_Y)
    o, lse_BNT = merge(o, lse_BNT, new, new_lse_BNT)
    return (o, lse_BNT, following), None

  B, T, N, _ = q.shape
  nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((B, N, T), flash_attention.MASKED)
  (o, lse, _), _ = jax.lax.scan(turn, (*nothing, keys), jnp.arange(n))
  return o.astype(q.dtype), lse


def merge(o_BTNH, lse_BNT, other_BTNH, other_lse_BNT):
  """Attention over two sets of keys from that over each: float32 o, and its log-sum-exp."""
  both_BNT = jnp.logaddexp(lse_BNT, other_lse_BNT)
  def share(x_BTNH, lse_BNT):
    return x_BTNH * jnp.exp(lse_BNT - both_BNT).swapaxes(1, 2)[..., None]
  return share(o_BTNH, lse_BNT) + share(other_BTNH, other_lse_BNT), both_BNT


def backward(saved, do_BTNH, axis, *, ring):
  """Gradients of `forward`'s q, k, v; each sum over turns or devices is in float32."""
  q, k, v, q_segment, k_segment, o, lse = saved
  q_start_X, swap, swap_back = _place(q, axis)
  do = swap(do_BTNH)

  def differentiate(k, v, k_segment, k_start_Y):
    return flash_backward.backward(q, k, v, q_segment, k_segment, q_start_X, k_start_Y, o, lse, do,
                                   dtype=jnp.float32)
  if ring:
    dq, dk, dv = _send_round(differentiate, q, (k, v, k_segment), axis)
    dk, dv = swap_back(dk.astype(k.dtype)), swap_back(dv.astype(v.dtype))
  else:
    keys = (_gather(x, axis) for x in (k, v, k_segment))
    dq, dk, dv = differentiate(*keys, jnp.zeros(1, jnp.int32))
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, scatter_dimension=1,
                                tiled=True)
    dk, dv = scatter(dk).astype(k.dtype), scatter(dv).astype(v.dtype)
  return swap_back(dq.astype(q.dtype)), dk, dv


def _send_round(differentiate, q, keys, axis):
  """dq here; dk and dv travel behind their keys, a turn late, and so behind the work too."""
  n, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

  def turn(carry, number):
    dq, dkv, keys = carry
    dkv, following = _pass_on(dkv, axis), _pass_on(keys, axis)
    new_dq, *new = differentiate(*keys, _starts((here - number) % n, n, keys[0].shape[1]))
    return (dq + new_dq, jax.tree.map(jnp.add, dkv, tuple(new)), following), None

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, *keys[:2])]
  carry = zeros[0], tuple(zeros[1:]), keys
  (dq, dkv, _), _ = jax.lax.scan(turn, carry, jnp.arange(n))
  return dq, *_pass_on(dkv, axis)


def _place(x_BT, axis):
  """Slots of this device's two stretches, the earlier first; the exchange, and the way back."""
  n, here, T = jax.lax.axis_size(axis), jax.lax.axis_index(axis), x_BT.shape[1]
  if not is_balanced(x_BT):
    return here[None] * T, lambda x_BT: x_BT, lambda x_BT: x_BT
  keeps_earlier = 2 * here < n

  def join(a_BT, b_BT):
    joined = (jnp.concatenate(pair, axis=1) for pair in ((a_BT, b_BT), (b_BT, a_BT)))
    return jnp.where(keeps_earlier, *joined)

  def send(x_BT):
    return jax.lax.ppermute(x_BT, axis, [(r, n - 1 - r) for r in range(n)])

  def swap(x_BT):
    kept, sent = jnp.split(x_BT, 2, axis=1)
    return join(kept, send(sent))

  def swap_back(x_BT):
    kept, sent = jnp.split(join(*jnp.split(x_BT, 2, axis=1)), 2, axis=1)
    return jnp.concatenate([kept, send(sent)], axis=1)
  return _starts(here, n, T), swap, swap_back


def _starts(device, n, T):
  """Slots at which the two stretches of T exchanged tokens on `device` begin, in order."""
  return jnp.sort(jnp.stack([2 * device, 2 * (n - 1 - device) + 1])) * (T // 2)


def _pass_on(tree, axis):
  n = jax.lax.axis_size(axis)
  return jax.lax.ppermute(tree, axis, [(r, (r + 1) % n) for r in range(n)])


def _gather(x_BT, axis):
  return jax.lax.all_gather(x_BT, axis, axis=1, tiled=True)
