"""pass@k, maj@k and intervals against enumeration, formulas and simulation."""
import itertools
import math
import random

import numpy as np
import pytest

from qwen3_jax.evaluation import estimates, modes


def every(count, k):
  return list(itertools.combinations(range(count), k))


def vote(answers, marks, chosen):
  """The mean mark of the answers most often given among `chosen`, by counting."""
  given = [answers[i] for i in chosen if answers[i] is not None]
  if not given:
    return 0.0
  most = max(given.count(answer) for answer in given)
  winners = {answer for answer in given if given.count(answer) == most}
  worth = {answer: np.mean([m for a, m in zip(answers, marks) if a == answer])
           for answer in winners}
  return float(np.mean([*worth.values()]))


@pytest.mark.parametrize('count', (1, 2, 5, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(count):
  draw = random.Random(count)
  for _ in range(10):
    marks = [draw.choice((0, 0, 1, 0.5)) for _ in range(count)]
    for k in range(1, count + 1):
      wanted = np.mean([max(marks[i] for i in chosen) for chosen in every(count, k)])
      assert estimates.pass_at(marks, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_is_the_published_formula():
  for n, right, k in ((200, 3, 100), (64, 1, 64), (64, 63, 1), (10, 0, 5)):
    wanted = 1 - math.comb(n - right, k) / math.comb(n, k)
    assert estimates.pass_at([1] * right + [0] * (n - right), k) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize('count', (1, 3, 6, 8))
def test_maj_at_k_is_the_mean_over_all_subsets(count):
  draw = random.Random(count)
  for _ in range(20):
    answers = [draw.choice((None, 0, 0, 1, 2, 3)) for _ in range(count)]
    right = draw.choice((0, 1))
    marks = [float(answer == right) for answer in answers]
    for k in range(1, count + 1):
      wanted = np.mean([vote(answers, marks, chosen) for chosen in every(count, k)])
      assert estimates.maj_at(answers, marks, k) == pytest.approx(wanted, abs=1e-12)


def test_maj_of_64_samples_against_drawn_subsets():
  draw = random.Random(0)
  answers = [draw.choice((0, 0, 0, 1, 1, 2, 3, 4, None)) for _ in range(64)]
  marks = [float(answer == 1) for answer in answers]
  for k in (2, 8, 31):
    drawn = [vote(answers, marks, draw.sample(range(64), k)) for _ in range(4000)]
    error = 4 * np.std(drawn) / math.sqrt(len(drawn))
    assert estimates.maj_at(answers, marks, k) == pytest.approx(np.mean(drawn), abs=error)


def test_k_beyond_the_samples_is_refused():
  for k in (0, 3):
    with pytest.raises(ValueError, match='want 1 to 2'):
      estimates.pass_at([1, 0], k)
    with pytest.raises(ValueError, match='want 1 to 2'):
      estimates.maj_at([1, 1], [1, 0], k)


def test_one_sample_a_problem_gives_the_interval_of_wilson():
  for right, count in ((8, 10), (0, 20), (20, 20), (1, 3)):
    marks = [True] * right + [False] * (count - right)
    found, wanted = estimates.interval(marks), modes.rate(marks)
    assert found == {key: pytest.approx(value, abs=1e-12) for key, value in wanted.items()}
  assert estimates.interval([])['count'] == 0


def test_interval_of_clustered_samples_holds_the_truth_and_no_more():
  """Problems of very different difficulty, four samples each: 95 % of intervals hold the mean.

  Samples taken for independent would give intervals that hold it far less often.
  """
  rng, held, naive = np.random.default_rng(0), 0, 0
  for _ in range(1000):
    chance = rng.beta(0.5, 0.5, 60)
    marks = rng.random((60, 4)) < chance[:, None]
    found = estimates.interval(marks.mean(1), 4)
    flat = modes.rate(list(marks.ravel()))
    held += found['low'] <= 0.5 <= found['high']
    naive += flat['low'] <= 0.5 <= flat['high']
  assert 930 <= held <= 970
  assert naive < 850


def test_interval_agrees_with_the_bootstrap_over_problems():
  rng = np.random.default_rng(1)
  values = (rng.random((80, 8)) < rng.beta(1, 2, 80)[:, None]).mean(1)
  means = np.sort(values[rng.integers(0, 80, (20_000, 80))].mean(1))
  found = estimates.interval(values, 8)
  assert found['low'] == pytest.approx(means[500], abs=0.01)
  assert found['high'] == pytest.approx(means[-500], abs=0.01)


def test_equal_problems_count_as_their_draws():
  """No spread between problems: as many tries as samples, not infinitely many."""
  found, wanted = estimates.interval([0.5] * 10, 4), modes.rate([True] * 20 + [False] * 20)
  assert (found['low'], found['high']) == pytest.approx((wanted['low'], wanted['high']))


def test_a_ratio_weighs_texts_by_their_length():
  found = estimates.ratio([10.0, 40.0], [10, 20])
  assert found['rate'] == pytest.approx(50 / 30) and found['low'] < 50 / 30 < found['high']
  same = estimates.ratio([2.0, 4.0], [1, 2])
  assert same['low'] == pytest.approx(same['high']) == pytest.approx(2)
  assert estimates.ratio([], [])['rate'] is None and estimates.ratio([1], [1])['low'] is None


def test_interval_of_a_ratio_holds_the_truth():
  rng, held = np.random.default_rng(0), 0
  for _ in range(500):
    counts = rng.integers(5, 100, 80)
    found = estimates.ratio(counts * rng.gamma(4, 0.5, 80), counts)
    held += found['low'] <= 2 <= found['high']
  assert 460 <= held <= 490


def test_answers_are_grouped_by_a_comparison():
  same = lambda a, b: float(a) == float(b)
  assert estimates.group(['1', None, '2', '1.0', '2'], same) == [0, None, 1, 0, 1]


def test_powers_end_in_all_samples():
  assert estimates.powers(1) == [1] and estimates.powers(8) == [1, 2, 4, 8]
  assert estimates.powers(10) == [1, 2, 4, 8, 10] and estimates.powers(64)[-1] == 64
