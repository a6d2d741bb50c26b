"""Position embedding and its extensions on vectors computed elsewhere."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.model import rope
from qwen3_jax.spec import Spec, Yarn


def test_frequencies():
  found = rope.frequencies(128, 1e6)
  assert found.shape == (64,) and found[0] == 1
  np.testing.assert_allclose(found[[1, 32, 63]], [1e6 ** (-2 / 128), 1e-3, 1e6 ** (-126 / 128)])


def test_yarn_of_qwen3():
  """Factor 4 of 32,768 positions, base 1e6: float64 values of the authors' formula."""
  found = rope.yarn_frequencies(128, 1e6, 4.0, 32_768)
  want = {0: 1.0, 23: 0.006978305848598663, 24: 0.005375321490790102, 30: 0.0010643609812470017,
          39: 6.490394320837028e-05, 40: 4.445698525097307e-05, 63: 3.102344401879299e-07}
  np.testing.assert_allclose(found[list(want)], list(want.values()), rtol=1e-12)
  plain = rope.frequencies(128, 1e6)
  np.testing.assert_array_equal(found[:24], plain[:24])  # up to 23 turn often enough
  np.testing.assert_allclose(found[40:], plain[40:] / 4)  # from 40 on interpolated whole
  assert math.isclose(rope.yarn_scale(4.0), 1.138629436111989)
  assert rope.yarn_scale(1.0) == rope.yarn_scale(0.5) == 1


def test_yarn_ramp_without_whole_ends():
  """Between the real-valued ends the ramp is linear in the pair's index."""
  index = [64 * math.log(32_768 / (2 * math.pi * turns)) / math.log(1e6) for turns in (32, 1)]
  found = rope.yarn_frequencies(128, 1e6, 4.0, 32_768, truncate=False)
  ramp = (30 - index[0]) / (index[1] - index[0])
  plain = rope.frequencies(128, 1e6)[30]
  assert math.isclose(found[30], plain / 4 * ramp + plain * (1 - ramp))


def test_ntk():
  """The slowest pair is interpolated by the whole scale, the fastest not at all."""
  scaled = rope.frequencies(128, rope.ntk_theta(1e4, 128, 8.0))
  plain = rope.frequencies(128, 1e4)
  assert scaled[0] == plain[0]
  assert math.isclose(scaled[-1], plain[-1] / 8)


def test_dynamic_ntk():
  assert rope.dynamic_ntk_theta(1e4, 128, 2048, 2048) == 1e4
  assert math.isclose(rope.dynamic_ntk_theta(1e4, 128, 8192, 2048), 1e4 * 4 ** (128 / 126))
  found = rope.dynamic_ntk_theta(1e4, 128, 4096, 2048, factor=3.0)  # 3 * 2 - 2 = 4
  assert math.isclose(found, 1e4 * 4 ** (128 / 126))


@pytest.mark.parametrize('length, alpha', [(100, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7),
                                           (8192, 7), (8193, 15)])
def test_dynamic_ntk_of_qwen1_goes_in_steps(length, alpha):
  found = rope.chunked_ntk_theta(1e4, 128, length, 2048)
  assert math.isclose(found, 1e4 * alpha ** (128 / 126))


def test_logn():
  found = rope.logn_scale(jnp.array([0, 2047, 2048, 8191]), 2048)
  want = [1, 1, math.log(2049) / math.log(2048), math.log(8192) / math.log(2048)]
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_rotation_depends_on_the_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
  freq = rope.frequencies(16, 1e4)
  def score(m, n):
    turned = [rope.rotate(x, *rope.rotation(jnp.array([[p]]), freq)) for x, p in ((q, m), (k, n))]
    return float(jnp.vdot(*turned))
  assert math.isclose(score(7, 3), score(104, 100), abs_tol=1e-4)
  assert not math.isclose(score(7, 3), score(7, 4), abs_tol=1e-2)


def test_rotation_by_hand():
  """Halves, not neighbours, are pairs: (x_i, x_{i+2}) turns by position * frequency."""
  x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
  freq = np.array([0.5, 0.25])
  found = rope.rotate(x, *rope.rotation(jnp.array([[3]]), freq, 2.0))[0, 0, 0]
  c, s = np.cos(3 * freq), np.sin(3 * freq)
  want = 2 * np.concatenate([[1, 2] * c - [3, 4] * s, [3, 4] * c + [1, 2] * s])
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_bfloat16_keeps_float32_angles():
  """Positions beyond 256 are not whole numbers in bfloat16; the tables never see it."""
  x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  cos, sin = rope.rotation(jnp.array([[1001]], jnp.int32), np.array([1.0, 0.1]))
  assert cos.dtype == jnp.float32
  np.testing.assert_allclose(cos[0, 0, 0], np.cos([1001, 100.1]), atol=1e-4)
  assert rope.rotate(x, cos, sin).dtype == jnp.bfloat16


def test_frequencies_of_a_spec():
  spec = Spec.named('4b')
  freq, scale = rope.spec_frequencies(spec)
  np.testing.assert_array_equal(freq, rope.frequencies(128, 1e6))
  assert scale == 1
  fields = dict(layers=1, width=8, heads=1, kv_heads=1, mlp=8)
  freq, scale = rope.spec_frequencies(Spec(**fields, yarn=Yarn(4.0, 32_768)))
  np.testing.assert_array_equal(freq, rope.yarn_frequencies(128, 1e6, 4.0, 32_768))
  assert math.isclose(scale, 1.138629436111989)
  assert rope.spec_frequencies(Spec(**fields, yarn=Yarn(4.0, 64, attention_factor=1.5)))[1] == 1.5
