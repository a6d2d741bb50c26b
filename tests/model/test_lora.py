"""Adapters: nothing at first, the full update's direction at full rank, merged equals attached."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import packing
from qwen3_jax.model import fused, lora, reward, transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import losses, optim
from qwen3_jax.training import step as training

COMMON = dict(layers=2, width=32, heads=4, kv_heads=2, mlp=48, vocab=96, head_width=8)
SPECS = {'dense': Spec(**COMMON, tied=True), 'qwen2': Spec(**COMMON, qk_norm=False, qkv_bias=True),
         'moe': Spec(**COMMON, experts=8, chosen=2, expert_mlp=16)}
pytestmark = pytest.mark.usefixtures('quick_compilation')


def draw(build, seed=0):
  """A pytree of normal numbers, filled on the host, in the shapes that `build` makes."""
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.1, x.shape), x.dtype),
    jax.eval_shape(build))


@pytest.fixture(scope='module')
def models():
  return {name: draw(functools.partial(transformer.make, spec)) for name, spec in SPECS.items()}


def draw_batch(B=8, T=24, vocab=96):
  rng = np.random.default_rng(0)
  return packing.make_batch(
    [np.split(rng.integers(0, vocab, T - b), [T // 3]) for b in range(B)], T)


def loss_of(base, **options):
  def loss(adapters, batch, base=base):
    return losses.next_token(lora.attach(base, adapters), batch, **options)
  return loss


def test_default_targets_follow_the_kind_of_model():
  assert lora.choose_targets(SPECS['dense'], 8, 32) == tuple(lora.TARGETS)
  assert lora.choose_targets(SPECS['moe'], 8, 32) == ('q', 'k', 'v', 'o')
  assert lora.choose_targets(SPECS['moe'], 8, 32, 'q') == ('q',)


@pytest.mark.parametrize('spec, options, message', [
  ('dense', dict(rank=0), 'config.lora.rank is 0; want a whole number'),
  ('dense', dict(rank='8x'), "config.lora.rank is '8x'"),
  ('dense', dict(alpha=0.0), 'config.lora.alpha is 0.0; want a number above 0'),
  ('dense', dict(targets=('q', 'w')), "has 'w'; want some of q, k, v, o, gate, up, down, embed"),
  ('dense', dict(targets=('head',)), "its embedding; want 'embed'"),
  ('moe', dict(targets=('q', 'up')), "'up', but this model is a mixture .* no adapters; want")])
def test_what_cannot_be_adapted_is_refused(spec, options, message):
  with pytest.raises(ValueError, match=message):
    lora.make(SPECS[spec], **dict(rank=4, alpha=8.0) | options)


def test_new_adapters_change_nothing_and_trained_ones_do(models):
  tokens_BT, spec = draw_batch()['tokens_BT'], SPECS['dense']

  @jax.jit
  def hidden(base, adapters=None):
    return (lora.attach(base, adapters) if adapters else base)(tokens_BT).hidden_BTD
  new = jax.jit(lambda: lora.make(spec, 4, 8.0))()
  plain = hidden(models['dense'])
  assert (hidden(models['dense'], new) == plain).all()
  assert np.abs(hidden(models['dense'], draw(lambda: new, 1)) - plain).max() > 0.1
  a = np.asarray(new.stacks[0].mlp.down_FU[...])  # variance 1 / inputs, another draw in each layer
  assert a.std() == pytest.approx(48 ** -0.5, rel=0.15) and not np.allclose(a[0], a[1])


@pytest.mark.parametrize('name', SPECS)
def test_merged_equals_attached(models, name):
  """Logits in float32, within 2e-5 of logits of size 3; every default target has a part in them."""
  spec, base, tokens_BT = SPECS[name], models[name], draw_batch()['tokens_BT']
  tables = ('embed',) if spec.tied else ('embed', 'head')
  targets = lora.choose_targets(spec, 4, 8.0) + tables
  adapters = draw(lambda: lora.make(spec, 4, 8.0, targets), 1)

  @jax.jit
  def logits(base, adapters=None):
    model = lora.attach(base, adapters) if adapters else base
    return model.logits(model(tokens_BT).hidden_BTD)
  merged = jax.jit(lora.merge)(base, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  want = logits(base, adapters)
  assert np.abs(want).max() > 2
  np.testing.assert_allclose(logits(merged), want, atol=2e-5)
  same = jax.tree.map(lambda a, b: bool((a == b).all()), base, merged)
  kept = {name for name, same in alphabet_names(same).items() if same}
  assert all('norm' in name or 'bias' in name or 'mlp' in name and spec.experts for name in kept)


def alphabet_names(tree):
  return {jax.tree_util.keystr(path): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_full_rank_takes_the_direction_of_the_full_update(models):
  """First SGD step, B zero, A with orthonormal rows: each W moves by -scale^2 G, G its gradient."""
  base, batch, spec = models['dense'], draw_batch(), SPECS['dense']
  rank, alpha = 48, 24.0  # the largest number of inputs: `down`'s
  batch |= dict(total_weight=batch['weight_BT'].sum())
  rng = np.random.default_rng(0)

  def start(path, x):
    if not path[-2].name.endswith('U'):
      return jnp.zeros(x.shape)
    tall = rng.normal(size=(2, rank, np.prod(x.shape[1:-1])))
    return jnp.array(np.linalg.qr(tall)[0].swapaxes(1, 2).reshape(x.shape), jnp.float32)
  shapes = jax.eval_shape(lambda: lora.make(spec, rank, alpha))
  adapters = jax.tree_util.tree_map_with_path(start, shapes)
  full = jax.jit(jax.grad(lambda params: losses.next_token(params, batch)[0]))(base)
  low = jax.jit(jax.grad(lambda adapters: loss_of(base)(adapters, batch)[0]))(adapters)
  moved = jax.jit(lambda w, g: jax.tree.map(
    jnp.subtract, lora.merge(base, jax.tree.map(jnp.subtract, w, g)), base))(adapters, low)
  for part, weight, _ in lora.TARGETS.values():
    got, want = (np.asarray(getattr(getattr(tree.stacks[0], part), weight)[...], np.float64)
                 for tree in (moved, full))
    assert np.abs(want).max() > 1e-4
    cosine = -(got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want)
    assert cosine > 1 - 1e-6
    assert np.linalg.norm(got) / np.linalg.norm(want) == pytest.approx((alpha / rank) ** 2, 1e-3)


@functools.cache
def compiled(kind, mesh=None, parts=1):
  """The training step of a middle-sized model, with remat and a scan over its ten layers."""
  spec = Spec(layers=10, width=256, heads=4, kv_heads=2, mlp=768, vocab=512, head_width=64,
              tied=True)
  base = jax.eval_shape(functools.partial(transformer.make, spec))
  params = base if kind == 'full' else jax.eval_shape(lambda: lora.make(spec, 8, 16.0))
  optimizer = optim.adamw()
  state = jax.eval_shape(lambda params: training.state_of(params, optimizer), params)
  batch = {f'{name}_BT': jax.ShapeDtypeStruct((4 * parts, 48), dtype) for name, dtype in dict(
    tokens=jnp.int32, segment=jnp.int32, position=jnp.int32, weight=jnp.float32).items()}
  loss = functools.partial(losses.next_token, remat='full')
  frozen = () if kind == 'full' else (base,)
  if frozen:
    loss = loss_of(None, remat='full')
  step = training.make_step(loss, optimizer, lambda step: 1e-3, parts)
  return spec, jax.jit(step, donate_argnums=0).lower(state, batch, *frozen).compile()


def test_no_gradient_of_a_frozen_weight_exists():
  """In the compiled step: no product of a weight's shape, and memory far below full training's.

  Full training makes 10 layers of gradients, and moments. The frozen model is read where it lies.
  """
  spec, full = compiled('full')
  _, low = compiled('lora')
  shapes = {(spec.width, spec.mlp), (spec.width, spec.heads * spec.head_width),
            (spec.vocab, spec.width)}
  shapes |= {shape[::-1] for shape in shapes}

  def products(text):
    found = {tuple(map(int, match[1].split(',')))
             for match in re.finditer(r'= f32\[([\d,]+)\]\S* dot\(', text)}
    return found & shapes
  assert products(full.as_text()) and not products(low.as_text())
  full, low = full.memory_analysis(), low.memory_analysis()
  weights = 4 * spec.parameters()
  adapters = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(
    lambda: lora.make(spec, 8, 16.0))))
  assert full.temp_size_in_bytes > weights > 1.8 * low.temp_size_in_bytes
  assert low.alias_size_in_bytes == pytest.approx(3 * adapters, rel=0.01)  # weights and moments
  assert low.argument_size_in_bytes == pytest.approx(weights + 3 * adapters, rel=0.01)


def train(spec, base, mesh_shape=None, parts=1, steps=2):
  """Adapters and each step's values of `steps` steps; on a mesh where its shape is given."""
  batch, optimizer = draw_batch(), optim.adamw(eps=1e-3)
  state = training.state_of(draw(lambda: lora.make(spec, 4, 8.0), 1), optimizer)
  loss = loss_of(None, remat='full')
  step = training.make_step(loss, optimizer, lambda step: 1e-2, parts)
  mesh = None
  if mesh_shape:
    mesh = alphabet.make_mesh(mesh_shape)
    state, batch, base = (jax.device_put(x, alphabet.shardings(x, mesh))
                          for x in (state, batch, base))
  out = (None if mesh is None else jax.tree.map(lambda x: x.sharding, state)), None
  run, history = jax.jit(step, out_shardings=out), []
  with jax.set_mesh(mesh) if mesh else jax.default_device(None):
    for _ in range(steps):
      state, values = run(state, batch, base)
      history.append({name: np.asarray(value) for name, value in values.items()})
  return state, history


@pytest.mark.parametrize('name', ['dense', pytest.param('moe', marks=pytest.mark.slow)])
def test_sharded_and_in_micro_batches_equals_plain(models, name):
  spec, base = SPECS[name], models[name]
  state, want = train(spec, base)
  assert want[1]['loss'] < want[0]['loss']
  other, got = train(spec, base, dict(tensor=2, fsdp=2), parts=2)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(state.params), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)
  pairs = other.params.stacks[0].attention  # sharded by their letters, the rank never
  a, b = pairs.q_DU[...], pairs.q_UNH[...]
  assert a.sharding.shard_shape(a.shape) == (2, 16, 4)
  assert b.sharding.shard_shape(b.shape) == (2, 4, 2, 8)


def test_adapted_blocks_are_not_fused(models):
  """Generation fuses weights and would drop the adapters without a word."""
  def fuse():
    adapted = lora.attach(models['dense'], lora.make(SPECS['dense'], 4, 8.0))
    return fused.fuse(adapted.unstacked()[0], SPECS['dense'], 1)
  with pytest.raises(ValueError, match='merge the adapters'):
    jax.eval_shape(fuse)


def test_head_of_a_reward_model_is_trained_whole(models):
  """It stands in the adapters, replaces that of the frozen model, and is no part of its name."""
  base = reward.from_language_model(models['qwen2'], seed=1)
  head = lora.extra(reward.make(SPECS['qwen2'], seed=2))
  adapters = lora.make(SPECS['qwen2'], 2, 8.0, extra=head)
  assert list(head) == ['reward_D'] and adapters.reward_D.shape == (32,)
  for model in (lora.attach(base, adapters), lora.merge(base, adapters)):
    assert isinstance(model, reward.RewardModel)
    assert (model.reward_D[...] == adapters.reward_D[...]).all()
  other = reward.from_language_model(models['qwen2'], seed=3)
  assert lora.fingerprint(other) == lora.fingerprint(base) != lora.fingerprint(models['dense'])


def test_fingerprint_knows_the_weights_not_their_layout(models):
  base = models['dense']
  want = lora.fingerprint(base)
  mesh = alphabet.make_mesh(dict(fsdp=4))
  with jax.set_mesh(mesh):
    assert lora.fingerprint(jax.device_put(base, alphabet.shardings(base, mesh))) == want
  assert lora.fingerprint(transformer.cast(base, jnp.bfloat16)) == want
  assert lora.fingerprint(models['qwen2']) != want
  other = jax.tree.map(lambda w: w, base)
  other.stacks[0].mlp.up_DF[...] = base.stacks[0].mlp.up_DF[...] * 1.01
  assert lora.fingerprint(other) != want
