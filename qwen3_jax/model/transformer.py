"""Qwen3, dense and mixture of experts: an `nnx.Module` that is its own parameter pytree."""
import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from qwen3_jax.kernels.attention import OUT
from qwen3_jax.kernels.embedding import look_up
from qwen3_jax.mesh import constrain, shardings
from qwen3_jax.model import rope
from qwen3_jax.model.attention import Attention, rms_norm
from qwen3_jax.model.cache import Cache, Paged
from qwen3_jax.model.fused import fuse
from qwen3_jax.model.lora import PRODUCT
from qwen3_jax.model.moe import Balance, Mlp, Moe

UNROLLED = 8  # layers; a shorter stack is no loop (XLA:CPU runs a loop's body on one thread)

FLOAT32 = ('router_DE', 'reward_D')  # and the norms: parameters that are never rounded
_save = jax.checkpoint_policies
POLICIES = {  # what of a layer the backward pass finds saved beside its input
    'none': None,  # everything
    'full': _save.nothing_saveable,
    'attention_out': _save.save_only_these_names(OUT),  # what attention gives, and its projection
    'dots': _save.save_only_these_names(OUT, PRODUCT),  # and every projection: none is made again
    'offload': _save.save_and_offload_only_these_names(  # nothing, and the input is with the host
        names_which_can_be_saved=[], names_which_can_be_offloaded=['block_in'],
        offload_src='device', offload_dst='pinned_host'),
}


@struct.dataclass
class Context:
  """What every layer of one forward pass shares."""
  rotation: tuple[jax.Array, jax.Array]  # cos, sin (B, T, 1, H/2)
  segment_BT: jax.Array
  segment_BS: jax.Array | None = None  # with a cache: of all slots
  start: jax.Array | int = 0  # with a cache: slot (of `Paged`: position) of the first new token


@struct.dataclass
class Output:
  """`hidden_BTD` is after the final norm; per-layer statistics are stacked over the MoE layers."""
  hidden_BTD: jax.Array
  cache: Cache | Paged | None = None
  balance: Balance | None = None
  routes: jax.Array | None = None  # (layers, B, T, X)


class Block(nnx.Module):
  """x + attention(norm x), then x + mlp(norm x)."""

  def __init__(self, spec, sparse, rngs):
    self.attention_norm_D = nnx.Param(jnp.ones(spec.width))
    self.attention = Attention(spec, rngs)
    self.mlp_norm_D = nnx.Param(jnp.ones(spec.width))
    self.mlp = (Moe if sparse else Mlp)(spec, rngs)

  def __call__(self, x_BTD, spec, context, kv=None, routes=None):
    x_BTD = checkpoint_name(x_BTD, 'block_in')
    a_BTD = rms_norm(x_BTD, self.attention_norm_D[...], spec.norm_eps)
    a_BTD, kv = self.attention(a_BTD, spec, context, kv)
    x_BTD = x_BTD + checkpoint_name(a_BTD, OUT)
    m_BTD = rms_norm(x_BTD, self.mlp_norm_D[...], spec.norm_eps)
    m_BTD, balance, routes = self.mlp(m_BTD, spec, context, routes)
    return constrain(x_BTD + m_BTD, 'BTD'), kv, balance, routes


class Qwen3(nnx.Module):
  """Calling it is the forward pass; `jax.grad` with respect to it gives a module of gradients.

  `stacks` holds one stacked `Block` for each run of layers of one kind (`Spec.runs`): a single one
  for every released model.
  """

  def __init__(self, spec, rngs):
    self.spec = spec
    init = nnx.initializers.normal(0.02)
    V, D = spec.vocab, spec.width
    self.embed_VD = nnx.Param(init(rngs.params(), (V, D), jnp.float32))
    self.stacks = nnx.List([
        jax.vmap(lambda key, sparse=sparse: Block(spec, sparse, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), count))
        for _, count, sparse in spec.runs()])
    self.norm_D = nnx.Param(jnp.ones(D))
    if not spec.tied:
      self.head_VD = nnx.Param(init(rngs.params(), (V, D), jnp.float32))

  def __call__(self, tokens_BT, segment_BT=None, position_BT=None, cache=None, routes=None,
               remat='none', dtype=None, rotation=None):
    """Hidden states of `tokens_BT`; see `Output`.

    Segment 0 is padding; other tokens attend causally within their own segment. Without
    `position_BT`, positions count from 0 in each segment. With `cache`, the tokens continue it.
    `routes` (MoE layers, B, T, X) replays routing. `dtype`: that of activations and matmuls, the
    weights' own by default. `rotation`: the tokens' cosines and sines, where the caller has them
    already (inside a loop XLA would compute them again in every layer).
    """
    dtype = dtype or self.embed_VD.dtype
    if segment_BT is None:
      segment_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    if position_BT is None:
      position_BT = default_position(segment_BT, cache)
    if rotation is None:
      rotation = rope.rotation(position_BT, *rope.spec_frequencies(self.spec))
    context = Context(rotation, segment_BT)
    if cache is not None:
      context = context.replace(segment_BS=cache.mark(segment_BT), start=cache.length)
    x_BTD = constrain(look_up(self.embed_VD[...], tokens_BT, dtype), 'BTD')
    if cache is None:
      x_BTD, balance, routes = self._scanned(x_BTD, context, routes, remat)
    else:
      x_BTD, layers, balance, routes = self._unrolled(x_BTD, context, cache, routes)
      cache = cache.advance(layers, segment_BT)
    return Output(rms_norm(x_BTD, self.norm_D[...], self.spec.norm_eps), cache, balance, routes)

  def _scanned(self, x_BTD, context, routes, remat):
    """All layers without a cache: one scan for each stack, each step rematerialised by policy."""
    balances, all_routes, first = [], [], 0
    for stack, (_, count, sparse) in zip(self.stacks, self.spec.runs()):
      def step(x, layer):
        block, given = layer
        x, _, balance, chosen = block(x, self.spec, context, None, given)
        return x, (balance, chosen)
      if remat != 'none':
        step = jax.checkpoint(step, policy=POLICIES[remat])
      given = None
      if sparse and routes is not None:
        given, first = routes[first:first + count], first + count
      x_BTD, (balance, chosen) = jax.lax.scan(step, x_BTD, (stack, given),
                                              unroll=count <= UNROLLED)
      if sparse:
        balances.append(balance)
        all_routes.append(chosen)
    return x_BTD, *_joined(balances, all_routes)

  def _unrolled(self, x_BTD, context, cache, routes):
    """All layers with a cache, one after the other: nothing of the cache is copied."""
    layers, balances, all_routes = [], [], []
    for block, kv in zip(self.unstacked(), cache.layers):
      sparse = isinstance(block.mlp, Moe)
      given = routes[len(balances)] if sparse and routes is not None else None
      x_BTD, kv, balance, chosen = block(x_BTD, self.spec, context, kv, given)
      layers.append(kv)
      if sparse:
        balances.append(jax.tree.map(lambda x: x[None], balance))
        all_routes.append(chosen[None])
    return x_BTD, tuple(layers), *_joined(balances, all_routes)

  def unstacked(self):
    """The blocks one by one."""
    return [jax.tree.map(lambda w, i=i: w[i], stack)
            for stack in self.stacks for i in range(stack.attention_norm_D.shape[0])]

  def split(self, rows=None):
    """The same model with one stack a layer, for calls with a cache: `unstacked` slices nothing.

    With `rows`, the tokens decoded at once on one device, the blocks are fused for them.
    """
    model, blocks = jax.tree.map(lambda w: w, self), self.unstacked()
    if rows:
      blocks = [fuse(block, self.spec, rows) for block in blocks]
    model.stacks = nnx.List([jax.tree.map(lambda w: w[None], block) for block in blocks])
    return model

  def head(self):
    """The head's weights (V, D): the embedding when tied."""
    return (self.embed_VD if self.spec.tied else self.head_VD)[...]

  def logits(self, hidden_BTD):
    """float32 (B, T, V). Only for a few positions: in training the head runs inside the loss."""
    head_VD = self.head().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, head_VD, preferred_element_type=jnp.float32)


def _joined(balances, routes):
  if not balances:
    return None, None
  def join(*xs):
    return jnp.concatenate(xs)
  return jax.tree.map(join, *balances), join(*routes)


def default_position(segment_BT, cache=None):
  """Positions from 0 within each run of one segment number; with a cache, after what it holds."""
  same = segment_BT[:, 1:] == segment_BT[:, :-1]
  index = jnp.arange(segment_BT.shape[1])
  first = jnp.where(jnp.pad(same, ((0, 0), (1, 0))), 0, index)
  position_BT = index - jax.lax.cummax(first, axis=1)
  if cache is None:
    return position_BT
  held = (cache.segment_BS == segment_BT[:, :1]) & (segment_BT[:, :1] > 0)
  return jnp.where(segment_BT > 0, position_BT + held.sum(1, keepdims=True), 0)


def cast(params, dtype):
  """Matrices in `dtype`; norms, routers and a reward head keep float32, where they compute."""
  def one(path, w):
    name = str(getattr(path[-2], 'name', ''))
    return w if 'norm' in name or name in FLOAT32 else w.astype(dtype)
  return jax.tree_util.tree_map_with_path(one, params)


def make(spec, seed=0):
  """A random model: normal 0.02, norms 1. Trace it under jit to have it made sharded."""
  return Qwen3(spec, nnx.Rngs(seed))


def init(spec, seed=0, mesh=None):
  """`make`, run: made sharded on `mesh`, never whole on one device."""
  build = functools.partial(make, spec, seed)
  out = None if mesh is None else shardings(jax.eval_shape(build), mesh)
  return jax.jit(build, out_shardings=out)()
