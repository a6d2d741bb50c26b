"""Sums of gradients over devices: exact in float32, off by a known bound in bfloat16."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import exchange
from qwen3_jax.kernels.linear import linear

ROUNDING = 2.0 ** -8  # of bfloat16, relative


def summed(shares, axis, axes=('fsdp',), shape=None):
  """`scatter_sum` of the devices' shares (devices, ...), put together again."""
  mesh, spec = alphabet.make_mesh(shape), [None] * (shares.ndim - 1)
  spec[axis] = axes
  body = functools.partial(exchange.scatter_sum, axes=axes, axis=axis)
  return jax.jit(jax.shard_map(lambda x: body(x[0]), mesh=mesh, in_specs=jax.P(axes),
                               out_specs=jax.P(*spec), check_vma=False))(shares)


@pytest.mark.parametrize('axes, shape', [(('fsdp',), None), (('data', 'fsdp'), dict(data=2))])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_every_device_keeps_its_part_of_the_sum(axis, axes, shape):
  shares = np.random.default_rng(0).normal(size=(4, 8, 4, 12)).astype(np.float32)
  np.testing.assert_allclose(summed(shares, axis, axes, shape), shares.sum(0), atol=2e-6)


def test_bfloat16_is_off_by_its_bound_and_no_more():
  """Shares of all magnitudes that nearly cancel: a sum kept in bfloat16 would lose it all."""
  rng = np.random.default_rng(1)
  shares = rng.normal(size=(4, 64, 64)) * 10.0 ** rng.uniform(-6, 6, (1, 64, 64))
  shares[3] = -shares[:3].sum(0) * (1 + 1e-3 * rng.normal(size=(64, 64)))
  got = np.float64(summed(jnp.asarray(shares, jnp.bfloat16), 0))
  wrong = np.abs(got - shares.sum(0)) / np.abs(shares).sum(0)
  assert ROUNDING / 8 < wrong.max() <= ROUNDING * (1 + 1e-4)
  exact = np.float64(summed(shares.astype(np.float32), 0))
  assert (np.abs(exact - shares.sum(0)) / np.abs(shares).sum(0)).max() < 2e-7


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_weights_gradient_is_sent_in_its_type_and_keeps_the_bound(dtype):
  """The gradient of a projection of bfloat16 activations, by 4 devices' rows."""
  rng = np.random.default_rng(2)
  x_BTD, dy_BTF = (jnp.asarray(rng.normal(size=(4, 6, n)), jnp.bfloat16) for n in (8, 16))
  w_DF = jnp.asarray(rng.normal(size=(8, 16)), dtype)

  def gradient(x, dy, w):
    return jax.vjp(lambda w: linear(x, w, 1, 'DF'), w)[1](dy)[0]
  with jax.set_mesh(alphabet.make_mesh()):
    got = jax.jit(gradient)(x_BTD, dy_BTF, w_DF)
    program = str(jax.make_jaxpr(gradient)(x_BTD, dy_BTF, w_DF))
  sent = [line for line in program.splitlines() if 'all_to_all' in line]
  assert len(sent) == 1 and {jnp.float32: ':f32[', jnp.bfloat16: ':bf16['}[dtype] in sent[0]
  shares = np.einsum('btd,btf->bdf', *(np.float64(x) for x in (x_BTD, dy_BTF)))
  bound = np.abs(shares).sum(0) * (2e-7 if dtype == jnp.float32 else ROUNDING)
  bound += np.abs(shares.sum(0)) * (0 if dtype == jnp.float32 else ROUNDING)  # of what is kept
  assert got.dtype == dtype
  assert (np.abs(np.float64(got) - shares.sum(0)) <= bound * 1.01).all()
