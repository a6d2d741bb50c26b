"""A mixture's experts on sorted tokens: dropless, no capacity. Meaning: `reference.experts`.

Rows are assignments (token, choice) sorted by expert. On TPU the kernels of `grouped_matmul` and
`grouped_gradient` run. On CPU each expert's rows are padded to whole blocks and a scan multiplies
block after block (XLA's `ragged_dot` there multiplies every row with every expert: measured 25 x
slower at 8,192 rows and 32 experts); elsewhere, and where the kernels cannot, `jax.lax.ragged_dot`.
"""
import functools

import jax
import jax.numpy as jnp

from qwen3_jax.kernels import dispatch, grouped_gradient, grouped_matmul, target

ROWS = 64  # rows of one CPU block in training; small batches use smaller ones
SLACK = 1.2  # a limit's rows by those of an even routing
UNROLL = 8  # blocks in one turn of the loop: what does not depend on each other runs at once


def experts(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, limit=None):
  """sum over the chosen experts of gate * SwiGLU expert(x); (M, D). No token is ever dropped.

  A token's chosen experts are different. With `limit`, ids that are no expert's (E, for example)
  cost nothing, and there are at most `limit` others, SLACK times as many as are expected.
  """
  args = x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD
  if target.platform() == 'tpu':
    try:
      parts = _parts(x_MD, gate_EDF)
    except ValueError as error:
      target.report('experts', 'ragged_dot', str(error))
      return _ragged(*args, limit)
    target.report('experts', 'grouped kernels')
    return _grouped(*args, limit) if parts == 1 else _in_parts(parts, *args)
  return jax.lax.platform_dependent(*args, cpu=functools.partial(_blocked, limit=limit),
                                    default=functools.partial(_ragged, limit=limit))


def fits(x_MD, gate_EDF):
  """Whether these tokens are one call of the kernels, or there are none for such weights."""
  if target.platform() != 'tpu':
    return True
  try:
    return _parts(x_MD, gate_EDF) == 1
  except ValueError:
    return True


def _parts(x_MD, gate_EDF):
  """The fewest equal parts of the tokens that the kernels have room for; ValueError if none."""
  (M, D), (E, _, F) = x_MD.shape, gate_EDF.shape
  parts = 1
  while True:
    try:
      grouped_matmul.choose(-(-M // parts), D, F, E, x_MD.dtype, save=True)
      return parts
    except ValueError:
      if M // parts <= 2048:
        raise
      parts *= 2


def _in_parts(parts, x_MD, chosen_MX, gate_MX, *weights):
  M = len(x_MD)
  step = -(-M // parts)
  return jnp.concatenate([
      _grouped(*(a[i:i + step] for a in (x_MD, chosen_MX, gate_MX)), *weights)
      for i in range(0, M, step)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _grouped(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, limit=None):
  """The kernels for TPU; elsewhere they are interpreted, for tests."""
  return _grouped_forward(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, limit, False)[0]


def _grouped_forward(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, limit, save=True):
  weights = gate_EDF, up_EDF, down_EFD
  slot_P, row_MX, count_E, _ = plan(chosen_MX, len(gate_EDF), grouped_matmul.ALIGN, limit)
  weight_P = jnp.take(gate_MX.reshape(-1), slot_P, mode='fill', fill_value=0)
  out = grouped_matmul.swiglu_down(x_MD, slot_P // chosen_MX.shape[1], weight_P, count_E, *weights,
                                   save=save, load=_expected(limit))
  y_MD, *saved = out if save else (out,)
  return y_MD, (x_MD, gate_MX, slot_P, row_MX, count_E, *weights, *saved)


def _grouped_backward(limit, saved, dy_MD):
  dx_MD, dgate_MX, *weights = grouped_gradient.backward(saved, dy_MD, load=_expected(limit))
  return dx_MD, None, dgate_MX, *weights


def _expected(limit):
  return None if limit is None else int(limit / SLACK)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _ragged(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, limit=None):
  slot_P, row_MX, count_E, _ = plan(chosen_MX, gate_EDF.shape[0], 1, limit)
  x_PD = _dispatch(x_MD, slot_P, row_MX)
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=count_E)
  h_PF = jax.nn.silu(dot(x_PD, gate_EDF)) * dot(x_PD, up_EDF)
  return _combine(dot(h_PF, down_EFD), gate_MX, slot_P, row_MX)


def _blocked(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD, limit=None):
  E = gate_EDF.shape[0]
  rows = ROWS
  while rows > 1 and rows * E > (limit or chosen_MX.size):
    rows //= 2
  slot_P, row_MX, _, expert_of_block = plan(chosen_MX, E, rows, limit)
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


def count_rows(assignments, experts, rows):
  """A plan's rows, whatever the routing."""
  return -(-assignments // rows) * rows + experts * (rows - 1) // rows * rows


def plan(chosen_MX, experts, rows, limit=None):
  """Where each assignment goes when experts' groups are padded to multiples of `rows`.

  Returns slot_P (the assignment m * X + x of each row; M * X where the row is padding), row_MX
  (the row of each assignment), count_E (assignments of each expert) and the expert of each block
  of rows. A token's chosen experts are different. With `limit`, ids that are no expert's get the
  last row, which is padding then, and there are at most `limit` others. On TPU `dispatch.plan`
  finds the same.
  """
  if limit is not None:
    here_MX = (chosen_MX >= 0) & (chosen_MX < experts)
    chosen_MX = jnp.where(here_MX, chosen_MX, dispatch.widen(experts))
  if target.platform() == 'tpu' and dispatch.fits(dispatch.widen(experts), chosen_MX.shape[1]):
    slot_P, row_MX, count_E, of_block = dispatch.plan(chosen_MX, dispatch.widen(experts), rows,
                                                      limit)
    return slot_P, row_MX, count_E[:experts], jnp.minimum(of_block, experts - 1)
  A = chosen_MX.size
  flat_A = chosen_MX.reshape(-1)
  order_A = jnp.argsort(flat_A, stable=True)
  count_E = jnp.bincount(flat_A, length=experts)
  padded_E = -(-count_E // rows) * rows
  end_E = jnp.cumsum(padded_E)
  sorted_A = flat_A[order_A]
  row_A = (end_E - padded_E - jnp.cumsum(count_E) + count_E)[sorted_A] + jnp.arange(A)
  total = count_rows(A, experts, rows)
  if limit is not None:
    total = count_rows(limit, experts, rows) + rows
    row_A = jnp.where(sorted_A < experts, row_A, total + jnp.arange(A))
  order_A, row_A = order_A.astype(jnp.int32), row_A.astype(jnp.int32)
  slot_P = jnp.full(total, A, jnp.int32).at[row_A].set(order_A, unique_indices=True, mode='drop')
  row_MX = jnp.zeros(A, jnp.int32).at[order_A].set(row_A, unique_indices=True)
  row_MX = jnp.minimum(row_MX, total - 1)
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
