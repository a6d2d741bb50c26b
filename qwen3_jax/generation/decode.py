"""What of generation is compiled: prefill of many texts at once, and a loop of decoding steps.

Both take the pool of pages, rows as the host wrote them down, and give the pool back. Nothing else
stays on the device between two calls, so rows may come and go between them.
"""
import functools

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.generation import thinking
from qwen3_jax.generation.sampling import Settings, logp_of, sample
from qwen3_jax.mesh import constrain, is_alone
from qwen3_jax.model import rope
from qwen3_jax.model.cache import Cache, Paged, Pool
from qwen3_jax.model.transformer import Qwen3


@struct.dataclass
class Decoder:
  """A model ready to decode: its own arrays; or on CPU a copy with layers unstacked and fused, and
  the head turned for one-token products."""
  model: Qwen3
  head_DV: jax.Array | None = None

  def logits(self, hidden_BD):
    """float32 (B, V)."""
    if self.head_DV is None:
      return self.model.logits(hidden_BD[:, None])[:, 0]
    return jnp.dot(hidden_BD, self.head_DV, preferred_element_type=jnp.float32)


@struct.dataclass
class Rows:
  """Where each row is, and what it was asked to do."""
  token_B: jax.Array  # the last of its text, not in the cache yet
  length_B: jax.Array  # tokens in the cache, which is the position of that token
  count_B: jax.Array  # tokens after the prompt
  limit_B: jax.Array  # how many there may be
  alive_B: jax.Array  # draws tokens
  closing_B: jax.Array  # stopped, its last token still to be run
  stop_BJ: jax.Array  # stop ids, -1 where there are fewer
  settings: Settings
  seen_BV: jax.Array | None  # ids generated, where a presence penalty asks
  budget: thinking.Budget | None
  progress: thinking.Progress | None


def prepare(model, rows=1):
  """Decoder of `model`, best for batches of `rows`.

  On one CPU it holds a copy of the weights (ValueError for a model with LoRA adapters): drop the
  model where memory is short. On several, or an accelerator, it holds the model's own arrays.
  """
  return _fuse(model, rows) if is_alone() and jax.default_backend() == 'cpu' else Decoder(model)


@functools.partial(jax.jit, static_argnums=1)
def _fuse(model, rows):
  split = model.split(rows)
  if not model.spec.tied:
    del split.head_VD
  return Decoder(split, model.head().T)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_pool(spec, pages, size, dtype):
  return Pool.make(spec, pages, size, dtype)


@functools.partial(jax.jit, static_argnums=1)
def grow(pool, pages):
  return pool.grow(pages)


@functools.partial(jax.jit, static_argnums=7, donate_argnums=1)
def prefill(decoder, pool, tokens_BT, length_B, count_B, table_BC, page_BW, with_routes):
  """(pool, routes): `count_B` tokens of each row run, and written after the `length_B` held.

  Tokens start at column 0; `page_BW` are the row's pages from that of position `length_B` on.
  Routes (B, T, MoE layers, X) where asked for.
  """
  T = tokens_BT.shape[1]
  cache = pool.read(table_BC, length_B, T)
  segment_BT = (jnp.arange(T) < count_B[:, None]).astype(jnp.int32)
  position_BT = jnp.where(segment_BT > 0, length_B[:, None] + jnp.arange(T), 0)
  out = decoder.model(constrain(tokens_BT, 'BT'), constrain(segment_BT, 'BT'), position_BT, cache)
  pool = pool.write(out.cache.replace(length=cache.length), length_B, page_BW)
  routes = small(out.routes.transpose(1, 2, 0, 3), decoder) if with_routes else None
  return pool, copied(routes)


@functools.partial(jax.jit, static_argnums=(7, 8), donate_argnums=1)
def decode(decoder, pool, rows, table_BC, page_BW, steps, least, chunk, with_routes):
  """Draws up to min(`steps`, `chunk`) tokens a row, until fewer than `least` rows are at work.

  Attends to the pages where they lie. Returns (pool, columns, steps, thinking.Progress): columns
  are arrays (chunk, B, ...), of which the first `steps` are written: token, real (it was drawn),
  ran (a token was run), forced, logp, logp_untempered and, where asked for, routes: those of the
  token that was run, the one before.
  """
  end, *drawn = _draw(decoder, pool.attached(table_BC, rows.length_B, page_BW), rows,
                      table_BC.shape[1] * pool.size + chunk, steps, least, chunk, with_routes)
  return end.detached(), *drawn


@functools.partial(jax.jit, static_argnums=(6, 7))
def decode_copied(decoder, pool, rows, table_BC, steps, least, chunk, with_routes):
  """`decode` on a copy of the rows' pages, which it returns in place of the pool: see `write`."""
  cache = pool.read(table_BC, rows.length_B, chunk)
  end, *drawn = _draw(decoder, cache, rows, cache.length + chunk, steps, least, chunk, with_routes)
  return end.replace(length=cache.length), *drawn


@functools.partial(jax.jit, donate_argnums=0)
def write(pool, cache, length_B, page_BW):
  """The pool with what `decode_copied` drew after the rows' first `length_B` tokens."""
  return pool.write(cache, length_B, page_BW)


def _draw(decoder, cache, rows, slots, steps, least, chunk, with_routes):
  """The loop of `decode`, positions being less than `slots`: (cache, columns, steps, progress)."""
  rotation = rope.rotation(jnp.arange(slots)[None], *rope.spec_frequencies(decoder.model.spec))
  advance = functools.partial(_step, decoder, with_routes, [turn[0] for turn in rotation])
  _, _, shapes = jax.eval_shape(advance, cache, rows)
  columns = {name: jnp.zeros((chunk, *x.shape), x.dtype) for name, x in shapes.items()}
  steps = jnp.minimum(steps, chunk)

  def more(carry):
    i, _, rows, _ = carry
    return (i < steps) & ((rows.alive_B | rows.closing_B).sum() >= least)

  def step(carry):
    i, cache, rows, columns = carry
    cache, rows, column = advance(cache, rows)
    return i + 1, cache, rows, {name: columns[name].at[i].set(column[name]) for name in columns}

  start = cache.replace(length=jnp.asarray(cache.length, jnp.int32))
  i, end, rows, columns = jax.lax.while_loop(more, step, (jnp.int32(0), start, rows, columns))
  return end, *copied((columns, i, rows.progress))


def _step(decoder, with_routes, rotation, cache: Cache | Paged, rows):
  """Runs the last token of each row and draws the next: (cache, rows, what is kept of the step)."""
  at_work_B = rows.alive_B | rows.closing_B
  out = decoder.model(rows.token_B[:, None], at_work_B[:, None].astype(jnp.int32),
                      rows.length_B[:, None], cache,
                      rotation=[turn[rows.length_B][:, None] for turn in rotation])
  logits_BV = constrain(decoder.logits(out.hidden_BTD[:, 0]), 'BV')
  token_B, logp_B, plain_B = sample(logits_BV, rows.settings, rows.count_B, rows.seen_BV)
  alive_B, progress, forced_B = rows.alive_B, rows.progress, jnp.zeros_like(rows.alive_B)
  if progress is not None:
    progress, token_B, forced_B = thinking.steer(progress, rows.budget, token_B)
    progress = jax.tree.map(lambda new, old: jnp.where(alive_B, new, old), progress, rows.progress)
    logp_B = jnp.where(forced_B, 0.0, logp_B)
    plain_B = logp_of(logits_BV, token_B)
  seen_BV = rows.seen_BV
  if seen_BV is not None:
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  count_B = rows.count_B + alive_B
  ends_B = (token_B[:, None] == rows.stop_BJ).any(-1) & ~forced_B | (count_B >= rows.limit_B)
  column = dict(token=token_B, real=alive_B, ran=at_work_B, forced=forced_B, logp=logp_B,
                logp_untempered=plain_B)
  if with_routes:
    column['routes'] = small(out.routes[:, :, 0].swapaxes(0, 1), decoder)
  rows = rows.replace(
    token_B=jnp.where(alive_B, token_B, rows.token_B), length_B=rows.length_B + at_work_B,
    count_B=count_B, alive_B=alive_B & ~ends_B, seen_BV=seen_BV, progress=progress,
    closing_B=alive_B & ends_B & with_routes)
  return out.cache, rows, column


def small(routes, decoder):
  """Routes in the smallest type that holds every expert's number."""
  return routes.astype(jnp.uint8 if decoder.model.spec.experts <= 256 else jnp.int32)


def copied(tree):
  """Whole on every device, so that each process can read it."""
  return jax.tree.map(lambda x: constrain(x, '.' * x.ndim), tree)
