"""Attention of a few new tokens a row to keys and values that lie in pages.

On TPU one kernel (`paged_flash`). Elsewhere plain JAX: a loop over blocks of page columns with an
online softmax (Milakov & Gimelshein 2018), as long as the longest row needs, so that no array of
rows x positions exists.
"""
import jax
import jax.numpy as jnp

from qwen3_jax.kernels import target
from qwen3_jax.kernels.paged_flash import paged_flash, refusal
from qwen3_jax.kernels.paged_write import paged_write

MASKED = -1e30  # finite, so that no difference of two of them is NaN
SLOTS = 1024  # visited in one turn


def paged_attention(q_BKGH, k_BKHS, v_BKSH, table_BC, length_B):
  """softmax(q k / sqrt(H)) v over each row's first `length_B` tokens; as q.

  The first axis of `k_BKHS` and `v_BKSH` is pages, S the slots of one. Column c of `table_BC` is
  the page of positions c * S .. c * S + S - 1; columns past a row's length may hold any page. A row
  of length 0 gives 0. The query is a row's last token; q_BQKGH are its last Q, of which query i
  sees positions < length - (Q - 1 - i).
  """
  if q_BKGH.ndim == 4:
    return paged_attention(q_BKGH[:, None], k_BKHS, v_BKSH, table_BC, length_B)[:, 0]
  if _suits('attention', q_BKGH, k_BKHS, v_BKSH):
    return paged_flash(q_BKGH, k_BKHS, v_BKSH, table_BC, length_B)
  return _blocks(q_BKGH, k_BKHS, v_BKSH, table_BC, length_B)


def write(k_BKHS, v_BKSH, page_B, slot_B, k_BKH, v_BKH):
  """(k_BKHS, v_BKSH) with one token a row in slot `slot_B` of page `page_B`.

  Where two rows write to one page at once, as they may to one that is nobody's, what it then holds
  is not determined.
  """
  k_BKH, v_BKH = k_BKH.astype(k_BKHS.dtype), v_BKH.astype(v_BKSH.dtype)
  if _suits('writing', k_BKH, k_BKHS, v_BKSH):
    return tuple(paged_write(k_BKHS, v_BKSH, page_B, slot_B, k_BKH, v_BKH))
  return k_BKHS.at[page_B, :, :, slot_B].set(k_BKH), v_BKSH.at[page_B, :, slot_B].set(v_BKH)


def _suits(operation, new, k_BKHS, v_BKSH):
  """Whether the kernels run: on TPU, if they take such pages."""
  if target.platform() != 'tpu':
    return False
  reason = refusal(new, k_BKHS, v_BKSH)
  target.report(f'paged {operation}', 'plain JAX' if reason else 'one kernel', reason)
  return not reason


def _blocks(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B):
  B, Q, K, G, H = q_BQKGH.shape
  size, columns = v_BKSH.shape[2], table_BC.shape[1]
  block = min(columns, max(1, SLOTS // size))
  table_BC = jnp.pad(table_BC, ((0, 0), (0, -columns % block)))
  end_BQ11 = (length_B[:, None] - jnp.arange(Q - 1, -1, -1))[..., None, None]

  def visit(i, carry):
    o, top, total = carry
    page_BC = jax.lax.dynamic_slice_in_dim(table_BC, i * block, block, 1)
    k, v = k_BKHS[page_BC], v_BKSH[page_BC]
    s = jnp.einsum('BQKGH,BCKHS->BQKGCS', q_BQKGH, k, preferred_element_type=jnp.float32)
    position_CS = (i * block + jnp.arange(block))[:, None] * size + jnp.arange(size)
    s = jnp.where((position_CS < end_BQ11)[:, :, None, None], s * H ** -0.5, MASKED)
    top_new = jnp.maximum(top, s.max((-2, -1)))
    p = jnp.exp(s - top_new[..., None, None])
    keep = jnp.exp(top - top_new)
    pv = jnp.einsum('BQKGCS,BCKSH->BQKGH', p.astype(v.dtype), v,
                    preferred_element_type=jnp.float32)
    return o * keep[..., None] + pv, top_new, total * keep + p.sum((-2, -1))

  turns = -(-length_B.max() // (block * size))
  o, none = jnp.zeros(q_BQKGH.shape, jnp.float32), jnp.zeros((B, Q, K, G))
  o, _, total = jax.lax.fori_loop(0, turns, visit, (o, none + MASKED / 10, none))
  return (o / jnp.where(total > 0, total, 1)[..., None]).astype(q_BQKGH.dtype)
