"""The key-value cache of generation: a plain pytree, passed in and returned."""
import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.kernels.attention import attention


@struct.dataclass
class LayerKV:
  """One layer's keys and values, in slots 0 .. S-1."""
  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def extend(self, k_BTKH, v_BTKH, start):
    """Writes T new tokens from slot `start` on."""
    at = (0, start, 0, 0)
    return LayerKV(jax.lax.dynamic_update_slice(self.k_BSKH, k_BTKH.astype(self.k_BSKH.dtype), at),
                   jax.lax.dynamic_update_slice(self.v_BSKH, v_BTKH.astype(self.v_BSKH.dtype), at))

  def attend(self, q_BTNH, context):
    """Attention of T new queries over all slots written so far."""
    if q_BTNH.shape[1] > 1:
      return attention(q_BTNH, self.k_BSKH, self.v_BSKH, context.segment_BT, context.segment_BS,
                       context.start)
    return _decode(q_BTNH, self.k_BSKH, self.v_BSKH, context.segment_BT, context.segment_BS,
                   context.start)


def _decode(q_B1NH, k_BSKH, v_BSKH, segment_B1, segment_BS, start):
  """One query a sequence: scores are (B, N, S), small enough to be whole."""
  B, _, N, H = q_B1NH.shape
  S, K = k_BSKH.shape[1:3]
  q_BKGH = q_B1NH.reshape(B, K, N // K, H)
  s_BKGS = jnp.einsum('BKGH,BSKH->BKGS', q_BKGH, k_BSKH, preferred_element_type=jnp.float32)
  seen_BS = (segment_BS == segment_B1) & (segment_B1 > 0) & (jnp.arange(S) <= start)
  s_BKGS = jnp.where(seen_BS[:, None, None], s_BKGS * H ** -0.5, -1e30)
  p_BKGS = jax.nn.softmax(s_BKGS, axis=-1).astype(v_BSKH.dtype)
  o_BKGH = jnp.einsum('BKGS,BSKH->BKGH', p_BKGS, v_BSKH, preferred_element_type=jnp.float32)
  return o_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)


@struct.dataclass
class Cache:
  """All layers' slots, which slots hold what, and how many are written."""
  layers: tuple[LayerKV, ...]
  segment_BS: jax.Array  # 0: padding or not yet written
  length: jax.Array  # slots written, one number for the batch (short prompts are padded on the left)

  @classmethod
  def make(cls, spec, batch, slots, dtype=jnp.float32):
    """An empty cache of `slots` positions."""
    shape = (batch, slots, spec.kv_heads, spec.head_width)
    layers = tuple(LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(spec.layers))
    return cls(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))
