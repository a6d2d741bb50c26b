"""Attention over a split context equals that over whole rows, round a ring and gathered."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen3_jax.kernels import reference, ring_attention


def make_inputs(B, T, N, K, H=64, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  return [jax.random.normal(key, (B, T, heads, H), dtype)
          for key, heads in zip(keys, (N, K, K, N))]


def segments(kind, B, T):
  t = np.arange(T)
  rows = dict(whole=[t * 0 + 1], packed=[1 + (t >= T // 3) + (t >= T // 2), 1 + t // (T // 7)],
              padded=[np.where(t < T // 3, 1, 0), np.where(t < 200, 0, 1)],
              ends=[np.where(t < 100, 1, np.where(t < T - 100, 0, 1)), t * 0])[kind]
  return jnp.asarray(np.stack([rows[b % len(rows)] for b in range(B)]), jnp.int32)


def split_over(devices, ring):
  """(values, saved) and gradients of the ring's functions, of whole arrays."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ('context',))
  tokens = P(None, 'context')

  def both(q, k, v, do, segment):
    o, saved = ring_attention.forward(q, k, v, segment, 'context', ring=ring)
    return o, *ring_attention.backward(saved, do, 'context', ring=ring)
  return jax.jit(jax.shard_map(both, mesh=mesh, in_specs=tokens, out_specs=tokens,
                               check_vma=False))


@jax.jit
def whole(q, k, v, do, segment):
  o, pull = jax.vjp(lambda q, k, v: reference.attention(q, k, v, segment, segment), q, k, v)
  return o, *pull(do)


SLOW = pytest.mark.slow  # interpreted kernels


@pytest.mark.parametrize('devices, T, N, K, ring, kinds', [
    (2, 512, 2, 1, True, ('ends',)),
    (2, 512, 2, 1, False, ('packed',)),
    pytest.param(4, 1024, 4, 2, True, ('whole', 'packed', 'padded', 'ends'), marks=SLOW),
    pytest.param(4, 1024, 4, 2, False, ('whole', 'packed', 'padded', 'ends'), marks=SLOW),
    # the middle device exchanges with itself
    pytest.param(3, 768, 2, 2, True, ('packed',), marks=SLOW),
    pytest.param(2, 1024, 3, 1, True, ('whole',), marks=SLOW),
    pytest.param(4, 400, 2, 1, False, ('packed',), marks=SLOW),  # too short to be exchanged
], ids=str)
def test_values_and_gradients(devices, T, N, K, ring, kinds):
  inputs = make_inputs(2, T, N, K)
  split = split_over(devices, ring)
  for kind in kinds:
    segment = segments(kind, 2, T)
    got, want = split(*inputs, segment), whole(*inputs, segment)
    for name, a, b in zip(('output', 'dq', 'dk', 'dv'), got, want):
      np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f'{kind}: {name}')


@SLOW
def test_bfloat16_stays_near_float32():
  """Four turns' rounded partial results are no worse than a bfloat16 result should be."""
  segment = segments('packed', 2, 1024)
  low = make_inputs(2, 1024, 4, 2, dtype=jnp.bfloat16)
  exact = whole(*(x.astype(jnp.float32) for x in low), segment)
  for ring in (True, False):
    for a, b in zip(split_over(4, ring)(*low, segment), exact):
      assert a.dtype == jnp.bfloat16
      assert np.linalg.norm(a.astype(np.float32) - b) <= 0.01 * np.linalg.norm(b)


def test_every_turn_has_equal_work():
  """Pairs of stretches that matter, of each device in each turn: two, or the diagonal's three."""
  for n in (2, 3, 4, 8):
    starts = [np.asarray(ring_attention._starts(jnp.int32(r), n, 2)) for r in range(n)]
    assert sorted(np.concatenate(starts)) == list(range(2 * n))
    for here in range(n):
      for turn in range(n):
        seen = starts[here][:, None] >= starts[(here - turn) % n]
        assert seen.sum() == (3 if turn == 0 else 2)


@SLOW
@pytest.mark.parametrize('topology', ['v5p:2x2x1', 'v6e:2x2'])
@pytest.mark.parametrize('T, ring', [(32768, False), (32768, True), (131072, True)], ids=str)
def test_long_contexts_compile(T, ring, topology):
  """Forward and backward of an 8b layer's heads, split over four chips."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = jax.sharding.Mesh(np.array(devices[:4]), ('context',))
  tokens = P(None, 'context')

  def both(q, k, v, do, segment):
    assert ring_attention.uses_ring(k, 'context') == (T > 32768)
    o, saved = ring_attention.forward(q, k, v, segment, 'context', ring=ring)
    return o, *ring_attention.backward(saved, do, 'context', ring=ring)

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, tokens))
  q, k, segment = shape(1, T, 32, 128), shape(1, T, 8, 128), shape(1, T, dtype=jnp.int32)
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.shard_map(both, in_specs=tokens, out_specs=tokens, check_vma=False)
                       ).lower(q, k, k, q, segment).compile()
  text = compiled.as_text()
  assert 'flash_forward' in text and 'flash_backward' in text
  assert ('all-gather(' in text) != ring and 'collective-permute-start' in text
  here = 4 * T // 4 * 32 * 128  # bytes of one device's queries in float32
  assert compiled.memory_analysis().temp_size_in_bytes < 16 * here
