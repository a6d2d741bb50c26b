"""A reward model: the transformer of any `Spec` with one number a token in place of the head."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen3_jax.data import preferences
from qwen3_jax.model.transformer import Qwen3


class RewardModel(Qwen3):
  """`reward(model(tokens).hidden_BTD)`; the reward of a conversation is that of its last token.

  Its spec is tied, whatever was asked for: there is no language-model head.
  """

  def __init__(self, spec, rngs):
    super().__init__(dataclasses.replace(spec, tied=True), rngs)
    self.reward_D = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (spec.width,)))

  def reward(self, hidden_BTD):
    """float32 (B, T): the head is never rounded to bfloat16."""
    return jnp.einsum('BTD,D->BT', hidden_BTD.astype(jnp.float32), self.reward_D[...],
                      precision='highest')


def make(spec, seed=0):
  """A random reward model."""
  return RewardModel(spec, nnx.Rngs(seed))


def from_language_model(model, seed=0):
  """The weights of a language model, taken over, below a random reward head."""
  shapes = jax.eval_shape(lambda: make(model.spec))
  shapes.embed_VD, shapes.stacks, shapes.norm_D = model.embed_VD, model.stacks, model.norm_D
  key = nnx.Rngs(seed).params()
  shapes.reward_D = nnx.Param(nnx.initializers.normal(0.02)(key, (model.spec.width,)))
  return shapes


def last_reward(model, tokens_BT, segment_BT, dtype=None):
  """float32 (B,): the reward at the last token of each row, padded (segment 0) on either side."""
  reward_BT = model.reward(model(tokens_BT, segment_BT, dtype=dtype).hidden_BTD)
  last_B1 = (jnp.arange(tokens_BT.shape[1]) * (segment_BT > 0)).argmax(1, keepdims=True)
  return jnp.take_along_axis(reward_BT, last_B1, 1)[:, 0]


def score(model, tokenizer, conversations, batch=8):
  """The reward of each conversation, float32 numpy: of the answer in its last turn.

  They run sorted by length in batches of `batch`, padded to a power of two.
  """
  found = [preferences.encode_last(tokenizer, record) for record in conversations]
  rewards = np.zeros(len(found), np.float32)
  order = sorted(range(len(found)), key=lambda i: len(found[i]))
  for first in range(0, len(order), batch):
    here = order[first:first + batch]
    T = 1 << (len(found[here[-1]]) - 1).bit_length()
    tokens_BT, segment_BT = np.zeros((2, batch, T), np.int32)
    for b, i in enumerate(here):
      tokens_BT[b, :len(found[i])], segment_BT[b, :len(found[i])] = found[i], 1
    rewards[here] = np.asarray(_last_reward(model, tokens_BT, segment_BT))[:len(here)]
  return rewards


_last_reward = jax.jit(last_reward)
