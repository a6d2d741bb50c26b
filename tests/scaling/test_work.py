"""FLOPs of a jaxpr equal a count by hand."""
import jax
import jax.numpy as jnp
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.scaling import work
from qwen3_jax.spec import Spec
from qwen3_jax.training import losses


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_a_product():
  assert work.count_flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7


def test_a_loop_counts_its_turns():
  def loop(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
  assert work.count_flops(loop, shape(4, 8), shape(6, 8, 8)) == 6 * 2 * 4 * 8 * 8


def test_what_is_recomputed_counts():
  def loss(w, x, block):
    return jnp.sum(block(x, w) ** 2)

  def two(x, w):
    return jnp.tanh(x @ w) @ w
  plain = work.count_flops(jax.grad(lambda w, x: loss(w, x, two)), shape(8, 8), shape(4, 8))
  again = work.count_flops(jax.grad(lambda w, x: loss(w, x, jax.checkpoint(two))), shape(8, 8),
                           shape(4, 8))
  one = 2 * 4 * 8 * 8
  assert plain == 5 * one  # two forward, two of weights, one of inputs
  assert again - plain == one  # the first product again; the second's result is not needed


def test_on_each_device_of_a_mesh():
  mesh = alphabet.make_mesh(dict(fsdp=4))
  def body(x, w):
    return x @ w
  split = jax.sharding.PartitionSpec('fsdp')
  whole = jax.sharding.PartitionSpec()
  fn = jax.shard_map(body, mesh=mesh, in_specs=(split, whole), out_specs=split)
  assert work.count_flops(fn, shape(8, 5), shape(5, 7)) == 2 * 8 * 5 * 7


@pytest.mark.parametrize('tied', [True, False])
def test_a_dense_step_by_hand(tied):
  """6 for each weight and token, 12 for attention's pairs, blocks on the diagonal whole."""
  spec = Spec(2, 64, 4, 2, 128, 512, 16, tied=tied)
  B, T = 2, 128
  batch = {f'{name}_BT': jax.ShapeDtypeStruct((B, T), dtype) for name, dtype in dict(
    tokens=jnp.int32, segment=jnp.int32, position=jnp.int32, weight=jnp.float32).items()}
  params = jax.eval_shape(lambda: transformer.make(spec))

  def loss(params, batch):
    return losses.next_token(params, batch | {'total_weight': 1.0})[0]
  got = work.count_flops(jax.grad(loss), params, batch)
  N, K, H, D = spec.heads, spec.kv_heads, spec.head_width, spec.width
  layer = D * (N + 2 * K) * H + N * H * D + 3 * D * spec.mlp
  weights = 6 * B * T * (spec.layers * layer + D * spec.vocab)
  pairs = (2 + 5) * 2 * B * spec.layers * N * H * T * T  # one block: 2 products, 5 backward
  assert got == weights + pairs
