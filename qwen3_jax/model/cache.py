"""The key-value cache of generation: plain pytrees, passed in and returned.

Between calls the keys and values of all texts lie in a `Pool` of pages. A call either reads the
pages of its rows into contiguous slots once (`Cache`, many steps then pay for one copy: the way on
CPU, and of every prefill) or attends to the pages where they lie (`Paged`).
"""
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from qwen3_jax.kernels import paged_attention
from qwen3_jax.kernels.attention import attention
from qwen3_jax.mesh import constrain, count_row_ways, partition


@struct.dataclass
class LayerKV:
  """One layer's keys and values, in slots 0 .. S-1.

  Slots are the keys' last axis, so that both products of a decoded token read memory in order
  (measured on CPU: 3.5 x faster than with slots second).
  """
  k_BKHS: jax.Array
  v_BKSH: jax.Array

  def extend(self, k_BTKH, v_BTKH, start):
    """Writes T new tokens from slot `start` on."""
    k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
    write = jax.lax.dynamic_update_slice
    return LayerKV(write(self.k_BKHS, k_BKHT.astype(self.k_BKHS.dtype), (0, 0, 0, start)),
                   write(self.v_BKSH, v_BKTH.astype(self.v_BKSH.dtype), (0, 0, start, 0)))

  def attend(self, q_BTNH, context):
    """Attention of T new queries over all slots written so far."""
    if q_BTNH.shape[1] == 1:
      return _decode(q_BTNH, self.k_BKHS, self.v_BKSH, context.segment_BT, context.segment_BS,
                     context.start)
    return attention(q_BTNH, self.k_BKHS.transpose(0, 3, 1, 2), self.v_BKSH.swapaxes(1, 2),
                     context.segment_BT, context.segment_BS, context.start)


def _decode(q_B1NH, k_BKHS, v_BKSH, segment_B1, segment_BS, start):
  """One query a sequence: scores are (B, N, S), small enough to be whole."""
  B, _, N, H = q_B1NH.shape
  K, S = v_BKSH.shape[1:3]
  q_BKGH = q_B1NH.reshape(B, K, N // K, H)
  s_BKGS = jnp.einsum('BKGH,BKHS->BKGS', q_BKGH, k_BKHS, preferred_element_type=jnp.float32)
  seen_BS = (segment_BS == segment_B1) & (segment_B1 > 0) & (jnp.arange(S) <= start)
  s_BKGS = jnp.where(seen_BS[:, None, None], s_BKGS * H ** -0.5, -1e30)
  p_BKGS = jax.nn.softmax(s_BKGS, axis=-1).astype(v_BKSH.dtype)
  o_BKGH = jnp.einsum('BKGS,BKSH->BKGH', p_BKGS, v_BKSH, preferred_element_type=jnp.float32)
  return o_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)


@struct.dataclass
class Cache:
  """All layers' slots, which slots hold what, and how many are written."""
  layers: tuple[LayerKV, ...]
  segment_BS: jax.Array  # 0: padding or not yet written
  length: jax.Array | int  # slots written, of every row (short prompts are padded on the left)

  @classmethod
  def make(cls, spec, batch, slots, dtype=jnp.float32):
    """An empty cache of `slots` positions.

    Its length is the plain number 0, so that a first call that fills every slot within one trace
    is known to be causal, and half of the blocks are skipped.
    """
    shape = (batch, spec.kv_heads, spec.head_width, slots)
    layers = tuple(LayerKV(constrain(jnp.zeros(shape, dtype), 'BKHS'),
                           constrain(jnp.zeros(shape, dtype).swapaxes(2, 3), 'BKSH'))
                   for _ in range(spec.layers))
    return cls(layers, jnp.zeros((batch, slots), jnp.int32), 0)

  def mark(self, segment_BT):
    """Segments of all slots once `segment_BT` is written."""
    return jax.lax.dynamic_update_slice(self.segment_BS, segment_BT, (0, self.length))

  def advance(self, layers, segment_BT):
    """The cache with `layers`, which hold the tokens of `segment_BT` too."""
    return Cache(layers, self.mark(segment_BT), self.length + segment_BT.shape[1])


@struct.dataclass
class PagedKV:
  """One layer's pages, attended to where they lie; `table_BC` names each row's."""
  k_BKHS: jax.Array
  v_BKSH: jax.Array
  table_BC: jax.Array

  def extend(self, k_BTKH, v_BTKH, start):
    """Writes one token a row at its position `start` (B,)."""
    def write(k_BKHS, v_BKSH, table_BC, k_BKH, v_BKH, start_B):
      size = v_BKSH.shape[2]
      column_B1 = start_B[:, None] // size
      page_B = jnp.take_along_axis(table_BC, column_B1, 1, mode='fill', fill_value=0)[:, 0]
      return paged_attention.write(k_BKHS, v_BKSH, page_B, start_B % size, k_BKH, v_BKH)
    k_BKHS, v_BKSH = _on_own_rows(write, 'BKHS BKHS B BK BK B', 'BKHS BKHS')(
      self.k_BKHS, self.v_BKSH, self.table_BC, k_BTKH[:, 0], v_BTKH[:, 0], start)
    return PagedKV(k_BKHS, v_BKSH, self.table_BC)

  def attend(self, q_BTNH, context):
    """Attention of one new query a row."""
    B, _, N, H = q_BTNH.shape
    q_BKGH = q_BTNH.reshape(B, self.v_BKSH.shape[1], -1, H)
    o_BKGH = _on_own_rows(paged_attention.paged_attention, 'BK BKHS BKHS B B', 'BK')(
      q_BKGH, self.k_BKHS, self.v_BKSH, self.table_BC, context.start + 1)
    return o_BKGH.reshape(q_BTNH.shape)


@struct.dataclass
class Paged:
  """All layers' pages as a cache for one token a row at a time."""
  layers: tuple[PagedKV, ...]
  length: jax.Array  # (B,) tokens of each row

  def mark(self, segment_BT):
    return None

  def advance(self, layers, segment_BT):
    return Paged(layers, self.length + segment_BT[:, 0])

  def detached(self):
    """The `Pool` that holds what was written."""
    return Pool(tuple(LayerKV(kv.k_BKHS, kv.v_BKSH) for kv in self.layers))


@struct.dataclass
class Pool:
  """Pages of keys and values: the first axis of each layer's arrays is pages.

  A page has as many slots as the last axis of `k_BKHS` is long. Pages are split over devices as
  rows are, and a row's pages lie where the row is: their numbers count from 0 on each. Page 0 is
  nobody's.
  """
  layers: tuple[LayerKV, ...]

  @classmethod
  def make(cls, spec, pages, size, dtype):
    """An empty pool of `pages` pages of `size` tokens."""
    return cls(Cache.make(spec, pages, size, dtype).layers)

  @property
  def size(self):
    """Tokens in a page."""
    return self.layers[0].k_BKHS.shape[-1]

  def grow(self, pages):
    """The pool with room for `pages` pages; none changes its number."""
    more = (pages - len(self.layers[0].k_BKHS)) // shards()
    def pad(kv):
      return LayerKV(*(jnp.pad(x, ((0, more), (0, 0), (0, 0), (0, 0)))
                       for x in (kv.k_BKHS, kv.v_BKSH)))
    return Pool(tuple(_on_own_rows(pad, 'BKHS', 'BKHS')(kv) for kv in self.layers))

  def read(self, table_BC, length_B, more):
    """Cache of rows whose first `length_B` tokens lie in `table_BC`, with `more` free slots."""
    def gather(kv, table_BC):
      B, C = table_BC.shape
      k_BCKHS, v_BCKSH = kv.k_BKHS[table_BC], kv.v_BKSH[table_BC]
      k_BKHS = k_BCKHS.transpose(0, 2, 3, 1, 4).reshape(B, *kv.k_BKHS.shape[1:3], -1)
      v_BKSH = v_BCKSH.swapaxes(1, 2).reshape(B, len(kv.v_BKSH[0]), -1, kv.v_BKSH.shape[-1])
      return LayerKV(jnp.pad(k_BKHS, ((0, 0), (0, 0), (0, 0), (0, more))),
                     jnp.pad(v_BKSH, ((0, 0), (0, 0), (0, more), (0, 0))))
    layers = tuple(_on_own_rows(gather, 'BKHS B', 'BKHS')(kv, table_BC) for kv in self.layers)
    slots = table_BC.shape[1] * self.size
    segment_BS = (jnp.arange(slots + more) < length_B[:, None]).astype(jnp.int32)
    return Cache(layers, segment_BS, slots)

  def write(self, cache, length_B, page_BW):
    """The pool with what `cache` holds since it was read.

    `page_BW` are the pages from the one in which position `length_B` lies; page 0 takes what is not
    wanted.
    """
    size, slots = self.size, cache.length
    position_BS = (length_B // size * size)[:, None] + jnp.arange(page_BW.shape[1] * size)
    new_BS = slots + position_BS - length_B[:, None]
    slot_BS = jnp.where(position_BS < length_B[:, None], position_BS, new_BS)
    slot_BS = jnp.minimum(slot_BS, cache.segment_BS.shape[1] - 1)
    def scatter(kv, new, page_BW, slot_BS):
      k_BKHS = jnp.take_along_axis(new.k_BKHS, slot_BS[:, None, None], 3)
      v_BKSH = jnp.take_along_axis(new.v_BKSH, slot_BS[:, None, :, None], 2)
      B, W = page_BW.shape
      k = k_BKHS.reshape(*k_BKHS.shape[:3], W, size).transpose(0, 3, 1, 2, 4)
      v = v_BKSH.reshape(*v_BKSH.shape[:2], W, size, -1).swapaxes(1, 2)
      page = page_BW.reshape(-1)
      return LayerKV(kv.k_BKHS.at[page].set(k.reshape(B * W, *k.shape[2:])),
                     kv.v_BKSH.at[page].set(v.reshape(B * W, *v.shape[2:])))
    return Pool(tuple(_on_own_rows(scatter, 'BKHS BKHS B B', 'BKHS')(kv, new, page_BW, slot_BS)
                      for kv, new in zip(self.layers, cache.layers)))

  def attached(self, table_BC, length_B, page_BW):
    """`Paged` cache of the rows, the page in which each goes on being its own from now on."""
    column_B1 = jnp.minimum(length_B // self.size, table_BC.shape[1] - 1)[:, None]
    def own(kv, table_BC, column_B1, page_BW):
      old_B = jnp.take_along_axis(table_BC, column_B1, 1)[:, 0]
      return LayerKV(kv.k_BKHS.at[page_BW[:, 0]].set(kv.k_BKHS[old_B]),
                     kv.v_BKSH.at[page_BW[:, 0]].set(kv.v_BKSH[old_B]))
    place_BW = column_B1 + jnp.arange(page_BW.shape[1])
    rows_B1 = jnp.arange(len(table_BC))[:, None]
    table = table_BC.at[rows_B1, place_BW].set(page_BW, mode='drop')
    layers = (_on_own_rows(own, 'BKHS B B B', 'BKHS')(kv, table_BC, column_B1, page_BW)
              for kv in self.layers)
    return Paged(tuple(PagedKV(kv.k_BKHS, kv.v_BKSH, table) for kv in layers), length_B)


def shards():
  """Into how many parts rows, and with them pages, are split under the mesh that is set."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else count_row_ways(mesh)


def _on_own_rows(f, taken, given):
  """`f` on each device's own rows and pages: no page is sent anywhere.

  `taken` and `given` say of each argument and result which of its axes are split: 'B', 'BK', or
  'BKHS' for arrays (of a `LayerKV`) of four axes. Row counts are multiples of `shards()`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return f

  def run(*args):
    heads = jax.tree.leaves(args[taken.split().index('BKHS')])[0].shape[1]
    rows, head = partition('BK', (shards(), heads), mesh)
    spec = dict(B=PartitionSpec(rows), BK=PartitionSpec(rows, head))
    spec['BKHS'] = spec['BK']
    results = tuple(spec[name] for name in given.split())
    return jax.shard_map(f, in_specs=tuple(spec[name] for name in taken.split()), check_vma=False,
                         out_specs=results if len(results) > 1 else results[0])(*args)
  return run
