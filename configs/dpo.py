"""DPO on pairs of answers, the offline stage of Qwen2.5 (2412.15115, section 4.2).

Published there: about 150,000 pairs, one epoch, learning rate 7e-7 (with an optimizer that merges
weights online, which is not here). Beta is that of the method's paper (2305.18290); rows a step,
about 128 pairs of 1,024 tokens, and the linear schedule are ours. Without `reference` the model
that `init` names is the reference.
"""
from qwen3_jax.stages.defaults import PAIRS, preference


def get_config(arg):
  config = preference('dpo', arg, 'dpo', beta=0.1, reference=None)
  if config.model.layers == 4:
    config.optim.update(dict(schedule='linear', peak_lr=3e-4))
    config.data.sources = ((f'{PAIRS},size=2500', 1.0),)
    config.data.heldout = (f'{PAIRS},size=400',)
  else:
    config.data.length, config.data.batch = 8192, 16
    config.optim.update(dict(schedule='linear', peak_lr=7e-7, warmup=100))
  return config
