"""QK-norm and rope in one pass equal their meaning, values and gradients, at ragged lengths."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import norm_rope as kernel
from qwen3_jax.kernels import reference
from qwen3_jax.model import rope
from qwen3_jax.model.attention import rms_norm

EPS = 1e-6
BLOCKS = (('tokens', 32), ('heads', 2))


def make_inputs(B, T, N, dtype=jnp.float32, size=1.0):
  keys = jax.random.split(jax.random.key(0), 3)
  x, do = (size * jax.random.normal(key, (B, T, N, 128), dtype) for key in keys[:2])
  scale_H = 1 + 0.3 * jax.random.normal(keys[2], (128,))
  position_BT = jnp.arange(T) + jnp.arange(B)[:, None] * 1000
  return x, scale_H, *rope.rotation(position_BT, rope.frequencies(128, 1e6), 1.1), do / size


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, scale_H, cos, sin, do):
  o, pull = jax.vjp(lambda x, scale_H: function(x, scale_H, cos, sin, EPS), x, scale_H)
  return o, *pull(do)


@functools.cache
def in_blocks(blocks):
  return lambda *args: kernel.norm_rope(*args, dict(blocks), True)


@pytest.mark.parametrize('B, T, N', [(1, 80, 4), (2, 40, 3)])
def test_values_and_gradients(B, T, N):
  inputs = make_inputs(B, T, N)
  got = value_and_gradients(in_blocks(BLOCKS), *inputs)
  want = value_and_gradients(reference.norm_rope, *inputs)
  for a, b, size in zip(got, want, (1, 1, T)):
    np.testing.assert_allclose(a, b, atol=1e-5 * size)


def test_meaning_is_what_the_model_computes():
  x, scale_H, cos, sin, _ = make_inputs(2, 9, 3)
  np.testing.assert_allclose(reference.norm_rope(x, scale_H, cos, sin, EPS),
                             rope.rotate(rms_norm(x, scale_H, EPS), cos, sin), atol=1e-6)


@pytest.mark.parametrize('size', [1e-6, 1e10])
def test_tiny_and_huge_norms_in_bfloat16(size):
  x, scale_H, cos, sin, do = make_inputs(1, 64, 2, jnp.bfloat16, size)
  got = value_and_gradients(in_blocks(BLOCKS), x, scale_H, cos, sin, do)
  x, do = x.astype(jnp.float32), do.astype(jnp.float32)
  want = value_and_gradients(reference.norm_rope, x, scale_H, cos, sin, do)
  for a, b in zip(got, want):
    a = a.astype(np.float32)
    assert np.isfinite(a).all() and np.linalg.norm(a - b) <= 0.005 * np.linalg.norm(b)


def test_zero_heads_give_zero():
  x, *rest = make_inputs(1, 32, 2)
  o, dx, d_scale = value_and_gradients(in_blocks(BLOCKS), 0 * x, *rest)
  assert (o == 0).all() and np.isfinite(dx).all() and (d_scale == 0).all()


def test_sharded_equals_whole():
  inputs = make_inputs(2, 64, 4)
  want = value_and_gradients(reference.norm_rope, *inputs)
  for sizes in (dict(fsdp=2, tensor=2), dict(fsdp=1, context=4), dict(fsdp=4)):
    with jax.set_mesh(alphabet.make_mesh(sizes)):  # the last: two rows stay whole on four devices
      got = jax.jit(value_and_gradients.__wrapped__, static_argnums=0)(in_blocks(BLOCKS), *inputs)
    for a, b, size in zip(got, want, (1, 1, 64)):
      np.testing.assert_allclose(a, b, atol=1e-5 * size)


def test_errors_say_what_to_do():
  x, scale_H, cos, sin, _ = make_inputs(1, 8, 2)
  with pytest.raises(ValueError, match='wants heads of 128, got 64'):
    kernel.norm_rope(x[..., :64], scale_H[:64], cos[..., :32], sin[..., :32], EPS)
  x = jnp.zeros((1, 8192, 32, 128))
  angle = jnp.zeros((1, 8192, 1, 64))
  with pytest.raises(ValueError, match='needs .* MiB of VMEM, .* lower `tokens`'):
    kernel.norm_rope(x, scale_H, angle, angle, EPS, dict(tokens=4096, heads=32))


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('T, N, dtype', [(4096, 32, jnp.bfloat16), (200, 5, jnp.float32)], ids=str)
def test_compiles_for_tpus(topology, T, N, dtype):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ('data',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
            for x in jax.eval_shape(lambda: make_inputs(1, T, N, dtype))]
  with jax.set_mesh(mesh):
    text = value_and_gradients.lower(kernel.norm_rope, *inputs).compile().as_text()
  assert 'norm_rope' in text and 'norm_rope_backward' in text
