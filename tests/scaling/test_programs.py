"""The programs of a stage: all that it runs, on the devices it runs on, with what lies beside."""
import jax
import numpy as np
import pytest

from qwen3_jax import mesh as alphabet
from qwen3_jax.commands import config as configs
from qwen3_jax.scaling import programs
from qwen3_jax.stages import load


def of_stage(name, overrides=(), **options):
  config = configs.load_config(name, overrides)
  mesh = alphabet.make_mesh(dict(fsdp=4))
  return config, programs.of_stage(config, mesh, **options)


@pytest.mark.parametrize('name, wanted', [
  ('configs/s1.py:tiny', ['update']), ('configs/fusion.py:tiny', ['update']),
  ('configs/reward_model.py:tiny', ['update']),
  ('configs/dpo.py:tiny', ['update', 'reference, before training']),
  ('configs/reasoning_rl.py:tiny', ['update', 'prefill, 32 prompts', 'decode, 128 rows']),
  ('configs/distill_on.py:tiny', ['update', 'teacher', 'prefill, 32 prompts',
                                  'decode, 128 rows'])])
def test_each_stage_has_its_programs_and_they_can_be_traced(name, wanted):
  _, found = of_stage(name)
  assert [each.name for each in found] == wanted
  for each in found:
    with jax.set_mesh(each.mesh):
      outputs = each.fn.trace(*each.args).jaxpr.out_avals
    assert outputs and each.useful > 0 and each.tokens > 0


def test_a_batch_of_pairs_is_as_the_stage_packs_it():
  from qwen3_jax.data import preferences
  config, (update, _) = of_stage('configs/dpo.py:tiny')
  made = preferences.make_batch([[]] * config.data.batch, config.data.length)
  planned = update.args[1]
  assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
    name: (x.shape, np.dtype(x.dtype)) for name, x in made.items()}


def test_adapters_are_trained_on_a_frozen_model():
  config, (whole,) = of_stage('configs/s1.py:tiny')
  _, (adapted,) = of_stage('configs/s1.py:tiny', ['--config.lora.rank=4'])
  assert adapted.parts['weights'] < whole.parts['weights'] / 5
  assert adapted.parts['frozen model'] == whole.parts['weights']  # in float32, as tiny computes
  assert adapted.parts['optimizer'] < whole.parts['optimizer'] / 5
  spec = load.spec_from(config.model)
  assert adapted.useful == adapted.tokens * spec.flops_per_token(config.data.length, frozen=True)


def test_what_stays_on_shared_devices_lies_beside():
  _, (update, teacher, prefill, decode) = of_stage('configs/distill_on.py:tiny')
  state = update.parts['weights'] + update.parts['optimizer']
  assert update.beside == {'teacher': teacher.parts['weights'],
                           'engine': sum(decode.parts.values())}
  assert teacher.beside == {'training state': state, 'engine': sum(decode.parts.values())}
  assert decode.beside == prefill.beside == {'teacher': teacher.parts['weights'],
                                             'training state': state}


def test_devices_of_their_own_have_nothing_beside():
  config = configs.load_config('configs/reasoning_rl.py:tiny', [])
  first, second = (alphabet.make_mesh(devices=jax.devices()[i:i + 2]) for i in (0, 2))
  update, prefill, decode = programs.of_stage(config, first, second)
  assert update.mesh == first and prefill.mesh == decode.mesh == second
  assert not update.beside and not decode.beside
