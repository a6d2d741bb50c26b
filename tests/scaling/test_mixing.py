"""The tuner: thetas to try, the surface fitted to them, intervals; and real proxies end to end."""

import json
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from qwen3_jax.__main__ import main
from qwen3_jax.scaling import mixing

SPREAD = ConfigDict(dict(domain=1.5, education=2.0))
NAMES = ['arts', 'law', 'education']


def test_thetas_fill_the_box_and_begin_without_weights():
  thetas = mixing.draw_thetas(NAMES, NAMES[:2], SPREAD, 64, 0)
  assert thetas.shape == (64, 3) and not thetas[0].any()
  np.testing.assert_allclose(thetas[:, :2].sum(1), 0, atol=1e-12)  # the same to all says nothing
  for column, half in zip(thetas.T, (1.5, 1.5, 2.0)):
    assert -half <= column.min() < -0.7 * half and 0.7 * half < column.max() <= half
  assert (thetas == mixing.draw_thetas(NAMES, NAMES[:2], SPREAD, 64, 0)).all()


def test_surface_finds_a_planted_minimum():
  """loss = 5 + quadratic around `best` + noise of 0.01."""
  rng, best = np.random.default_rng(0), np.array([0.6, -0.6, 1.2])
  thetas = mixing.draw_thetas(NAMES, NAMES[:2], SPREAD, 24, 0)
  losses = 5 + 0.1 * ((thetas - best) ** 2).sum(1) + 0.01 * rng.normal(size=24)
  surface = mixing.fit(thetas, losses)
  candidates = mixing.draw_thetas(NAMES, NAMES[:2], SPREAD, mixing.CANDIDATES, 1)
  found = mixing.choose(surface, candidates)
  np.testing.assert_allclose(found, best, atol=0.15)
  assert surface.degree == 2 and surface.explained > 0.9
  assert surface.predict(found[None])[0] == pytest.approx(5, abs=0.02)


def test_surface_of_noise_explains_nothing():
  explained = []
  for seed in range(8):
    thetas = mixing.draw_thetas(NAMES, NAMES[:2], SPREAD, 24, seed)
    losses = np.random.default_rng(seed).normal(size=24)
    explained.append(mixing.fit(thetas, losses).explained)
  assert np.mean(explained) < 0.15


def test_leaving_one_out_is_what_refitting_gives():
  thetas = mixing.draw_thetas(NAMES, NAMES[:2], SPREAD, 12, 0)[:, 1:]
  losses = thetas[:, 0] + np.random.default_rng(0).normal(size=12)
  surface = mixing.fit(thetas, losses)
  errors = {}
  for degree in (1, 2):
    terms = mixing._terms(thetas / surface.scale, degree)
    for ridge in mixing.RIDGES:
      penalty = ridge * np.diag([0.0] + [1.0] * (terms.shape[1] - 1))
      left = []
      for i in range(12):
        x, y = np.delete(terms, i, 0), np.delete(losses, i)
        left.append(losses[i] - terms[i] @ np.linalg.pinv(x.T @ x + penalty) @ x.T @ y)
      errors[degree, ridge] = np.sqrt(np.mean(np.square(left)))
  assert surface.error == pytest.approx(min(errors.values()), rel=1e-6)


def test_interval_is_students():
  """1 to 5: mean 3, standard error 0.7071, t of 4 degrees at 97.5 % is 2.7764."""
  assert mixing.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.96324), rel=1e-5)
  assert mixing.interval([2.0]) == (2.0, float('inf'))


def test_mean_loss_by_targets():
  losses = dict(arts=4.0, law=6.0)
  assert mixing.mean_loss(losses) == 5
  assert mixing.mean_loss(losses, (('law', 3.0), ('arts', 1.0))) == 5.5
  assert mixing.mean_loss(losses, (('law', 1.0),)) == 6
  with pytest.raises(ValueError, match='weigh none of the held-out domains arts, law'):
    mixing.mean_loss(losses, (('trade', 1.0),))


def test_summary_pairs_runs_by_seed():
  """Seeds differ by 1, levels by 0.1 to 0.12: apart the intervals overlap, paired they do not."""
  finals = dict(one=[dict(law=x) for x in (5.0, 6.0, 7.0)],
                two=[dict(law=x) for x in (4.9, 5.88, 6.89)])
  one, two = mixing.summarise(finals)
  assert one['against'] == {} and one['half'] > 2
  mean, half = two['against']['one']
  assert mean == pytest.approx(-0.11) and mean + half < -0.05


def test_log_drops_a_torn_line(tmp_path):
  path = tmp_path / 'trials.jsonl'
  log = mixing.Log(path)
  log.add(('domain', 0), losses=dict(law=1.5))
  log.add(('domain', 1), losses=dict(law=2.5))
  text = path.read_text()
  path.write_text(text[:-9])
  assert list(mixing.Log(path).found) == [('domain', 0)]
  again = mixing.Log(path)
  again.add(('domain', 1), losses=dict(law=2.5))
  assert path.read_text() == text


@pytest.fixture
def labelled(tmp_path):
  """A file of 160 labelled records of two domains, some of scrambled words."""
  rng, rows = random.Random(0), []
  words = dict(law='the court held that no person shall be bound by a rule of law'.split(),
               arts='she painted green hills while birds sang over a small blue sea'.split())
  for i in range(160):
    domain, poor = ('law', 'arts')[i % 2], i % 4 < 2
    text = words[domain] * 4
    start = rng.randrange(len(text) // 2)
    text = text[start:start + 20]
    if poor:
      rng.shuffle(text)
    rows.append(dict(id=f'r{i}', text=f'{" ".join(text)} {i}',
                     labels=dict(domain=domain, education=rng.randint(0, 1) if poor else 4)))
  path = tmp_path / 'labelled.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path, rows


def run(path, workdir, *more):
  settings = dict(trials=4, seeds=2, steps=4, final_steps=4, batch=2, length=32,
                  tokenizer_size=340, **{
                    'model.layers': 1, 'model.width': 16, 'model.heads': 2, 'model.kv_heads': 1,
                    'model.head_width': 8, 'model.mlp': 32, 'model.vocab': 340,
                    'optim.warmup': 1, 'heldout.batches': 1, 'heldout.share': 0.2})
  return main(['mix', '--config=configs/mix.py:tiny', f'--input={path}', f'--workdir={workdir}',
               *(f'--config.{key}={value}' for key, value in settings.items()), *more])


def test_command_and_its_resume(labelled, tmp_path, capsys, quick_compilation):
  path, rows = labelled
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  assert run(path, whole) == 0
  printed = capsys.readouterr().out
  assert 'instance: theta arts' in printed and 'against domain' in printed
  weights = [json.loads(line) for line in (whole / 'weights.jsonl').read_text().splitlines()]
  assert [each['id'] for each in weights] == [row['id'] for row in rows]
  assert np.mean([each['weight'] for each in weights]) == pytest.approx(1, abs=0.1)
  mix = json.loads((whole / 'mix.json').read_text())
  instance = mix['levels'][1]
  assert instance['names'] == ['arts', 'law', 'education'] and instance['trials'] == 4
  ratio = np.log(weights[0]['weight'] / weights[2]['weight'])  # one domain, other education
  gap = (rows[0]['labels']['education'] - rows[2]['labels']['education']) / 2.5
  assert ratio == pytest.approx(gap * instance['theta'][2])
  trials = (whole / 'trials.jsonl').read_text().splitlines()
  assert len(trials) == 2 * 4 + 3 * 2
  assert len({line['losses']['law'] for line in map(json.loads, trials)}) > 10  # theta matters

  cut.mkdir()  # as a run that was killed leaves it, with a torn line
  for name in ('config.json', 'tokenizer'):
    (cut / name).symlink_to(whole / name)
  (cut / 'trials.jsonl').write_text('\n'.join(trials[:6]) + '\n' + trials[6][:20])
  assert run(path, cut, '--config.parallel=2') == 2
  assert 'holds the trials of another run (config.config.parallel: 1 -> 2)' in (
    capsys.readouterr().err)
  assert run(path, cut) == 0
  assert (cut / 'trials.jsonl').read_text().splitlines() == trials
  assert json.loads((cut / 'mix.json').read_text()) == mix


def test_proxies_in_parallel_are_those_apart(labelled, tmp_path, quick_compilation):
  path, _ = labelled
  assert run(path, tmp_path / 'one', '--config.levels=("instance",)') == 0
  assert run(path, tmp_path / 'four', '--config.levels=("instance",)', '--config.parallel=4') == 0
  one, four = ([json.loads(line) for line in (tmp_path / name / 'trials.jsonl').open()]
               for name in ('one', 'four'))
  assert len(one) == len(four) == 8
  for a, b in zip(one, four):
    assert a['key'] == b['key']
    assert a['losses'] == pytest.approx(b['losses'], rel=1e-4)


@pytest.mark.parametrize('line, message', [
  ('{"text": "x"}', 'labelled, line 161: labels.domain is None'),
  ('{"labels": {"domain": "law", "education": 3}}', 'line 161: the record has labels; wanted text'),
  ('{"text": ', 'line 161: not JSON')])
def test_bad_lines_are_named(labelled, tmp_path, capsys, line, message):
  path, _ = labelled
  with path.open('a') as file:
    file.write(line + '\n')
  assert run(path, tmp_path / 'run') == 2
  assert message in capsys.readouterr().err


def test_nothing_held_out(labelled, tmp_path, capsys):
  path, _ = labelled
  assert run(path, tmp_path / 'run', '--config.heldout.least_education=5') == 2
  assert '0 held out: give more documents, or change config.heldout' in capsys.readouterr().err
