"""Feed-forward blocks: SwiGLU, and its mixture of experts with softmax top-k routing."""
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import exchange, expert_parallel, routing, target
from qwen3_jax.kernels import experts as kernel
from qwen3_jax.kernels.linear import swiglu
from qwen3_jax.model.lora import project


@struct.dataclass
class Balance:
  """What one MoE layer's routing did, summed over real tokens of the whole global batch."""
  count_E: jax.Array  # assignments of each expert; no gradient
  probability_E: jax.Array  # summed softmax probabilities over all experts
  z: jax.Array  # summed logsumexp(router logits)^2
  tokens: jax.Array


class Mlp(nnx.Module):
  """down(silu(gate x) * up x)."""

  def __init__(self, spec, rngs):
    D, F = spec.width, spec.mlp
    init = nnx.initializers.normal(0.02)
    self.gate_DF = nnx.Param(init(rngs.params(), (D, F), jnp.float32))
    self.up_DF = nnx.Param(init(rngs.params(), (D, F), jnp.float32))
    self.down_FD = nnx.Param(init(rngs.params(), (F, D), jnp.float32))

  def __call__(self, x_BTD, spec, context, routes=None):
    """Returns (B, T, D), and None twice where a mixture has its balance and routes."""
    gate_BTF, up_BTF = (project(self, weight, x_BTD) for weight in ('gate_DF', 'up_DF'))
    return project(self, 'down_FD', swiglu(gate_BTF, up_BTF)), None, None


class Moe(nnx.Module):
  """Softmax over all experts in float32, the top `chosen`, renormalised; dropless."""

  def __init__(self, spec, rngs):
    D, E, F = spec.width, spec.experts, spec.expert_mlp
    init = nnx.initializers.normal(0.02)
    self.router_DE = nnx.Param(init(rngs.params(), (D, E), jnp.float32))
    self.gate_EDF = nnx.Param(init(rngs.params(), (E, D, F), jnp.float32))
    self.up_EDF = nnx.Param(init(rngs.params(), (E, D, F), jnp.float32))
    self.down_EFD = nnx.Param(init(rngs.params(), (E, F, D), jnp.float32))

  def __call__(self, x_BTD, spec, context, routes=None):
    """Returns (B, T, D), the layer's `Balance`, and the chosen experts (B, T, X).

    With `routes_BTX` given, these experts are used and only their gates come from the router
    (routing replay); the gradient goes through the gates either way.
    """
    logits_BTE = jnp.einsum('BTD,DE->BTE', x_BTD.astype(jnp.float32),
                            self.router_DE[...].astype(jnp.float32))
    if routes is None and target.platform() == 'tpu' and routing.fits(spec.experts, spec.chosen):
      routes, gate_BTX, balance = _route(logits_BTE, context.segment_BT, spec)
      return self._experts(x_BTD, routes, gate_BTX.astype(x_BTD.dtype)), balance, routes
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    if routes is None:
      gate_BTX, routes = jax.lax.top_k(probability_BTE, spec.chosen)
    else:
      gate_BTX = jnp.take_along_axis(probability_BTE, routes, axis=-1)
    if spec.renormalise:
      gate_BTX = gate_BTX / gate_BTX.sum(-1, keepdims=True)
    y_BTD = self._experts(x_BTD, routes, gate_BTX.astype(x_BTD.dtype))
    return y_BTD, _balance(logits_BTE, probability_BTE, routes, context.segment_BT), routes

  def _experts(self, x_BTD, routes_BTX, gate_BTX):
    weights = [w[...] for w in (self.gate_EDF, self.up_EDF, self.down_EFD)]
    return _sharded_experts(x_BTD, routes_BTX, gate_BTX, *weights)


def _route(logits_BTE, segment_BT, spec):
  """The router's kernel on each device's own tokens: routes, gates and the global `Balance`."""
  real_BT = (segment_BT > 0).astype(jnp.float32)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    routes, gate_BTX, *sums = _flat_route(logits_BTE, real_BT, spec)
    return routes, gate_BTX, Balance(*sums)
  rows = alphabet.partition('BT', real_BT.shape, mesh)
  whole, wide = PartitionSpec(), PartitionSpec(*rows, None)
  body = functools.partial(_flat_route, spec=spec, axes=jax.tree.leaves(tuple(rows)))
  routes, gate_BTX, *sums = jax.shard_map(
      body, in_specs=(wide, rows), out_specs=(wide, wide, *[whole] * 4), check_vma=False)(
          logits_BTE, real_BT)
  return routes, gate_BTX, Balance(*sums)


def _flat_route(logits_BTE, real_BT, spec, axes=()):
  out = routing.route(logits_BTE.reshape(-1, spec.experts), real_BT.reshape(-1), spec.chosen,
                      spec.renormalise)
  sums = out.count_E, out.probability_E, out.z, real_BT.sum()
  if axes:
    sums = jax.lax.psum(sums, axes)
  shape = (*real_BT.shape, spec.chosen)
  return out.chosen_MX.reshape(shape), out.gate_MX.reshape(shape), *sums


def _balance(logits_BTE, probability_BTE, routes_BTX, segment_BT):
  real_BT = (segment_BT > 0).astype(jnp.float32)
  experts = logits_BTE.shape[-1]
  hit_BTE = (routes_BTX[..., None] == jnp.arange(experts)).any(-2)
  return Balance(
      count_E=jax.lax.stop_gradient(jnp.einsum('BT,BTE->E', real_BT, hit_BTE.astype(jnp.float32))),
      probability_E=jnp.einsum('BT,BTE->E', real_BT, probability_BTE),
      z=jnp.sum(real_BT * jax.nn.logsumexp(logits_BTE, -1) ** 2), tokens=real_BT.sum())


def _sharded_experts(x_BTD, routes_BTX, gate_BTX, gate_EDF, up_EDF, down_EFD):
  """Experts on each device's own tokens, summed over F.

  Tokens go to the devices that have their experts where E is split over the axis `expert`; over
  other axes the weights are gathered.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return _flat_experts(kernel.experts, x_BTD, routes_BTX, gate_BTX, gate_EDF, up_EDF, down_EFD)
  rows = PartitionSpec(*alphabet.partition('BTD', x_BTD.shape, mesh)[:2], None)
  specs = [PartitionSpec(*alphabet.partition(names, w.shape, mesh))
           for names, w in (('EDF', gate_EDF), ('EDF', up_EDF), ('EFD', down_EFD))]
  body = functools.partial(_local_experts, specs=specs)
  return jax.shard_map(body, in_specs=(rows, rows, rows, *specs), out_specs=rows, check_vma=False)(
      x_BTD, routes_BTX, gate_BTX, gate_EDF, up_EDF, down_EFD)


def _local_experts(x_BTD, routes_BTX, gate_BTX, *weights, specs):
  axes = exchange.axes_of
  run, exchanged, weights = kernel.experts, 'expert' in axes(specs[0][0]), list(weights)
  if exchanged:
    run = functools.partial(expert_parallel.experts, axis='expert')
  for i, names in enumerate(('EDF', 'EDF', 'EFD')):
    for dim, letter in enumerate(names):
      over = tuple(axis for axis in axes(specs[i][dim]) if not (exchanged and axis == 'expert'))
      if over and letter != 'F':
        weights[i] = exchange.gather_weight(weights[i], over, dim, x_BTD.dtype)
  y_BTD = _flat_experts(run, x_BTD, routes_BTX, gate_BTX, *weights)
  width_axes = axes(specs[0][2])
  return jax.lax.psum(y_BTD, width_axes) if width_axes else y_BTD


def _flat_experts(run, x_BTD, routes_BTX, gate_BTX, *weights):
  flat = [x.reshape(-1, x.shape[-1]) for x in (x_BTD, routes_BTX, gate_BTX)]
  return run(*flat, *(w.astype(x_BTD.dtype) for w in weights)).reshape(x_BTD.shape)
