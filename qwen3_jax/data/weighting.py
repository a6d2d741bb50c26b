"""Documents weighed one by one: weights from labels, and sources that give them as often.

Qwen3 chose its pretraining mixture for each document by its labels (report, section 3.1), where
earlier work weighed whole domains. How is not published; here the weight of a document is
exp(theta . x), divided by its mean over all documents, with x of its labels.
"""
import numpy as np

LEVELS = ('domain', 'instance', 'crossed')
MIDDLE = 2.5  # of the education values 0 to 5


def columns(level, domains, safety=False):
  """Names of the features of a level: one a domain; with 'instance' also `education`, and `unsafe`
  where `safety` tells documents apart; with 'crossed' an `education` of each domain.
  """
  if level not in LEVELS:
    raise ValueError(f'level {level!r} does not exist; want one of {", ".join(LEVELS)}')
  names = list(domains)
  if level == 'instance':
    names.append('education')
  if level == 'crossed':
    names += [f'education of {domain}' for domain in domains]
  return names + ['unsafe'] * (safety and level != 'domain')


def features(labels, names):
  """float64 (documents, names) of what `columns` names; education runs from -1 (0) to 1 (5).

  `labels` are dicts with 'domain', 'education' and perhaps 'safety'. Raises ValueError for one
  that lacks what a name asks for, or whose domain has no column.
  """
  place = {name: i for i, name in enumerate(names)}
  out = np.zeros((len(labels), len(names)))
  for row, each in zip(out, labels):
    domain, education = read_label(each)
    if domain not in place:
      raise ValueError(f'domain {domain!r} was not among those tuned: '
                       f'{", ".join(n for n in names if not n.startswith("education"))}')
    row[place[domain]] = 1
    for name in ('education', f'education of {domain}'):
      if name in place:
        row[place[name]] = education / MIDDLE - 1
    if 'unsafe' in place:
      row[place['unsafe']] = each.get('safety') == 'unsafe'
  return out


def read_label(labels):
  """(domain, education) of a record's labels; ValueError saying what is wrong."""
  labels = labels if isinstance(labels, dict) else {}
  domain, education = labels.get('domain'), labels.get('education')
  if not isinstance(domain, str) or not domain:
    raise ValueError(f'labels.domain is {domain!r}; want a name, as the annotate stage gives it')
  if isinstance(education, bool) or not isinstance(education, (int, float)) or not (
      0 <= education <= 5):
    raise ValueError(f'labels.education is {education!r}; want a number from 0 to 5')
  return domain, education


def weigh(theta, features):
  """Weights of documents with mean 1."""
  score = features @ np.asarray(theta, np.float64)
  weights = np.exp(score - score.max())
  return weights / weights.mean()


def draw(weights, size, seed=0):
  """Sorted indices of `size` documents drawn by weight: each within 1 of its exact share.

  Systematic sampling: one seeded offset, then equal steps along the cumulated weights. Raises
  ValueError for weights that are negative, not finite or all zero.
  """
  weights = np.asarray(weights, np.float64)
  if not weights.size or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
    raise ValueError('weights of documents must be finite, not negative, and one above 0')
  ends = np.cumsum(weights)
  points = (np.arange(size) + np.random.default_rng(seed).random()) / size * ends[-1]
  return np.minimum(np.searchsorted(ends, points, side='right'), np.flatnonzero(weights)[-1])


def weighted(source, weights, rounds=8, seed=0):
  """A `sources.Source` that gives document i weights[i] / mean times as often as `source` does.

  It is as long as `rounds` passes over the source, so that a document's number of copies is exact
  to 1 / rounds of the mean; those whose share is less come in some of the passes or not at all.
  What it gives depends on the index alone: a run that resumes in `data.mixture` finds the same.
  """
  if len(weights) != len(source):
    raise ValueError(f'{len(weights)} weights for {len(source)} documents of source {source.name}')
  return source.take(draw(weights, rounds * len(source), seed), f'{source.name}, weighted')
