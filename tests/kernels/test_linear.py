"""Projections and SwiGLU with own gradients, against the plain einsum."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels.linear import linear, swiglu


def draw(shape, seed, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def pulled(f, *inputs):
  """f's value and its gradients against a fixed random cotangent."""
  y, pull = jax.vjp(f, *inputs)
  return y, *pull(draw(y.shape, 9, y.dtype))


@pytest.mark.parametrize('inner, x, w, names', [
    (1, (2, 5, 8), (8, 3, 4), 'BTD,DNH->BTNH'), (2, (2, 5, 3, 4), (3, 4, 8), 'BTNH,NHD->BTD'),
    (1, (7, 8), (8, 6), 'MD,DF->MF')])
def test_linear_is_its_einsum(inner, x, w, names):
  inputs = draw(x, 0), draw(w, 1)
  got = pulled(lambda x, w: linear(x, w, inner), *inputs)
  want = pulled(lambda x, w: jnp.einsum(names, x, w), *inputs)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_weight_gradient_is_summed_in_float32():
  """4,096 equal tokens in bfloat16: a sum kept in bfloat16 would stop growing at 256."""
  x, w = jnp.ones((1, 4096, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.bfloat16)
  gradient = jax.grad(lambda w: linear(x, w).astype(jnp.float32).sum())(w)
  np.testing.assert_array_equal(gradient.astype(jnp.float32), 4096)


@pytest.mark.parametrize('shape', [dict(fsdp=4), dict(context=2, tensor=2)], ids=str)
def test_linear_on_a_mesh(shape):
  x_BTD, w_DF = draw((4, 6, 8), 0), draw((8, 12), 1)
  want = pulled(linear, x_BTD, w_DF)
  mesh = alphabet.make_mesh(shape)
  layout = alphabet.shardings(dict(x_BTD=x_BTD, w_DF=w_DF), mesh)
  placed = [jax.device_put(a, layout[n]) for n, a in (('x_BTD', x_BTD), ('w_DF', w_DF))]
  with jax.set_mesh(mesh):
    got = jax.jit(lambda *a: pulled(linear, *a))(*placed)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_swiglu_is_its_meaning():
  inputs = draw((3, 5), 0) * 4, draw((3, 5), 1)
  for a, b in zip(pulled(swiglu, *inputs), pulled(lambda g, u: jax.nn.silu(g) * u, *inputs)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
