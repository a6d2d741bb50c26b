"""Bradley-Terry reward model, for preference alignment in general RL (Qwen3 report, section 4.4).

Qwen3's settings are unpublished. These are Qwen's first (2309.16609, section 3.2.1): one epoch,
learning rate 3e-6, 64 pairs a step, up to 2,048 tokens an answer with its prompt. A row of 4,096
holds a pair of that length; pairs are packed, and 16 rows hold 64 of 1,024 tokens. That the rate is
constant after a short warm-up is ours.
"""
from qwen3_jax.stages.defaults import PAIRS, preference


def get_config(arg):
  config = preference('reward_model', arg, 'reward', centre=None)
  if config.model.layers == 4:
    config.optim.update(dict(schedule='linear', peak_lr=1.5e-3))
    config.data.sources = ((f'{PAIRS},size=8000', 1.0),)
    config.data.heldout = (f'{PAIRS},size=600',)
  else:
    config.data.length, config.data.batch = 4096, 16
    config.optim.update(dict(peak_lr=3e-6, warmup=20))
  return config
