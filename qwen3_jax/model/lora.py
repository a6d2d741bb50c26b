"""Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685): W + scale A B, with W frozen.

The adapters are a pytree of their own, the only thing that is trained, saved and has moments.
`attach` lends them to a frozen model, whose projections then add scale (x A) B to x W: no merged W
and no gradient of W's size exists in training. `merge` folds them in, for generation and export.

Tokens that a base model hardly ever saw (`<|im_end|>`, `<think>`) stay as untrained as they were:
adapters alone often never learn to stop. Start from a post-trained model or an SFT of all weights,
or add the targets 'embed' and 'head', which train these tables whole and cost their full gradient.
"""
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qwen3_jax.kernels.linear import linear
from qwen3_jax.mesh import letters

TARGETS = {  # name: (part of a block, weight, how many of its axes are inputs)
    'q': ('attention', 'q_DNH', 1), 'k': ('attention', 'k_DKH', 1), 'v': ('attention', 'v_DKH', 1),
    'o': ('attention', 'o_NHD', 2), 'gate': ('mlp', 'gate_DF', 1), 'up': ('mlp', 'up_DF', 1),
    'down': ('mlp', 'down_FD', 1)}
TABLES = {'embed': 'embed_VD', 'head': 'head_VD'}
OWN = ('embed_VD', 'norm_D', 'head_VD')  # parameters of a `Qwen3` outside its blocks
PRODUCT = 'product'  # by this name a policy of recomputation keeps what a projection gives
SAMPLES = 256  # elements of each weight that go into a fingerprint


def choose_targets(spec, rank, alpha, targets=None):
  """The targets as a tuple; by default all of a dense model's, those of attention of a mixture's.

  Raises ValueError for what cannot be adapted: experts have no adapters, a tied model no head.
  """
  if not isinstance(rank, int) or rank < 1:
    raise ValueError(f'config.lora.rank is {rank!r}; want a whole number from 1, or None for off')
  if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
    raise ValueError(f'config.lora.alpha is {alpha!r}; want a number above 0 (32, say): the '
                     'adapters are scaled by alpha / rank')
  targets = (targets,) if isinstance(targets, str) else tuple(targets or (
      name for name, (part, *_) in TARGETS.items() if part == 'attention' or not spec.experts))
  for name in targets:
    if name not in TARGETS and name not in TABLES:
      raise ValueError(f'config.lora.targets has {name!r}; want some of '
                       f'{", ".join((*TARGETS, *TABLES))}')
    if spec.experts and name in TARGETS and TARGETS[name][0] == 'mlp':
      raise ValueError(f'config.lora.targets has {name!r}, but this model is a mixture of experts: '
                       'experts have no adapters; want some of q, k, v, o')
    if spec.tied and name == 'head':
      raise ValueError("config.lora.targets has 'head', but this model's head is its embedding; "
                       "want 'embed', which trains both")
  return targets


class Pairs(nnx.Module):
  """A and B of each adapted weight of one part of a block: of `q_DNH`, `q_DU` and `q_UNH`.

  A is normal with variance 1 / inputs, so that x A has x's size; B is zero: a new adapter changes
  nothing.
  """

  def __init__(self, spec, rank, part, targets, rngs):
    sizes = dict(D=spec.width, N=spec.heads, K=spec.kv_heads, H=spec.head_width, F=spec.mlp, U=rank)
    for where, weight, inner in (TARGETS[name] for name in targets if name in TARGETS):
      if where == part:
        a, b = pair_names(weight, inner)
        a_shape, b_shape = ([sizes[letter] for letter in letters(name)] for name in (a, b))
        init = nnx.initializers.normal(math.prod(a_shape[:-1]) ** -0.5)
        setattr(self, a, nnx.Param(init(rngs.params(), a_shape, jnp.float32)))
        setattr(self, b, nnx.Param(jnp.zeros(b_shape)))


class BlockPairs(nnx.Module):
  """The adapters of a `Block`."""

  def __init__(self, spec, rank, targets, rngs):
    self.attention = Pairs(spec, rank, 'attention', targets, rngs)
    self.mlp = Pairs(spec, rank, 'mlp', targets, rngs)


class Adapters(nnx.Module):
  """All that a LoRA run trains: pairs stacked as the model's blocks are, and whole parameters.

  Whole are what `targets` adds to the model's tables (zero at first), and `extra`, parameters by
  name which the frozen model does not have or which stand for its own (the head of a reward model).
  """

  def __init__(self, spec, rank, alpha, targets, rngs, extra=()):
    self.spec, self.scale = spec, alpha / rank
    self.stacks = nnx.List([
        jax.vmap(lambda key: BlockPairs(spec, rank, targets, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), count)) for _, count, _ in spec.runs()])
    for name in TABLES.keys() & set(targets):
      setattr(self, TABLES[name], nnx.Param(jnp.zeros((spec.vocab, spec.width))))
    for name, parameter in dict(extra).items():
      setattr(self, name, parameter)


def make(spec, rank, alpha, targets=None, seed=0, extra=()):
  """New adapters; trace it under jit to have them made sharded. Raises as `choose_targets`."""
  targets = choose_targets(spec, rank, alpha, targets)
  return Adapters(spec, rank, alpha, targets, nnx.Rngs(seed), extra)


def extra(model):
  """The parameters by name that `model` has beyond those of a `Qwen3`: a reward model's head."""
  return {name: parameter for name, parameter in vars(model).items()
          if isinstance(parameter, nnx.Param) and name not in OWN}


def pair_names(weight, inner):
  """Names of A and B of `weight`: ('o_NHU', 'o_UD') of 'o_NHD', whose two first axes are inputs."""
  name, axes = weight.split('_')
  return f'{name}_{axes[:inner]}U', f'{name}_U{axes[inner:]}'


def project(module, weight, x, inner=1):
  """x times the module's weight of that name, plus x A B where an adapter of it is attached."""
  y = checkpoint_name(linear(x, getattr(module, weight)[...], inner, letters(weight)), PRODUCT)
  pairs, (a, b) = getattr(module, 'lora', None), pair_names(weight, inner)
  if not hasattr(pairs, a):
    return y
  low = linear(x, getattr(pairs, a)[...], inner)
  return y + linear(low, getattr(pairs, b)[...])


def attach(base, adapters):
  """The frozen model `base` with the adapters in its projections, B already scaled."""
  model = jax.tree.map(lambda w: w, base)
  for block, pairs in zip(model.stacks, jax.tree.map(lambda w: w, adapters).stacks, strict=True):
    for part in ('attention', 'mlp'):
      lora = getattr(pairs, part)
      for name in _pairs_of(lora):
        _, b = pair_names(*name)
        setattr(lora, b, nnx.Param(adapters.scale * getattr(lora, b)[...]))
      getattr(block, part).lora = lora
  return _with_whole(model, adapters)


def merge(base, adapters):
  """The plain model with W + scale A B, computed in float32, in W's type."""
  model = jax.tree.map(lambda w: w, base)
  for block, pairs in zip(model.stacks, adapters.stacks, strict=True):
    for part in ('attention', 'mlp'):
      module, lora = getattr(block, part), getattr(pairs, part)
      for weight, inner in _pairs_of(lora):
        a, b = (getattr(lora, name)[...] for name in pair_names(weight, inner))
        w = getattr(module, weight)[...]
        added = adapters.scale * jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
        setattr(module, weight, nnx.Param((w.astype(jnp.float32) + added).astype(w.dtype)))
  return _with_whole(model, adapters)


def _pairs_of(lora):
  """(weight, inner) of the adapters that a `Pairs` holds."""
  return [(weight, inner) for _, weight, inner in TARGETS.values()
          if hasattr(lora, pair_names(weight, inner)[0])]


def _with_whole(model, adapters):
  for name, parameter in vars(adapters).items():
    if isinstance(parameter, nnx.Param):
      if name in TABLES.values():
        w = getattr(model, name)[...]
        parameter = nnx.Param((w.astype(jnp.float32) + parameter[...]).astype(w.dtype))
      setattr(model, name, parameter)
  return model


def fingerprint(model):
  """Eight hex digits that change with the model's weights, whatever their layout and type.

  From up to SAMPLES elements of each weight, evenly spaced, rounded to bfloat16. What adapters have
  of their own (`extra`) does not count.
  """
  def sample(w):
    at = np.linspace(0, w.size - 1, min(w.size, SAMPLES)).astype(np.int64)
    return w[np.unravel_index(at, w.shape)].astype(jnp.bfloat16)
  mesh = jax.sharding.get_abstract_mesh()
  own = {name: part for name, part in vars(model).items() if name in ('stacks', *OWN)}
  out = None if mesh.empty else jax.P()
  picked = jax.jit(lambda own: jax.tree.map(sample, own), out_shardings=out)(own)
  return f'{zlib.crc32(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(picked))):08x}'
