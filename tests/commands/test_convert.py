"""Conversion between Hugging Face folders and training runs, both ways."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.model import hf, tensorfile
from qwen3_jax.stages import load
from qwen3_jax.text.tokenizer import train

FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures'
MIXED, QWEN2 = FIXTURES / 'd_moe_mixed', FIXTURES / 'qwen2'


def convert(source, target, *more):
  return main(['convert', '--from', str(source), '--to', str(target), *more])


def assert_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, *map(hf.name_leaves, (one, two)))


@pytest.mark.parametrize('folder', [MIXED, QWEN2], ids=lambda p: p.name)
def test_there_and_back(folder, tmp_path, capsys):
  """Hugging Face -> run -> Hugging Face gives the same file."""
  assert convert(folder, tmp_path / 'run', '--as', 'run') == 0
  assert load.find(tmp_path / 'run')[0] == 'run'
  run, original = load.load(tmp_path / 'run', dtype=None), hf.load(folder, dtype=None)
  assert run.spec == original.spec
  assert_equal(run, original)
  assert convert(tmp_path / 'run', tmp_path / 'back') == 0
  assert_equal(hf.load(tmp_path / 'back', dtype=None), original)
  assert f'back: {original.spec.parameters():,} weights' in capsys.readouterr().out
  assert sorted(p.name for p in tmp_path.iterdir()) == ['back', 'run']


def test_tokenizer_type_and_stop_ids_come_along(tmp_path):
  """A run's own tokenizer says where an exported model stops, if its spec does not."""
  words = ['the quick brown fox jumps over the lazy dog ' * 3, 'pack my box with 5 dozen jugs'] * 20
  assert convert(QWEN2, tmp_path / 'run', '--as', 'run') == 0
  tokenizer = train(words, 320, tmp_path / 'run' / 'tokenizer')
  assert convert(tmp_path / 'run', tmp_path / 'out', '--dtype', 'bfloat16') == 0
  stored = tensorfile.find_tensors(tmp_path / 'out')
  assert {each.dtype.name for each in stored.values()} == {'bfloat16'}
  model, found = load.load_model(tmp_path / 'out')
  assert found.encode('the fox') == tokenizer.encode('the fox')
  assert model.spec.stop_ids == tokenizer.stop_ids
  assert model.embed_VD.dtype == jnp.bfloat16


def test_generation_defaults_are_kept(tmp_path):
  source = tmp_path / 'in'
  hf.save(hf.load(QWEN2, dtype=None), source)
  text = json.dumps({'eos_token_id': [5, 3], 'temperature': 0.6, 'top_k': 20})
  (source / 'generation_config.json').write_text(text)
  assert convert(source, tmp_path / 'out') == 0
  assert (tmp_path / 'out' / 'generation_config.json').read_text() == text
  assert hf.Spec.from_hf(tmp_path / 'out').stop_ids == (5, 3)


def test_errors(tmp_path, capsys):
  assert convert(tmp_path / 'nowhere', tmp_path / 'out') == 2
  assert 'no model in' in capsys.readouterr().err
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('mine')
  assert convert(QWEN2, tmp_path / 'full') == 2
  assert 'exists and is not an empty folder' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['full']
