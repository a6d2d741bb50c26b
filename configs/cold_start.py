"""Long-CoT cold start: supervised fine-tuning on filtered thinking (Qwen3 report, section 4.1).

Its purpose is the pattern, not the score: the report keeps samples and steps few. Make the data
with `python -m qwen3_jax filter --config=configs/filter.py:cold_start` and name its output in
data.sources. The tiny form filters and learns the solutions of generated problems, and stops early
enough for rewards to have something to teach.
"""
from qwen3_jax.stages.defaults import REASONING, supervised

SUMS = 'tasks:kinds=chain,difficulty=1,size=400'  # what rewards teach next


def get_config(arg):
  config = supervised('cold_start', arg, tiny_steps=1400)
  if config.model.layers == 4:
    config.optim.update(dict(schedule='linear', peak_lr=4e-3))
    config.prepare = dict(by='filter', config='configs/filter.py:cold_start,tiny', set=(),
                          inputs=dict(input=(f'{REASONING},size=10000',)))
    config.data.heldout = SUMS, f'{REASONING},size=400'
    config.stop_loss = 0.04  # of sums: about half are right then, by whatever step that is
  return config
