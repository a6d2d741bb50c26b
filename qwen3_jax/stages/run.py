"""What every stage that trains shares: mesh, optimizer, resume, the loop, the data's cursor."""
import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import packing
from qwen3_jax.model import lora, transformer
from qwen3_jax.stages import load
from qwen3_jax.training import fit, losses, optim
from qwen3_jax.training import step as training
from qwen3_jax.training.checkpoint import Checkpoints, steps
from qwen3_jax.training.metrics import Metrics


def train(config, workdir, *, spec, loss, open_loader, heldout=None, make=transformer.make,
          restore=load.load_params, report=losses.report, micro_rows=None,
          mesh=None):
  """Trains one stage in `workdir` up to `config.steps`, from its last checkpoint if it has one.

  `loss(params, batch)` and `report(sums)` are the stage's (see `training.step.make_step`, also for
  `micro_rows`); `open_loader(mesh)` gives its stream of batches (`data.packing.Loader`) with
  `heldout(mesh)` {name: global batches} beside it, or what makes batches of the present weights
  (`rollouts.Rollouts`), which measures by itself, and whose `frozen`, if it has that, are weights
  that the loss takes behind the batch: a teacher's head, of the batch last drawn.
  `make(spec, seed)` builds random weights, `restore(folder, spec, mesh, dtype)` those of
  `config.init` (float32 without `dtype`). With `config.lora.rank` adapters alone are trained.
  `mesh`: instead of one over all devices.
  """
  mesh = mesh or alphabet.make_mesh({axis: size for axis, size in config.mesh.items() if size})
  o = config.optim
  optimizer = make_optimizer(o)
  rate = optim.schedule(o.schedule, o.peak_lr, config.steps, o.warmup, o.final, o.decay)
  with (jax.set_mesh(mesh), contextlib.closing(open_loader(mesh)) as loader,
        contextlib.closing(Checkpoints(workdir / 'checkpoints', config.keep)) as checkpoints):
    options, frozen, flops = dict(config.lora), (), spec.flops_per_token(config.data.length)
    if options['rank'] is not None:
      loss, make, *frozen = adapt(config, workdir, spec, mesh, loss, make, restore)
      restore, flops = None, spec.flops_per_token(config.data.length, frozen=True)
    merge = jax.jit(lora.merge)

    def whole(params):
      return merge(*frozen, params) if frozen else params
    if heldout:
      evaluate = fit.evaluator(loss, heldout(mesh), report, frozen)
    else:
      def evaluate(params):
        return loader.measure(whole(params))
    if checkpoints.latest() is None:
      state = first_state(config, spec, optimizer, mesh, make, restore)
    else:
      state = resume(config, spec, optimizer, mesh, make, checkpoints, loader)
    step = training.make_step(loss, optimizer, rate, config.get('micro_batches', 1), report,
                              micro_rows)
    out = jax.tree.map(lambda x: x.sharding, state), None
    compiled = jax.jit(step, donate_argnums=0, out_shardings=out)

    def step(state, batch):
      state, values = compiled(state, batch, *frozen, *getattr(loader, 'frozen', ()))
      return state, values | getattr(loader, 'notes', {})

    def draw(params, number):
      if heldout:
        return alphabet.to_global(next(loader), loader.rows, loader.batch, mesh)
      return loader.draw(functools.partial(whole, params), number)
    with Metrics(workdir, config.steps, config.stage, int(state.step), flops) as metrics:
      return fit.fit(state, step, draw, steps=config.steps, checkpoints=checkpoints,
                     metrics=metrics, cursor=lambda: gather_cursor(loader.state()),
                     config=config.to_dict(), save_every=config.save_every, evaluate=evaluate,
                     evaluate_every=config.evaluate_every, stop_loss=config.get('stop_loss'))


def first_state(config, spec, optimizer, mesh, make, restore):
  """TrainState at step 0: random, or the weights of `config.init` where there is a `restore`."""
  if config.init and restore:
    return training.state_from(restore(config.init, spec, mesh), optimizer, mesh)
  return training.initial_state(functools.partial(make, spec, config.seed), optimizer, mesh)


def adapt(config, workdir, spec, mesh, loss, make, restore):
  """What a LoRA run trains instead: its loss(adapters, batch, base), its `make`, and the base.

  The frozen base lies in the compute type, sharded as weights are, and is an argument of the loss.
  Where it came from is noted in `workdir` with its fingerprint (`load.note_base`), so that the run
  continues, and is loaded, on the same weights. What `make` gives beyond a `Qwen3`'s own parameters
  (a reward model's head) is trained whole.
  """
  options = dict(config.lora)
  targets = lora.choose_targets(spec, **options)
  if not config.init:
    raise ValueError('config.lora.rank is set, but there is no model to adapt: give one with '
                     '--init=DIR')
  dtype = compute_dtype(config)
  if load.base_folder(workdir):
    base = load.load_base(workdir, spec, mesh, dtype, restore)
  elif steps(workdir / 'checkpoints'):
    raise ValueError(f'{workdir} has checkpoints of adapters but no base.json, which says what '
                     'they adapt; delete the folder, or use another --workdir')
  else:
    base = restore(config.init, spec, mesh, dtype)
    load.note_base(workdir, config.init, base)

  def make_adapters(spec, seed=0):
    return lora.make(spec, **options, seed=seed, extra=lora.extra(make(spec, seed)))

  def adapted(adapters, batch, base, *frozen):
    return loss(lora.attach(base, adapters), batch, *frozen)
  count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: make_adapters(spec))))
  print(f'LoRA of rank {options["rank"]} on {", ".join(targets)}: training {count:,} parameters, '
        f'{spec.parameters():,} frozen', flush=True)
  return adapted, make_adapters, base


def resume(config, spec, optimizer, mesh, make, checkpoints, loader):
  """The TrainState last saved; the loader continues behind what it had read."""
  shapes = jax.eval_shape(lambda: training.state_of(make(spec), optimizer))
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                          alphabet.shardings(shapes, mesh))
  step, state, cursor = checkpoints.restore(abstract)
  if step > config.steps:
    raise ValueError(f'{checkpoints.folder} is at step {step} already, config.steps is '
                     f'{config.steps}; ask for more steps, or use another --workdir')
  loader.restore(cursor)
  return state


def check_vocabulary(tokenizer, spec):
  """Raises ValueError where the embedding lacks rows for the tokenizer's ids."""
  if tokenizer.size > spec.vocab:
    raise ValueError(f'the tokenizer has {tokenizer.size} ids, config.model.vocab is {spec.vocab}; '
                     'the embedding must have a row for each')


def make_optimizer(o):
  """The optimizer of a config's section `optim`."""
  return optim.make(o.kind, o.b1, o.b2, o.eps, o.weight_decay, o.clip, o.moments)


TYPES = 'float32', 'bfloat16'


def compute_dtype(config):
  """The type of activations and matmuls; ValueError where a setting of the step does not exist."""
  for field, known in (('dtype', TYPES), ('gradients', TYPES), ('remat', transformer.POLICIES)):
    if config[field] not in known:
      raise ValueError(f'config.{field} is {config[field]!r}; want one of {", ".join(known)}')
  return jnp.dtype(config.dtype)


def make_cast(config):
  """cast(params), the weights as a loss takes them.

  A gradient has its weight's type, and is sent from device to device in it
  (`kernels.exchange.scatter_sum`). So with `config.gradients` 'bfloat16' matrices are cast before
  they are used; with 'float32' where they are used, and gathered in the compute type all the same.
  """
  if 'float32' in (config.dtype, config.gradients):
    return lambda params: params
  return functools.partial(transformer.cast, dtype=jnp.bfloat16)


def gather_cursor(state):
  """The whole batch's data position from every host's part of it."""
  if jax.process_count() == 1:
    return state
  text = np.frombuffer(json.dumps(state).encode(), np.uint8)
  size = int(multihost_utils.process_allgather(np.array(text.size)).max())
  texts = multihost_utils.process_allgather(np.pad(text, (0, size - text.size), constant_values=32))
  return packing.merge_states([json.loads(bytes(text)) for text in texts])
