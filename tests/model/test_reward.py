"""Reward models: where the reward is read, what a conversation scores, exchange with others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qwen3_jax.data import preferences
from qwen3_jax.model import hf, reward, transformer
from qwen3_jax.spec import Spec
from qwen3_jax.text import tokenizer as text

SPEC = Spec(layers=2, width=32, heads=4, kv_heads=2, mlp=48, vocab=320, head_width=8)
pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def model():
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.2, x.shape), x.dtype),
    jax.eval_shape(lambda: reward.make(SPEC)))


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  words = 'what is the colour of this sea and that sky blue green it is called nile or rhine '
  return text.train([words * 20], 310, tmp_path_factory.mktemp('tokenizer'))


def test_reward_is_read_at_the_last_token_whatever_the_side_of_padding(model):
  rng, T = np.random.default_rng(1), 12
  rows = [rng.integers(0, 320, n) for n in (12, 7, 1)]
  left, right = np.zeros((2, 2, 3, T), np.int32)
  for b, row in enumerate(rows):
    right[:, b, :len(row)] = row, np.ones(len(row))
    left[:, b, T - len(row):] = row, np.ones(len(row))
  got = [jax.jit(reward.last_reward)(model, *side) for side in (left, right)]
  alone = jax.jit(lambda model, row: model(row[None]).hidden_BTD[0, -1] @ model.reward_D[...])
  np.testing.assert_allclose(got[0], got[1], rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(got[1][1], alone(model, rows[1]), rtol=2e-5, atol=1e-6)
  assert np.std(got[0]) > 0.1


def test_score_of_conversations_ends_at_the_answer(model, tokenizer):
  """Each conversation scores as it does alone, and as its packed tokens do in training."""
  def ask(question, answer):
    return {'messages': [{'role': 'user', 'content': question},
                         {'role': 'assistant', 'content': answer}]}
  found = [ask('what is blue', 'the sea'), ask('what is the nile ' * 5, 'it is green'),
           ask('sky', 'blue')]
  got = reward.score(model, tokenizer, found, batch=2)
  assert got.dtype == np.float32 and len(set(got.tolist())) == 3
  np.testing.assert_allclose(got[1:2], reward.score(model, tokenizer, found[1:2]), rtol=1e-5)
  ids = preferences.encode_last(tokenizer, found[0])
  assert tokenizer.decode(ids.tolist()).endswith('the sea<|im_end|>')
  pair = preferences.normalise_pair({'prompt': 'what is blue', 'chosen': 'the sea',
                                     'rejected': 'the rhine'})
  packed = preferences.encode_pair(tokenizer, pair)
  np.testing.assert_array_equal(packed['id'][packed['rejected'] == 0], ids)


def test_the_head_stays_float32_and_the_language_model_s_is_gone(model):
  small = transformer.cast(model, jnp.bfloat16)
  assert small.reward_D[...].dtype == jnp.float32 and small.embed_VD[...].dtype == jnp.bfloat16
  assert not SPEC.tied and not hasattr(model, 'head_VD')
  language = transformer.init(SPEC)
  below = reward.from_language_model(language, seed=3)
  assert jax.tree.structure(below) == jax.tree.structure(model)
  assert below.stacks is language.stacks and 0 < jnp.std(below.reward_D[...]) < 0.05


def test_hugging_face_folder_and_back(model, tokenizer, tmp_path):
  """A classifier of one label there; transformers' own logits: tests/benchmarks/hf_reward.py."""
  hf.save(model, tmp_path / 'hf', tokenizer=tokenizer)
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert config['architectures'] == ['Qwen3ForSequenceClassification']
  assert config['id2label'] == {'0': 'reward'}
  tensors = safetensors.numpy.load_file(tmp_path / 'hf' / 'model.safetensors')
  assert tensors['score.weight'].shape == (1, 32) and 'lm_head.weight' not in tensors
  again = hf.load(tmp_path / 'hf', dtype=jnp.float32)
  for a, b in zip(*map(jax.tree.leaves, (model, again)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert isinstance(again, reward.RewardModel)
