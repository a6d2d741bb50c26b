"""Rows of the embedding: values and gradients, alone and on meshes, by tokens and by the table."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import embedding

V, D = 24, 8


def draw(rows, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (rows, 6)).astype(np.int32)
  return (jnp.asarray(rng.normal(size=(V, D)), dtype), jnp.asarray(tokens),
          jnp.asarray(rng.normal(size=(rows, 6, D)), dtype))


def rows_and_gradient():
  """A new function, which is traced anew: LANES is looked at then."""
  def both(table_VD, tokens_BT, d_BTD):
    rows, pull = jax.vjp(lambda w: embedding.look_up(w, tokens_BT, d_BTD.dtype), table_VD)
    return rows, pull(d_BTD)[0]
  return both


@pytest.mark.parametrize('lanes', [1, 10**6], ids=['tokens move', 'the table moves'])
@pytest.mark.parametrize('rows, shape', [
  (4, dict(fsdp=4)), (4, dict(tensor=2)), (4, dict(data=2)), (4, dict(context=2)),
  (2, dict(context=2, tensor=2)), (3, dict(fsdp=4)), (1, dict(fsdp=2, context=2))], ids=str)
def test_on_a_mesh_equals_alone(monkeypatch, rows, shape, lanes):
  """Also with fewer rows than devices, and with the vocabulary cut over `tensor`."""
  monkeypatch.setattr(embedding, 'LANES', lanes)
  table, tokens, d = draw(rows)
  want = np.zeros((V, D))
  np.add.at(want, tokens, d)
  mesh = alphabet.make_mesh(shape)
  named = dict(w_VD=table, t_BT=tokens, d_BTD=d)
  layout = alphabet.shardings(named, mesh)
  placed = [jax.device_put(x, layout[name]) for name, x in named.items()]
  with jax.set_mesh(mesh):
    found, gradient = jax.jit(rows_and_gradient())(*placed)
    program = str(jax.make_jaxpr(rows_and_gradient())(*placed))
  np.testing.assert_array_equal(found, table[tokens])
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  if mesh.shape['fsdp'] > 1:
    whole = f'f32[{V // mesh.shape["tensor"]},{D}]'
    gathers = [line for line in program.splitlines() if 'all_gather' in line]
    assert any(whole in line for line in gathers) == (lanes > 1 and rows == 4)
  if rows == 4:
    assert gradient.sharding.shard_shape((V, D)) == placed[0].sharding.shard_shape((V, D))


def test_gradient_of_a_frequent_token_is_added_in_float32():
  """4,096 times one: a sum kept in bfloat16 would stop growing at 256."""
  table, tokens = jnp.ones((4, 2), jnp.bfloat16), jnp.ones((1, 4096), jnp.int32)
  _, gradient = rows_and_gradient()(table, tokens, jnp.ones((1, 4096, 2), jnp.bfloat16))
  np.testing.assert_array_equal(np.float32(gradient), [[0, 0], [4096, 4096], [0, 0], [0, 0]])
