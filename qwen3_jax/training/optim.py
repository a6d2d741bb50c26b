"""AdamW with clipping, and the learning-rate schedules of the stages."""
import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('constant', 'cosine', 'wsd', 'linear')


def adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0):
  """Clip by global norm, Adam, decoupled weight decay; without the learning rate.

  The step multiplies by -lr(step) itself, so that a skipped update does not shift the schedule.
  Decay applies to matrices only. QK-norm scales grow large in long runs without it (Qwen3-Next
  report), but decaying them is a choice Qwen3 did not publish.
  """
  def matrices(params):
    return jax.tree_util.tree_map_with_path(lambda path, w: not _is_vector(path), params)
  return optax.chain(optax.clip_by_global_norm(clip), optax.scale_by_adam(b1, b2, eps),
                     optax.add_decayed_weights(weight_decay, matrices))


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
