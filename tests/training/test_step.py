"""The training step: accumulation, skipped updates, sharding, and what XLA makes of it."""

import contextlib
import functools
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import losses, optim
from qwen3_jax.training import step as training

LOSS = functools.partial(losses.next_token, balance=0.05, router_z=0.01)
MESHES = [dict(fsdp=4), dict(tensor=2, fsdp=2), dict(data=2, fsdp=2), dict(expert=4),
          *(pytest.param(shape, marks=pytest.mark.slow) for shape in (
            dict(expert=2, fsdp=2), dict(expert=2, tensor=2), dict(expert=2, context=2)))]


def leaves(tree):
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_micro_batches_add_up_to_one_batch(models, draw_batch):
  """Loss and gradients (params - new params) of ragged rows, cut in 1, 2 and 4.

  For a mixture of experts, whose counts run over the micro-batches, see test_losses.
  """
  batch, found = draw_batch(seed=1), []
  state = training.state_of(models['dense'], optax.identity())
  sizes = (batch['weight_BT'] > 0).sum(1)
  assert len({sizes[part::4].sum() for part in range(4)}) == 4  # else a mean of means would do
  for parts in (1, 2, 4):
    step = training.make_step(losses.next_token, optax.identity(), lambda step: 1.0, parts)
    new, values = jax.jit(step)(state, batch)
    found.append((leaves(jax.tree.map(jnp.subtract, state.params, new.params)), values))
  (want, want_values), *others = found
  assert max(np.abs(g).max() for g in want) > 1e-3
  for got, values in others:
    for key in want_values:
      np.testing.assert_allclose(values[key], want_values[key], rtol=2e-6)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=3e-7)


def assert_same(a, b):
  for x, y in zip(leaves((a.params, a.opt)), leaves((b.params, b.opt)), strict=True):
    assert x.tobytes() == y.tobytes()


@pytest.fixture(scope='module')
def skipping(models):
  """(step, state) of a loss with a factor in the batch whose gradient can be spoilt."""
  def loss(params, batch):
    value, sums = losses.next_token(params, {k: v for k, v in batch.items() if k != 'root_B'})
    spoil = jnp.sqrt(batch['root_B'][0] * params.norm_D[0] ** 2)  # at 0: value 0, gradient NaN
    return value + spoil, sums
  optimizer = optim.adamw()
  step = jax.jit(training.make_step(loss, optimizer, lambda step: 1e-2, 2))
  return step, training.state_of(models['dense'], optimizer)


@pytest.mark.parametrize('spoilt', ['weight_BT', 'root_B'])
def test_update_that_is_not_finite_is_skipped_whole(skipping, draw_batch, spoilt):
  step, state = skipping
  good = draw_batch() | {'root_B': np.ones(8, np.float32)}
  bad = good | {spoilt: good[spoilt].copy()}
  bad[spoilt][4] = np.nan if spoilt == 'weight_BT' else 0
  bad[spoilt][0] = bad[spoilt][4]
  first, _ = step(state, good)
  second, values = step(first, bad)
  assert np.isfinite(values['loss']) == (spoilt == 'root_B')
  assert not np.isfinite(values['grad_norm'])
  third, values3 = step(second, bad)
  assert_same(first, third)
  assert [int(values[k]) for k in ('skipped', 'streak')] == [1, 1]
  assert [int(values3[k]) for k in ('skipped', 'streak')] == [2, 2]
  fourth, values4 = step(third, good)
  assert [int(x) for x in (fourth.step, values4['skipped'], values4['streak'])] == [4, 2, 0]
  want, _ = step(first, good)  # a skipped update leaves no trace but the counters
  assert_same(fourth, want)


@contextlib.contextmanager
def captured_stderr():
  """What the process, XLA's C++ included, writes to stderr: a list with one text at the end."""
  texts = []
  with tempfile.TemporaryFile('w+') as file:
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield texts
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      texts.append(file.read())


def compile_step(spec, mesh_shape, B, T, micro_batches=1, remat='none'):
  """(compiled step, mesh, what XLA wrote while compiling); no mesh for mesh_shape None."""
  optimizer = optim.adamw(eps=1e-3)  # so large that an update is smooth in its gradient
  step = training.make_step(functools.partial(LOSS, remat=remat), optimizer, lambda step: 1e-2,
                            micro_batches)
  state = jax.eval_shape(
    lambda: training.state_of(transformer.make(spec), optimizer))
  batch = {f'{name}_BT': jax.ShapeDtypeStruct((B, T), dtype) for name, dtype in dict(
    tokens=jnp.int32, segment=jnp.int32, position=jnp.int32, weight=jnp.float32).items()}
  if mesh_shape is None:
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), None, ''
  mesh = alphabet.make_mesh(mesh_shape)
  place = lambda tree: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
    alphabet.shardings(tree, mesh))
  state, batch = place(state), place(batch)
  out = jax.tree.map(lambda x: x.sharding, state), None
  with jax.set_mesh(mesh), captured_stderr() as written:
    compiled = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch).compile()
  return compiled, mesh, written[0]


def train(compiled, mesh, params, batch, steps=2):
  """Final state and each step's values of `steps` steps on the same batch."""
  state, history = training.state_of(params, optim.adamw(eps=1e-3)), []
  state = jax.tree.map(jnp.copy, state)  # the step donates it
  if mesh is not None:
    state, batch = (jax.device_put(x, alphabet.shardings(x, mesh)) for x in (state, batch))
  for _ in range(steps):
    state, values = compiled(state, batch)
    history.append({k: np.asarray(v) for k, v in values.items()})
  return state, history


@pytest.fixture(scope='module')
def unsharded(specs, models, draw_batch):
  @functools.cache
  def run(name):
    return train(*compile_step(specs[name], None, 8, 24)[:2], models[name], draw_batch())
  return run


def assert_close(trained, wanted):
  (got_state, got), (want_state, want) = trained, wanted
  for a, b in zip(got, want):
    for key in b:
      np.testing.assert_allclose(a[key], b[key], rtol=2e-5, atol=1e-6, err_msg=key)
  for a, b in zip(leaves(got_state), leaves(want_state), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.slow
def test_micro_batches_on_an_expert_axis(specs, models, draw_batch):
  trained, wanted = (train(*compile_step(specs['moe'], shape, 8, 24, 2)[:2], models['moe'],
                           draw_batch()) for shape in (dict(expert=2, fsdp=2), None))
  assert_close(trained, wanted)


@pytest.mark.parametrize('mesh_shape', MESHES, ids=str)
@pytest.mark.parametrize('name', ['dense', 'moe'])
def test_sharded_equals_unsharded(specs, models, draw_batch, unsharded, name, mesh_shape):
  compiled, mesh, written = compile_step(specs[name], mesh_shape, 8, 24)
  assert 'rematerialization' not in written, written
  got_state, got = train(compiled, mesh, models[name], draw_batch())
  assert_close((got_state, got), unsharded(name))
  embed = got_state.params.embed_VD[...]
  assert embed.sharding.shard_shape(embed.shape) != embed.shape
  moment = got_state.opt[1].mu.embed_VD[...]
  assert moment.sharding == embed.sharding


def test_the_warning_looked_for_would_be_seen():
  """A resharding that XLA can only do by gathering whole does write what the tests look for."""
  mesh = alphabet.make_mesh(dict(data=2, fsdp=2))
  def reshard(x):
    x = jnp.sin(jax.lax.with_sharding_constraint(x, jax.P(('data', 'fsdp'))))
    return jax.lax.with_sharding_constraint(x, jax.P(None, 'fsdp'))
  with jax.set_mesh(mesh), captured_stderr() as written:
    jax.jit(reshard).lower(jnp.ones((24, 8))).compile()
  assert 'rematerialization' in written[0]


@pytest.mark.parametrize('mesh_shape, parts', [(None, 1), (dict(tensor=2, fsdp=2), 2)])
def test_logits_never_exist_whole(mesh_shape, parts):
  """No float buffer in the compiled step holds vocabulary x tokens of even one row."""
  T, V = 2048, 4000
  spec = Spec(layers=1, width=16, heads=2, kv_heads=1, mlp=24, vocab=V, head_width=8, tied=True)
  rows = 1 if mesh_shape is None else 4
  compiled, _, written = compile_step(spec, mesh_shape, rows * parts, T, parts, 'full')
  assert 'rematerialization' not in written
  shards = {V, V // 2 if mesh_shape and 'tensor' in mesh_shape else V}
  largest = 0
  for match in re.finditer(r'\b(?:f|bf)\d+\[([\d,]+)\]', compiled.as_text()):
    sizes = [int(size) for size in match[1].split(',')]
    for width in shards & set(sizes):
      largest = max(largest, np.prod(sizes) // width)
  assert 1024 <= largest < T  # one chunk of 1,024 tokens was found, and nothing larger


def test_made_sharded_is_the_same(specs):
  optimizer = optim.adamw()
  make = functools.partial(transformer.make, specs['dense'], 3)
  whole = training.initial_state(make, optimizer)
  spread = training.initial_state(make, optimizer, alphabet.make_mesh(dict(tensor=2)))
  for a, b in zip(leaves(whole), leaves(spread), strict=True):
    assert a.tobytes() == b.tobytes()
  donated = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(whole)
  assert int(donated.step) == 1  # its buffers are its own: none is donated twice


def test_rows_must_divide(models, draw_batch):
  step = training.make_step(LOSS, optax.identity(), lambda step: 1.0, 3)
  with pytest.raises(ValueError, match='8 rows cannot be cut into 3 micro-batches'):
    jax.eval_shape(step, training.state_of(models['dense'], optax.identity()), draw_batch())


@pytest.mark.parametrize('size', ['30b-a3b', '235b-a22b'])
def test_largest_models_trace(size):
  """Their whole step, by `eval_shape`: nothing is allocated."""
  spec, optimizer = Spec.named(size), optim.adamw()
  state = jax.eval_shape(lambda: training.state_of(transformer.make(spec), optimizer))
  shape = jax.ShapeDtypeStruct((8, 4096), jnp.int32)
  batch = dict(tokens_BT=shape, segment_BT=shape, position_BT=shape,
               weight_BT=jax.ShapeDtypeStruct((8, 4096), jnp.float32))
  loss = functools.partial(LOSS, dtype=jnp.bfloat16, remat='full')
  new, values = jax.eval_shape(
    training.make_step(loss, optimizer, lambda step: 1e-4, 2), state, batch)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
  assert all(jax.tree.leaves(same))
  assert sum(x.size for x in jax.tree.leaves(new.params)) == spec.parameters()
  assert values['expert_load_LE'].shape == (spec.layers, 128)
