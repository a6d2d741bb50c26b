"""Rows of a token array held in VMEM, fetched and summed one at a time: no permuted copy in HBM.

A held row is `sublanes` whole sublanes of 128 words of 32 bits, so that one load or store moves up
to 1,024 words of it, and the next row begins `step` sublanes on. In bfloat16 word c holds columns c
(low half) and c + D/2 (high half) of the row.
A tile of fetched rows is staged column block by column block, `pitch` sublanes apart; in bfloat16
the even rows come before the odd ones: a register of 16-bit numbers holds rows in pairs.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
PIECE = 256  # rows of one copy between HBM and the held form
HIGH = -65536  # the upper 16 bits of a word


def sublanes(width, dtype):
  """Sublanes that a held row of `width` columns takes."""
  return width * jnp.dtype(dtype).itemsize // (4 * LANES)


def step(sublanes):
  """From one held row to the next.

  VMEM has 32 banks: eight sublanes at a distance that is a multiple of 8 take 2 to 8 accesses.
  """
  return sublanes + 1


def pitch(rows):
  """From one column block of staged rows to the next."""
  return rows + 1


def word(dtype):
  return jnp.int32 if jnp.dtype(dtype).itemsize == 2 else dtype


def lower(a, b):
  """The low halves of a and b, a's below."""
  return (a & 0xffff) | (b << 16)


def upper(a, b):
  """The high halves of a and b, a's below."""
  return jax.lax.shift_right_logical(a, 16) | (b & HIGH)


def hold(x_hbm, held, buffer, semaphore):
  """Copies x (M, D), M a multiple of PIECE, into `held` by way of `buffer` (2, PIECE, D)."""
  pieces = x_hbm.shape[0] // PIECE

  def copy(i):
    at = pl.ds(pl.multiple_of(i * PIECE, PIECE), PIECE)
    return pltpu.make_async_copy(x_hbm.at[at], buffer.at[i & 1], semaphore.at[i & 1])
  copy(0).start()

  def turn(i, _):
    @pl.when(i + 1 < pieces)
    def _():
      copy(i + 1).start()
    copy(i).wait()
    _hold_piece(buffer.at[i & 1], held, i * PIECE)
    return 0
  jax.lax.fori_loop(0, pieces, turn, 0)


def _hold_piece(piece, held, first):
  D, dtype = piece.shape[1], piece.dtype
  n = sublanes(D, dtype)
  start = pl.multiple_of(first * step(n), PIECE)
  for b in range(n):
    block = pl.ds(b * LANES, LANES)
    if dtype == jnp.float32:
      held[pl.ds(start + b, PIECE, stride=step(n))] = piece[:, block]
    else:
      low = pltpu.bitcast(piece[:, block], jnp.int32)
      high = pltpu.bitcast(piece[:, pl.ds(D // 2 + b * LANES, LANES)], jnp.int32)
      held[pl.ds(start + b, PIECE // 2, stride=2 * step(n))] = lower(low, high)
      held[pl.ds(start + step(n) + b, PIECE // 2, stride=2 * step(n))] = upper(low, high)


def fetch(held, staged, place, first, rows, width, dtype, span=None):
  """Stages the held rows that begin at sublanes place[first], ..., place[first + rows - 1].

  With a static `span`, only these of the tile's rows.
  """
  n = sublanes(width, dtype)
  halves = 2 if jnp.dtype(dtype).itemsize == 2 else 1
  stride = pitch(rows // halves)
  for r in range(*span or (0, rows)):
    to = r // halves + r % halves * n * stride
    staged[pl.ds(to, n, stride=stride)] = held[pl.ds(place[first + r], n)]


def unstage(staged, tile, height):
  """Writes the first `height` staged rows to `tile` (rows, D) as a matrix."""
  rows, D = tile.shape
  n = sublanes(D, tile.dtype)
  for b in range(n):
    if tile.dtype == jnp.float32:
      tile[:height, pl.ds(b * LANES, LANES)] = staged[pl.ds(b * pitch(rows), height)]
    else:
      even = staged[pl.ds(b * pitch(rows // 2), height // 2)]
      odd = staged[pl.ds((n + b) * pitch(rows // 2), height // 2)]
      tile[:height, pl.ds(b * LANES, LANES)] = pltpu.bitcast(lower(even, odd), tile.dtype)
      tile[:height, pl.ds(D // 2 + b * LANES, LANES)] = pltpu.bitcast(upper(even, odd), tile.dtype)


def add(total, staged, rows, place, first, span):
  """Adds rows `span` (static) of `rows` that are staged in float32 to those of `total`.

  Row r goes to the sublanes from place[first + r]; those of eight rows in turn must differ, unless
  nobody reads what is there.
  """
  n = staged.shape[0] // pitch(rows)
  for group in range(*span, 8):
    sums = []
    for r in range(group, group + 8):
      at = pl.ds(place[first + r], n)
      sums.append((at, total[at] + staged[pl.ds(r, n, stride=pitch(rows))]))
    for at, value in sums:
      total[at] = value


def clear(ref):
  """Zeros whole pieces of an array; nobody reads what is left over."""
  def turn(i, _):
    ref[pl.ds(pl.multiple_of(i * PIECE, PIECE), PIECE)] = jnp.zeros(
        (PIECE, LANES), ref.dtype)
    return 0
  jax.lax.fori_loop(0, ref.shape[0] // PIECE, turn, 0)


def release(total, out_hbm, columns, buffer, semaphore):
  """Writes a held float32 array (M + 1 rows) to out_hbm[:, columns], in its dtype, as a matrix."""
  M = out_hbm.shape[0]
  n = buffer.shape[2] // LANES

  def copy(i):
    at = pl.ds(pl.multiple_of(i * PIECE, PIECE), PIECE)
    return pltpu.make_async_copy(buffer.at[i & 1], out_hbm.at[at, columns], semaphore.at[i & 1])

  def turn(i, _):
    @pl.when(i >= 2)
    def _():
      copy(i - 2).wait()
    for b in range(n):
      start = pl.multiple_of(i * PIECE * step(n), PIECE)
      block = total[pl.ds(start + b, PIECE, stride=step(n))]
      buffer[i & 1, :, pl.ds(b * LANES, LANES)] = block.astype(buffer.dtype)
    copy(i).start()
    return 0
  jax.lax.fori_loop(0, M // PIECE, turn, 0)
  for i in range(max(M // PIECE - 2, 0), M // PIECE):
    copy(i).wait()
