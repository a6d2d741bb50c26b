"""Reward model: a scalar head on any model, trained on pairs of answers (Bradley and Terry)."""
import functools

import jax.numpy as jnp

from qwen3_jax.model import reward
from qwen3_jax.stages import load, pairs
from qwen3_jax.training import preference


def run(config, workdir, tokenizer):
  """Trains one reward model in `workdir`, from the language model of `config.init` if given."""
  opened, heldout = pairs.open_pairs(config, tokenizer)
  return pairs.train(
    config, workdir, tokenizer, opened, heldout,
    pairs.bind(config, preference.bradley_terry, centre=config.centre),
    make=reward.make, restore=functools.partial(restore, seed=config.seed))


def restore(folder, spec, mesh, dtype=jnp.float32, seed=0):
  """The language model in `folder` below a new reward head; see `load.load_params`."""
  return reward.from_language_model(load.load_params(folder, spec, mesh, dtype), seed)
