"""From logits to one token a row: penalty, temperature, filters, a draw with a key of its own."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

NEVER = -1e30  # finite, so that a difference of two masked logits is not NaN


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn, and when the text ends.

  In this order: `presence_penalty` is taken off the logits of tokens already generated, the rest is
  divided by `temperature` (0: the most likely token), the `top_k` likeliest are kept, of these the
  fewest whose probabilities reach `top_p`, of these those with at least `min_p` of the highest
  probability. None is off. `stop_ids` None: the tokenizer's. Raises ValueError on senseless values.
  """
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  presence_penalty: float | None = None
  max_tokens: int = 32_768
  stop_ids: tuple[int, ...] | None = None
  seed: int = 0

  def __post_init__(self):
    for name, good, wanted in (
        ('temperature', self.temperature >= 0, '0 (greedy) or more'),
        ('top_k', self.top_k is None or self.top_k >= 1, 'at least 1, or None'),
        ('top_p', self.top_p is None or 0 < self.top_p <= 1, 'above 0 and at most 1, or None'),
        ('min_p', self.min_p is None or 0 <= self.min_p <= 1, '0 to 1, or None'),
        ('max_tokens', self.max_tokens >= 1, 'at least 1')):
      if not good:
        raise ValueError(f'{name} is {getattr(self, name)}: want {wanted}')


GREEDY = Sampling(temperature=0.0)
THINKING = Sampling(0.6, top_k=20, top_p=0.95)  # Qwen3 Technical Report, section 4.7
NON_THINKING = Sampling(0.7, top_k=20, top_p=0.8, presence_penalty=1.5)


@struct.dataclass
class Settings:
  """`Sampling` of each row as arrays; the static fields say which work a batch needs at all."""
  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  presence_B: jax.Array
  seed_BJ: jax.Array  # two numbers of 32 bits: the sampling's seed, the row's
  size: int = struct.field(pytree_node=False)  # ids from here on are never drawn
  greedy: bool = struct.field(pytree_node=False)  # every row
  mixed: bool = struct.field(pytree_node=False)  # some rows are greedy, some not
  tempered: bool = struct.field(pytree_node=False)  # a temperature is neither 0 nor 1
  floored: bool = struct.field(pytree_node=False)  # a min_p is set
  width: int | None = struct.field(pytree_node=False)  # candidates that are sorted; None: no sort
  penalised: bool = struct.field(pytree_node=False)

  @classmethod
  def make(cls, rows, seeds, size):
    """Settings of `rows`, a `Sampling` each; row i draws with the key (rows[i].seed, seeds[i]).
    Arrays are numpy's.

    `size` is the number of ids that the tokenizer has; the embedding may have more rows.
    """
    def column(name, off, dtype=np.float32):
      values = [getattr(row, name) for row in rows]
      return np.array([off if v is None else v for v in values], dtype)
    drawn = [row for row in rows if row.temperature > 0]
    filters = any(row.top_k or row.top_p for row in drawn)
    width = max(min(row.top_k or size, size) for row in drawn) if filters else 0
    width = min(size, 1 << (width - 1).bit_length()) if width else None
    return cls(column('temperature', 0), column('top_k', size, np.int32), column('top_p', 1),
               column('min_p', 0), column('presence_penalty', 0),
               np.array([(row.seed, seed) for row, seed in zip(rows, seeds)], np.uint32),
               size, not drawn, 0 < len(drawn) < len(rows),
               any(row.temperature != 1 for row in drawn), any(row.min_p for row in drawn), width,
               any(row.presence_penalty for row in rows))


def sample(logits_BV, settings, count_B, seen_BV=None):
  """Draws one token a row: (token_B, logp_B, logp_untempered_B).

  `logits_BV` float32; `count_B` tokens were generated so far, and row b's draw depends on nothing
  but its logits, its key and this number. `seen_BV` marks generated tokens, wanted where a penalty
  is set. `logp_B` is under the distribution drawn from (0 where greedy), `logp_untempered_B` under
  the plain softmax of the model over all V, which is what a training loss sees.
  """
  drawable_BV = logits_BV
  if settings.size < logits_BV.shape[1]:
    drawable_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < settings.size, logits_BV, NEVER)
  if settings.penalised:
    drawable_BV = drawable_BV - settings.presence_B[:, None] * seen_BV
  if settings.greedy:
    token_B, logp_B = argmax(drawable_BV), jnp.zeros(len(logits_BV), jnp.float32)
  else:
    token_B, logp_B = _draw(drawable_BV, settings, count_B)
  if settings.mixed:
    hot_B = settings.temperature_B > 0
    token_B = jnp.where(hot_B, token_B, argmax(drawable_BV))
    logp_B = jnp.where(hot_B, logp_B, 0.0)
  return token_B, logp_B, logp_of(logits_BV, token_B)


def argmax(x_BV):
  """First index of the largest value, by two plain reductions (XLA's own is scalar on CPU)."""
  top_B1 = x_BV.max(-1, keepdims=True)
  index_V = jnp.arange(x_BV.shape[1], dtype=jnp.int32)
  return jnp.where(x_BV == top_B1, index_V, x_BV.shape[1] - 1).min(-1)


def logp_of(logits_BV, token_B):
  """log softmax(logits)[token]."""
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _draw(logits_BV, settings, count_B):
  """Gumbel-max over the kept candidates C; sorted by falling logit where a filter needs it."""
  logits_BC, id_BC = logits_BV, None
  if settings.tempered:
    logits_BC /= jnp.where(settings.temperature_B > 0, settings.temperature_B, 1)[:, None]
  if settings.width:
    logits_BC, id_BC = jax.lax.top_k(logits_BC, settings.width)
    kept_BC = jnp.arange(settings.width) < settings.top_k_B[:, None]
    p_BC = jax.nn.softmax(jnp.where(kept_BC, logits_BC, NEVER), axis=-1)
    before_BC = jnp.cumsum(p_BC, axis=-1) - p_BC
    kept_BC &= (before_BC < settings.top_p_B[:, None]) | (settings.top_p_B >= 1)[:, None]
    logits_BC = jnp.where(kept_BC, logits_BC, NEVER)
  if settings.floored:
    floor_B1 = logits_BC.max(-1, keepdims=True) + jnp.log(settings.min_p_B)[:, None]
    logits_BC = jnp.where(logits_BC >= floor_B1, logits_BC, NEVER)
  every_BC = jnp.arange(logits_BC.shape[1])[None] if id_BC is None else id_BC
  place_B = argmax(logits_BC + _gumbel(settings.seed_BJ, count_B, every_BC))  # NEVER: still never
  token_B = place_B if id_BC is None else jnp.take_along_axis(id_BC, place_B[:, None], 1)[:, 0]
  return token_B, logp_of(logits_BC, place_B)


def _gumbel(seed_BJ, count_B, id_BC):
  """Gumbel noise of each id: a hash of (seeds, count, id), the same whichever candidates are kept.

  From all 32 bits, finest where the noise is largest: a draw's tail is not cut off at 2^-23.
  """
  key = jnp.zeros(len(seed_BJ), jnp.uint32), seed_BJ[:, 0]
  for number_B in (seed_BJ[:, 1], count_B):
    key = threefry(*key, number_B)
  bits = threefry(*(half[:, None] for half in key), id_BC)
  u_BC = (bits[0] ^ bits[1]).astype(jnp.float32) * 2.0 ** -32 + 2.0 ** -33
  u_BC = jnp.minimum(u_BC, 1 - 2.0 ** -24)
  return -jnp.log(-jnp.log1p(-u_BC))


def threefry(a, b, number):
  """Threefry-2x32 (Salmon et al. 2011) of (0, number) under the key (a, b): `jax.random.fold_in`.

  Written out, XLA fuses it with what follows: jax's own is a loop of passes over memory on CPU.
  """
  keys = a, b, a ^ b ^ np.uint32(0x1BD11BDA)
  x, y = a, number.astype(jnp.uint32) + b
  for i in range(5):
    for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x = x + y
      y = (y << turn | y >> (32 - turn)) ^ x
    x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x, y
