import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.generation.sampling import GREEDY, NON_THINKING, Sampling, Settings, argmax, sample

V, SIZE = 40, 36
LOGITS_V = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)
draw = jax.jit(sample)


def expected(row, logits_V, seen=()):
  """Probabilities of the ids by `Sampling`'s words, one id at a time in numpy."""
  logits_V = np.array(logits_V[:SIZE], np.float64)
  logits_V[list(seen)] -= row.presence_penalty or 0
  p = np.exp(logits_V / row.temperature)
  order = np.argsort(-p, kind='stable')
  if row.top_k:
    order = order[:row.top_k]
  if row.top_p:
    share = np.cumsum(p[order]) / p[order].sum()
    order = order[:np.searchsorted(share, row.top_p) + 1]
  if row.min_p:
    order = [id for id in order if p[id] >= row.min_p * p.max()]
  kept = np.zeros(V)
  kept[order] = p[order]
  return kept / kept.sum()


@pytest.mark.parametrize('row', [
  Sampling(), Sampling(1.7), Sampling(0.5, top_k=5), Sampling(top_p=0.6), Sampling(min_p=0.15),
  Sampling(0.7, top_k=20, top_p=0.8), Sampling(1.3, top_k=9, top_p=0.9, min_p=0.1),
  Sampling(presence_penalty=1.5), NON_THINKING, Sampling(top_k=1), Sampling(top_p=1e-6),
  Sampling(top_p=1.0), Sampling(min_p=1.0), Sampling(top_k=1000)])
def test_draws_follow_the_exact_distribution(row):
  """20,000 draws: no id outside the support, and Pearson's chi-squared within 6 sigma."""
  count, seen = 20_000, [3, 7, int(LOGITS_V[:SIZE].argmax())]
  settings = Settings.make([row] * count, range(count), SIZE)
  seen_BV = np.zeros((count, V), bool)
  seen_BV[:, seen] = True
  token_B, logp_B, plain_B = draw(np.tile(LOGITS_V, (count, 1)), settings, np.zeros(count, int),
                                  seen_BV)
  p_V = expected(row, LOGITS_V, seen)
  drawn_V = np.bincount(token_B, minlength=V)
  assert not drawn_V[p_V == 0].any()
  np.testing.assert_allclose(logp_B, np.log(p_V[token_B]), atol=2e-5)
  np.testing.assert_allclose(plain_B, jax.nn.log_softmax(LOGITS_V)[token_B], atol=2e-5)
  likely = p_V * count >= 5
  chi = np.sum((drawn_V - p_V * count)[likely] ** 2 / (p_V * count)[likely])
  degrees = max(likely.sum() - 1, 1)
  assert chi < degrees + 6 * np.sqrt(2 * degrees)


def test_a_row_draws_the_same_in_any_company():
  """Neighbours decide how many candidates are sorted; the row's token must not notice."""
  rows = [Sampling(0.9, top_k=10, seed=4), Sampling(seed=4), Sampling(0.8, top_p=0.9, seed=5),
          Sampling(1.2, min_p=0.05), GREEDY]
  logits = np.random.default_rng(1).normal(0, 2, (5, V)).astype(np.float32)
  count_B = np.arange(5)
  together = draw(logits, Settings.make(rows, range(5), SIZE), count_B)
  for b in range(5):
    alone = draw(logits[b:b + 1], Settings.make(rows[b:b + 1], [b], SIZE), count_B[b:b + 1])
    assert int(alone[0][0]) == int(together[0][b])
    np.testing.assert_allclose(alone[1][0], together[1][b], atol=1e-6)


def test_seed_prompt_and_place_each_change_the_draw():
  def tokens(seed, place, count):
    row = Sampling(3.0, seed=seed)
    logits = np.tile(LOGITS_V, (64, 1))
    settings = Settings.make([row] * 64, [place] * 64, SIZE)
    return np.asarray(draw(logits, settings, np.arange(count, count + 64))[0])
  base = tokens(0, 0, 0)
  assert (tokens(0, 0, 0) == base).all()
  for other in (tokens(1, 0, 0), tokens(0, 1, 0), tokens(0, 0, 64)):
    assert (other != base).mean() > 0.5
  assert len(set(base)) > 5


def test_greedy_takes_the_first_of_the_largest_and_sorts_nothing():
  logits = np.zeros((2, V), np.float32)
  logits[0, [5, 9]], logits[1, [SIZE, SIZE - 1]] = 3, [9, 2]
  settings = Settings.make([GREEDY] * 2, [0, 0], SIZE)
  token_B, logp_B, _ = draw(logits, settings, np.zeros(2, int))
  assert token_B.tolist() == [5, SIZE - 1] and logp_B.tolist() == [0, 0]
  text = draw.lower(logits, settings, np.zeros(2, int)).as_text()
  assert 'stablehlo.sort' not in text and 'chlo.top_k' not in text
  np.testing.assert_array_equal(argmax(jnp.array([[1., 1., 0.]])), [0])


def test_penalty_changes_what_is_greedy():
  settings = Settings.make([Sampling(0, presence_penalty=100.0)], [0], SIZE)
  best = int(LOGITS_V[:SIZE].argmax())
  token_B, *_ = draw(LOGITS_V[None], settings, np.zeros(1, int), np.arange(V)[None] == best)
  assert int(token_B[0]) == np.argsort(-LOGITS_V[:SIZE])[1]


@pytest.mark.parametrize('wrong', [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0),
                                   dict(top_p=1.1), dict(min_p=2), dict(max_tokens=0)])
def test_senseless_values_are_named(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    Sampling(**wrong)
