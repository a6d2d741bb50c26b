"""A stage's compiled programs, as shapes on a mesh: what `plan` compiles is what the stage runs.

Arrays stand as `jax.ShapeDtypeStruct`s with their shardings; nothing is allocated.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax import mesh as alphabet
from qwen3_jax.generation import decode
from qwen3_jax.generation.sampling import Sampling, Settings
from qwen3_jax.model import transformer
from qwen3_jax.model.cache import Pool
from qwen3_jax.spec import Spec
from qwen3_jax.stages import load, pretrain
from qwen3_jax.training import distillation, optim, policy
from qwen3_jax.training import step as training

INTS = ('tokens_BT', 'segment_BT', 'position_BT')
SCORES = ('weight_BT', 'scale_BT', 'advantage_BT', 'old_logp_BT', 'rollout_logp_BT',
          'reference_logp_BT')
PAGE, TURN = 128, 32  # of the engine on TPU: slots of a page, tokens of one call of its decoder


class Program(NamedTuple):
  """`fn(*args)` jitted; tokens and useful FLOPs of one run over all chips; bytes of its arguments
  on one device, by what they are; turns of its outer loop, where only its arguments say them."""
  name: str
  fn: object
  args: tuple
  tokens: int
  useful: float
  parts: dict
  turns: int = 1


def of_stage(config, mesh, teacher=None, held=8192):
  """[Program] of a config's stage on `mesh`.

  `teacher` names the teacher of distillation; `held` is how many tokens the pages of a rollout hold
  a row, on average. Raises ValueError for a method without a plan.
  """
  spec = load.spec_from(config.model)
  if config.method in ('pretrain', 'sft'):
    loss = pretrain.make_loss(config)
    return [update(config, spec, mesh, loss, batch_of(config, ('weight_BT',)))]
  if config.method == 'rl':
    return [update(config, spec, mesh, policy_loss(config), policy_batch(config, spec),
                   report=policy.report), rollout(config, spec, mesh, held)]
  if config.method == 'distill':
    other = Spec.named(teacher) if teacher else spec
    return [distilled(config, spec, other, mesh), teacher_forward(config, other, mesh),
            rollout(config, spec, mesh, held)]
  raise ValueError(f'plan knows pretrain, sft, rl and distill, not {config.method}')


def abstract(tree, mesh, dtype=None):
  """Shapes in the place of arrays, sharded; matrices in `dtype`, if one is given."""
  if dtype:
    tree = jax.eval_shape(functools.partial(transformer.cast, dtype=dtype), tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                      alphabet.shardings(tree, mesh))


def bytes_on_device(tree):
  """Bytes of sharded shapes on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def batch_of(config, floats=()):
  """Shapes of a batch of the config's rows."""
  shape = config.data.batch, config.data.length
  return ({name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in INTS}
          | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in floats})


def policy_batch(config, spec):
  """The batch of an update of reinforcement learning, as `stages/experience.py` makes it."""
  rows, length = config.data.batch, config.data.length
  batch = batch_of(config, SCORES)
  batch |= {name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in ('fresh_B', 'bonus_B')}
  sparse = sum(map(spec.sparse, range(spec.layers)))
  if sparse and config.rollout.replay:
    batch['routes_BTLX'] = jax.ShapeDtypeStruct((rows, length, sparse, spec.chosen), jnp.uint8)
  return batch


def policy_loss(config):
  """The policy's loss by the config's kind, KL and entropy terms."""
  p = config.policy
  settings = policy.Policy(p.kind, beta=p.beta, entropy=p.entropy, temperature=p.temperature)
  dtype = jnp.dtype(config.dtype)

  def loss(params, batch):
    return policy.loss(transformer.cast(params, dtype), batch, settings, remat=config.remat,
                       dtype=dtype)
  return loss


def update(config, spec, mesh, loss, batch, frozen=(), report=None):
  """The training step: gradients, their norm, AdamW; the state is given away and comes back."""
  optimizer = optim.adamw()
  make = functools.partial(transformer.make, spec)
  state = abstract(jax.eval_shape(lambda: training.state_of(make(), optimizer)), mesh)
  micro = config.get('micro_batches', 1)
  if rows := config.get('micro_rows'):
    micro = max(1, config.data.batch // rows)
  more = (report,) if report else ()
  step = training.make_step(loss, optimizer, lambda step: 3e-4, micro, *more)
  out = jax.tree.map(lambda x: x.sharding, state), None
  batch = abstract(batch, mesh)
  tokens = config.data.batch * config.data.length
  return Program('update', jax.jit(step, donate_argnums=0, out_shardings=out),
                 (state, batch, *frozen), tokens, tokens * spec.flops_per_token(config.data.length),
                 {'weights': bytes_on_device(state.params), 'optimizer': bytes_on_device(state.opt),
                  'batch': bytes_on_device(batch) + bytes_on_device(frozen)})


def distilled(config, spec, other, mesh):
  """The update of on-policy distillation, on the teacher's hidden states."""
  dtype = jnp.dtype(config.dtype)
  batch = batch_of(config, ('weight_BT',))
  batch['teacher_BTD'] = jax.ShapeDtypeStruct((*batch['tokens_BT'].shape, other.width), dtype)
  head = abstract(dict(head_VD=jax.ShapeDtypeStruct((other.vocab, other.width), dtype)), mesh)

  def loss(params, batch, head_VD):
    return distillation.loss(transformer.cast(params, dtype), batch, head_VD,
                             settings=distillation.Distillation(), remat=config.remat, dtype=dtype)
  return update(config, spec, mesh, loss, batch, (head['head_VD'],), distillation.report)


def teacher_forward(config, other, mesh):
  """The teacher's forward pass over a batch."""
  dtype = jnp.dtype(config.dtype)
  params = abstract(jax.eval_shape(functools.partial(transformer.make, other)), mesh, dtype)
  batch = abstract(batch_of(config), mesh)
  tokens = config.data.batch * config.data.length
  return Program('teacher', jax.jit(functools.partial(distillation.teacher_states, dtype=dtype)),
                 (params, batch), tokens, tokens * other.flops_per_token(config.data.length) / 3,
                 {'weights': bytes_on_device(params), 'batch': bytes_on_device(batch)})


def rollout(config, spec, mesh, held):
  """TURN tokens of every row of a rollout, the pages holding `held` tokens a row."""
  r, dtype = config.rollout, jnp.dtype(config.dtype)
  held = min(held, r.max_tokens)
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  B = -(-config.engine.rows // ways) * ways
  columns = -(-r.max_tokens // PAGE)
  zero = np.zeros(B, np.int32)
  state = decode.Rows(zero, zero, zero, zero, zero == 0, zero == 1, np.zeros((B, 4), np.int32),
                      Settings.make([Sampling()] * B, range(B), spec.vocab), None, None, None)
  with jax.set_mesh(mesh):
    model = abstract(jax.eval_shape(functools.partial(transformer.make, spec)), mesh, dtype)
    pool = abstract(jax.eval_shape(functools.partial(
      Pool.make, spec, B * -(-held // PAGE) + ways, PAGE, dtype)), mesh)
  args = (decode.Decoder(model), pool, state, np.zeros((B, columns), np.int32),
          np.zeros((B, (TURN + PAGE - 2) // PAGE + 1), np.int32), np.int32(TURN), np.int32(1), TURN,
          bool(spec.experts))
  return Program(f'decode, {B} rows', decode.decode, args, B * TURN,
                 B * TURN * spec.flops_per_token(held) / 3,
                 {'weights': bytes_on_device(model), 'keys and values': bytes_on_device(pool)},
                 TURN)
