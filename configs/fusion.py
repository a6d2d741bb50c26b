"""Thinking-mode fusion: supervised fine-tuning on both modes at once (Qwen3 report, section 4.3).

It continues the model of the stage before on its own right answers with thinking, and on others
without. Make the data with `python -m qwen3_jax fuse` and name its output in data.sources. The tiny
form does so by itself: its queries are those of the cold start.
"""
from qwen3_jax.stages.defaults import REASONING, supervised


def get_config(arg):
  config = supervised('fusion', arg, tiny_steps=1000)
  config.measure.budgets = 0, 256, 1024, 4096
  if config.model.layers == 4:
    config.measure.budgets = 0, 8, 16, 32, 64
    config.optim.update(dict(schedule='linear', peak_lr=2e-3))
    config.prepare = dict(
        by='fuse', config='configs/fuse.py:tiny',
        set=('mix.size=10000', 'mix.thinking_share=0.6', 'mix.turns_rate=0.5',
             'mix.system_rate=0.3'),
        inputs=dict(queries=(f'{REASONING},size=2000',), plain=(f'{REASONING},size=3000,seed=1',)))
  return config
