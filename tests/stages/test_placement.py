"""Placements: who gets which devices, what is refused, and that losses do not depend on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.stages import placement
from qwen3_jax.training import policy
from qwen3_jax.training import step as training


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a placement looks at of a device."""
  id: int
  slice_index: int = 0
  process_index: int = 0

  def __str__(self):
    return f'chip {self.id}'


def chips(slices, each=2, hosts=1):
  return [Chip(i, i // each, i * hosts // (slices * each)) for i in range(slices * each)]


def test_who_gets_which_devices():
  eight = chips(4)
  assert placement.divide('colocated', None, None, eight) == (eight, eight)
  assert placement.divide('split', 0.75, None, eight) == (eight[:6], eight[6:])
  assert placement.divide('by_slice', None, (3, 1), eight) == (eight[:6], eight[6:])
  shuffled = eight[::-1]
  train, draw = placement.divide('by_slice', None, (1, 3), shuffled)
  assert {c.slice_index for c in train} == {0} and {c.slice_index for c in draw} == {1, 2, 3}


def test_meshes():
  devices = jax.devices()[:4]
  mesh, same = placement.place(shape=dict(tensor=2), devices=devices)
  assert mesh is same and dict(mesh.shape) == dict(data=1, fsdp=2, expert=1, context=1, tensor=2)
  mesh, rollout = placement.place(shape=dict(fsdp=4), rollout_shape=dict(tensor=4), devices=devices)
  assert mesh.devices.size == rollout.devices.size == 4 and rollout.shape['tensor'] == 4
  mesh, rollout = placement.place('split', 0.5, shape=dict(tensor=2, fsdp=1), devices=devices)
  assert list(mesh.devices.flat) == devices[:2] and list(rollout.devices.flat) == devices[2:]
  assert mesh.shape == rollout.shape
  mesh, rollout = placement.place('split', 0.25, devices=devices)
  assert mesh.shape['fsdp'] == 1 and rollout.shape['fsdp'] == 3


@pytest.mark.parametrize('arguments, message', [
  (('apart', None, None, chips(2)), "no placement 'apart'; want one of colocated, split, by_slice"),
  (('split', None, None, chips(2)), "config.placement.fraction is None, the placement 'split'"),
  (('colocated', 0.5, None, chips(2)), "fraction is 0.5, the placement 'colocated'"),
  (('split', 0.5, (1, 1), chips(2)), r"slices is \(1, 1\), the placement 'split'"),
  (('split', 0.4, None, chips(2)), '0.4 of 4 devices is 1.6: chip 1 would be left over'),
  (('split', 1.0, None, chips(2)), 'must be k / 4, with 0 < k < 4'),
  (('split', -0.5, None, chips(2)), 'must be k / 4'),
  (('by_slice', None, (1, 1), chips(3)),
   r'slices \(1, 1\) of 3: slices \[2\] \(chip 4, chip 5\) would be left over'),
  (('by_slice', None, (2, 2), chips(3)), r'slices \(2, 2\) of 3: some would be wanted twice'),
  (('by_slice', None, (2, 0), chips(2)), 'at least 1 each'),
  (('split', 0.5, None, chips(2, hosts=2)), 'over 2 processes: each process .* Pathways'),
  (('by_slice', None, (1, 1), chips(2, hosts=4)), 'over 4 processes')])
def test_refusals(arguments, message):
  with pytest.raises(ValueError, match=message):
    placement.divide(*arguments)


def test_all_hosts_may_do_both():
  many = chips(2, hosts=4)
  assert placement.divide('colocated', None, None, many) == (many, many)


SPEC = Spec(1, 32, 2, 1, 48, 64, 16, tied=True)


def test_weights_that_lie_right_are_handed_over_as_they_are():
  mesh, rollout = placement.place(devices=jax.devices()[:4])
  params = transformer.init(SPEC, mesh=mesh)
  given = placement.hand_over(params, rollout)
  def pointers(tree):
    return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)
            for shard in x.addressable_shards]
  assert pointers(given) == pointers(params)
  _, apart = placement.place('split', 0.5, devices=jax.devices()[:4])
  moved = placement.hand_over(params, apart)
  assert {d for x in jax.tree.leaves(moved) for d in x.devices()} == set(jax.devices()[2:4])
  for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True):
    np.testing.assert_array_equal(a, b)


def learn(train, rollout, updates=2):
  """Losses and reports of updates, each on values that the rollout's devices computed before it."""
  rng = np.random.default_rng(0)
  optimizer = optax.scale_by_adam()
  state = training.initial_state(functools.partial(transformer.make, SPEC), optimizer, train)
  step = jax.jit(training.make_step(
    functools.partial(policy.loss, settings=policy.Policy(clip_low=0.01, clip_high=0.01)),
    optimizer, lambda step: 1e-2, report=policy.report), donate_argnums=0)
  values, seen = jax.jit(policy.token_values), []
  weight = np.ones((4, 16), np.float32)
  weight[:, 0] = 0
  for number in range(updates):
    batch = dict(tokens_BT=rng.integers(0, 64, (4, 16)).astype(np.int32),
                 segment_BT=np.ones((4, 16), np.int32), weight_BT=weight, scale_BT=weight / 60,
                 position_BT=np.tile(np.arange(16, dtype=np.int32), (4, 1)),
                 advantage_BT=np.array([1, -1, 1, -1], np.float32)[:, None] * weight)
    if number % 2 == 0:  # the others are one step off
      params = placement.hand_over(jax.tree.map(jnp.copy, state.params), rollout)
    with jax.set_mesh(rollout):
      logp = np.asarray(values(params, alphabet.to_global(batch, range(4), 4, rollout))[0])
    with jax.set_mesh(train):
      batch = alphabet.to_global(batch | dict(rollout_logp_BT=logp, old_logp_BT=logp), range(4), 4,
                                 train)
      state, report = step(state, batch)
    seen.append([float(report[name]) for name in ('loss', 'ratio', 'mismatch', 'entropy')])
  return np.array(seen)


@pytest.mark.slow
def test_losses_are_the_same_wherever_tokens_are_drawn():
  """Colocated and split, the weights handed over after each update and one update late."""
  devices = jax.devices()[:4]
  want = learn(*placement.place(devices=devices[:2]))
  got = learn(*placement.place('split', 0.5, devices=devices))
  assert abs(want[1, 1] - 1) > 1e-3 and abs(want[0, 1] - 1) < 1e-5  # one step off, and on-policy
  np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)
