"""The flash kernel's meaning, interpreted; and that the real compiler takes it for every TPU.

Interpreting says nothing about a TPU's arithmetic, and no TPU is here: the compile is all that is
known of one.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen3_jax.kernels import flash_attention, flash_blocks, reference

SMALL = dict(queries=128, keys=128, columns=128, units=1)


def draw(T, S, N=1, K=1, H=128, B=2, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return [np.asarray(rng.standard_normal((B, n, heads, H)), dtype)
          for n, heads in ((T, N), (S, K), (S, K))]


def pack(*rows):
  """(B, T) segments; a row is a list of lengths, the last of padding."""
  return np.array([np.repeat([*range(1, len(row)), 0], row) for row in rows], np.int32)


meaning = jax.jit(reference.partial_attention, static_argnames='window')


@functools.partial(jax.jit, static_argnames=('window', 'bound', 'blocks'))
def run(*args, window, bound, blocks):
  return flash_attention.forward(*args, window=window, bound=bound, blocks=dict(blocks))


def check(*args, q_start=(0,), k_start=(0,), window=None, bound=None, **blocks):
  args = *args, np.array(q_start, np.int32), np.array(k_start, np.int32)
  want, want_lse = meaning(*args, window=window)
  blocks = tuple((SMALL | blocks).items())
  o, lse = run(*args, window=window, bound=bound, blocks=blocks)
  assert o.shape == want.shape and o.dtype == want.dtype and lse.dtype == jnp.float32
  np.testing.assert_allclose(o, want, atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-5)
  return o, lse


@pytest.mark.parametrize('bound', [None, 20.0], ids=['running', 'bound'])
def test_packed_rows_of_ragged_lengths(bound):
  """A boundary inside a block, one-token documents, padding, a row of padding alone."""
  segment = pack([150, 1, 1, 148, 70], [300, 70], [370])
  q, k, v = draw(370, 370, N=2, B=3)
  o, lse = check(q, k, v, segment, segment, bound=bound, units=2)
  assert not o[2].any() and (lse[2] == flash_blocks.MASKED).all()
  np.testing.assert_allclose(o[0, 150], np.repeat(v[0, 150], 2, axis=0), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('N, K, H, blocks', [
  (3, 1, 128, {}), (4, 2, 128, dict(heads=1)), (2, 1, 64, {}), (1, 1, 128, dict(queries=256))],
  ids=['three', 'groups', 'narrow', 'tall'])
def test_heads_and_blocks(N, K, H, blocks):
  segment = pack([200, 56])
  q, k, v = draw(256, 256, N, K, H, B=1)
  check(q, k, v, segment, segment, **blocks)


@pytest.mark.parametrize('window', [None, 150])
@pytest.mark.parametrize('q_start, k_start', [
  ([128, 768], [0, 896]), ([0, 128], [512, 768]), ([300, 428], [0, 256]), ([0, 512], [0, 512])],
  ids=['zigzag', 'unseen', 'cache', 'parts'])
def test_stretches_and_windows(q_start, k_start, window):
  """Queries beyond their keys, before all of them, between; unmasked blocks inside a window."""
  q, k, v = draw(256, 512, B=1)
  one = lambda n: np.ones((1, n), np.int32)
  check(q, k, v, one(256), one(512), q_start=q_start, k_start=k_start, window=window)


def test_keys_beyond_vmem_are_visited_in_turns():
  segment = pack([100, 360, 52])
  q, k, v = draw(512, 512, B=1)
  check(q, k, v, segment, segment, q_start=[0, 256], k_start=[0, 256], resident=128)


@pytest.mark.slow
def test_merging_shards_of_keys_is_the_whole():
  segment = pack([300, 84])
  q, k, v = draw(384, 384, B=1)
  zero, half = np.array([0], np.int32), np.array([192], np.int32)
  part = functools.partial(run, window=None, bound=None, blocks=tuple(SMALL.items()))
  parts = [part(q, k[:, at], v[:, at], segment, segment[:, at], zero, start)
           for at, start in ((slice(0, 192), zero), (slice(192, None), half))]
  want = meaning(q, k, v, segment, segment, zero, zero)
  for got, wanted in zip(flash_attention.merge(*parts), want):
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_a_bfloat16_reference():
  """Within the error of softmax and products in bfloat16, measured from the float32 meaning."""
  segment = pack([200, 56])
  q, k, v = draw(256, 256, B=1, dtype=jnp.bfloat16)
  start = np.array([0], np.int32)
  exact, exact_lse = meaning(*(x.astype(np.float32) for x in (q, k, v)), segment, segment, start,
                             start)

  @jax.jit
  def plain(q, k, v):
    scores = jnp.einsum('BTNH,BSNH->BNTS', q, k) * 128 ** -0.5
    seen = (segment[:, None] == segment[:, :, None]) & np.tril(np.ones((256, 256), bool))
    p = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum('BNTS,BSNH->BTNH', p, v).astype(jnp.float32)
  allowed = np.abs(plain(q, k, v) - exact)[:, :200]
  traced = jax.jit(functools.partial(flash_attention.forward, blocks=SMALL))
  for bound in (20.0, 1e9):
    o, lse = traced(q, k, v, segment, segment, start, start, bound=bound)
    error = np.abs(np.asarray(o, np.float32) - exact)[:, :200]
    assert error.mean() < allowed.mean() and error.max() < 1.5 * allowed.max()
    assert np.abs(lse - exact_lse).max() < 0.01


def test_hostile_norms():
  """Scores at either side of the bound that is safe, and far beyond what exp can take."""
  q, k, v = draw(128, 128, B=1)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  q, k = (unit(x) * np.float32(512 ** 0.5) for x in (q, k))
  k = np.concatenate([q[:, :64], -q[:, 64:]], axis=1)
  segment, start = pack([128, 0]), np.array([0], np.int32)
  traced = jax.jit(functools.partial(flash_attention.forward, blocks=SMALL))
  for scale, bound in ((1, [46.0]), (1, [3.0, 56.0]), (1e4, [5e5]), (1e15, [5e16])):
    args = np.float32(scale) * q, k, v, segment, segment, start, start
    want, want_lse = meaning(*args)
    o, lse = traced(*args, bound=np.array(bound, np.float32))
    assert np.isfinite(o).all() and np.isfinite(lse).all()
    largest = np.abs(want_lse).max()  # about |q| |k|, by whose last bit small scores are rounded
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5 + 1e-6 * largest)
    if scale == 1:  # of a score of 46 the last bit is 4e-6; of greater ones, more than differences
      np.testing.assert_allclose(o, want, atol=3e-5)


@pytest.mark.parametrize('window', [None, 100])
def test_extents_hold_every_pair_that_sees_and_open_ones_all(window):
  q_segment, k_segment = pack([130, 200, 54], [384]), pack([100, 300, 112], [512, 0])
  q_start, k_start = np.array([256, 700]), np.array([0, 600])

  @jax.jit
  def find(*args):
    needed, whole = flash_blocks.pairs(*args, 64, 128, window)
    return needed, whole, flash_blocks.extents(needed, whole)
  needed, whole, extents = jax.device_get(find(q_segment, k_segment, q_start, k_start))
  slot = lambda start, n: (start[:, None] + np.arange(n // len(start))).reshape(-1)
  behind = slot(q_start, 384)[:, None] - slot(k_start, 512)
  seen = (behind >= 0) & (behind < (window or 1 << 30)) & (q_segment > 0)[:, :, None]
  seen &= q_segment[:, :, None] == k_segment[:, None]
  blocks = seen.reshape(2, 6, 64, 4, 128)
  assert (needed >= blocks.any((2, 4))).all() and (whole == blocks.all((2, 4))).all()
  for row in range(2):
    for i in range(6):
      low, high, first, shut = (int(x[row, i]) for x in extents)
      inside = [low <= j < high for j in range(4)]
      assert all(inside[j] for j in range(4) if needed[row, i, j])
      assert all(whole[row, i, j] for j in range(first, shut))
      assert first < shut or not whole[row, i].any()


def test_too_little_vmem_is_said_with_the_numbers():
  q, k, v = draw(128, 128, B=1)
  wide = [jax.ShapeDtypeStruct((1, 1 << 18, 1, 128), x.dtype) for x in (q, k, v)]
  segment = jax.ShapeDtypeStruct((1, 1 << 18), jnp.int32)
  start = jax.ShapeDtypeStruct((1,), jnp.int32)
  whole = functools.partial(flash_attention.forward, blocks=dict(resident=1 << 18))
  with pytest.raises(ValueError, match=r'needs .* MiB .* a core has 128.0: lower resident'):
    jax.eval_shape(whole, *wide, segment, segment, start, start)


BF16, F32 = jnp.bfloat16, jnp.float32
COMPILED = [(name, 16384, 8, 2, 128, BF16, None) for name in (
  'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')] + [
    ('v5p:2x2x1', 1000, 40, 8, 128, F32, None), ('v6e:2x2', 1024, 64, 4, 128, BF16, None),
    ('v6e:2x2', 1024, 16, 8, 64, BF16, 300)]


@pytest.mark.slow
@pytest.mark.parametrize('topology, T, N, K, H, dtype, window', COMPILED, ids=str)
def test_compiles(topology, T, N, K, H, dtype, window):
  """Both forms, under one condition."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices[:1]), ('one',))
  abstract = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, P()))
  q, k = (abstract((1, T, heads, H), dtype) for heads in (N, K))
  segment, start = abstract((1, T), jnp.int32), abstract((1,), jnp.int32)

  def both(q, k, v, segment, start, bound):
    return flash_attention.forward(q, k, v, segment, segment, start, start, bound=bound,
                                   window=window)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(both).lower(q, k, k, segment, start, abstract((), jnp.float32))
  text = lowered.compile().as_text()
  assert 'flash_forward' in text and 'flash_forward_running' in text
