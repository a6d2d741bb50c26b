"""Attention to pages equals plain attention to the same texts laid out in a row."""
import jax
import numpy as np
import pytest

from qwen3_jax.kernels import paged_attention, reference


@pytest.mark.parametrize('block', [4, 12, 1000])
def test_pages_in_any_order_equal_one_row(block, monkeypatch):
  monkeypatch.setattr(paged_attention, 'SLOTS', block)
  B, K, G, H, size, C = 4, 2, 3, 8, 4, 5
  length_B = np.array([1, 9, 20, 0])
  draw = np.random.default_rng(0)
  k_BSKH, v_BSKH = draw.normal(size=(2, B, C * size, K, H)).astype(np.float32)
  q_BKGH = draw.normal(size=(B, K, G, H)).astype(np.float32)
  table_BC = draw.permutation(B * C).reshape(B, C)
  pages = np.empty((2, B * C, size, K, H), np.float32)
  for b, c in np.ndindex(B, C):
    pages[:, table_BC[b, c]] = np.stack([k_BSKH, v_BSKH])[:, b, c * size:(c + 1) * size]
  o = jax.jit(paged_attention.paged_attention)(
    q_BKGH, pages[0].transpose(0, 2, 3, 1), pages[1].swapaxes(1, 2), table_BC, length_B)
  segment_BS = (np.arange(C * size) < length_B[:, None]).astype(np.int32)
  for b in range(B):
    want = reference.attention(q_BKGH[b].reshape(1, 1, K * G, H), k_BSKH[b:b + 1], v_BSKH[b:b + 1],
                               np.ones((1, 1), np.int32), segment_BS[b:b + 1], C * size)
    np.testing.assert_allclose(o[b], want.reshape(K, G, H), atol=1e-6)
