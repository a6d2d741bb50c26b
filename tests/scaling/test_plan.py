"""plan: refused by arithmetic in seconds, and what the compiler says is what is printed."""
import json

import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.commands import config as configs
from qwen3_jax.scaling import chips, plan


@pytest.mark.parametrize('config, topology, says', [
  ('configs/s1.py:235b-a22b', 'v5e:2x2', 'Take at least'),
  ('configs/s1.py:8b', 'v9:2x2', 'no topology'),
  ('configs/s1.py:8b', 'v5p', 'no topology')])
def test_the_impossible_is_refused_by_arithmetic(config, topology, says, capsys, monkeypatch):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')

  def compiles(*_):
    raise AssertionError('a program was compiled')
  monkeypatch.setattr(plan, 'estimate', compiles)
  assert main(['plan', f'--config={config}', f'--topology={topology}']) == 2
  assert says in capsys.readouterr().err


def test_how_many_chips_would_do():
  config = configs.load_config('configs/s1.py:235b-a22b', [])
  with pytest.raises(ValueError, match='weights, moments and gradients of 235.1 billion') as error:
    plan.check(config, 'v5p:2x2x1', 4)
  least = int(str(error.value).split('at least ')[1].split()[0])
  plan.check(config, 'v5p:8x8x8', 512)
  assert least * chips.CHIPS['v5p'].usable >= 16 * 235e9 > (least - 1) * chips.CHIPS['v5p'].usable


@pytest.mark.slow
def test_figures_are_the_compilers(capsys):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  arguments = ['plan', '--config=configs/s1.py:tiny', '--topology=v5p:2x2x1',
               '--config.data.batch=8', '--json']
  assert main(arguments) == 0
  (update,) = json.loads(capsys.readouterr().out)
  assert update['fits'] and update['name'] == 'update'
  assert update['hbm'] == sum(update['parts'].values())
  assert update['useful'] * 4 == pytest.approx(
    8 * 256 * configs_spec().flops_per_token(256))
  assert 0.5 < update['useful'] / update['executed'] < 1
  assert {each['axes'] for each in update['wire']} <= {'fsdp', 'none', 'permute'}


@pytest.mark.slow
@pytest.mark.parametrize('config, names', [
  ('configs/reasoning_rl.py:tiny', ['update', 'decode, 128 rows']),
  ('configs/distill_on.py:tiny', ['update', 'teacher', 'decode, 128 rows'])])
def test_no_program_of_a_stage_does_less_than_is_useful(config, names, capsys):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  assert main(['plan', f'--config={config}', '--topology=v5p:2x2x1', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert [each['name'] for each in found] == names
  for each in found:
    if each['name'] != 'teacher':  # whose head is not run here, but counts as useful
      assert 0.5 < each['useful'] / each['executed'] < 1


def configs_spec():
  from qwen3_jax.stages import load
  return load.spec_from(configs.load_config('configs/s1.py:tiny', []).model)
