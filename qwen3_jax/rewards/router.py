"""Rewards of answers: each record's own mixture of verifiers, judges and reward models.

A record's `verifiers` are {name: weight}. Rules run in child processes (`pool`), scorers (a judge,
a reward model, code in the sandbox) in threads beside them, each with a deadline. What the
machinery did not tell is missing, never zero.
"""
import collections
import contextlib
import dataclasses
import difflib
import math
import threading
import time
import weakref

from qwen3_jax.rewards.pool import Missing, Pool
from qwen3_jax.rewards.verifiers import NEEDS, RULES

SECONDS = 30.0  # for a rule and one answer; its inner limits (math-verify's 1 s) come first
SCORER_SECONDS = 600.0  # for a scorer and one batch
MEMORY = 10_000  # answers that a running mean goes back


@dataclasses.dataclass(frozen=True)
class Scored:
  """`components` are from 0 to 1, or None with the reason in `missing`; `raw` is unnormalised."""
  reward: float | None
  components: dict[str, float | None]
  missing: dict[str, str] = dataclasses.field(default_factory=dict)
  raw: dict[str, float] = dataclasses.field(default_factory=dict)


class Router:
  """Scores answers by the verifiers that their records name.

  `scorers` maps further names (code, judge, preference) to functions of a list of (record,
  response) pairs that give a number, None or an exception for each. `defaults` maps a source to the
  {name: weight} of its records that name none; `gates` are verifiers without whose full mark no
  other positive component counts; scorers in `unbounded` are normalised per source. `seconds` maps
  names to other deadlines. Scorers in `inline` run in the calling thread, as JAX wants it where
  several processes compute together, and have no deadline.
  """

  def __init__(self, scorers=None, defaults=None, gates=('mode',), unbounded=('preference',),
               workers=2, seconds=None, inline=()):
    self.inline = inline
    self.scorers, self.defaults = dict(scorers or {}), dict(defaults or {})
    self.gates, self.unbounded, self.seconds = gates, unbounded, dict(seconds or {})
    self.pool, self.hung, self.statistics = Pool(workers), {}, {}
    self.close = weakref.finalize(self, self.pool.close)

  def score(self, records, responses):
    """A Scored for each response, in order.

    A component of 1 is good, whatever it measures. A positive weight earns weight x component, a
    negative one is a penalty and costs weight x (1 - component); the reward is their sum. It is
    None where a component of positive weight is missing: answers judged by fewer rules than others
    to the same question cannot be compared with them. A missing penalty takes nothing off. Raises
    ValueError for a verifier that is not known or whose field the record lacks.
    """
    wanted = [self.weigh(record) for record in records]
    pairs = list(zip(records, responses, strict=True))
    found = [{} for _ in pairs]
    asked = {name for weights in wanted for name in weights} & {*self.scorers}
    running = [self._start(name, [i for i, weights in enumerate(wanted) if name in weights], pairs)
               for name in sorted(asked, key=lambda name: (name in self.inline, name))]
    jobs = [(i, name) for i, weights in enumerate(wanted) for name in weights
            if name not in self.scorers]
    values = self.pool.run([(name, *pairs[i]) for i, name in jobs],
                           lambda name: self.seconds.get(name, SECONDS))
    for (i, name), value in zip(jobs, values):
      found[i][name] = _check(value)
    for name, places, values in map(self._finish, running):
      values, raw = [_check(value, name in self.unbounded) for value in values], {}
      if name in self.unbounded:
        raw, values = values, self._normalise(name, [records[i] for i in places], values)
      for k, i in enumerate(places):
        found[i][name] = values[k]
        if raw and not isinstance(raw[k], Missing):
          found[i].setdefault('', {})[name] = raw[k]
    return [self._combine(weights, values) for weights, values in zip(wanted, found)]

  def weigh(self, record):
    """The {name: weight} of a record; ValueError where it cannot be scored by them."""
    weights = record.get('verifiers') or self.defaults.get(record.get('source'))
    where = f'record {record.get("id", record.get("source"))!r}'
    if not weights:
      raise ValueError(f'{where} names no verifiers and its source has no default; give it '
                       "'verifiers': {name: weight}")
    for name, weight in weights.items():
      known = {*RULES, *self.scorers}
      kind = name.partition('.')[0] if name.startswith('environment.') else name
      if kind not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = 'it needs a scorer, which this run has not opened' if name in NEEDS else (
          f'did you mean {near[0]!r}?' if near else f'there are: {", ".join(sorted(known))}')
        raise ValueError(f'{where} asks for the verifier {name!r}; {hint}')
      field = NEEDS.get(kind, 'messages')
      if record.get(field) is None:
        raise ValueError(f'{where} asks for the verifier {name!r} but has no {field!r}')
      if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f'{where}: the weight of {name!r} is {weight!r}, wanted a finite number')
    return weights

  def _combine(self, weights, values):
    raw = values.pop('', {})
    missing = {name: v.reason for name, v in values.items() if isinstance(v, Missing)}
    components = {name: None if name in missing else values[name] for name in weights}
    shut = any(components.get(gate, 1) is not None and components.get(gate, 1) < 1
               for gate in self.gates)
    total = 0.0
    for name, weight in weights.items():
      counts = name in self.gates or not shut or weight < 0
      if components[name] is not None:
        total += counts * weight * (components[name] if weight > 0 else 1 - components[name])
      elif counts and (weight > 0 or name in self.gates):
        total = math.nan
    return Scored(None if math.isnan(total) else total, components, missing, raw)

  def _start(self, name, places, pairs):
    """Begins a scorer in a thread, unless an earlier call of it still hangs."""
    answer, before = [], self.hung.pop(name, None)
    if before is not None and before.is_alive():
      self.hung[name] = before
      return name, places, before, answer, 0.0, len(places)
    thread = threading.Thread(target=_call, daemon=True, name=f'scorer {name}', args=(
      self.scorers[name], [pairs[i] for i in places], answer))
    (thread.run if name in self.inline else thread.start)()
    until = time.monotonic() + self.seconds.get(name, SCORER_SECONDS)
    return name, places, thread, answer, until, len(places)

  def _finish(self, run):
    name, places, thread, answer, until, count = run
    if not answer:
      thread.join(max(0.0, until - time.monotonic()))
    if not answer:
      self.hung[name] = thread
      return name, places, [Missing('deadline' if until else 'an earlier call still hangs')] * count
    values = list(answer[0])
    if len(values) != count:
      values = [Missing(f'the scorer gave {len(values)} numbers for {count} answers')] * count
    return name, places, values

  def _normalise(self, name, records, values):
    """Logistic function of how many deviations a number is from the mean of its source so far."""
    for record, value in zip(records, values):
      if not isinstance(value, Missing):
        self._add(f'{name} {record.get("source")}', value)
    normal = []
    for record, value in zip(records, values):
      if not isinstance(value, Missing):
        count, mean, square = self.statistics[f'{name} {record.get("source")}']
        deviation = math.sqrt(square / count) or 1.0
        value = 0.5 + 0.5 * math.tanh((value - mean) / deviation / 2)
      normal.append(value)
    return normal

  def _add(self, key, value):
    """Welford's running sums, which forget what is older than MEMORY answers."""
    count, mean, square = self.statistics.get(key, (0, 0.0, 0.0))
    if count >= MEMORY:
      count, square = MEMORY - 1, square * (MEMORY - 1) / count
    new = mean + (value - mean) / (count + 1)
    self.statistics[key] = count + 1, new, square + (value - mean) * (value - new)

  def state(self):
    """What `restore` takes, as JSON: the running statistics of unbounded scorers."""
    return {key: list(value) for key, value in sorted(self.statistics.items())}

  def restore(self, state):
    self.statistics = {key: tuple(value) for key, value in state.items()}


def _call(scorer, batch, answer):
  try:
    answer.append(scorer(batch))
  except Exception as error:
    answer.append([error] * len(batch))


def _check(value, unbounded=False):
  """A component, or Missing for what is none: a failure, NaN, infinity, a number out of range."""
  if value is None:
    return Missing('no number')
  if isinstance(value, Exception):
    return Missing(f'{type(value).__name__}: {value}'[:300])
  if isinstance(value, Missing):
    return value
  with contextlib.suppress(TypeError, ValueError, OverflowError):
    number = float(value)
    if math.isfinite(number) and (unbounded or 0 <= number <= 1):
      return number
  return Missing(f'not a reward: {value!r}'[:300])


def summarise(scored):
  """Metrics of scored answers: means of reward and components, counts of what is missing and why.

  {'reward': mean, 'reward_missing': n, 'math': mean, 'math_missing': n, ...} and, under 'reasons',
  how often each reason was given.
  """
  columns, reasons = collections.defaultdict(list), collections.Counter()
  for each in scored:
    columns['reward'].append(each.reward)
    for name, value in each.components.items():
      columns[name].append(value)
    reasons.update(f'{name}: {reason}' for name, reason in each.missing.items())
  metrics = {}
  for name, values in columns.items():
    there = [value for value in values if value is not None]
    if there:
      metrics[name] = sum(there) / len(there)
    metrics[f'{name}_missing'] = len(values) - len(there)
  return metrics | dict(reasons=dict(reasons))
