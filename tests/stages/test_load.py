"""Models from where they lie: a run, a recipe's folder, a Hugging Face folder; what is refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.commands import config as configs
from qwen3_jax.model import hf, transformer
from qwen3_jax.spec import Spec, Yarn
from qwen3_jax.stages import load
from qwen3_jax.training import optim
from qwen3_jax.training import step as training
from qwen3_jax.training.checkpoint import Checkpoints

FIXTURE = Path(__file__).resolve().parents[1] / 'fixtures' / 'd_moe_mixed'
pytestmark = pytest.mark.usefixtures('quick_compilation')


def draw(spec, seed):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(functools.partial(transformer.make, spec))
  return jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.1, x.shape), x.dtype), shapes)


def save_run(folder, config, seed):
  """What training leaves in its workdir, with random weights, which are returned."""
  params = draw(load.spec_from(config.model), seed)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(configs.to_json(config))
  shutil.copytree(config.data.tokenizer, folder / 'tokenizer')
  checkpoints = Checkpoints(folder / 'checkpoints')
  checkpoints.save(3, training.state_of(params, optim.adamw()), {}, {})
  checkpoints.close()
  return params


@pytest.fixture(scope='module')
def config(smallest):
  return configs.load_config('configs/s1.py:tiny', smallest())


@pytest.fixture(scope='module')
def recipe(config, tmp_path_factory):
  """(workdir of a recipe whose third stage has no checkpoint yet, weights by stage)."""
  workdir = tmp_path_factory.mktemp('recipe')
  params = {name: save_run(workdir / name, config, seed) for seed, name in enumerate(('s1', 's2'))}
  (workdir / 's3').mkdir()
  (workdir / 's3/config.json').write_text(configs.to_json(config))
  (workdir / 'recipe.json').write_text(json.dumps(['s1', 's2', 's3']))
  return workdir, params


def assert_equal(got, want, dtype=jnp.float32):
  """Norms and routers compute in float32 and are loaded so."""
  want = transformer.cast(want, dtype)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_spec_survives_a_config_and_its_json():
  """Every field, YaRN and tuples included, whatever has been through JSON."""
  config = configs.load_config('configs/s1.py:tiny,moe')
  with config.unlocked():
    config.model.yarn = dataclasses.asdict(Yarn(4.0, 32_768))
    config.model.mlp_only = (0, 2)
  direct = load.spec_from(config.model)
  assert direct == load.spec_from(json.loads(configs.to_json(config))['model'])
  assert (direct.yarn, direct.mlp_only, direct.experts) == (Yarn(4.0, 32_768), (0, 2), 16)
  assert isinstance(hash(direct), int)  # it is part of jit's key


def test_a_run_and_the_last_stage_of_a_recipe(recipe):
  workdir, params = recipe
  assert load.find(workdir / 's1') == ('run', workdir / 's1')
  assert load.find(workdir)[1] == workdir / 's2'
  assert_equal(load.load(workdir / 's1', dtype=jnp.float32), params['s1'])
  model, tokenizer = load.load_model(workdir)
  assert_equal(model, params['s2'], jnp.bfloat16)
  assert tokenizer.decode(tokenizer.encode('one cat')) == 'one cat'


def test_onto_a_mesh(recipe):
  workdir, params = recipe
  mesh = alphabet.make_mesh(dict(tensor=2, fsdp=2))
  model = load.load(workdir, mesh, jnp.float32)
  assert_equal(model, params['s2'])
  assert model.embed_VD[...].sharding.shard_shape((320, 32)) == (160, 16)


def test_weights_for_training_take_the_new_rope(recipe, config):
  workdir, params = recipe
  old = load.spec_from(config.model)
  new = dataclasses.replace(old, rope_theta=1e6, max_position=4096)
  got = load.load_params(workdir, new, alphabet.make_mesh())
  assert got.spec == new != old
  assert_equal(got, params['s2'])


def test_hugging_face_folder():
  spec = Spec.from_hf(FIXTURE)
  assert load.find(FIXTURE)[0] == 'hf'
  want = hf.load(FIXTURE, dtype=jnp.float32)
  new = dataclasses.replace(spec, rope_theta=5e5)
  got = load.load_params(FIXTURE, new, alphabet.make_mesh())
  assert got.spec == new
  assert_equal(got, want)
  assert_equal(load.load(FIXTURE), want, jnp.bfloat16)


@pytest.mark.parametrize('field, value', [
  ('layers', 2), ('width', 64), ('vocab', 100), ('experts', 4), ('mlp_only', ()),
  ('sparse_step', 1), ('tied', True), ('renormalise', False)])
def test_hugging_face_folder_of_another_shape(field, value):
  spec = Spec.from_hf(FIXTURE)
  value = not getattr(spec, field) if isinstance(value, bool) else value
  assert value != getattr(spec, field)
  with pytest.raises(ValueError, match=f'has {field} .*, config.model.{field} is .*choose'):
    load.load_params(FIXTURE, dataclasses.replace(spec, **{field: value}), alphabet.make_mesh())


def test_run_of_another_shape(recipe, config):
  spec = dataclasses.replace(load.spec_from(config.model), mlp=96)
  with pytest.raises(ValueError, match='saved by another model.*gate_DF.*model wants .*96'):
    load.load_params(recipe[0], spec, alphabet.make_mesh())


def test_nothing_there(tmp_path, recipe):
  for folder in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(FileNotFoundError, match='no model in .*want a Hugging Face folder'):
      load.load(folder)
  with pytest.raises(FileNotFoundError, match='no undamaged checkpoint'):
    load.load(recipe[0] / 's3')
