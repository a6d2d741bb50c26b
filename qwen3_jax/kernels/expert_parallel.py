"""A mixture's experts split over a mesh axis; to be called in `shard_map`.

A token is sent once to every device that has experts of its choice, runs through these, and comes
back once, as their weighted sum; its own device adds up what comes back. Tokens go block after
block, in turns: from one device to another a turn takes at most `Sizes.rows` of a block's tokens
with at most `Sizes.choices` choices, a fifth more than if all experts were chosen alike often.
What does not fit goes in further turns of the same block: no buffer grows with the routing, and no
token is lost. On TPU only rows with a token travel (`ragged_all_to_all`); elsewhere whole buffers.

The backward pass sends tokens again, and their gradients: nothing is kept but the inputs.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import experts as kernel
from qwen3_jax.kernels import target

ROWS = 8192  # most rows that a device receives in a turn


class Sizes(NamedTuple):
  """Tokens of a block; of one turn from one device to another: most tokens, most choices.

  `leaving`: rows that a device sends to others in a turn if all experts are chosen alike often.
  """
  block: int
  rows: int
  choices: int
  leaving: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def experts(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, axis):
  """`kernels.experts` of this device's tokens; it has the E experts from index * E on.

  `chosen_MX` counts the experts of all devices along the mesh axis `axis`.
  """
  return _forward(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, axis)[0]


def choose(M, X, ways, gate_EDF, dtype):
  """`Sizes` for M tokens of X choices on each of `ways` devices: as large as the kernels take."""
  E, D, _ = gate_EDF.shape
  block, reached = M, 1 - (1 - 1 / ways) ** X

  def room(count, most):
    return min(most, math.ceil(kernel.SLACK * count / 8) * 8)
  while True:
    rows = room(reached * block, block)
    choices = max(X, room(X / ways * block, rows * X))
    x = jax.ShapeDtypeStruct((ways * rows, D), dtype)
    if block == 1 or ways * rows <= ROWS and kernel.fits(x, gate_EDF):
      return Sizes(block, rows, choices, round((ways - 1) * reached * block))
    block = -(-block // 2)


def _forward(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, axis):
  weights = gate_EDF, up_EDF, down_EFD
  ways, experts = jax.lax.axis_size(axis), len(gate_EDF)
  sizes = choose(*chosen_MX.shape, ways, gate_EDF, x_MD.dtype)
  _report(sizes, ways, x_MD)

  def visit(_, part):
    x_LD, chosen_LX, gate_LX, turns = part

    def turn(_, carry):
      sent, y_LD = carry
      trip = _plan(chosen_LX, sent, experts, sizes, axis)
      chosen_RX, gate_RX = _send_choices(trip, chosen_LX, gate_LX, experts, axis)
      y_RD = kernel.experts(_send(trip, x_LD, axis), chosen_RX, gate_RX.astype(gate_LX.dtype),
                            *weights, limit=ways * sizes.choices)
      return trip.sent, y_LD + _collect(trip, _return(trip, y_RD, axis))
    start = _nothing_sent(ways), jnp.zeros(x_LD.shape, jnp.float32)
    return None, jax.lax.fori_loop(0, turns, turn, start)[1].astype(x_LD.dtype)
  turns = _count_turns(chosen_MX, experts, sizes, axis)
  parts = _in_blocks(sizes.block, ways * experts, x_MD, chosen_MX, gate_MX)
  _, y = jax.lax.scan(visit, None, (*parts, turns))
  return y.reshape(-1, x_MD.shape[1])[:len(x_MD)], (x_MD, chosen_MX, gate_MX, *weights)


def _backward(axis, saved, dy_MD):
  x_MD, chosen_MX, gate_MX, *weights = saved
  ways, experts = jax.lax.axis_size(axis), len(weights[0])
  sizes = choose(*chosen_MX.shape, ways, weights[0], x_MD.dtype)

  def visit(dweights, part):
    x_LD, dy_LD, chosen_LX, gate_LX, turns = part

    def turn(_, carry):
      sent, dx_LD, dgate_LX, dweights = carry
      trip = _plan(chosen_LX, sent, experts, sizes, axis)
      chosen_RX, gate_RX = _send_choices(trip, chosen_LX, gate_LX, experts, axis)

      def run(x_RD, gate_RX, *weights):
        return kernel.experts(x_RD, chosen_RX, gate_RX.astype(gate_LX.dtype), *weights,
                              limit=ways * sizes.choices)
      x_RD, dy_RD = (_send(trip, a, axis) for a in (x_LD, dy_LD))
      dx_RD, dgate_RX, *more = jax.vjp(run, x_RD, gate_RX, *weights)[1](dy_RD)
      dx_LD += _collect(trip, _return(trip, dx_RD, axis))
      dgate_LX += _collect(trip, _swap(dgate_RX, ways, axis))
      return trip.sent, dx_LD, dgate_LX, [a + b.astype(jnp.float32) for a, b in zip(dweights, more)]
    start = (_nothing_sent(ways), *(jnp.zeros(a.shape, jnp.float32) for a in (x_LD, gate_LX)),
             dweights)
    _, dx_LD, dgate_LX, dweights = jax.lax.fori_loop(0, turns, turn, start)
    return dweights, (dx_LD.astype(x_LD.dtype), dgate_LX.astype(gate_LX.dtype))
  turns = _count_turns(chosen_MX, experts, sizes, axis)
  zero = [jnp.zeros(w.shape, jnp.float32) for w in weights]
  x, chosen, gate, dy = _in_blocks(sizes.block, ways * experts, x_MD, chosen_MX, gate_MX, dy_MD)
  dweights, grads = jax.lax.scan(visit, zero, (x, dy, chosen, gate, turns))
  dx_MD, dgate_MX = (a.reshape(-1, a.shape[-1])[:len(x_MD)] for a in grads)
  return dx_MD, None, dgate_MX, *(d.astype(w.dtype) for d, w in zip(dweights, weights))


experts.defvjp(_forward, _backward)


def _report(sizes, ways, x_MD):
  size = ways * sizes.rows * x_MD.shape[1] * x_MD.dtype.itemsize / 2**20
  target.report('experts', f'split over {ways} devices; {sizes.block} of {len(x_MD)} tokens at a '
                f'time, at most {sizes.rows} with {sizes.choices} choices from one device to '
                f'another in a turn ({size:.1f} MiB received, {sizes.leaving} rows leave if all '
                'experts are chosen alike often)')


def _in_blocks(block, nobody, x_MD, chosen_MX, *more):
  """Arrays (M, ...) as (blocks, block, ...); the tokens that fill the last one choose `nobody`."""
  def cut(a, fill):
    a = jnp.pad(a, ((0, -len(a) % block), (0, 0)), constant_values=fill)
    return a.reshape(-1, block, a.shape[1])
  return cut(x_MD, 0), cut(chosen_MX, nobody), *(cut(a, 0) for a in more)


def _count_choices(chosen_LX, experts, ways):
  """Of each device and token, how many of its experts are there, (ways, ..., L)."""
  there_LX = chosen_LX // experts
  return jnp.stack([(there_LX == way).sum(-1, dtype=jnp.int32) for way in range(ways)])


def _count_turns(chosen_MX, experts, sizes, axis):
  """Turns that each block needs at most, the same on all devices of the mesh."""
  ways = jax.lax.axis_size(axis)
  _, chosen = _in_blocks(sizes.block, ways * experts, chosen_MX, chosen_MX)
  count = _count_choices(chosen, experts, ways)
  tokens, choices = (count > 0).sum(-1), count.sum(-1)
  # Every turn but the last is full of tokens, or has no room for all choices of the next token.
  most = 1 + tokens // sizes.rows + choices // (sizes.choices - chosen_MX.shape[1] + 1)
  turns = jnp.where((tokens <= sizes.rows) & (choices <= sizes.choices), 1, most).max(0)
  return jax.lax.pmax(turns, jax.sharding.get_abstract_mesh().axis_names)


def _nothing_sent(ways):
  return jnp.zeros(ways, jnp.int32), jnp.zeros(ways, jnp.int32)


class Trip(NamedTuple):
  """What one turn moves; W devices, C rows to each, L tokens of the block."""
  token_WC: jax.Array  # what is sent; L where nothing is
  place_LK: jax.Array  # where a token's rows lie, W * C where there is none
  send_W: jax.Array
  receive_W: jax.Array
  sent: tuple  # tokens and choices of the block that have been sent to each device, with these
  leaving: int


def _plan(chosen_LX, sent, experts, sizes, axis):
  """The `Trip` of the next tokens, in order, that this turn has room for."""
  ways, (L, X) = jax.lax.axis_size(axis), chosen_LX.shape
  count_WL = _count_choices(chosen_LX, experts, ways)
  rank_WL, total_WL = jnp.cumsum(count_WL > 0, 1), jnp.cumsum(count_WL, 1)
  rank_WL, total_WL = rank_WL - sent[0][:, None], total_WL - sent[1][:, None]
  now_WL = ((count_WL > 0) & (rank_WL > 0) & (rank_WL <= sizes.rows)
            & (total_WL <= sizes.choices))
  send_W = now_WL.sum(1, dtype=jnp.int32)
  token_WC = jnp.sort(jnp.where(now_WL, jnp.arange(L), L), axis=1)[:, :sizes.rows]
  none = ways * sizes.rows
  place_WL = jnp.where(now_WL, jnp.arange(ways)[:, None] * sizes.rows + rank_WL - 1, none)
  sent = sent[0] + send_W, sent[1] + jnp.where(now_WL, count_WL, 0).sum(1)
  place_LK = place_WL.T if ways <= X else _by_choice(place_WL.T, chosen_LX // experts, none)
  return Trip(token_WC, place_LK, send_W, jax.lax.all_to_all(send_W, axis, 0, 0, tiled=True), sent,
              sizes.leaving)


def _by_choice(place_LW, there_LX, none):
  """The place of each choice's row; `none` where an earlier choice of the token has the same."""
  X = there_LX.shape[1]
  at_LXW = there_LX[..., None] == jnp.arange(place_LW.shape[1])
  place_LX = jnp.where(at_LXW, place_LW[:, None], 0).sum(-1)
  same_LXX = there_LX[:, :, None] == there_LX[:, None]
  repeated_LX = (same_LXX & (jnp.arange(X)[:, None] > jnp.arange(X))).any(-1)
  return jnp.where(repeated_LX | ~at_LXW.any(-1), none, place_LX)


def _take(a, index, fill=0):
  return jnp.take(a, index, axis=0, mode='fill', fill_value=fill)


def _send_choices(trip, chosen_LX, gate_LX, experts, axis):
  """Of each row that this device receives: which of its E experts, E where none, and gates."""
  ways, X = len(trip.send_W), chosen_LX.shape[1]
  token_R = trip.token_WC.reshape(-1)
  chosen_RX = _take(chosen_LX, token_R, ways * experts)
  gate_RX = _take(gate_LX, token_R).astype(jnp.float32)
  both = jnp.concatenate([chosen_RX, jax.lax.bitcast_convert_type(gate_RX, jnp.int32)], -1)
  both = _swap(both, ways, axis)
  chosen_RX = both[:, :X] - jax.lax.axis_index(axis) * experts
  here_RX = (chosen_RX >= 0) & (chosen_RX < experts)
  return jnp.where(here_RX, chosen_RX, experts), jax.lax.bitcast_convert_type(both[:, X:],
                                                                              jnp.float32)


def _swap(few_RX, ways, axis):
  """Whole buffers of narrow rows to their devices; they travel with the rows as last axis."""
  few_WXC = few_RX.reshape(ways, -1, few_RX.shape[1]).swapaxes(1, 2)
  return jax.lax.all_to_all(few_WXC, axis, 0, 0).swapaxes(1, 2).reshape(few_RX.shape)


def _send(trip, x_LD, axis):
  """The rows that this device receives, C from each; 0 where there is none."""
  return _move(_take(x_LD, trip.token_WC.reshape(-1)), trip.send_W, trip.receive_W, trip.leaving,
               axis)


def _return(trip, y_RD, axis):
  """The rows that come back, in the places that the tokens were sent from."""
  return _move(y_RD, trip.receive_W, trip.send_W, trip.leaving, axis)


def _move(x_RD, send_W, receive_W, leaving, axis):
  ways, rows = len(send_W), len(x_RD) // len(send_W)
  if target.platform() != 'tpu':
    return jax.lax.all_to_all(x_RD, axis, 0, 0, tiled=True)
  first_W = jnp.arange(ways, dtype=jnp.int32) * rows
  to_W = jnp.full(ways, jax.lax.axis_index(axis) * rows, jnp.int32)
  with jax.named_scope(f'leaving_{leaving}'):  # for `scaling.traffic`: the buffer is larger
    return jax.lax.ragged_all_to_all(x_RD, jnp.zeros_like(x_RD), first_W, send_W, to_W, receive_W,
                                     axis_name=axis)


def _collect(trip, back_RD):
  """The sum of each token's rows, float32."""
  return sum(_take(back_RD, place_L).astype(jnp.float32) for place_L in trip.place_LK.T)
