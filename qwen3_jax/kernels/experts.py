"""A mixture's experts on sorted tokens: dropless, no capacity. Meaning: `reference.experts`.

Rows are assignments (token, choice) sorted by expert. On CPU each expert's rows are padded to whole
blocks and a scan multiplies block after block (XLA's `ragged_dot` there multiplies every row with
every expert: measured 25 x slower at 8,192 rows and 32 experts); elsewhere `jax.lax.ragged_dot`.
"""
import functools

import jax
import jax.numpy as jnp

ROWS = 64  # rows of one CPU block in training; small batches use smaller ones
UNROLL = 8  # blocks in one turn of the loop: what does not depend on each other runs at once


def experts(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD):
  """sum over the chosen experts of gate * SwiGLU expert(x); (M, D). No token is ever dropped."""
  return jax.lax.platform_dependent(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD,
                                    cpu=_blocked, default=_ragged)


def _ragged(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD):
  slot_P, row_MX, count_E, _ = plan(chosen_MX, gate_EDF.shape[0], 1)
  x_PD = _dispatch(x_MD, slot_P, row_MX)
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=count_E)
  h_PF = jax.nn.silu(dot(x_PD, gate_EDF)) * dot(x_PD, up_EDF)
  return _combine(dot(h_PF, down_EFD), gate_MX, slot_P, row_MX)


def _blocked(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD):
  E = gate_EDF.shape[0]
  rows = ROWS
  while rows > 1 and rows * E > chosen_MX.size:
    rows //= 2
  slot_P, row_MX, _, expert_of_block = plan(chosen_MX, E, rows)
  x_PD = _dispatch(x_MD, slot_P, row_MX)
  x_blocks = x_PD.reshape(-1, rows, x_PD.shape[-1])
  y_PD = _swiglu(x_blocks, gate_EDF, up_EDF, down_EFD, expert_of_block).reshape(x_PD.shape)
  return _combine(y_PD, gate_MX, slot_P, row_MX)


def every(x_MD, chosen_MX, gate_MX, gate_DEF, up_DEF, down_EFD):
  """What `experts` means, by running every expert on every token as three wide products.

  For CPU batches that hit most experts anyway and are so small that reading the weights takes the
  time (`few`): the products use all cores, blocks one after the other only one.
  """
  M, (_, E, F) = len(x_MD), gate_DEF.shape
  gate, up = (w.reshape(w.shape[0], -1) for w in (gate_DEF, up_DEF))
  hit_MXE = chosen_MX[..., None] == jnp.arange(E)
  weight_ME = jnp.where(hit_MXE, gate_MX[..., None], 0).sum(1)
  h_MEF = (jax.nn.silu(x_MD @ gate) * (x_MD @ up)).reshape(M, E, F) * weight_ME[..., None]
  return h_MEF.reshape(M, -1) @ down_EFD.reshape(E * F, -1)


def few(tokens, chosen, experts):
  """Whether `every` is the faster way to run `tokens` tokens."""
  return tokens <= 32 and tokens * chosen >= experts


def plan(chosen_MX, experts, rows):
  """Where each assignment goes when experts' groups are padded to multiples of `rows`.

  Returns slot_P (the assignment m * X + x of each row; M * X where the row is padding), row_MX
  (the row of each assignment), count_E (assignments of each expert) and the expert of each block
  of rows.
  """
  A = chosen_MX.size
  flat_A = chosen_MX.reshape(-1)
  order_A = jnp.argsort(flat_A, stable=True)
  count_E = jnp.bincount(flat_A, length=experts)
  padded_E = -(-count_E // rows) * rows
  end_E = jnp.cumsum(padded_E)
  sorted_A = flat_A[order_A]
  row_A = (end_E - padded_E - jnp.cumsum(count_E) + count_E)[sorted_A] + jnp.arange(A)
  total = -(-A // rows) * rows + experts * (rows - 1) // rows * rows
  order_A, row_A = order_A.astype(jnp.int32), row_A.astype(jnp.int32)
  slot_P = jnp.full(total, A, jnp.int32).at[row_A].set(order_A, unique_indices=True)
  row_MX = jnp.zeros(A, jnp.int32).at[order_A].set(row_A, unique_indices=True)
  starts = jnp.arange(total // rows) * rows
  of_block = jnp.minimum(jnp.searchsorted(end_E, starts, side='right'), experts - 1)
  return slot_P, row_MX.reshape(chosen_MX.shape), count_E.astype(jnp.int32), of_block


@jax.custom_vjp
def _dispatch(x_MD, slot_P, row_MX):
  """Copies tokens to their rows; the backward pass gathers too, instead of scattering."""
  return jnp.take(x_MD, slot_P // row_MX.shape[1], axis=0, mode='fill', fill_value=0)


def _dispatch_backward(row_MX, d_PD):
  return d_PD[row_MX].astype(jnp.float32).sum(1).astype(d_PD.dtype), None, None


_dispatch.defvjp(lambda x, slot, row: (_dispatch(x, slot, row), row), _dispatch_backward)


@jax.custom_vjp
def _combine(y_PD, gate_MX, slot_P, row_MX):
  """sum over choices of gate * the row's output, in float32."""
  weighted = gate_MX.astype(jnp.float32)[..., None] * y_PD[row_MX].astype(jnp.float32)
  return weighted.sum(1).astype(y_PD.dtype)


def _combine_backward(saved, d_MD):
  y_PD, gate_MX, slot_P, row_MX = saved
  d_MD = d_MD.astype(jnp.float32)
  d_gate = jnp.einsum('MXD,MD->MX', y_PD[row_MX].astype(jnp.float32), d_MD)
  gate_P = jnp.take(gate_MX.reshape(-1), slot_P, mode='fill', fill_value=0).astype(jnp.float32)
  d_PD = jnp.take(d_MD, slot_P // gate_MX.shape[1], axis=0, mode='fill', fill_value=0)
  return (gate_P[:, None] * d_PD).astype(y_PD.dtype), d_gate.astype(gate_MX.dtype), None, None


_combine.defvjp(lambda *args: (_combine(*args), args), _combine_backward)


@jax.custom_vjp
def _swiglu(x_blocks, gate_EDF, up_EDF, down_EFD, expert):
  """down(silu(gate x) * up x) of each block (blocks, rows, D) by its own expert."""
  def one(block):
    x, e = block
    return (jax.nn.silu(x @ gate_EDF[e]) * (x @ up_EDF[e])) @ down_EFD[e]
  return jax.lax.scan(lambda _, block: (None, one(block)), None, (x_blocks, expert),
                      unroll=min(UNROLL, len(expert)))[1]


def _swiglu_backward(saved, dy_blocks):
  x_blocks, gate_EDF, up_EDF, down_EFD, expert = saved

  def visit(sums, block):
    x, dy, e = block
    g, u = x @ gate_EDF[e], x @ up_EDF[e]
    s, pull = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)
    dg, du = pull(dy @ down_EFD[e].T)
    d_gate, d_up, d_down = sums
    sums = (d_gate.at[e].add(x.T @ dg), d_up.at[e].add(x.T @ du), d_down.at[e].add(s.T @ dy))
    return sums, dg @ gate_EDF[e].T + du @ up_EDF[e].T

  zero = tuple(jnp.zeros_like(w) for w in (gate_EDF, up_EDF, down_EFD))
  sums, dx_blocks = jax.lax.scan(visit, zero, (x_blocks, dy_blocks, expert),
                                 unroll=min(UNROLL, len(expert)))
  return dx_blocks, *sums, None


_swiglu.defvjp(lambda *args: (_swiglu(*args), args), _swiglu_backward)
