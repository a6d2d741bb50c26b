"""Reinforcement learning: answers of the model itself, scored, and a policy loss on them.

Reasoning RL and general RL (Qwen3 Technical Report, sections 4.2 and 4.4) are this stage on other
prompts and rewards: GRPO and its successors (`training.policy`), several updates a rollout.
"""
import jax
import jax.numpy as jnp

from qwen3_jax import mesh as alphabet
from qwen3_jax.data import queries
from qwen3_jax.environments import records as episodes
from qwen3_jax.model import transformer
from qwen3_jax.stages import load, placement, pretrain, rollouts, scorers
from qwen3_jax.stages import run as stage
from qwen3_jax.stages.curriculum import Curriculum, key
from qwen3_jax.stages.experience import Experience
from qwen3_jax.training import policy
from qwen3_jax.training.entropy import Controller


def run(config, workdir, tokenizer):
  """Trains `config.init` in `workdir` on its own answers; see `stages.run`.

  Raises ValueError for settings that do not fit, `parity.Mismatch` and `experience.Exhausted`.
  """
  spec = load.spec_from(config.model)
  stage.check_vocabulary(tokenizer, spec)
  settings = policy.Policy(**config.policy)
  check(config, spec, settings)
  dtype = stage.compute_dtype(config)

  def cast(params):
    return transformer.cast(params, dtype) if dtype != jnp.float32 else params

  lent = stage.make_cast(config)

  def loss(params, batch):
    return policy.loss(lent(params), batch, settings, size=tokenizer.size, remat=config.remat,
                       dtype=dtype, balance=config.balance or 0.0, router_z=config.router_z or 0.0)

  p, shape = config.placement, {axis: size for axis, size in config.mesh.items() if size}
  train_mesh, rollout_mesh = placement.place(p.kind, p.fraction, p.slices, shape, p.rollout_mesh)

  def open_experience(mesh):
    return Experience(
      config, workdir, tokenizer, mesh, rollout_mesh, spec=spec, settings=settings,
      cast=jax.jit(cast),
      curriculum=Curriculum(
        [(open_prompts(name, 'train'), share) for name, share in pretrain.source_shares(config)],
        config.seed, config.curriculum.high, used_questions(config.data.used)),
      heldout=heldout_prompts(config), router=scorers.open_router(config.rewards, mesh),
      controller=Controller(**config.entropy) if settings.entropy == 'bonus' else None,
      values=rollouts.trainer_values(config, settings.temperature, dtype, tokenizer.size),
      reference=reference_values(config, spec, settings, dtype, tokenizer.size, mesh))
  return stage.train(config, workdir, spec=spec, loss=loss, open_loader=open_experience,
                     report=policy.report, micro_rows=config.micro_rows, mesh=train_mesh)


def check(config, spec, settings):
  """ValueError for settings that contradict one another, before anything is computed."""
  rollouts.check(config, spec)
  r = config.rollout
  wrong = None
  if r.samples < 2:
    wrong = 'config.rollout.samples is 1: an advantage compares the samples of a prompt; want 2'
  elif r.rounds < 1:
    wrong = f'config.rollout.rounds is {r.rounds}; want at least 1'
  elif settings.temperature != r.temperature:
    wrong = (f'config.policy.temperature is {settings.temperature}, config.rollout.temperature '
             f'{r.temperature}: the loss must see the distribution that was drawn from')
  elif r.old == 'engine' and settings.correction:
    wrong = ("config.rollout.old='engine' makes the engine's policy the old one, so there is "
             'nothing to correct: set config.policy.correction=None')
  elif config.save_every and config.save_every % r.updates and r.updates > 1:
    wrong = (f'config.save_every is {config.save_every}; take a multiple of config.rollout.updates '
             f'({r.updates}), so that no batch waits while a checkpoint is written')
  if wrong:
    raise ValueError(wrong)


def open_prompts(name, split):
  """The records that a source's name stands for: episodes in an environment, or single turns."""
  kind, _, options = name.partition(':')
  if kind == 'episodes':
    return episodes.open_episodes(options, split)
  return queries.open_queries(name, split)


def used_questions(names):
  """Hashes of all questions that earlier stages trained on, by their files or sources."""
  found = set()
  for name in names or ():
    source = open_prompts(name, None)
    found.update(key(source[i]) for i in range(len(source)))
  return found


def heldout_prompts(config):
  """`measure_reward.prompts` held-out records, from all sources alike, each question once.

  Of files that are trained on it is their held-out part, of others all.
  """
  names, found = config.data.heldout or (), {}
  trained = [name for name, _ in pretrain.source_shares(config)]
  for name in names:
    generated = name.partition(':')[0] in ('tasks', 'gym', 'episodes', *queries.GENERATORS)
    source = open_prompts(name, 'heldout' if generated or name in trained else None)
    own = {}
    for i in range(min(len(source), 20 * config.measure_reward.prompts)):
      record = source[i]
      own.setdefault(key(record), record)
      if len(own) >= -(-config.measure_reward.prompts // len(names)):
        break
    found |= own
  return list(found.values())


def reference_values(config, spec, settings, dtype, size, mesh):
  """values(batch) of the reference model, `config.reference` or `init`; None without a beta."""
  if not settings.beta:
    return None
  with jax.set_mesh(alphabet.make_mesh(dict(mesh.shape))):
    params = load.load_params(config.reference or config.init, spec, mesh, dtype)
  values = rollouts.trainer_values(config, settings.temperature, dtype, size)

  def of_reference(batch):
    batch = {name: x for name, x in batch.items() if name != 'routes_BTLX'}
    return values(params, batch)[0], None
  return of_reference
