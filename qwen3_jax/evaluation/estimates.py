"""What samples say of a model: pass@k, maj@k and means without bias, with 95 % intervals."""
import math

import numpy as np

from qwen3_jax.stages.candidates import wilson

Z = 1.96  # deviations of a 95 % interval


def pass_at(marks, k):
  """The chance that the best of `k` of a problem's samples counts (Chen et al. 2021, eq. 1).

  The mean over all subsets of `k` of the `marks` (0 to 1) of each subset's highest; for marks of 0
  and 1 this is 1 - C(n - right, k) / C(n, k). Raises ValueError for `k` above their number.
  """
  ranked = sorted(marks)
  _check(k, len(ranked))
  return math.fsum(mark * (math.comb(place, k - 1) / math.comb(len(ranked), k))
                   for place, mark in enumerate(ranked) if mark)


def maj_at(answers, marks, k):
  """The mean mark of the most frequent answer among `k` of a problem's samples; ties share.

  Exact: the mean over all subsets of `k`. `answers` are group numbers, None for a sample that has
  no answer: it has no vote, and a subset of nothing else earns 0. A group's mark is the mean of
  its samples'. Raises ValueError for `k` above the number of samples.
  """
  _check(k, len(answers))
  groups = {}
  for answer, mark in zip(answers, marks, strict=True):
    groups.setdefault(answer, []).append(mark)
  silent = len(groups.pop(None, ()))
  sized = [(len(each), sum(each) / len(each)) for each in groups.values()]
  if not any(mark for _, mark in sized):
    return 0.0
  most = max(size for size, _ in sized)
  total = sum(_won_with(votes, sized, silent, k) for votes in range(1, min(k, most) + 1))
  return float(total / math.comb(len(answers), k))


def _won_with(votes, sized, silent, k):
  """Sum over subsets of `k` whose most frequent answers have `votes` each, of their mean mark.

  A generating function over how many of a subset are drawn and how many answers tie: of all
  subsets their number, and the sum of the marks of the answers that tie.
  """
  ties = k // votes
  count, marks = np.zeros((2, k + 1, ties + 1), object)
  for drawn in range(min(silent, k) + 1):
    count[drawn, 0] = math.comb(silent, drawn)
  for size, mark in sized:
    counted, marked = np.zeros((2, k + 1, ties + 1), object)
    for drawn in range(min(size, votes - 1) + 1):
      ways = math.comb(size, drawn)
      counted[drawn:] += ways * count[:k + 1 - drawn]
      marked[drawn:] += ways * marks[:k + 1 - drawn]
    if size >= votes:
      ways = math.comb(size, votes)
      counted[votes:, 1:] += ways * count[:k + 1 - votes, :-1]
      marked[votes:, 1:] += ways * (marks + mark * count)[:k + 1 - votes, :-1]
    count, marks = counted, marked
  return sum(marks[k, tie] / tie for tie in range(1, ties + 1))


def interval(values, samples=1):
  """{'rate', 'low', 'high', 'count'}: the mean of one value (0 to 1) a problem, problems clustered.

  Wilson's interval with as many independent tries as would give the mean the variance that the
  problems show: for values of 0 and 1 it is Wilson's own. Each value is a mean of up to `samples`
  draws, and there are no more tries than draws.
  """
  values = np.asarray(values, float)
  if not len(values):
    return dict(rate=0.0, low=0.0, high=1.0, count=0)
  rate, spread = float(values.mean()), float(values.var())
  bernoulli = rate * (1 - rate)
  tries = len(values)
  if bernoulli > 0:
    tries *= min(bernoulli / max(spread, 1e-12), samples)
  tries = max(tries, len(values))
  low, high = wilson(rate * tries, tries)
  return dict(rate=rate, low=low, high=high, count=len(values))


def ratio(sums, counts):
  """{'rate', 'low', 'high', 'count'}: sum of `sums` / sum of `counts`, one of each a text.

  The interval takes the texts for independent draws (the ratio estimator's variance); with a single
  one it is unknown: None.
  """
  sums, counts = np.asarray(sums, float), np.asarray(counts, float)
  if not counts.sum():
    return dict(rate=None, low=None, high=None, count=0)
  rate, number = float(sums.sum() / counts.sum()), len(sums)
  left = sums - rate * counts
  half = Z * math.sqrt((left * left).sum() * number / max(1, number - 1)) / counts.sum()
  low, high = (rate - half, rate + half) if number > 1 else (None, None)
  return dict(rate=rate, low=low, high=high, count=number)


def group(answers, same):
  """A number for each answer, equal where `same(answer, an earlier one)`; None stays None."""
  found, numbers = [], []
  for answer in answers:
    place = None
    if answer is not None:
      place = next((i for i, known in enumerate(found) if known == answer or same(answer, known)),
                   len(found))
      if place == len(found):
        found.append(answer)
    numbers.append(place)
  return numbers


def powers(samples):
  """The k of pass@k and maj@k that so many samples tell: 1, 2, 4 ..., and all."""
  return sorted({min(1 << i, samples) for i in range(samples.bit_length() + 1)})


def _check(k, count):
  if not 1 <= k <= count:
    raise ValueError(f'k is {k} of {count} samples: want 1 to {count}')
