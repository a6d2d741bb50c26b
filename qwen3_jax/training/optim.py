"""AdamW and Muon with clipping, the types of their state, and the learning-rate schedules."""
import math

import jax
import jax.numpy as jnp
import optax

from qwen3_jax.mesh import letters
from qwen3_jax.training import factored

SCHEDULES = ('constant', 'cosine', 'wsd', 'linear')
KINDS = ('adamw', 'muon')
MOMENTS = ('float32', 'bfloat16', 'factored')
MATRICES = dict(  # of blocks: how many axes their inputs and their outputs have
  DNH=(1, 2), DKH=(1, 2), NHD=(2, 1), DF=(1, 1), FD=(1, 1), EDF=(1, 1), EFD=(1, 1))


def make(kind, b1, b2, eps, weight_decay, clip, moments):
  """The optimizer `kind`, one of KINDS; see `adamw` and `muon`. Raises ValueError."""
  if kind not in KINDS:
    raise ValueError(f'config.optim.kind is {kind!r}; want one of {", ".join(KINDS)}')
  return dict(adamw=adamw, muon=muon)[kind](b1, b2, eps, weight_decay, clip, moments)


def adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, moments='float32'):
  """Clip by global norm, Adam, decoupled weight decay; without the learning rate.

  The step multiplies by -lr(step) itself, so that a skipped update does not shift the schedule.
  Decay applies to matrices only. QK-norm scales grow large in long runs without it (Qwen3-Next
  report), but decaying them is a choice Qwen3 did not publish. `moments`: see `_adam`.
  """
  return _clipped(_adam(b1, b2, eps, moments), weight_decay, clip)


def muon(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, moments='float32'):
  """Muon for the blocks' matrices, Adam (`b1`, `b2`) for embedding, head, routers and norms.

  A matrix moves along its momentum (0.95, Nesterov) made orthogonal by five Newton-Schulz steps;
  each expert's and each layer's is one of its own. Scaled by 0.2 sqrt(max(inputs, outputs)), its
  update is as large as one of Adam, whose learning rates and decay then serve (Liu et al. 2025,
  2502.16982, eq. 4). One momentum in the place of two moments. Raises ValueError for 'factored':
  there is no second moment.
  """
  if moments == 'factored':
    raise ValueError("config.optim.moments is 'factored', but Muon keeps no second moment; want "
                     'float32 or bfloat16')

  def kinds(params):
    return _by_path(lambda path: 'muon' if _names(path) in MATRICES else 'adam', params)

  def axes(params):
    return _by_path(lambda path: optax.contrib.MuonDimensionNumbers(*_sides(path)), params)

  def scaled(updates, _):
    return jax.tree_util.tree_map_with_path(_scale, updates)
  matrices = optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=axes), optax.stateless(scaled))
  if moments == 'bfloat16':
    matrices = _held_in_bfloat16(matrices)
  return _clipped(optax.partition(dict(muon=matrices, adam=_adam(b1, b2, eps, moments)), kinds),
                  weight_decay, clip)


def _clipped(inner, weight_decay, clip):
  def matrices(params):
    return _by_path(lambda path: not _is_vector(path), params)
  return optax.chain(optax.clip_by_global_norm(clip), inner,
                     optax.add_decayed_weights(weight_decay, matrices))


def _adam(b1, b2, eps, moments):
  """Adam's direction, its moments by `moments`, one of MOMENTS.

  'bfloat16': both are rounded when kept, computed in float32: each is off by at most 2^-8 / (1 - b)
  of the largest that it was. 'factored': see `factored.scale`. Raises ValueError, also for a decay
  that bfloat16 would round away.
  """
  if moments not in MOMENTS:
    raise ValueError(f'config.optim.moments is {moments!r}; want one of {", ".join(MOMENTS)}')
  if moments != 'float32' and max(b1, b2 if moments == 'bfloat16' else 0) > 1 - 2 ** -7:
    raise ValueError(f'config.optim.moments is {moments!r}, but with b1 {b1} and b2 {b2} a step '
                     f'changes them by less than bfloat16 sees; want both up to {1 - 2 ** -7}')
  if moments == 'factored':
    return factored.scale(b1, b2, eps, _sides)
  adam = optax.scale_by_adam(b1, b2, eps)
  return adam if moments == 'float32' else _held_in_bfloat16(adam)


def _held_in_bfloat16(inner):
  """An optax transformation whose moments of matrices lie in bfloat16 from step to step."""
  def cast(state, dtype):
    def one(path, x):
      return x.astype(dtype) if _names(path) and not _is_vector(path) else x
    return jax.tree_util.tree_map_with_path(one, state)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, jnp.bfloat16)
  return optax.GradientTransformation(lambda params: cast(inner.init(params), jnp.bfloat16), update)


def _sides(path):
  """A matrix's axes of inputs and of outputs, counted from the last one; None for a vector.

  Layers and experts are no axis of a matrix: each has one.
  """
  names = _names(path)
  if _is_vector(path) or len(names) < 2:
    return None
  inputs, outputs = (MATRICES.get(names) or (1, len(names) - 1))
  return tuple(range(-outputs - inputs, -outputs)), tuple(range(-outputs, 0))


def _scale(path, update):
  sides = [math.prod(update.shape[axis] for axis in side) for side in _sides(path)]
  return 0.2 * max(sides) ** 0.5 * update


def _by_path(choose, tree):
  return jax.tree_util.tree_map_with_path(lambda path, _: choose(path), tree)


def _names(path):
  """The shape letters of the parameter that a leaf belongs to; '' of none."""
  found = [letters(str(getattr(key, 'name', ''))) for key in path]
  return next((names for names in reversed(found) if names), '')


def _is_vector(path):
  name = str(getattr(path[-2], 'name', ''))
  return 'norm' in name or 'bias' in name


def schedule(name, peak, steps, warmup=0, final=0.1, decay=0.2):
  """Learning rate as a function of the step (from 0), a float32 scalar.

  Linear warm-up over `warmup` steps, then by `name`: 'constant'; 'cosine' or 'linear' down to
  `final` * peak at `steps`; 'wsd' (warm-up, stable, decay): peak until the last `decay` fraction
  of the steps, then linear to `final` * peak.
  """
  if name not in SCHEDULES:
    raise ValueError(f'schedule {name!r} does not exist; want one of {", ".join(SCHEDULES)}')
  if warmup >= steps:
    raise ValueError(f'warm-up of {warmup} steps does not fit into {steps} steps')

  def lr(step):
    step = jnp.asarray(step, jnp.float32)
    start = steps * (1 - decay) if name == 'wsd' else warmup
    done = jnp.clip((step - start) / max(steps - start, 1), 0, 1)
    if name == 'cosine':
      done = 0.5 * (1 - jnp.cos(jnp.pi * done))
    scale = 1.0 if name == 'constant' else 1 - (1 - final) * done
    return peak * jnp.minimum((step + 1) / max(warmup, 1), 1) * scale
  return lr
