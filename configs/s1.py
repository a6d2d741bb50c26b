"""S1, general stage: over 30 T tokens of 119 languages at 4,096 (Qwen3 report, section 3.2)."""
from qwen3_jax.stages.defaults import pretraining


def get_config(arg):
  config = pretraining('s1', arg, tokens=30 * 10**12)
  config.optim.schedule, config.optim.final = 'cosine', 0.3
  if config.model.layers == 4:
    config.steps, config.data.batch = 500, 4
    config.save_every = config.evaluate_every = 200
    config.data.heldout_batches = 16
    config.data.sources = (('stdlib', 1.0),)
    config.data.heldout = ('stdlib',)
  return config
