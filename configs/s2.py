"""S2, reasoning stage: about 5 T tokens of more STEM, code, reasoning and synthetic text at 4,096.

The report says the learning rate decays faster than in S1 (section 3.2); how fast is not published:
here linearly from where S1 ended to a tenth of that.
"""
from qwen3_jax.stages.defaults import REASONING, pretraining


def get_config(arg):
  config = pretraining('s2', arg, tokens=5 * 10**12)
  config.optim.peak_lr *= 0.3
  config.optim.schedule, config.optim.final, config.optim.warmup = 'linear', 0.1, 10
  if config.model.layers == 4:
    config.steps, config.data.batch = 700, 4
    config.save_every = config.evaluate_every = 200
    config.data.heldout_batches = 16
    config.optim.peak_lr = 3e-3
    config.data.sources = (('stdlib', 0.3), ('tasks', 0.1), (REASONING, 0.6))
    config.data.heldout = ('stdlib', f'{REASONING},size=400')
  return config
