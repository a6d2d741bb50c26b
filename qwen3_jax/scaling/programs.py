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
from qwen3_jax.data import preferences
from qwen3_jax.generation import decode, engine
from qwen3_jax.generation.sampling import Sampling, Settings
from qwen3_jax.model import lora, reward, transformer
from qwen3_jax.model.cache import Pool, shards
from qwen3_jax.spec import Spec
from qwen3_jax.stages import load, pairs, pretrain
from qwen3_jax.stages import run as stage
from qwen3_jax.training import distillation, losses, policy, preference
from qwen3_jax.training import step as training

INTS = ('tokens_BT', 'segment_BT', 'position_BT')
SCORES = ('weight_BT', 'scale_BT', 'advantage_BT', 'old_logp_BT', 'rollout_logp_BT',
          'reference_logp_BT')
PAGE, TURN = 128, 32  # of the engine on TPU: slots of a page, tokens of one call of its decoder


class Program(NamedTuple):
  """`fn(*args)` jitted for `mesh`; tokens and useful FLOPs of one run over all its chips; bytes of
  its arguments on one device, by what they are; turns of its outer loop, where only its arguments
  say them; `rounds`, how often its temporaries are filled; `beside`, bytes of what else lies on the
  device while it runs."""
  name: str
  fn: object
  args: tuple
  tokens: int
  useful: float
  parts: dict
  mesh: object
  turns: int = 1
  rounds: int = 1
  beside: dict = {}


def of_stage(config, mesh, draw_mesh=None, teacher=None, held=8192):
  """[Program] of a config's stage, trained on `mesh`, rollouts drawn on `draw_mesh`, else there.

  `teacher` names the teacher of distillation; `held` is how many tokens the pages of a rollout hold
  a row, on average. Raises ValueError for a method without a plan.
  """
  spec, draw_mesh = load.spec_from(config.model), draw_mesh or mesh
  if config.method in ('pretrain', 'sft'):
    loss = pretrain.make_loss(config)
    return [update(config, spec, mesh, loss, batch_of(config, ('weight_BT',)))]
  if config.method in ('dpo', 'reward'):
    return preferred(config, spec, mesh)
  if config.method == 'rl':
    found = [update(config, spec, mesh, policy_loss(config), policy_batch(config, spec),
                    report=policy.report)]
    frozen = {}
    if config.policy.beta:
      frozen = {'reference': bytes_on_device(weights_in(config, spec, mesh))}
  elif config.method == 'distill':
    other = Spec.named(teacher) if teacher else spec
    found = [distilled(config, spec, other, mesh), teacher_forward(config, other, mesh)]
    frozen = {'teacher': found[1].parts['weights']}
  else:
    raise ValueError(f'plan knows pretrain, sft, dpo, reward, rl and distill, not {config.method}')
  found += rollout(config, spec, draw_mesh, held)
  return share(found, frozen) if draw_mesh == mesh else found


def share(programs, frozen):
  """The programs of a stage on the same devices, each beside what the others keep there.

  The training state, the engine's weights and pages, and `frozen` models stay while any of them
  runs.
  """
  kept = frozen | {'training state': sum(programs[0].parts[name] for name in (
    'weights', 'optimizer')), 'engine': sum(programs[-1].parts.values())}

  def beside(program):
    own = {'update': 'training state', 'teacher': 'teacher'}.get(program.name, 'engine')
    return {name: size for name, size in kept.items() if name != own}
  return [program._replace(beside=beside(program)) for program in programs]


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
  dtype, cast = jnp.dtype(config.dtype), stage.make_cast(config)

  def loss(params, batch):
    return policy.loss(cast(params), batch, settings, remat=config.remat,
                       dtype=dtype)
  return loss


def update(config, spec, mesh, loss, batch, frozen=(), report=losses.report, make=transformer.make):
  """The training step: gradients, their norm, the optimizer; the state is given away and comes
  back. With `config.lora.rank` adapters alone are trained, the model lies frozen beside them."""
  optimizer = stage.make_optimizer(config.optim)
  flops = spec.flops_per_token(config.data.length)
  build, parts = functools.partial(make, spec), {}
  if config.lora.rank is not None:
    base = weights_in(config, spec, mesh, make)
    loss, build, frozen = adapters(config, spec, loss, make), make_adapters(config, spec, make), (
      base, *frozen)
    flops, parts = spec.flops_per_token(config.data.length, frozen=True), {
      'frozen model': bytes_on_device(base)}
  state = abstract(jax.eval_shape(lambda: training.state_of(build(), optimizer)), mesh)
  micro = config.get('micro_batches', 1)
  if config.get('micro_rows'):
    micro = config.data.batch // config.micro_rows
  step = training.make_step(loss, optimizer, lambda step: 3e-4, micro, report)
  out = jax.tree.map(lambda x: x.sharding, state), None
  batch = abstract(batch, mesh)
  tokens = config.data.batch * config.data.length
  parts |= {'weights': bytes_on_device(state.params), 'optimizer': bytes_on_device(state.opt)}
  rest = bytes_on_device(batch) + bytes_on_device(frozen) - parts.get('frozen model', 0)
  return Program('update', jax.jit(step, donate_argnums=0, out_shardings=out),
                 (state, batch, *frozen), tokens, tokens * flops, parts | {'batch': rest}, mesh,
                 rounds=micro)


def weights_in(config, spec, mesh, make=transformer.make):
  """Shapes of the model in the config's compute type."""
  return abstract(jax.eval_shape(functools.partial(make, spec)), mesh, jnp.dtype(config.dtype))


def make_adapters(config, spec, make):
  """What builds the adapters of the config (see `stages.run.adapt`)."""
  return lambda: lora.make(spec, **dict(config.lora), extra=lora.extra(make(spec)))


def adapters(config, spec, loss, make):
  """loss(adapters, batch, frozen model) from one of a whole model."""
  lora.choose_targets(spec, **dict(config.lora))

  def adapted(adapters, batch, base, *frozen):
    return loss(lora.attach(base, adapters), batch, *frozen)
  return adapted


def preferred(config, spec, mesh):
  """Training on pairs of answers: the update, and the reference's pass of DPO, run once before."""
  batch = {name: jax.ShapeDtypeStruct((config.data.batch, *x.shape[1:]), x.dtype)
           for name, x in preferences.make_batch([[]], config.data.length).items()}
  if config.method == 'reward':
    loss = pairs.bind(config, preference.bradley_terry, centre=config.centre)
    return [update(config, spec, mesh, loss, batch, report=preference.report, make=reward.make)]
  loss = pairs.bind(config, preference.dpo, beta=config.beta)
  dtype, params, given = jnp.dtype(config.dtype), weights_in(config, spec, mesh), abstract(
    batch, mesh)

  def reference(params, batch):
    out = params(batch['tokens_BT'], batch['segment_BT'], batch['position_BT'], dtype=dtype)
    return preference.answer_logp(params, out, batch)
  tokens = config.data.batch * config.data.length
  return [update(config, spec, mesh, loss, batch, report=preference.report), Program(
    'reference, before training', jax.jit(reference), (params, given), tokens,
    tokens * spec.flops_per_token(config.data.length) / 3,
    {'weights': bytes_on_device(params), 'batch': bytes_on_device(given)}, mesh)]


def distilled(config, spec, other, mesh):
  """The update of on-policy distillation, on the teacher's hidden states."""
  dtype, cast = jnp.dtype(config.dtype), stage.make_cast(config)
  batch = batch_of(config, ('weight_BT',))
  batch['teacher_BTD'] = jax.ShapeDtypeStruct((*batch['tokens_BT'].shape, other.width), dtype)
  head = abstract(dict(head_VD=jax.ShapeDtypeStruct((other.vocab, other.width), dtype)), mesh)

  def loss(params, batch, head_VD):
    return distillation.loss(cast(params), batch, head_VD,
                             settings=distillation.Distillation(), remat=config.remat, dtype=dtype)
  return update(config, spec, mesh, loss, batch, (head['head_VD'],), distillation.report)


def teacher_forward(config, other, mesh):
  """The teacher's forward pass over a batch."""
  params, batch = weights_in(config, other, mesh), abstract(batch_of(config), mesh)
  tokens = config.data.batch * config.data.length
  run = functools.partial(distillation.teacher_states, dtype=jnp.dtype(config.dtype))
  return Program('teacher', jax.jit(run), (params, batch), tokens,
                 tokens * other.flops_per_token(config.data.length) / 3,
                 {'weights': bytes_on_device(params), 'batch': bytes_on_device(batch)}, mesh)


def rollout(config, spec, mesh, held):
  """[Program]: prompts prefilled, and TURN tokens of every row, pages holding `held` a row."""
  r, dtype = config.rollout, jnp.dtype(config.dtype)
  held, size = min(held, r.max_tokens), config.engine.page or PAGE
  with jax.set_mesh(mesh):
    ways = shards()
    rows, turn = -(-config.engine.rows // ways), config.engine.chunk or TURN
    model = weights_in(config, spec, mesh)
    count = config.engine.pages or ways * (rows * -(-held // size) + 1)
    pool = abstract(jax.eval_shape(functools.partial(Pool.make, spec, count, size, dtype)), mesh)
  parts = {'weights': bytes_on_device(model), 'keys and values': bytes_on_device(pool)}
  decoder, sparse = decode.Decoder(model), bool(spec.experts)

  def tables(B, columns, T):
    return np.zeros((B, columns), np.int32), np.zeros((B, (T + size - 2) // size + 1), np.int32)
  B, T = ways * min(rows, engine.TOKENS // engine.PIECE), engine.PIECE
  zero = np.zeros(B, np.int32)
  first = Program(f'prefill, {B} prompts', decode.prefill, (
    decoder, pool, np.zeros((B, T), np.int32), zero, zero, *tables(B, T // size, T), sparse),
    B * T, B * T * spec.flops_per_token(T) / 3, parts, mesh)
  B, zero = ways * rows, np.zeros(ways * rows, np.int32)
  state = decode.Rows(zero, zero, zero, zero, zero == 0, zero == 1, np.zeros((B, 4), np.int32),
                      Settings.make([Sampling()] * B, range(B), spec.vocab), None, None, None)
  args = (decoder, pool, state, *tables(B, -(-r.max_tokens // size), turn), np.int32(turn),
          np.int32(1), turn, sparse)
  return [first, Program(f'decode, {B} rows', decode.decode, args, B * turn,
                         B * turn * spec.flops_per_token(held) / 3, parts, mesh, turn, turn)]
