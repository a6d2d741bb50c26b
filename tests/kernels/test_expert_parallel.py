"""Experts split over devices equal their plain meaning: whatever the routing, nothing is lost."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import expert_parallel, reference
from qwen3_jax.model import moe

B, T, X, E, D, F = 4, 24, 3, 8, 16, 8
MESHES = [dict(expert=4, fsdp=1), dict(expert=2, fsdp=2), dict(expert=2, fsdp=1, tensor=2),
          dict(expert=2, fsdp=1, context=2)]
ROUTES = {
    'random': lambda n: np.argsort(np.random.default_rng(0).random((len(n), E)), 1)[:, :X],
    'all to one device': lambda n: np.stack([0 * n, 1 + 0 * n], 1),
    'empty experts': lambda n: np.stack([n % 2, 5 + n % 2], 1),
    'one hot device': lambda n: np.stack([np.where(n % 9, 6, 3), 7 + 0 * n], 1)}


def make(kind):
  """(chosen experts (B, T, X), [x, gates, the three weights, dy])."""
  chosen = jnp.asarray(ROUTES[kind](np.arange(B * T)), jnp.int32).reshape(B, T, -1)
  shapes = (B, T, D), chosen.shape, (E, D, F), (E, D, F), (E, F, D), (B, T, D)
  keys = jax.random.split(jax.random.key(1), len(shapes))
  return chosen, [jax.random.normal(key, shape) / 2 for key, shape in zip(keys, shapes)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, chosen, x, gate, gate_EDF, up_EDF, down_EFD, dy):
  y, pull = jax.vjp(lambda x, gate, *weights: function(x, chosen, gate, *weights), x, gate,
                    gate_EDF, up_EDF, down_EFD)
  return y, *pull(dy)


def meaning(x, chosen, gate, *weights):
  flat = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, gate))
  return reference.experts(*flat, *weights).reshape(x.shape)


def run_sharded(shape, chosen, arrays):
  mesh = alphabet.make_mesh(shape)
  names = 'BTX', 'BTD', 'BTX', 'EDF', 'EDF', 'EFD', 'BTD'
  placed = [jax.device_put(a, NamedSharding(mesh, alphabet.partition(n, a.shape, mesh)))
            for n, a in zip(names, (chosen, *arrays))]
  with jax.set_mesh(mesh):
    return jax.jit(value_and_gradients.__wrapped__, static_argnums=0)(
      moe._sharded_experts, *placed)


def compare(got, want):
  for name, a, b in zip(('y', 'dx', 'dgate', 'dgate_EDF', 'dup_EDF', 'ddown_EFD'), got, want):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize('shape', [
    MESHES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[1:])], ids=str)
@pytest.mark.parametrize('kind', ROUTES)
def test_every_mesh_in_several_turns(kind, shape, monkeypatch):
  """Blocks of a few tokens, in turns of fewer rows and choices than an even routing needs."""
  monkeypatch.setattr(expert_parallel, 'ROWS', 32)
  monkeypatch.setattr(expert_parallel.kernel, 'SLACK', 0.7)
  chosen, arrays = make(kind)
  compare(run_sharded(shape, chosen, arrays), value_and_gradients(meaning, chosen, *arrays))


def test_all_in_one_turn():
  chosen, arrays = make('random')
  compare(run_sharded(MESHES[0], chosen, arrays), value_and_gradients(meaning, chosen, *arrays))


def test_rows_that_no_axis_divides():
  """Three rows: every device has all tokens, and they count once."""
  chosen, arrays = make('random')
  chosen, *arrays = (a[:3] if len(a) == B else a for a in (chosen, *arrays))
  compare(run_sharded(MESHES[1], chosen, arrays), value_and_gradients(meaning, chosen, *arrays))


def test_buffers_do_not_grow_with_the_routing():
  """Four devices, a layer of 30b-a3b: a turn's rows are few, and all buffers are of this size."""
  gate_EDF = jax.ShapeDtypeStruct((32, 2048, 768), jnp.bfloat16)
  sizes = expert_parallel.choose(16384, 8, 4, gate_EDF, jnp.bfloat16)
  assert sizes.block * 4 * (1 - .75 ** 8) <= 4 * sizes.rows <= expert_parallel.ROWS
  assert sizes.choices < 1.3 * sizes.block * 8 / 4
  assert sizes.leaving == round(3 * (1 - .75 ** 8) * sizes.block)


def test_one_token():
  """As in decoding: every device has one, on a mesh where a turn's fair share is less than one."""
  chosen, arrays = make('one hot device')
  chosen, *arrays = (a[:, :1] if a.shape[:2] == (B, T) else a for a in (chosen, *arrays))
  compare(run_sharded(MESHES[0], chosen, arrays), value_and_gradients(meaning, chosen, *arrays))


def test_turns_are_as_many_as_the_routing_needs():
  mesh = alphabet.make_mesh(dict(expert=4, fsdp=1))
  sizes = expert_parallel.Sizes(block=16, rows=6, choices=8, leaving=0)

  def count(chosen_MX):
    return expert_parallel._count_turns(chosen_MX, 2, sizes, 'expert')
  chosen = np.tile(np.arange(64)[:, None] * 2 % 8, (1, 2)) + [0, 1]  # pairs, evenly over devices
  run = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=PartitionSpec('expert'),
                              out_specs=PartitionSpec(), check_vma=False))
  np.testing.assert_array_equal(run(chosen), [1])
  np.testing.assert_array_equal(run(chosen * 0 + [2, 3]), [1 + 16 // 6 + 32 // 7])
