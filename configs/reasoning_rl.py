"""Reasoning RL: GRPO on verifiable problems, in thinking mode (Qwen3 report, section 4.2).

The report has 3,995 pairs of question and verifier, 170 steps on the largest model, large batches,
many rollouts a question and several updates on each. Make such pairs with
`python -m qwen3_jax filter --config=configs/filter.py:rl`, and name them in data.sources and what
earlier stages trained on in data.used. The tiny form takes generated problems.
"""
from qwen3_jax.stages.defaults import reinforcement


def get_config(arg):
  config = reinforcement('reasoning_rl', arg)
  if config.model.layers == 4:
    config.data.sources = (('tasks:kinds=chain,difficulty=1', 1.0),)
    config.data.heldout = tuple(name for name, _ in config.data.sources)
  return config
