"""Flash attention's gradients equal those of the plain meaning; the compilers of four TPUs take it.

Interpreted on a CPU; what a TPU's schedule says is in benchmarks/kernel_cases.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.kernels import flash_backward, reference

SMALL = dict(queries=8, heads=2, chunk=8, units=2, resident=512)


def make_inputs(B, T, S, N, K, H=8, seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def segments(kind, B, T):
  """Segment numbers (B, T) of one awkward kind."""
  t = np.arange(T)
  rows = {'whole': [t * 0 + 1],
          'padded': [np.where(t < T - 3, 1, 0), np.where(t < 3, 0, 1)],
          'packed': [1 + (t >= T // 3) + (t >= T // 2), np.where(t < T - 2, 1 + t // 4, 0)],
          'repeated': [1 + t // 5 % 2],
          'one token': [1 + t],
          'masked row': [t * 0, t * 0 + 1]}[kind]
  return jnp.asarray(np.stack([rows[b % len(rows)] for b in range(B)]), jnp.int32)


@functools.partial(jax.jit, static_argnames=('window',))
def differentiate(q, k, v, do, q_segment, k_segment, q_start, k_start, window=None):
  """((output, log-sum-exp), the meaning's gradients)."""
  def attend(q, k, v):
    return reference.partial_attention(q, k, v, q_segment, k_segment, q_start, k_start, window)
  (o, lse), pull = jax.vjp(attend, q, k, v)
  return (o, lse), pull((do, jnp.zeros_like(lse)))


@functools.partial(jax.jit, static_argnames=('window', 'dtype', 'sizes'))
def backward(*args, sizes, window=None, dtype=None):
  return flash_backward.backward(*args, window=window, dtype=dtype, blocks=SMALL | dict(sizes))


def check(inputs, q_segment, k_segment, q_start=(0,), k_start=(0,), window=None, tolerance=1e-5,
          **sizes):
  q, k, v, do = inputs
  place = [jnp.asarray(x, jnp.int32) for x in (q_segment, k_segment, q_start, k_start)]
  (o, lse), want = differentiate(q, k, v, do, *place, window=window)
  got = backward(q, k, v, *place, o, lse, do, window=window, sizes=tuple(sorted(sizes.items())))
  for name, a, b in zip(('dq', 'dk', 'dv'), got, want):
    assert a.dtype == q.dtype and np.isfinite(a).all()
    scale = max(1, float(np.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)
  return got


@pytest.mark.parametrize('kind', ['whole', 'padded', 'packed', 'repeated', 'one token',
                                  'masked row'])
def test_segments(kind):
  """Lengths that are no multiple of a block; the heads of a key head in two steps."""
  segment = segments(kind, 2, 45)
  got = check(make_inputs(2, 45, 45, 8, 2), segment, segment)
  for x in got:
    assert (x[segment == 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('N, K, sizes', [(3, 3, dict(heads=1, units=4)), (5, 1, dict(heads=5))])
def test_head_ratios(N, K, sizes):
  segment = segments('packed', 1, 40)
  check(make_inputs(1, 40, 40, N, K), segment, segment, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize('q_start, k_start, window', [
    ((0, 60), (20, 40), None),  # a zigzag shard: one stretch of queries sees none of the keys
    ((7, 33), (0,), None), ((25,), (0,), 9)])
def test_stretches_and_window(q_start, k_start, window):
  T, S = 20 * len(q_start), 20 * len(k_start) if len(k_start) > 1 else 60
  one = jnp.ones((1, 1), jnp.int32)
  check(make_inputs(1, T, S, 2, 1), jnp.tile(one, (1, T)), jnp.tile(one, (1, S)), q_start, k_start,
        window, units=1)


@pytest.mark.slow
def test_keys_in_turns_that_do_not_fit_at_once():
  """With the output and log-sum-exp of all keys, the gradients of parts of them add up."""
  segment = segments('packed', 2, 70)
  check(make_inputs(2, 70, 70, 4, 2), segment, segment, resident=32, units=1)


def test_nothing_seen_gives_zero():
  q, k, v, do = make_inputs(2, 45, 45, 8, 2)
  ones, start = segments('whole', 2, 45), jnp.zeros(1, jnp.int32)
  o, lse = jnp.zeros_like(q), jnp.full((2, 8, 45), -1e30)
  for x in backward(q, k, v, ones, ones, start, start + 45, o, lse, do, window=None,
                    sizes=()):
    assert (x == 0).all()


def test_huge_norms_stay_finite():
  """Scores of a thousand: float32 rounds them by 1e-4, and so p = exp(s - lse)."""
  q, k, v, do = make_inputs(2, 45, 45, 8, 2)
  segment = segments('packed', 2, 45)
  check((20 * q, 20 * k, v, do), segment, segment, tolerance=2e-3)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_a_bfloat16_meaning():
  """Head dimension 128; errors against float32 of the same numbers."""
  inputs = make_inputs(1, 200, 200, 2, 1, H=128, dtype=jnp.bfloat16)
  segment, start = segments('padded', 1, 200), jnp.zeros(1, jnp.int32)
  place = segment, segment, start, start
  _, exact = differentiate(*(x.astype(jnp.float32) for x in inputs), *place)
  (o, lse), meant = differentiate(*inputs, *place)
  args, sizes = (*inputs[:3], *place, o, lse, inputs[3]), dict(queries=128, chunk=128, units=1)
  for a, b, c in zip(backward(*args, sizes=tuple(sizes.items())), meant, exact):
    assert a.dtype == jnp.bfloat16
    mine, usual = (float(jnp.linalg.norm(x.astype(jnp.float32) - c)) for x in (a, b))
    assert mine <= 2 * usual + 2e-3 * float(jnp.linalg.norm(c))


def test_too_small_a_memory_is_told_with_numbers():
  shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
  S = 1 << 17
  segment, start = shape(1, S, dtype=jnp.int32), shape(1, dtype=jnp.int32)
  with pytest.raises(ValueError, match=r'needs .* MiB of VMEM .*keys_values 128.*blocks.resident'):
    jax.eval_shape(functools.partial(flash_backward.backward, blocks=dict(resident=S)),
                   shape(1, S, 4, 128), shape(1, S, 1, 128), shape(1, S, 1, 128), segment, segment,
                   start, start, shape(1, S, 4, 128), shape(1, 4, S, dtype=jnp.float32),
                   shape(1, S, 4, 128))


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('T, S, N, K, H, dtype, sizes', [
    (4096, 4096, 4, 1, 128, jnp.bfloat16, {}),
    (2048, 3000, 5, 1, 128, jnp.bfloat16, dict(resident=1024)),
    (1024, 1024, 2, 1, 64, jnp.float32, dict(chunk=128, units=2))])
def test_compiles(topology, T, S, N, K, H, dtype, sizes):
  """Mosaic takes it for every TPU: a plain step, keys in turns, and float32 of width 64."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices[:1]), ('x',))
  shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(
    dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
  start = shape(1, dtype=jnp.int32)
  q, k, lse = shape(1, T, N, H), shape(1, S, K, H), shape(1, N, T, dtype=jnp.float32)
  run = functools.partial(flash_backward.backward, window=1500 if sizes else None, blocks=sizes,
                          dtype=jnp.float32 if sizes else None)
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(q, k, k, shape(1, T, dtype=jnp.int32),
                                  shape(1, S, dtype=jnp.int32), start, start, q, lse, q).compile()
  assert 'flash_backward' in compiled.as_text()
