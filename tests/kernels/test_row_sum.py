"""Rows are summed by token, as the plain scatter does it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.kernels import row_sum


@pytest.mark.parametrize('P, M, D, dtype', [(128, 50, 256, jnp.float32),
                                            (72, 300, 128, jnp.bfloat16)])
def test_sums_equal_a_scatter(P, M, D, dtype, monkeypatch):
  """Tokens in turn differ; some have no rows, some rows no token, whatever they hold."""
  monkeypatch.setattr(row_sum, 'TILE', 16)
  rng = np.random.default_rng(0)
  token = np.concatenate([rng.choice(M, 8, replace=False) for _ in range(P // 8)])
  token[5::11] = M
  x = rng.normal(size=(P, D)).astype(np.float32)
  x[5::11] = np.nan
  got = jax.jit(row_sum.sum_rows, static_argnums=2)(jnp.asarray(x, dtype), jnp.asarray(token), M)
  want = np.zeros((M, D), np.float32)
  np.add.at(want, token[token < M], np.asarray(jnp.asarray(x, dtype), np.float32)[token < M])
  np.testing.assert_allclose(got.astype(jnp.float32), jnp.asarray(want, dtype).astype(jnp.float32),
                             atol=1e-5 if dtype == jnp.float32 else 2e-2)


def test_no_room():
  with pytest.raises(ValueError, match='1000000 tokens of width 256 have no room in VMEM'):
    row_sum.choose(10 ** 6, 256, jnp.float32)
