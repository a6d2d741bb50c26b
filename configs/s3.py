"""S3, long-context stage: hundreds of billions of tokens at 32,768 (Qwen3 report, section 3.2).

RoPE's base goes from 10,000 to 1,000,000 (ABF); 75 % of the text is 16,384 to 32,768 tokens long
and 25 % 4,096 to 16,384. The tiny form keeps these fractions of a row of 1,024. The learning rate
is not published: here it warms up again, to a fifth of S1's peak, and decays to a tenth of that.
"""
from qwen3_jax.stages.defaults import pretraining


def get_config(arg):
  config = pretraining('s3', arg, tokens=300 * 10**9)
  config.model.rope_theta = 1e6
  config.data.length_mix = ((0.75, (0.5, 1.0)), (0.25, (0.125, 0.5)))
  config.optim.peak_lr *= 0.2
  config.optim.schedule = 'linear'
  if config.model.layers == 4:
    config.steps = 120
    config.data.length, config.data.batch = 1024, 2
    config.data.heldout_batches = 8
    config.data.sources = (('stdlib', 1.0),)
    config.data.heldout = ('stdlib',)
  else:
    config.data.length, config.data.batch = 32_768, config.data.batch // 8
  return config
