"""Pretraining stages S1, S2, S3: packed text and next-token loss; a stage is two functions."""
import contextlib
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import mixture, packing, sources
from qwen3_jax.model import transformer
from qwen3_jax.stages import load
from qwen3_jax.training import fit, losses, optim
from qwen3_jax.training import step as training
from qwen3_jax.training.checkpoint import Checkpoints
from qwen3_jax.training.metrics import Metrics


def make_loss(config):
  """loss(params, batch) of a config: compute type, recomputation, balance terms."""
  for field, known in (('dtype', ('float32', 'bfloat16')), ('remat', transformer.POLICIES)):
    if config[field] not in known:
      raise ValueError(f'config.{field} is {config[field]!r}; want one of {", ".join(known)}')
  dtype = jnp.dtype(config.dtype)

  def loss(params, batch):
    params = transformer.cast(params, dtype) if dtype != jnp.float32 else params
    return losses.next_token(params, batch, remat=config.remat, dtype=dtype,
                             balance=config.balance or 0.0, router_z=config.router_z or 0.0)
  return loss


def source_shares(config):
  """[(source, share of tokens)] of `config.data.sources`, which may also be one source's name."""
  given = config.data.sources
  if not given:
    raise ValueError(
      'config.data.sources is None: say what to train on, e.g. --config.data.sources='
      "\"(('/data/*.jsonl', 1.0),)\", or \"(('stdlib', 1.0),)\" for this machine's Python library")
  if isinstance(given, str):
    return [(given, 1.0)]
  for pair in given:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
            and isinstance(pair[1], (int, float))):
      raise ValueError(f'config.data.sources holds {pair!r}; want pairs of a source and its share '
                       "of the tokens, e.g. (('/data/*.jsonl', 1.0),)")
  return [tuple(pair) for pair in given]


def open_documents(config, tokenizer, split):
  """The mixture of `config.data.sources`, each by length where asked."""
  data = config.data
  encode = functools.partial(tokenizer.encode, special=False)
  parts = []
  for spec, share in source_shares(config):
    source = sources.open_source(spec, split)
    if data.length_mix and split == 'train':
      views = mixture.length_mix(source, encode, data.length, data.length_mix)
      parts += [(view, share * part) for view, part in views]
    else:
      parts.append((source, share))
  return mixture.mixture(parts, config.seed, encode)


def make_loader(config, tokenizer, mesh):
  """The stage's stream of batches on this host: the rows its devices hold."""
  data = config.data
  return packing.Loader(
      open_documents(config, tokenizer, 'train'),
      functools.partial(tokenizer.encode, special=False), data.batch, data.length,
      tokenizer.eod_id, rows=alphabet.owned_rows(data.batch, mesh),
      keep_whole=8 if data.length_mix else 0)


def heldout_batches(config, tokenizer, mesh):
  """{name: batches} of held-out text, the same at every evaluation.

  The first source is `heldout_loss`, which compares stages; others are `heldout_<source>`.
  """
  data = config.data
  rows = alphabet.owned_rows(data.batch, mesh)
  encode = functools.partial(tokenizer.encode, special=False)
  batches = {}
  for spec in data.heldout or ():
    source = sources.open_source(spec, 'heldout')
    label = re.sub(r'\W+', '_', re.sub(r':\w+=.*', '', spec)).strip('_')
    batches[f'heldout_{label}' if batches else 'heldout_loss'] = [
      alphabet.to_global(batch, rows, data.batch, mesh) for batch in packing.fixed_batches(
        source, encode, data.batch, data.length, data.heldout_batches, tokenizer.eod_id, rows)]
  return batches


def first_state(config, spec, optimizer, mesh):
  """TrainState at step 0: random, or the weights of `config.init`."""
  if config.init:
    return training.state_from(load.load_params(config.init, spec, mesh), optimizer, mesh)
  make = functools.partial(transformer.make, spec, config.seed)
  return training.initial_state(make, optimizer, mesh)


def run(config, workdir, tokenizer):
  """Trains one stage in `workdir` up to `config.steps`, from its last checkpoint if it has one."""
  spec = load.spec_from(config.model)
  if tokenizer.size > spec.vocab:
    raise ValueError(f'the tokenizer has {tokenizer.size} ids, config.model.vocab is {spec.vocab}; '
                     'the embedding must have a row for each')
  mesh = alphabet.make_mesh({axis: size for axis, size in config.mesh.items() if size})
  o = config.optim
  optimizer = optim.adamw(o.b1, o.b2, o.eps, o.weight_decay, o.clip)
  rate = optim.schedule(o.schedule, o.peak_lr, config.steps, o.warmup, o.final, o.decay)
  loss = make_loss(config)
  with (jax.set_mesh(mesh),
        contextlib.closing(make_loader(config, tokenizer, mesh)) as loader,
        contextlib.closing(Checkpoints(workdir / 'checkpoints', config.keep)) as checkpoints):
    evaluate = fit.evaluator(loss, heldout_batches(config, tokenizer, mesh))
    state = _resume(config, spec, optimizer, mesh, checkpoints, loader)
    step = training.make_step(loss, optimizer, rate, config.micro_batches)
    out = jax.tree.map(lambda x: x.sharding, state), None
    step = jax.jit(step, donate_argnums=0, out_shardings=out)

    def draw(params, number):
      return alphabet.to_global(next(loader), loader.rows, config.data.batch, mesh)
    with Metrics(workdir, config.steps, config.stage, int(state.step),
                 spec.flops_per_token(config.data.length)) as metrics:
      return fit.fit(state, step, draw, steps=config.steps, checkpoints=checkpoints,
                     metrics=metrics, cursor=lambda: gather_cursor(loader.state()),
                     config=config.to_dict(), save_every=config.save_every, evaluate=evaluate,
                     evaluate_every=config.evaluate_every)


def gather_cursor(state):
  """The whole batch's data position from every host's part of it."""
  if jax.process_count() == 1:
    return state
  text = np.frombuffer(json.dumps(state).encode(), np.uint8)
  size = int(multihost_utils.process_allgather(np.array(text.size)).max())
  texts = multihost_utils.process_allgather(np.pad(text, (0, size - text.size), constant_values=32))
  return packing.merge_states([json.loads(bytes(text)) for text in texts])


def _resume(config, spec, optimizer, mesh, checkpoints, loader):
  if checkpoints.latest() is None:
    return first_state(config, spec, optimizer, mesh)
  shapes = jax.eval_shape(lambda: training.state_of(transformer.make(spec), optimizer))
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                          alphabet.shardings(shapes, mesh))
  step, state, cursor = checkpoints.restore(abstract)
  if step > config.steps:
    raise ValueError(f'{checkpoints.folder} is at step {step} already, config.steps is '
                     f'{config.steps}; ask for more steps, or use another --workdir')
  loader.restore(cursor)
  return state
