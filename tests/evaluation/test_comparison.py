"""Ways from one student compared: costs, curves, pass@k; and the command end to end."""
import json

import numpy as np
import pytest
from etils import epath

from qwen3_jax.__main__ import main
from qwen3_jax.commands import compare, train
from qwen3_jax.commands import config as configs
from qwen3_jax.evaluation import comparison


def write_run(folder, rates, flops, seconds=2.0):
  """A run's workdir: two updates a rollout, a measurement at the first and at every second."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(dict(rollout=dict(samples=4))))
  lines = []
  for step in range(1, 2 * len(rates) - 1):
    line = dict(step=step, flops=flops, seconds=seconds)
    if step % 2:
      line |= dict(prompts=10, answer_tokens=20.0)
    rate = rates[0] if step == 1 else rates[step // 2] if step % 2 == 0 else None
    if rate is not None:
      line |= dict(heldout_reward=rate, heldout_reward_low=rate - 0.1,
                   heldout_reward_high=rate + 0.1)
    lines.append(json.dumps(line))
  (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  return epath.Path(folder)


def test_a_curve_begins_at_no_cost(tmp_path):
  run = write_run(tmp_path / 'run', [0.2, 0.5, 0.4], flops=3.0)
  assert comparison.curve(run) == [
    [0.0, 0.0, 0.2, pytest.approx(0.1), pytest.approx(0.3)],
    [6.0, 2.0, 0.5, pytest.approx(0.4), pytest.approx(0.6)],
    [12.0, 6.0, 0.4, pytest.approx(0.3), pytest.approx(0.5)]]
  assert comparison.spend(run) == dict(flops=12.0, seconds=8.0, tokens=2 * 10 * 4 * 20)


def test_the_ratio_of_costs_is_taken_where_both_have_come(tmp_path):
  slow = comparison.curve(write_run(tmp_path / 'slow', [0.2, 0.3, 0.4, 0.5], flops=100.0))
  fast = comparison.curve(write_run(tmp_path / 'fast', [0.2, 0.8], flops=10.0, seconds=1.0))
  found = comparison.compare_costs(slow, fast)  # 600 FLOPs, and half of 20
  assert found['rate'] == 0.5 and found['flops'] == pytest.approx(60)
  assert found['seconds'] == pytest.approx(10 / 0.5)
  assert comparison.reach(slow, 0.35, 0) == pytest.approx(300)
  assert comparison.reach(slow, 0.1, 0) == 0.0 and comparison.reach(slow, 0.9, 0) is None
  flat = [[0.0, 0.0, 0.2, 0.1, 0.3], [9.0, 9.0, 0.15, 0.1, 0.3]]
  assert comparison.compare_costs(flat, fast) == dict(rate=0.2, flops=None, seconds=None)


def test_curves_of_seeds_are_averaged_and_their_spread_is_shown():
  one = [[0.0, 0.0, 0.2, 0.19, 0.21], [10.0, 1.0, 0.4, 0.39, 0.41]]
  other = [[0.0, 0.0, 0.2, 0.19, 0.21], [14.0, 3.0, 0.6, 0.59, 0.61]]
  merged = comparison.merge([one, other])
  assert merged[0] == pytest.approx([0, 0, 0.2, 0.19, 0.21])
  half = 1.96 * np.std([0.4, 0.6], ddof=1) / 2 ** 0.5
  assert merged[1] == pytest.approx([12, 2, 0.5, 0.5 - half, 0.5 + half])


def test_rates_and_pass_at_k(tmp_path):
  """Four problems, four samples: pass@2 of one right sample in four is a half."""
  marks = dict(thinking=[[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
               plain=[[0] * 4] * 4)
  row = comparison.grade([marks])
  assert row['thinking']['rate'] == 5 / 16 and row['thinking']['count'] == 4
  assert row['thinking']['low'] < 5 / 16 < row['thinking']['high'] and row['plain']['rate'] == 0
  assert {k: each['rate'] for k, each in row['pass'].items()} == {
    '1': 5 / 16, '2': (0.5 + 1) / 4, '4': 0.5}
  run = write_run(tmp_path / 'run', [0.2, 0.5], flops=1e9)
  found = comparison.tabulate({'start': [(marks, None)], 'RL': [(marks, run)]}, {}, 'tasks')
  assert [each['flops'] for each in found['rows']] == [0.0, 2e9] and list(found['curves']) == ['RL']
  assert found['curves']['RL'][1][:2] == [2e9, 0.5]
  text = '\n'.join(comparison.describe(found))
  assert '31.2%' in text and 'pass@4' in text and '2e+09' in text and '4 problems, 1 seed' in text


def test_without_student_or_teacher_it_is_refused(tmp_path, capsys):
  assert main(['compare', f'--workdir={tmp_path}']) == 2
  assert 'give them with --init=DIR and --teacher=DIR' in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_measures_and_goes_on_where_it_was(
    smallest, tmp_path, capsys, monkeypatch, quick_compilation):
  for name, seed in (('student', 0), ('teacher', 1)):
    config = configs.load_config('configs/s1.py:tiny', smallest(
      steps=3, data__heldout=(), evaluate_every=None, seed=seed))
    assert train.train(config, epath.Path(tmp_path / name)) == 0
  short = 'length:difficulty=1,thinking=off'  # of which a random model gets a part
  ways = []
  for name, file, own in configs.load_config('configs/compare.py:tiny').ways:
    few = dict(steps=4, rollout__updates=2, rollout__prompts=4, rollout__max_tokens=32,
               engine__rows=8, engine__pages=64, measure_reward__prompts=4, evaluate_every=2,
               save_every=2, data__length=160, optim__warmup=1)
    few |= dict(rollout__samples=4) if name.endswith('RL') else {}
    few = [f'{key.replace("__", ".")}={value}' for key, value in few.items()]
    ways.append((name, file, (*few, *(each for each in own if 'every' not in each))))
  arguments = ['compare', f'--workdir={tmp_path}/out', f'--init={tmp_path}/student',
               f'--teacher={tmp_path}/teacher', f'--config.ways={tuple(ways)!r}',
               f'--config.sources=(({short!r}, 1.0),)', f'--config.heldout=({short!r},)',
               '--config.measure.count=4', '--config.measure.samples=2',
               '--config.measure.max_tokens=8']
  assert main(arguments) == 0
  found = json.loads((tmp_path / 'out' / 'comparison.json').read_text())
  assert [row['name'] for row in found['rows']] == [
    'off-policy', 'off-policy + RL', 'off-policy + on-policy']
  assert [row['flops'] > 0 for row in found['rows']] == [False, True, True]
  assert all(points[0][0] == 0 < points[-1][0] for points in found['curves'].values())
  told = capsys.readouterr().out
  assert 'off-policy + RL against off-policy + on-policy' in told
  again = []
  monkeypatch.setattr(comparison, 'mark', lambda *args, **kwargs: again.append(args))
  assert main(arguments) == 0 and not again
  assert json.loads((tmp_path / 'out' / 'comparison.json').read_text()) == found
  assert compare.measured({}, None, tmp_path / 'out' / 'start')['plain']
