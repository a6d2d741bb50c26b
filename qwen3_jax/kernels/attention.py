"""Grouped-query attention: the one place where its form is chosen. Meaning: `reference.attention`.
"""
from qwen3_jax.kernels import blocked_attention, target


def attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start=0, block=None):
  """Causal grouped-query attention within segments; (B, T, N, H).

  `start` is the slot of the first query (0 in training; the cache's length in generation).
  """
  target.report('attention', 'blocks of plain JAX')
  return blocked_attention.attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start, block)
