"""Routing replay: given experts with the current router's gates, in the forward and recomputed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import advantage, policy

SPEC = Spec(layers=2, width=32, heads=2, kv_heads=1, mlp=48, vocab=64, head_width=16, experts=8,
            chosen=2, expert_mlp=16)


@pytest.fixture(scope='module')
def model():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(functools.partial(transformer.make, SPEC))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.1, x.shape), x.dtype), shapes)


@pytest.fixture(scope='module')
def batch():
  """Two rows of two samples, the last places padding."""
  rng = np.random.default_rng(1)
  segment = np.repeat([[1, 2, 0]], 2, 0).repeat([7, 8, 1], axis=1)
  weight = ((segment > 0) & (np.arange(16) % 7 > 2)).astype(np.float32)
  scale = advantage.aggregate([weight.sum()])[0] * weight
  return dict(
    tokens_BT=rng.integers(0, 64, (2, 16)), segment_BT=segment, weight_BT=weight, scale_BT=scale,
    position_BT=np.concatenate([np.arange(7), np.arange(8), [0]])[None].repeat(2, 0),
    advantage_BT=rng.normal(size=(2, 16)).astype(np.float32) * weight)


@pytest.fixture(scope='module')
def own(model, batch):
  """The model's own choices as a batch has them (B, T, MoE layers, X)."""
  _, _, routes = jax.jit(policy.token_values)(model, batch)
  return np.asarray(routes).transpose(1, 2, 0, 3).astype(np.uint8)


@pytest.fixture(scope='module')
def drifted(own):
  """Routes that have not one expert in common with the router's own."""
  rng = np.random.default_rng(2)

  def draw(taken):
    return rng.permutation(np.setdiff1d(np.arange(8), taken))[:2]
  return np.apply_along_axis(draw, -1, own).astype(np.uint8)


def gradients(model, batch, remat='none'):
  return jax.jit(jax.value_and_grad(functools.partial(
    policy.loss, settings=policy.Policy(), remat=remat), has_aux=True))(model, batch)


@pytest.fixture(scope='module')
def replayed(model, batch, drifted):
  return gradients(model, batch | dict(routes_BTLX=drifted))


def test_layers_computed_again_replay_too(model, batch, drifted, replayed):
  """Were the recomputation to choose for itself, gradients would be of other experts."""
  (want, _), want_gradient = replayed
  (value, _), gradient = gradients(model, batch | dict(routes_BTLX=drifted), 'full')
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for a, b in zip(*map(jax.tree.leaves, (gradient, want_gradient)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


def test_routers_learn_where_their_own_choice_is_another(replayed, own, drifted):
  """Gathered from scores that are zero but for the router's top, the gradient would be none."""
  assert not (own[..., None] == drifted[..., None, :]).any()
  routers = [np.asarray(stack.mlp.router_DE[...]) for stack in replayed[1].stacks]
  assert all(np.abs(router).max() > 1e-6 for stack in routers for router in stack)


def test_gates_are_the_current_scores_of_the_given_experts(model, batch, drifted):
  """g = I exp(s) / sum I exp(s) with I the given experts and s the router's scores now."""
  moe = jax.tree.map(lambda w: w[0], model.stacks[0]).mlp
  x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 16, 32)), jnp.float32)
  routes = jnp.asarray(drifted[:, :, 0], jnp.int32)
  context = transformer.Context(None, jnp.asarray(batch['segment_BT']))

  def ours(router):
    part = jax.tree.map(lambda w: w, moe)
    part.router_DE = type(moe.router_DE)(router)
    return part(x, SPEC, context, routes)[0]

  def by_hand(router):
    s_BTE = x @ router
    here_BTE = (routes[..., None] == jnp.arange(8)).any(-2)
    gate_BTE = jnp.where(here_BTE, jnp.exp(s_BTE), 0)
    gate_BTE = gate_BTE / gate_BTE.sum(-1, keepdims=True)
    h = jax.nn.silu(jnp.einsum('BTD,EDF->BTEF', x, moe.gate_EDF[...]))
    y = jnp.einsum('BTEF,EFD->BTED', h * jnp.einsum('BTD,EDF->BTEF', x, moe.up_EDF[...]),
                   moe.down_EFD[...])
    return jnp.einsum('BTE,BTED->BTD', gate_BTE, y)
  direction = jnp.asarray(np.random.default_rng(4).normal(size=x.shape), jnp.float32)

  @jax.jit
  def both(router):
    (got, pull), (want, pull2) = jax.vjp(ours, router), jax.vjp(by_hand, router)
    return got, want, pull(direction)[0], pull2(direction)[0]
  got, want, gradient, gradient2 = both(moe.router_DE[...])
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_allclose(gradient, gradient2, atol=1e-5)


def test_agreement_of_each_layer(model, batch, own, drifted):
  """Half of the routes replaced, in the order of a set, in the second MoE layer."""
  mixed = own[..., ::-1].copy()
  counted = (batch['segment_BT'] > 0) & (np.arange(16) != 6) & (np.arange(16) != 14)
  changed = (np.arange(16) % 3 == 0) & counted
  mixed[:, :, 1, 0] = np.where(changed, drifted[:, :, 1, 0], mixed[:, :, 1, 0])
  mixed[:, 6], mixed[:, 14:] = drifted[:, 6], drifted[:, 14:]  # these tokens predict no other
  got = jax.jit(policy.route_agreement)(model, batch | dict(routes_BTLX=mixed))
  share = changed.sum() / counted.sum()
  assert 0.2 < share < 0.6
  np.testing.assert_allclose(got['equal_L'], [1, 1 - share], rtol=1e-6)
  np.testing.assert_allclose(got['overlap_L'], [1, 1 - share / 2], rtol=1e-6)


def test_replay_takes_away_the_jumps_of_the_ratio(model, batch, own):
  """The routers moved: other experts make the ratio jump, other gates of the same ones less so."""
  def logp(model, routes=None):
    given = batch if routes is None else batch | dict(routes_BTLX=routes)
    return policy.token_values(model, given)[0]
  moved = jax.tree_util.tree_map_with_path(
    lambda path, w: w + 0.2 * np.random.default_rng(5).normal(size=w.shape).astype(np.float32)
    if 'router' in str(path) else w, model)
  free, kept = jax.jit(logp), jax.jit(logp)
  old = free(model)
  np.testing.assert_allclose(kept(model, own), old, atol=1e-5)  # its own routes change nothing
  jump, shift = (np.asarray(x - old)[batch['weight_BT'] > 0] for x in (
    free(moved), kept(moved, own)))
  assert np.square(jump).mean() > 3 * np.square(shift).mean() > 0
