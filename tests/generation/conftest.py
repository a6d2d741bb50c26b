"""A random model and a small trained tokenizer: generation needs no sense, only arithmetic."""
import dataclasses

import jax
import pytest

from qwen3_jax.generation import thinking
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.text.tokenizer import train

SPEC = Spec(2, 32, 4, 2, 64, vocab=512, head_width=16, tied=True, max_position=512)


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
  words = ('the quick brown fox jumps over a lazy dog; Considering time limited by the user, '
           'I have to give the solution based on thinking directly now. ')
  texts = [thinking.STOP * 40, words * 3, 'naïve café, 日本語, 🙂 and 12345 + 678 = 13023\n\n' * 4]
  return train(texts, 400, tmp_path_factory.mktemp('tokenizer'))


def sharpen(model):
  """Larger weights, so that the logits of a random model are far from equal."""
  return jax.tree.map(lambda w: w * 4, model)


@pytest.fixture(scope='session')
def model():
  return sharpen(transformer.init(SPEC))


@pytest.fixture(scope='session')
def moe_model():
  spec = dataclasses.replace(SPEC, experts=4, chosen=2, expert_mlp=32, sparse_step=2)
  return sharpen(transformer.init(spec, seed=1))
