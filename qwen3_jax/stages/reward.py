"""Reward model: a scalar head on any model, trained on pairs of answers (Bradley and Terry)."""
import functools

from qwen3_jax.model import reward
from qwen3_jax.stages import load, pairs
from qwen3_jax.training import preference


def run(config, workdir, tokenizer):
  """Trains one reward model in `workdir`, from the language model of `config.init` if given."""
  opened, heldout = pairs.open_pairs(config, tokenizer)
  return pairs.train(
    config, workdir, tokenizer, opened, heldout,
    pairs.bind(config, preference.bradley_terry, centre=config.centre),
    make=reward.make, restore=functools.partial(load.load_below_reward, seed=config.seed))

