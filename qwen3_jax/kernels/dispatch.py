"""Where each assignment's row goes on TPU, without a sort. Meaning: `experts.plan`.

An assignment's rank within its expert is the number of earlier tokens that chose the same expert: a
matrix of hits (E, tokens) times a triangle of ones. The inverse, which token has rank r of expert
e, is not scattered (a TPU scatters one element at a time) but found: the same hits are kept as bit
words with the number of hits before each word, and every row searches its word, then its bit.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.kernels import target

LANES, SUBLANES = 128, 8
TOKENS = LANES * SUBLANES  # of one block
WORD = 32  # tokens of a bit word
FIELD = 8  # tokens of a word of choices, 3 bits each: exact in float32
STRETCH = LANES * WORD  # tokens whose words fill one row of lanes
TURNS = STRETCH // TOKENS


def fits(experts, chosen):
  """Whether the kernels take this mixture."""
  return experts % (2 * SUBLANES) == 0 and experts <= LANES and chosen <= SUBLANES


def widen(experts):
  """The least number of experts from this on that the kernels take; the rest are empty."""
  return -(-experts // (2 * SUBLANES)) * 2 * SUBLANES


def plan(chosen_MX, experts, rows, limit=None, interpret=None):
  """`experts.plan` in two kernels: ranks and bit words of tokens, then the token of each row."""
  M, X = chosen_MX.shape
  if not fits(experts, X):
    raise ValueError(f'{X} of {experts} experts: want at most {SUBLANES} of a multiple of '
                     f'{2 * SUBLANES} up to {LANES}; elsewhere use experts.plan')
  total = -(-(limit or M * X) // rows) * rows + experts * (rows - 1) // rows * rows
  total += 0 if limit is None else rows
  needs = count_bytes(M, experts, total)
  if needs > target.vmem():
    raise ValueError(f'the plan of {M} tokens needs {needs} bytes of VMEM, this core has '
                     f'{target.vmem()}: give it fewer tokens at a time')
  if interpret is None:
    interpret = target.platform() != 'tpu'
  rank, *tables, count = rank_tokens(chosen_MX, experts, interpret)
  count_QE = count[:, :, 0].astype(jnp.int32)
  count_E = count_QE.sum(0)
  padded_E = -(-count_E // rows) * rows
  end_E = jnp.cumsum(padded_E)
  start_QE = end_E - padded_E + jnp.cumsum(count_QE, 0) - count_QE
  slot_P, row = place_rows(chosen_MX, rank, tables, start_QE, count_QE, total, interpret)
  starts = jnp.arange(total // rows) * rows
  of_block = jnp.sum(end_E <= starts[:, None], -1)
  if limit is not None:
    row = jnp.where((chosen_MX >= 0) & (chosen_MX < experts), row, total - 1)
  return slot_P, row, count_E, jnp.minimum(of_block, experts - 1)


def rank_tokens(chosen_MX, experts, interpret):
  """Ranks within each stretch of 4,096 tokens, and the tables with which `place_rows` inverts them.

  Returns rank (8, padded M) float32; table (2, Q, E, 128) int32, for each word of 32 tokens the
  hits before it in the stretch and its own hits as bits; field (turns, Q, E, 128) int32, for each 8
  tokens which of their choices the expert is, 3 bits each; before (the same shape) the hits before
  each 1,024 tokens, and count (Q, E, 128) float32 those of the stretch, a copy a lane.
  """
  M, X = chosen_MX.shape
  Q = pl.cdiv(M, STRETCH)
  turns = TURNS if Q > 1 else pl.cdiv(M, TOKENS)
  pad = (0, SUBLANES - X), (0, Q * turns * TOKENS - M)
  ids = jnp.pad(chosen_MX.T.astype(jnp.int32), pad, constant_values=-1)
  triangle, word, field = _matrices()
  whole = [pl.BlockSpec(x.shape, lambda q, i: (0, 0)) for x in (triangle, word, field)]
  tokens = pl.BlockSpec((SUBLANES, TOKENS), lambda q, i: (0, q * turns + i))
  hits = pltpu.VMEM((TOKENS // WIDE * experts, WIDE), jnp.bfloat16)
  return pl.pallas_call(
      functools.partial(_rank_body, choices=X, unroll=not interpret),
      name='dispatch_ranks', grid=(Q, turns),
      in_specs=[tokens, *whole],
      out_specs=[tokens, pl.BlockSpec((2, 1, experts, LANES), lambda q, i: (0, q, 0, 0)),
                 pl.BlockSpec((1, 1, experts, LANES), lambda q, i: (i, q, 0, 0)),
                 pl.BlockSpec((1, 1, experts, LANES), lambda q, i: (i, q, 0, 0)),
                 pl.BlockSpec((1, experts, LANES), lambda q, i: (q, 0, 0))],
      out_shape=[jax.ShapeDtypeStruct(ids.shape, jnp.float32),
                 jax.ShapeDtypeStruct((2, Q, experts, LANES), jnp.int32),
                 jax.ShapeDtypeStruct((turns, Q, experts, LANES), jnp.int32),
                 jax.ShapeDtypeStruct((turns, Q, experts, LANES), jnp.int32),
                 jax.ShapeDtypeStruct((Q, experts, LANES), jnp.float32)],
      scratch_shapes=[hits, hits],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret)(ids, triangle, word, field)


WIDE = 256  # tokens of one product with the triangle


def _matrices():
  """Triangle and totals (256, 384); of a block's tokens (1024, 128): words, and fields of choices.

  Lanes 0-31 of `word` count the hits before each word, lanes 32-63 and 64-95 are the low and the
  high 16 bits. All entries are 0 or powers of two: bfloat16 products are exact.
  """
  row, column = jnp.arange(WIDE)[:, None], jnp.arange(WIDE + LANES)
  triangle = (row < column) | (column >= WIDE)
  token, lane = jnp.arange(TOKENS)[:, None], jnp.arange(LANES)
  part, of = lane // WORD, lane % WORD
  bit = (token // WORD == of) & (token % WORD // 16 == part - 1)
  word = jnp.where(part == 0, token < of * WORD, jnp.where(bit, 2. ** (token % 16), 0))
  field = jnp.where(token // FIELD == lane, 8. ** (token % FIELD), 0)
  return [x.astype(jnp.bfloat16) for x in (triangle, word, field)]


def _rank_body(id_ref, triangle_ref, word_ref, field_ref, rank_ref, table_ref, fields_ref,
               before_ref, count_ref, hit_ref, choice_ref, *, choices, unroll):
  experts = count_ref.shape[1]
  turn = pl.program_id(1)

  @pl.when(turn == 0)
  def _():
    count_ref[...] = jnp.zeros_like(count_ref)
    table_ref[0, 0] = jnp.full((experts, LANES), STRETCH, jnp.int32)
    table_ref[1, 0] = jnp.zeros((experts, LANES), jnp.int32)
  before = count_ref[0]
  before_ref[0, 0] = before.astype(jnp.int32)

  def rank(chunk):
    ranks = jnp.dot(hit_ref[pl.ds(chunk * experts, experts), :], triangle_ref[...],
                    preferred_element_type=jnp.float32)
    earlier = count_ref[0]
    for half in range(WIDE // LANES):
      lanes = slice(chunk * WIDE + half * LANES, chunk * WIDE + (half + 1) * LANES)
      rank_ref[:, lanes] = _pick(ranks[:, half * LANES:(half + 1) * LANES] + earlier,
                                 id_ref[:, lanes])
    count_ref[0] = earlier + ranks[:, WIDE:]
  chunks = TOKENS // WIDE
  for chunk in range(chunks + 1):  # products run under the next chunk's marks
    if chunk < chunks:
      for group in (2 * chunk, 2 * chunk + 1):
        _mark(group, id_ref, hit_ref, choice_ref, experts, choices, unroll)
    if chunk:
      rank(chunk - 1)
  _write_words(hit_ref, choice_ref, word_ref, field_ref, table_ref, fields_ref, before, turn)


def _mark(group, id_ref, hit_ref, choice_ref, experts, choices, unroll):
  """Writes the hits (1 or 0) and choices (0 to 7; 0 where no hit) of 128 tokens.

  They lie as (E, 256) for each 256 tokens.
  """
  height = 2 * SUBLANES
  lanes = slice(group % 2 * LANES, (group % 2 + 1) * LANES)
  ids = [jnp.broadcast_to(id_ref[k:k + 1, group * LANES:(group + 1) * LANES], (height, LANES))
         for k in range(choices)]

  def mark(piece, carry):
    expert = piece * height + jax.lax.broadcasted_iota(jnp.int32, (height, LANES), 0)
    place = jnp.zeros((height, LANES), jnp.float32)
    for k in range(choices):
      place = jnp.where(ids[k] == expert, k + 1., place)
    place = place.astype(jnp.bfloat16)
    hit = jnp.minimum(place, 1)
    rows = pl.ds(pl.multiple_of(group // 2 * experts + piece * height, height), height)
    hit_ref[rows, lanes] = hit
    choice_ref[rows, lanes] = place - hit
    return carry
  jax.lax.fori_loop(0, experts // height, mark, 0, unroll=unroll)


def _pick(ranks, ids):
  """ranks (E, 128) at each token's expert ids (8, 128)."""
  inside, piece = ids & (SUBLANES - 1), ids >> 3
  rank = jnp.zeros(ids.shape, jnp.float32)
  for n in range(ranks.shape[0] // SUBLANES):
    found = _gather(ranks[n * SUBLANES:(n + 1) * SUBLANES], inside, 0)
    rank = jnp.where(piece == n, found, rank)
  return rank


def _gather(x, index, axis):
  return jnp.take_along_axis(x, index, axis=axis, mode='promise_in_bounds')


def _write_words(hit_ref, choice_ref, word_ref, field_ref, table_ref, fields_ref, before, turn):
  """This block's words, moved to the block's quarter of the stretch's lanes."""
  experts = before.shape[0]

  def product(marks_ref, matrix_ref):
    return sum(jnp.dot(marks_ref[pl.ds(chunk * experts, experts), :],
                       matrix_ref[pl.ds(chunk * WIDE, WIDE), :],
                       preferred_element_type=jnp.float32) for chunk in range(TOKENS // WIDE))
  words = product(hit_ref, word_ref)
  number = words.astype(jnp.int32)
  shift = turn * (TOKENS // WORD)
  prefix = pltpu.roll(number + before.astype(jnp.int32), shift, 1)
  low = pltpu.roll(number, shift + LANES - WORD, 1)
  high = pltpu.roll(number, shift + LANES - 2 * WORD, 1)
  mine = jax.lax.broadcasted_iota(jnp.int32, number.shape, 1) // (TOKENS // WORD) == turn
  table_ref[0, 0] = jnp.where(mine, prefix, table_ref[0, 0])
  table_ref[1, 0] = jnp.where(mine, low | (high << 16), table_ref[1, 0])
  fields_ref[0, 0] = product(choice_ref, field_ref).astype(jnp.int32)


HEIGHT = SUBLANES // 2  # rows of 128 positions that one group is given at a time: two at once
GROUPS = 64  # groups whose searches are begun together: a lookup takes some 120 cycles
VALUES = 8 << 20  # bytes of VMEM for what does not stay in registers


def count_bytes(M, experts, total):
  """VMEM that `place_rows` needs: all it reads and writes lies there."""
  stretches = pl.cdiv(M, STRETCH)
  return VALUES + 4 * (3 * stretches * STRETCH * SUBLANES + total
                       + (2 * TURNS + 4) * stretches * experts * LANES)


def place_rows(chosen_MX, rank, tables, start_QE, count_QE, total, interpret):
  """slot_P and row_MX of `plan` from what `rank_tokens` found."""
  (M, X), (Q, E) = chosen_MX.shape, start_QE.shape
  ids = jnp.pad(chosen_MX.T.astype(jnp.int32), ((0, SUBLANES - X), (0, rank.shape[1] - M)))
  first_G, count_G = (x.astype(jnp.int32).reshape(-1) for x in (start_QE, count_QE))
  turns = jnp.max((first_G % LANES + count_G + HEIGHT * LANES - 1) // (HEIGHT * LANES))
  start = jnp.pad(start_QE.astype(jnp.int32), ((0, 0), (0, LANES - E)))
  wide = [jnp.broadcast_to(x[:, None], (Q * E, LANES)) for x in (first_G, count_G)]
  tables = [x.reshape(len(x), Q * E, LANES) for x in tables]
  high = pl.cdiv(total, LANES) + HEIGHT
  everything = pl.BlockSpec(memory_space=pltpu.VMEM)
  slots, rows = pl.pallas_call(
      functools.partial(_place_body, choices=X, tokens=M, experts=E), name='dispatch_rows',
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(1,), in_specs=[everything] * 8, out_specs=[everything] * 2),
      out_shape=[jax.ShapeDtypeStruct((high, LANES), jnp.int32),
                 jax.ShapeDtypeStruct(rank.shape, jnp.int32)],
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=count_bytes(M, E, total)),
      interpret=interpret,
  )(turns[None], first_G, ids, rank, start, *wide, *tables)
  return slots.reshape(-1)[:total], rows[:X, :M].T


def _place_body(turns_ref, first_ref, id_ref, rank_ref, base_ref, start_ref, count_ref, table_ref,
                field_ref, before_ref, slot_ref, row_ref, *, choices, tokens, experts):
  slot_ref[...] = jnp.full(slot_ref.shape, tokens * choices, jnp.int32)

  width = id_ref.shape[1] // base_ref.shape[0]

  def add_start(q, carry):
    base = jnp.broadcast_to(base_ref[pl.ds(q, 1), :], (SUBLANES, LANES))
    stretch = pl.ds(pl.multiple_of(q * width, width), width)
    ids, ranks, rows = (ref.at[:, stretch] for ref in (id_ref, rank_ref, row_ref))
    for lanes in (slice(n, n + LANES) for n in range(0, width, LANES)):
      rows[:, lanes] = ranks[:, lanes].astype(jnp.int32) + _gather(base, ids[:, lanes], 1)
    return carry
  jax.lax.fori_loop(0, base_ref.shape[0], add_start, 0)
  side = math.gcd(experts, GROUPS)  # of one stretch
  steps = len(first_ref) // side

  def visit(n, carry):
    turn, step = n // steps, n % steps
    at = pl.multiple_of(step * side, side)
    rows = pl.ds(at, side)
    views = [ref.at[rows] for ref in (start_ref, count_ref)]
    views += [ref.at[:, rows] for ref in (table_ref, field_ref, before_ref)]
    token, choice, own = _find(*views, turn)
    slot = (at // experts * STRETCH + token) * choices + choice
    for group in range(side):
      part = slice(group * HEIGHT, (group + 1) * HEIGHT)
      row = pl.ds((first_ref[at + group] >> 7) + turn * HEIGHT, HEIGHT)
      slot_ref[row, :] = jnp.where(own[part], slot[part], slot_ref[row, :])
    return carry
  jax.lax.fori_loop(0, turns_ref[0] * steps, visit, 0)


def _find(start_ref, count_ref, table_ref, field_ref, before_ref, turn):
  """Of 4 x 128 rows of each group: the token in its stretch, the choice, and whether it is the
  group's own.

  First the word by bisection of the hits before words, then its bit, then 3 bits of its choices.
  One lookup takes some 120 cycles, so all groups take each step together.
  """
  shape = start_ref.shape[0] * HEIGHT, LANES

  def spread(ref):
    first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0) < HEIGHT
    rows = [jnp.broadcast_to(ref[n:n + 1], (SUBLANES, LANES)) for n in range(start_ref.shape[0])]
    return jnp.concatenate([jnp.where(first, a, b) for a, b in zip(rows[::2], rows[1::2])])

  def lookup(ref, piece, index):
    return _gather(spread(ref.at[piece]), index, 1)

  def climb(word, n, up):
    """Adds n for each of the next `up` boundaries, n words apart, that lie at or below the rank."""
    return word + sum(jnp.where(lookup(table_ref, 0, word + i * n) <= rank, n, 0)
                      for i in range(1, up + 1))
  sublane, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, n) for n in range(2))
  position = (sublane % HEIGHT + turn * HEIGHT) * LANES + lane
  rank = position - (spread(start_ref) & (LANES - 1))
  word = sum((jnp.where(spread(before_ref.at[n]) <= rank, TOKENS // WORD, 0)
              for n in range(1, before_ref.shape[0])), jnp.zeros(shape, jnp.int32))
  word = climb(climb(climb(word, 8, 3), 2, 3), 1, 1)
  left, bits = rank - lookup(table_ref, 0, word), lookup(table_ref, 1, word)
  bit = jnp.zeros(shape, jnp.int32)
  for n in (16, 8, 4, 2, 1):
    ones = jax.lax.population_count(bits & ((1 << n) - 1))
    over = left >= ones
    left = jnp.where(over, left - ones, left)
    bits = jnp.where(over, jax.lax.shift_right_logical(bits, n), bits)
    bit += jnp.where(over, n, 0)
  token = word * WORD + bit
  lane, piece = (token >> 3) & (LANES - 1), token >> 10
  field = lookup(field_ref, 0, lane)
  for n in range(1, field_ref.shape[0]):
    field = jnp.where(piece == n, lookup(field_ref, n, lane), field)
  choice = jax.lax.shift_right_logical(field, 3 * (token & (FIELD - 1))) & 7
  return token, choice, (rank >= 0) & (rank < spread(count_ref))
