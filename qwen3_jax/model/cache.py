"""The key-value cache of generation: a plain pytree, passed in and returned."""
import jax
import jax.numpy as jnp
from flax import struct

from qwen3_jax.kernels.attention import attention
from qwen3_jax.mesh import constrain


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

  def grow(self, slots):
    """The same cache with room for `slots` positions."""
    more = slots - self.segment_BS.shape[1]
    layers = tuple(LayerKV(jnp.pad(kv.k_BKHS, ((0, 0), (0, 0), (0, 0), (0, more))),
                           jnp.pad(kv.v_BKSH, ((0, 0), (0, 0), (0, more), (0, 0))))
                   for kv in self.layers)
    return Cache(layers, jnp.pad(self.segment_BS, ((0, 0), (0, more))), self.length)
