"""One training step: gradients over micro-batches, one update, skipped whole when not finite."""
import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct

from qwen3_jax import mesh as alphabet
from qwen3_jax.training import losses


@struct.dataclass
class TrainState:
  """All that a run carries from step to step; the data's position is saved beside it."""
  step: jax.Array  # updates tried
  params: object
  opt: object
  skipped: jax.Array  # updates skipped because loss or gradient was not finite
  streak: jax.Array  # of those, how many in a row up to now


def initial_state(make_params, optimizer, mesh=None):
  """TrainState on `mesh`, made sharded; `make_params()` builds the model (only ever traced)."""
  def make():
    return state_of(make_params(), optimizer)
  out = mesh and alphabet.shardings(jax.eval_shape(make), mesh)
  return jax.jit(make, out_shardings=out)()


def state_from(params, optimizer, mesh=None):
  """TrainState around weights that exist (a checkpoint, a Hugging Face folder); takes them over."""
  make = functools.partial(state_of, optimizer=optimizer)
  out = mesh and alphabet.shardings(jax.eval_shape(make, params), mesh)
  return jax.jit(make, out_shardings=out, donate_argnums=0)(params)


def state_of(params, optimizer):
  """TrainState at step 0."""
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero, zero)


def make_step(loss, optimizer, lr, micro_batches=1, report=losses.report, micro_rows=None):
  """`step(state, batch, *frozen) -> (state, metrics)`, to be jitted with the state donated.

  `loss(params, batch, *frozen) -> (share, sums)`: see `losses.next_token`. `frozen` are weights
  that no gradient is taken of (LoRA's base). The global batch is cut into `micro_batches` along
  its rows, or into as many as give `micro_rows` rows each, and their gradients and sums added;
  `report(sums)` gives the values of the whole step, `loss` among them.
  """
  def step(state, batch, *frozen):
    parts = len(batch['tokens_BT']) // micro_rows if micro_rows else micro_batches
    totals = dict(total_weight=_targets(batch['weight_BT']).sum(),
                  total_tokens=(batch['segment_BT'] > 0).sum().astype(jnp.float32))
    if 'pair_BC' in batch:
      totals['total_pairs'] = batch['pair_BC'].sum()
    value, sums, grads = _accumulate(loss, state.params, batch, totals, parts, frozen)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt = optimizer.update(grads, state.opt, state.params)
    rate = lr(state.step)
    params = jax.tree.map(lambda w, u: w - (rate * u).astype(w.dtype), state.params, updates)
    params, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old),
                               (params, opt), (state.params, state.opt))
    skip = 1 - finite.astype(jnp.int32)
    state = TrainState(state.step + 1, params, opt, state.skipped + skip,
                       (state.streak + skip) * skip)
    return state, dict(**report(sums), grad_norm=norm, lr=rate,
                       tokens=totals['total_weight'], skipped=state.skipped, streak=state.streak,
                       **_expert_load(sums, totals['total_tokens']))
  return step


def _targets(weight_BT):
  return weight_BT.at[:, 0].set(0)


def _expert_load(sums, tokens):
  """Balance terms, and the busiest expert's load against the mean (1 is even), worst layer.

  `balance` is that of the whole step, whatever the number of micro-batches it was cut into.
  """
  if 'count_LE' not in sums:
    return {}
  count_LE = sums['count_LE']
  balance = losses.balance_loss(count_LE, sums['probability_LE'], tokens).mean()
  return dict(balance=balance, router_z=sums['router_z'], expert_load_LE=count_LE,
              expert_peak=jnp.max(count_LE.max(-1) / jnp.maximum(count_LE.mean(-1), 1e-9)))


def _accumulate(loss, params, batch, totals, micro_batches, frozen):
  """Loss, metric sums and gradients of the whole batch, summed over its micro-batches."""
  grad = jax.value_and_grad(loss, has_aux=True)
  spec = params.spec
  counts = jnp.zeros((sum(map(spec.sparse, range(spec.layers))), spec.experts))
  if micro_batches == 1:
    (value, sums), grads = grad(params, batch | totals | dict(count_LE=counts), *frozen)
    return value, sums, grads
  parts = {name: _rows_in_parts(x, micro_batches, name) for name, x in batch.items()}

  def visit(carry, part):
    part = part | totals | dict(count_LE=carry[1].get('count_LE', counts))
    (value, sums), grads = grad(params, part, *frozen)
    total, earlier, sum_grads = carry
    return (total + value, losses.merge(earlier, sums),
            jax.tree.map(jnp.add, sum_grads, grads)), None

  first = jax.tree.map(lambda x: x[0], parts) | totals | dict(count_LE=counts)
  (value, sums), grads = jax.eval_shape(grad, params, first, *frozen)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, sums, grads))
  return jax.lax.scan(visit, zero, parts)[0]


def _rows_in_parts(x, parts, name):
  """(B, ...) -> (parts, B / parts, ...): every part takes rows of every device."""
  B = x.shape[0]
  if B % parts:
    raise ValueError(f'{B} rows cannot be cut into {parts} micro-batches; '
                     'batch must be a multiple of micro_batches')
  x = x.reshape(B // parts, parts, *x.shape[1:]).swapaxes(0, 1)
  return jax.vmap(lambda x: alphabet.constrain(x, alphabet.letters(name)))(x)
