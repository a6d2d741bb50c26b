"""Weights of documents: from labels, exact as shares of a source, the same at every drawing."""

import numpy as np
import pytest

from qwen3_jax.data import mixture, sources, weighting

LABELS = [dict(domain='law', education=0), dict(domain='law', education=5, safety='unsafe'),
          dict(domain='arts', education=2.5, safety='safe')]


@pytest.mark.parametrize('level, names, rows', [
  ('domain', ['arts', 'law'], [[0, 1], [0, 1], [1, 0]]),
  ('instance', ['arts', 'law', 'education', 'unsafe'],
   [[0, 1, -1, 0], [0, 1, 1, 1], [1, 0, 0, 0]]),
  ('crossed', ['arts', 'law', 'education of arts', 'education of law', 'unsafe'],
   [[0, 1, 0, -1, 0], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])])
def test_features_of_a_level(level, names, rows):
  assert weighting.columns(level, ['arts', 'law'], safety=True) == names
  np.testing.assert_array_equal(weighting.features(LABELS, names), rows)


@pytest.mark.parametrize('labels, message', [
  (dict(education=3), 'labels.domain is None; want a name'),
  (dict(domain='law', education='high'), "labels.education is 'high'; want a number from 0 to 5"),
  (dict(domain='law', education=6), 'labels.education is 6'),
  (dict(domain='law', education=True), 'labels.education is True'),
  (None, 'labels.domain is None'),
  (dict(domain='trade', education=3), "'trade' was not among those tuned: arts, law")])
def test_labels_that_say_nothing_are_refused(labels, message):
  with pytest.raises(ValueError, match=message):
    weighting.features([labels], ['arts', 'law', 'education'])


def test_unknown_level():
  with pytest.raises(ValueError, match="level 'token' does not exist; want one of domain"):
    weighting.columns('token', ['law'])


def test_weights_have_mean_one_and_the_ratio_that_theta_says():
  x = weighting.features(LABELS, ['arts', 'law', 'education'])
  weights = weighting.weigh([0.5, -0.5, 1.0], x)
  assert weights.mean() == pytest.approx(1)
  assert np.log(weights[1] / weights[0]) == pytest.approx(2)
  assert np.log(weights[2] / weights[1]) == pytest.approx(0)
  np.testing.assert_array_equal(weighting.weigh(np.zeros(3), x), 1)
  assert np.isfinite(weighting.weigh([2000, 0, 0], x)).all()


@pytest.mark.parametrize('seed', range(5))
def test_each_document_comes_within_one_of_its_share(seed):
  weights = np.random.default_rng(seed).exponential(size=200) ** 2
  weights[[0, 7, 199]] = 0
  drawn = weighting.draw(weights, 1000, seed)
  counts, exact = np.bincount(drawn, minlength=200), 1000 * weights / weights.sum()
  assert len(drawn) == 1000 and np.abs(counts - exact).max() < 1
  assert not counts[[0, 7, 199]].any()
  assert (drawn == weighting.draw(weights, 1000, seed)).all()
  assert (drawn != weighting.draw(weights, 1000, seed + 1)).any()


@pytest.mark.parametrize('weights', [[], [0, 0], [1, -1], [1, np.nan]])
def test_weights_that_are_none(weights):
  with pytest.raises(ValueError, match='must be finite, not negative, and one above 0'):
    weighting.draw(weights, 4)


def make_source(count=40):
  texts = [f'document {i}' for i in range(count)]
  return sources.Source('texts', texts.__getitem__, np.array([len(t) for t in texts]),
                        np.arange(count, dtype=np.uint64))


def test_weighted_source_in_a_mixture():
  """Over a block of the mixture, 32 passes, documents come by weight; the order is found again."""
  source, weights = make_source(32), np.linspace(0, 2, 32)
  view = weighting.weighted(source, weights, rounds=4, seed=1)
  mix = mixture.mixture([(view, 1.0)], seed=3)
  given = [mix[i][1] for i in range(mixture.BLOCK)]
  counts = np.array([given.count(source[i]) for i in range(32)])
  assert np.abs(counts / 32 - 4 * weights).max() < 1
  again = mixture.mixture([(weighting.weighted(source, weights, rounds=4, seed=1), 1.0)], seed=3)
  assert [again[i][1] for i in range(80, 160)] == given[80:160] != sorted(given[80:160])
  assert again.identity == mix.identity  # what a resumed run compares
  other = weighting.weighted(source, weights[::-1], rounds=4, seed=1)
  assert mixture.mixture([(other, 1.0)], seed=3).identity != mix.identity


def test_as_many_weights_as_documents():
  with pytest.raises(ValueError, match='3 weights for 40 documents of source texts'):
    weighting.weighted(make_source(), [1, 2, 3])
