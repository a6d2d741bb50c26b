"""Tunes the weights of documents on small proxies, as RegMix (Liu et al. 2024, 2407.01492) does.

Trials: proxies trained on a fixed budget, each with its own theta (see `data.weighting`). A ridge
regression from theta to the mean held-out loss is fitted to them; the theta of the lowest loss it
predicts, within what was tried, is then trained several times beside the unweighted documents.
RegMix weighs domains; here levels that weigh each document by its labels get the same trials and
the same budget, so that the two can be compared.
"""
import dataclasses
import json

import numpy as np
from scipy import stats

from qwen3_jax.data import weighting

RIDGES = 10.0 ** np.arange(-6, 3)
CANDIDATES, BEST = 2 ** 14, 100  # RegMix, section 3.4: the mean of the 100 best of many


def draw_thetas(names, domains, spread, count, seed):
  """(count, names) of theta from a scrambled Sobol sequence in a box; the first is 0 (no weights).

  `spread` holds the box's half-widths, `domain` and `education` (which `unsafe` shares). Adding the
  same to all domains changes no weight, so their mean is taken off.
  """
  box = np.array([spread.domain if name in domains else spread.education for name in names])
  sobol = stats.qmc.Sobol(len(names), seed=seed)
  unit = sobol.random_base2(int(np.ceil(np.log2(max(2, count)))))[:count]
  thetas = (2 * unit - 1) * box
  if count < CANDIDATES:
    thetas[0] = 0
  where = [name in domains for name in names]
  thetas[:, where] -= thetas[:, where].mean(1, keepdims=True)
  return thetas


@dataclasses.dataclass(frozen=True)
class Surface:
  """A polynomial of theta fitted to losses; `error` is that of leaving one out (root mean square).

  `explained` is 1 - error^2 / variance: near 0 or below, the trials say nothing of theta.
  """
  degree: int
  scale: np.ndarray
  coefficients: np.ndarray
  error: float
  explained: float

  def predict(self, thetas):
    return _terms(thetas / self.scale, self.degree) @ self.coefficients


def _terms(x, degree):
  ones, (i, j) = np.ones((len(x), 1)), np.triu_indices(x.shape[1])
  return np.hstack([ones, x] + [x[:, i] * x[:, j]] * (degree == 2))


def fit(thetas, losses):
  """The `Surface` of degree 1 or 2, and of that ridge, which leaves the least error one out."""
  scale = np.abs(thetas).max(0) + 1e-12
  best = None
  for degree in (1, 2):
    x = _terms(thetas / scale, degree)
    for ridge in RIDGES:
      penalty = ridge * np.eye(x.shape[1])
      penalty[0, 0] = 0
      inverse = np.linalg.pinv(x.T @ x + penalty) @ x.T
      leverage = np.clip(np.einsum('ij,ji->i', x, inverse), None, 1 - 1e-9)
      error = float(np.sqrt(np.mean(((losses - x @ (inverse @ losses)) / (1 - leverage)) ** 2)))
      if best is None or error < best.error:
        best = Surface(degree, scale, inverse @ losses, error,
                       1 - error ** 2 / max(np.var(losses), 1e-30))
  return best


def choose(surface, candidates):
  """The mean of the BEST candidates of lowest predicted loss."""
  return candidates[np.argsort(surface.predict(candidates))[:BEST]].mean(0)


def mean_loss(losses, targets=None):
  """Mean of {domain: loss}; `targets` are weights by domain (absent: 0), None weighs them alike."""
  weights = {domain: (1.0 if targets is None else dict(targets).get(domain, 0.0))
             for domain in losses}
  total = sum(weights.values())
  if not total > 0:
    raise ValueError(f'config.targets {targets} weigh none of the held-out domains '
                     f'{", ".join(losses)}')
  return sum(weights[domain] * loss for domain, loss in losses.items()) / total


def interval(values, level=0.95):
  """(mean, half-width) of the t interval of the mean; the half-width of one value is not finite."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return float(values.mean()), float('inf')
  error = values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(error * stats.t.ppf((1 + level) / 2, len(values) - 1))


class Log:
  """Lines of results by key in a JSONL file, each written once; a torn last line is dropped."""

  def __init__(self, path):
    self.path, self.found = path, {}
    text = path.read_text() if path.exists() else ''
    whole = text[:text.rfind('\n') + 1]
    if whole != text:
      path.write_text(whole)
    for line in whole.splitlines():
      entry = json.loads(line)
      self.found[tuple(entry['key'])] = entry

  def add(self, key, **entry):
    self.found[key] = dict(key=key, **entry)
    with self.path.open('a') as file:
      file.write(json.dumps(self.found[key]) + '\n')


def run_trials(proxy, log, jobs, steps, parallel, report=print):
  """Measures what of `jobs` {key: (weights, seed, more)} is not in `log`, `parallel` at a time."""
  missing = [key for key in jobs if key not in log.found]
  for first in range(0, len(missing), parallel):
    keys = missing[first:first + parallel]
    weights, seeds, more = zip(*(jobs[key] for key in keys))
    for key, rest, found in zip(keys, more, proxy.measure(weights, steps, seeds)):
      log.add(key, losses=found, **rest)
      report(f'{" ".join(map(str, key))}: '
             f'mean {np.mean(list(found.values())):.4f}')
  return {key: log.found[key] for key in jobs}


def tune_level(proxy, log, level, config, report=print):
  """Theta of one level with what the trials say of it, as a dict."""
  domains = proxy.documents.domains
  safety = len({each.get('safety') for each in proxy.documents.labels}) > 1
  names = weighting.columns(level, domains, safety)
  x = weighting.features(proxy.documents.labels, names)
  thetas = draw_thetas(names, domains, config.spread, config.trials, config.seed)
  jobs = {(level, i): (weighting.weigh(theta, x), config.seed, dict(theta=theta.tolist()))
          for i, theta in enumerate(thetas)}
  found = run_trials(proxy, log, jobs, config.steps, config.parallel, report)
  losses = np.array([mean_loss(each['losses'], config.targets) for each in found.values()])
  surface = fit(thetas, losses)
  candidates = draw_thetas(names, domains, config.spread, CANDIDATES, config.seed + 1)
  theta = choose(surface, candidates)
  return dict(level=level, names=names, theta=theta.tolist(), trials=len(thetas),
              predicted=float(surface.predict(theta[None])[0]), unweighted=float(losses[0]),
              best_trial=float(losses.min()), degree=surface.degree, error=surface.error,
              explained=surface.explained)


def compare(proxy, log, tuned, config, report=print):
  """Final proxies of each tuned level and of unweighted documents: {name: [losses of each seed]}.

  Seeds are not those of the trials; all levels share them, and the budget.
  """
  weights = {'unweighted': np.ones(len(proxy.documents.labels))}
  for level in tuned:
    x = weighting.features(proxy.documents.labels, level['names'])
    weights[level['level']] = weighting.weigh(level['theta'], x)
  seeds = range(config.seed + 1, config.seed + 1 + config.seeds)
  jobs = {('final', name, seed): (each, seed, {}) for seed in seeds
          for name, each in weights.items()}
  found = run_trials(proxy, log, jobs, config.final_steps, config.parallel, report)
  return {name: [found['final', name, seed]['losses'] for seed in seeds] for name in weights}


def summarise(finals, targets=None):
  """Rows of dicts: `name`, `loss` and `half` (95 % interval over seeds), `domains`, `against`.

  `against` holds the mean difference to each row above with its half-width, paired by seed: below
  0 means a lower loss.
  """
  means = {name: np.array([mean_loss(each, targets) for each in runs])
           for name, runs in finals.items()}
  rows = []
  for name, runs in finals.items():
    loss, half = interval(means[name])
    domains = {domain: interval([each[domain] for each in runs]) for domain in runs[0]}
    against = {row['name']: interval(means[name] - means[row['name']]) for row in rows}
    rows.append(dict(name=name, loss=loss, half=half, domains=domains, against=against))
  return rows
