"""plan: refused by arithmetic in seconds, and what the compiler says is what is printed."""
import json

import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.commands import config as configs
from qwen3_jax.scaling import chips, describe, kernel_calls, plan


@pytest.mark.parametrize('config, topology, says', [
  ('configs/s1.py:235b-a22b', 'v5e:2x2', 'Take at least'),
  ('configs/s1.py:8b', 'v9:2x2', 'no topology'),
  ('configs/s1.py:8b', 'v5p', 'no topology'),
  ('configs/s1.py:8b', 'v5p:5x3x7', 'the compiler knows no topology v5p:5x3x7'),
  ('configs/s1.py:0.6b,v5p', 'v5p:2x2x1', "config argument '0.6b,v5p'")])
def test_the_impossible_is_refused_by_arithmetic(config, topology, says, capsys, monkeypatch):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')

  def compiles(*_):
    raise AssertionError('a program was compiled')
  monkeypatch.setattr(plan, 'estimate', compiles)
  assert main(['plan', f'--config={config}', f'--topology={topology}']) in (2, 78)
  assert says in capsys.readouterr().err


@pytest.mark.parametrize('more, says', [
  (['--slices=0'], '--slices is 0'), (['--search=0'], '--search is 0'),
  (['--teacher=32b'], '--teacher is of distillation'),
  (['--config.data.batch=6'], 'Set --config.data.batch=8'),
  (['--config.mesh.tensor=3'], 'needs 3 devices, there are 4')])
def test_requests_that_make_no_sense(more, says, capsys):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  assert main(['plan', '--config=configs/s1.py:tiny', '--topology=v5p:2x2x1', *more]) == 2
  assert says in capsys.readouterr().err


def test_how_many_chips_would_do():
  config = configs.load_config('configs/s1.py:235b-a22b', [])
  with pytest.raises(ValueError, match='weights, moments and gradients of 235.1 billion') as error:
    plan.check(config, 'v5p:2x2x1', 4)
  least = int(str(error.value).split('at least ')[1].split()[0])
  plan.check(config, 'v5p:8x8x8', 512)
  assert least * chips.CHIPS['v5p'].usable >= 16 * 235e9 > (least - 1) * chips.CHIPS['v5p'].usable


def estimate(**changes):
  """By hand: 1 s of products, 2 of kernels, 3 of HBM, 5 of collectives of which 1 is exposed."""
  times = [kernel_calls.Time('flash_forward', 4, 2.0, 'schedule')]
  wire = [plan.Wire('all-gather', 'fsdp', True, False, 3, 4e9),
          plan.Wire('all-reduce', 'data', False, True, 1, 1e9)]
  fields = dict(
    name='update', parts={'weights': 2**30, 'temporaries': 2**31}, hbm=3 * 2**30, room=2**34,
    tokens=1000, useful=4e12, executed=5e12, wire=wire, kernels=times, products_s=1.0,
    memory_s=3.0, ici_s=4.0, dcn_s=1.0, exposed_s=1.0, compiled_s=9.0, kept=False)
  return plan.Estimate(**fields | changes)


def test_what_overlaps_and_what_does_not():
  assert estimate().seconds == 4.0 + 1.0  # hidden collectives take longest, then the exposed one
  assert estimate(products_s=7.0).seconds == 7.0 + 2.0 + 1.0
  assert estimate(memory_s=8.0).seconds == 8.0 + 1.0
  assert estimate().serial_s == 1.0 + 2.0 + 3.0 + 4.0 + 1.0


def test_the_text_says_what_was_found():
  chip = chips.CHIPS['v5p']
  text = '\n'.join(describe.describe(estimate(), chip, budget=1e9, count=8, price=2.0))
  for line in ('3.00 of 16.00 GiB of HBM a device, it fits',
               '4.00 GB over fsdp, 3 runs, overlapped', '1.00 GB over data (DCN), 1 runs, exposed',
               '2.00 s, 4 runs, by schedule', '5.00 s a step', '0.80 of them useful',
               '200 tokens/s',
               'at best 57.9 days, 11,111 chip-hours, 22,222 at 2.0'):
    assert line in text
  short = estimate(hbm=2**35)
  text = '\n'.join(describe.describe(short, chip))
  assert 'DOES NOT FIT: short by 16.0 GiB' in text and '--config.micro_batches' in text
  beside = estimate(parts={'beside: engine': 2**35}, hbm=2**35)
  assert 'lies beside (engine)' in describe.advice(beside)
  whole = json.loads(json.dumps(describe.as_json(short)))
  assert whole['wire'][1]['dcn'] and whole['kernels'][0]['by'] == 'schedule'
  assert whole['seconds'] == 5.0 and not whole['fits']


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
  ('configs/reasoning_rl.py:tiny', ['update', 'prefill, 32 prompts', 'decode, 128 rows']),
  ('configs/distill_on.py:tiny', ['update', 'teacher', 'prefill, 32 prompts', 'decode, 128 rows'])])
def test_no_program_of_a_stage_does_less_than_is_useful(config, names, capsys):
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  assert main(['plan', f'--config={config}', '--topology=v5p:2x2x1', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert [each['name'] for each in found] == names
  for each in found:
    if each['name'] in ('update', 'decode, 128 rows'):  # the others run no head, which counts
      assert 0.5 < each['useful'] / each['executed'] < 1


def configs_spec():
  from qwen3_jax.stages import load
  return load.spec_from(configs.load_config('configs/s1.py:tiny', []).model)


@pytest.mark.slow
def test_slices_reduce_within_each_before_they_meet(capsys):
  """What a device sends to the other slice is its shard of the gradients, not all of them."""
  pytest.importorskip('libtpu', reason='LIBTPU ABSENT: pip install jax[tpu] brings the compiler')
  arguments = ['plan', '--config=configs/s1.py:tiny', '--topology=v5e:2x2', '--slices=2', '--json',
               '--config.data.batch=8']
  assert main(arguments) == 0
  (update,) = json.loads(capsys.readouterr().out)
  crossing = sum(each['bytes'] for each in update['wire'] if each['dcn'])
  shard = 4 * configs_spec().parameters() / 4  # in float32, of a slice's four devices
  assert 0.8 * shard < crossing < 4 * shard
  assert update['dcn_s'] == pytest.approx(crossing / chips.CHIPS['v5e'].dcn)
  assert {each['axes'] for each in update['wire']} <= {'fsdp', 'slices', 'none', 'permute'}


def test_smaller_moments_need_fewer_chips():
  config = configs.load_config('configs/s1.py:235b-a22b', ['--config.optim.moments=bfloat16'])
  with pytest.raises(ValueError, match='Take at least') as e:
    plan.check(config, 'v5p:2x2x1', 4)
  least = int(str(e.value).split('at least ')[1].split()[0])
  assert least * chips.CHIPS['v5p'].usable >= 12 * 235e9 > (least - 1) * chips.CHIPS['v5p'].usable
