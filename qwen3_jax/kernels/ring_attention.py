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

GATHERED = 128 << 20  # bytes of gathered keys and values; more go round the ring
STRETCH = 128  # an exchanged stretch is a multiple of this long, so that blocks need no padding


def uses_ring(k_BTKH, axis):
  """Whether these keys, one device's, go round the ring, being too many to gather.

  An 8b layer over 4 v5p, scheduled, not run: at 32,768 tokens the forward pass waits 0.6 ms for
  gathered keys (96 MiB over two links) and the ring's merging takes 1.1 ms. Beyond, the kernel
  visits gathered keys in turns too, as VMEM holds no more, and they and their float32 gradients
  take 1.5 GiB at 131,072 tokens: the ring hides what it sends behind its turns and keeps one part.
  """
  return 2 * k_BTKH.nbytes * jax.lax.axis_size(axis) > GATHERED and is_balanced(k_BTKH)


def is_balanced(k_BTKH):
  """Whether the rows' parts are exchanged, so that all devices have equal work."""
  return k_BTKH.shape[1] % (2 * STRETCH) == 0


def forward(q_BTNH, k_BTKH, v_BTKH, segment_BT, axis, *, ring, bound=None):
  """o (B, T, N, H) of this device's tokens, and what `backward` wants of it.

  Causal within segments over the whole row, whose r-th part the r-th device along the mesh axis
  `axis` has. `ring`: keys go round, else are gathered.
  """
  H = q_BTNH.shape[-1]
  q_start_X, swap, swap_back = _place(q_BTNH, axis)
  q, q_segment = swap(_flat(q_BTNH)), swap(segment_BT)
  keys = _flat(k_BTKH), _flat(v_BTKH), segment_BT

  def attend(k, v, k_segment, k_start_Y):
    q_BTNH, k_BSKH, v_BSKH = (_heads(x, H) for x in (q, k, v))
    o, lse = flash_attention.forward(q_BTNH, k_BSKH, v_BSKH, q_segment, k_segment, q_start_X,
                                     k_start_Y, bound=bound)
    return _flat(o), lse
  if ring:
    keys = tuple(swap(x) for x in keys)
    o, lse = _go_round(attend, q, keys, axis, H)
  else:
    o, lse = attend(*(_gather(x, axis) for x in keys), jnp.zeros(1, jnp.int32))
  return _heads(swap_back(o), H), (q, *keys[:2], q_segment, keys[2], o, lse)


def _go_round(attend, q, keys, axis, H):
  """All keys seen by `q` in n turns; the next keys travel while a turn's are worked on."""
  n, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

  def turn(carry, number):
    o, lse_BNT, keys = carry
    following = _pass_on(keys, axis)
    new = attend(*keys, _starts((here - number) % n, n, keys[0].shape[1]))
    return (*merge(o, lse_BNT, *new), following), None

  B, T, width = q.shape
  nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((B, width // H, T), flash_attention.MASKED)
  (o, lse, _), _ = jax.lax.scan(turn, (*nothing, keys), jnp.arange(n))
  return o.astype(q.dtype), lse


def merge(o, lse_BNT, other, other_lse_BNT):
  """Attention over two sets of keys from that over each, (B, T, N * H): float32, and its lse.

  Each head's share is spread over its lanes by a product with ones, which XLA fuses with the sum; a
  broadcast over (B, T, N, H) would move the arrays to another layout and back.
  """
  both_BNT = jnp.logaddexp(lse_BNT, other_lse_BNT)
  N = lse_BNT.shape[1]
  ones = jnp.repeat(jnp.eye(N), o.shape[-1] // N, axis=1)
  share = jnp.einsum('BNT,NW->BTW', jnp.exp(other_lse_BNT - both_BNT), ones,
                     precision=jax.lax.Precision.HIGHEST)
  return o + (other - o) * share, both_BNT


def backward(saved, do_BTNH, axis, *, ring):
  """Gradients of `forward`'s q, k, v; each sum over turns or devices is in float32."""
  q, k, v, q_segment, k_segment, o, lse = saved
  H = do_BTNH.shape[-1]
  q_start_X, swap, swap_back = _place(q, axis)
  q_BTNH, o_BTNH, do_BTNH = (_heads(x, H) for x in (q, o, swap(_flat(do_BTNH))))

  def differentiate(k, v, k_segment, k_start_Y):
    return map(_flat, flash_backward.backward(
      q_BTNH, _heads(k, H), _heads(v, H), q_segment, k_segment, q_start_X, k_start_Y, o_BTNH, lse,
      do_BTNH, dtype=jnp.float32))
  if ring:
    dq, dk, dv = _send_round(differentiate, q, (k, v, k_segment), axis)
    dk, dv = swap_back(dk.astype(k.dtype)), swap_back(dv.astype(v.dtype))
  else:
    keys = (_gather(x, axis) for x in (k, v, k_segment))
    dq, dk, dv = differentiate(*keys, jnp.zeros(1, jnp.int32))
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, scatter_dimension=1,
                                tiled=True)
    dk, dv = scatter(dk).astype(k.dtype), scatter(dv).astype(v.dtype)
  return tuple(_heads(x, H) for x in (swap_back(dq.astype(q.dtype)), dk, dv))


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


def _flat(x_BTNH):
  """Heads side by side, as the kernels and the projections have them: (B, T, N * H)."""
  return x_BTNH.reshape(*x_BTNH.shape[:2], -1)


def _heads(x, H):
  return x.reshape(*x.shape[:2], -1, H)


def _place(x_BT, axis):
  """Slots of this device's two stretches, the earlier first; the exchange, and the way back."""
  n, here, T = jax.lax.axis_size(axis), jax.lax.axis_index(axis), x_BT.shape[1]
  if not is_balanced(x_BT):
    return here[None] * T, lambda x_BT: x_BT, lambda x_BT: x_BT
  half = T // 2
  kept_at = jnp.where(2 * here < n, 0, half)
  update, cut = jax.lax.dynamic_update_slice_in_dim, jax.lax.dynamic_slice_in_dim

  def send(x_BT):
    return jax.lax.ppermute(x_BT, axis, [(r, n - 1 - r) for r in range(n)])

  def swap(x_BT):
    twice_BT = update(x_BT, x_BT[:, :half], half, 1)  # half of it is right: nothing is selected
    return update(twice_BT, send(x_BT[:, half:]), half - kept_at, 1)

  def swap_back(x_BT):
    kept, sent = (cut(x_BT, at, half, 1) for at in (kept_at, half - kept_at))
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
