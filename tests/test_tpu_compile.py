"""The real TPU compiler accepts the training step, dense and mixture, on a described topology.

Compiled, not run: no TPU is here. Sizes of memory for real models: `python -m qwen3_jax plan`.
"""
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.scaling import traffic, work
from qwen3_jax.spec import Spec
from qwen3_jax.training import losses, optim
from qwen3_jax.training import step as training

MOE = dict(experts=16, chosen=4, expert_mlp=128)


def trace_step(topology, shape, spec, length, dtype=jnp.float32, remat='full'):
  """(the step on 4 rows traced, its mesh); matrices and their gradients in `dtype`."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = alphabet.make_mesh(shape, devices)
  optimizer = optim.adamw()

  def abstract(tree):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                        alphabet.shardings(tree, mesh))
  make = functools.partial(transformer.make, spec)
  state = abstract(jax.eval_shape(lambda: training.state_of(make(), optimizer)))
  batch = abstract({f'{name}_BT': jax.ShapeDtypeStruct((4, length), dtype) for name, dtype in dict(
      tokens=jnp.int32, segment=jnp.int32, position=jnp.int32, weight=jnp.float32).items()})

  def loss(params, batch):
    return losses.next_token(transformer.cast(params, dtype), batch, remat=remat,
                             dtype=jnp.bfloat16, balance=0.008)
  step = training.make_step(loss, optimizer, lambda step: 3e-4)
  out = jax.tree.map(lambda x: x.sharding, state), None
  with jax.set_mesh(mesh):
    return jax.jit(step, donate_argnums=0, out_shardings=out).trace(state, batch), mesh


def compile_step(*args):
  """`trace_step`, compiled."""
  traced, mesh = trace_step(*args)
  with jax.set_mesh(mesh):
    return traced.lower().compile(), mesh


@pytest.mark.slow
def test_policies_compute_again_what_they_say():
  """By hand, of 4 rows: 'full' all of a layer but the last product, 'dots' no product at all."""
  T, spec = 1024, Spec(12, 512, 4, 2, 1024, 16384, 128, tied=True)
  found = {remat: work.of_jaxpr(trace_step(
    'v5p:2x2x1', dict(fsdp=4), spec, T, jnp.bfloat16, remat)[0].jaxpr.jaxpr)
    for remat in ('none', 'dots', 'attention_out', 'full', 'offload')}
  D, heads, kv = spec.width, spec.heads * spec.head_width, spec.kv_heads * spec.head_width
  layer = 2 * 4 * T * spec.layers
  assert found['dots'] == pytest.approx(found['none'], rel=0.001)  # rotations and norms
  assert found['attention_out'] - found['dots'] == pytest.approx(
    layer * D * (heads + 2 * kv + 2 * spec.mlp), rel=0.001)
  attention = found['full'] - found['attention_out'] - layer * heads * D
  assert attention == pytest.approx(layer * 2 * heads * T / 2, rel=0.3)  # blocks on the diagonal
  assert found['offload'] == found['full']


@pytest.mark.slow
@pytest.mark.parametrize('topology, shape, moe', [
    ('v5p:2x2x1', dict(fsdp=2, tensor=2), {}),
    ('v6e:2x2', dict(fsdp=4), MOE)], ids=lambda x: str(x))
def test_step_compiles_in_bounded_memory(topology, shape, moe, capfd):
  """No buffer holds all logits or all scores, and nothing is fully rematerialised to be moved."""
  compiled, _ = compile_step(topology, shape, Spec(10, 256, 4, 2, 512, 8192, 128, **moe), 4096)
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  text = compiled.as_text()
  rows = 4 // shape['fsdp']
  for whole in (f'[{rows},4096,8192]', f'[{rows * 4096},8192]', '4096,4096]'):
    assert whole not in text
  memory = compiled.memory_analysis()
  logits = rows * 4096 * 8192 * 4
  assert memory.temp_size_in_bytes < 1.5 * logits  # all logits and their gradient would be 2


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_dense_gradients_are_exchanged_in_their_type(dtype):
  """What fsdp sends, by hand: weights twice in bfloat16, the head once, each gradient once.

  Of the tied embedding nothing more: tokens' rows go to and fro. Nothing large is all-reduced.
  """
  spec = Spec(12, 512, 4, 2, 1024, 16384, 128, tied=True)
  compiled, mesh = compile_step('v5p:2x2x1', dict(fsdp=4), spec, 1024, dtype)
  sent = {}
  for each in traffic.read(compiled.as_text(), mesh):
    kind = 'gathered' if each.kind in ('all-gather', 'collective-permute') else each.kind
    sent[kind] = sent.get(kind, 0) + each.runs * each.bytes
  table = spec.vocab * spec.width
  layers, size = spec.parameters() - table, jnp.dtype(dtype).itemsize
  assert sent['all-to-all'] == pytest.approx(size * (layers + table) + 2 * 2 * 1024 * spec.width,
                                             rel=0.01)
  # A product that gathers as it goes sends what it begins with round the ring, 4 parts of 3.
  assert 0.95 < sent['gathered'] / (2 * (2 * layers + table)) < 1.36
  assert sent['all-reduce'] < 0.01 * sent['all-to-all']
