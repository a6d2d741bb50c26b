"""Which prompts come next: those the model has not seen, can learn, does not know, of every kind.

The four criteria of the report's query-verifier pairs (section 4.2), applied while training: unused
before (`used`), learnable and challenging (by measured pass rates), broad (`credit` over sources).
"""
import hashlib

import numpy as np

FLOOR = 0.1  # of a source whose answers are all right or all wrong: pass rates change
MEMORY = 0.9  # of a source's pass rate, a prompt
FINITE = 100_000  # prompts; larger sources are not seen twice, so rates of single prompts are idle


class Curriculum:
  """An endless order of prompts over `parts`, [(source of records, share)].

  A prompt of pass rate `high` or more is not drawn again (Khatri et al. 2025, 2510.13786: no
  positive resampling), one that had no success waits for the next round through its source. Within
  a round, prompts whose rewards vary most, by pass rates known so far or the record's own
  `pass_rate`, come first (Qwen2.5, 2412.15115, section 4.3). A source is drawn by its share times
  4 p (1 - p) of its running pass rate p, so that effort goes where answers differ. `used` are
  hashes (`key`) of questions that earlier stages trained on; they are skipped. Everything is a
  function of `state`.
  """

  def __init__(self, parts, seed=0, high=0.9, used=()):
    if not parts or not all(len(source) for source, _ in parts):
      raise ValueError('a source of prompts is empty; each of config.data.sources must have some')
    self.parts, self.seed, self.high, self.used = parts, seed, high, frozenset(used)
    self.passed = [0.5] * len(parts)  # running pass rates
    self.credit = [0.0] * len(parts)
    self.place = [[0, 0] for _ in parts]  # round, prompts looked at in it
    self.rates = [{} for _ in parts]  # {index: pass rate} of finite sources
    self.begun = [{} for _ in parts]  # the same when the present round began: it fixes the order
    self.skipped = 0
    self._orders = {}

  def draw(self, count):
    """The next `count` prompts: [((part, index), record)]."""
    return [self._next(self._choose()) for _ in range(count)]

  def learn(self, place, rate):
    """Takes in the pass rate (0 to 1) of a prompt that was drawn; None where nothing is known."""
    part, index = place
    if rate is None:
      return
    self.passed[part] = MEMORY * self.passed[part] + (1 - MEMORY) * rate
    if len(self.parts[part][0]) <= FINITE:
      self.rates[part][index] = rate

  def state(self):
    """What JSON can hold and `restore` takes."""
    rates, begun = ([{str(index): rate for index, rate in each.items()} for each in known]
                    for known in (self.rates, self.begun))
    return dict(passed=list(self.passed), credit=list(self.credit), skipped=self.skipped,
                place=[list(pair) for pair in self.place], rates=rates, begun=begun,
                sources=[source.fingerprint for source, _ in self.parts])

  def restore(self, state):
    """Continues behind what was drawn; ValueError where the sources are others."""
    now = [source.fingerprint for source, _ in self.parts]
    if state['sources'] != now:
      raise ValueError('the prompts have changed since the checkpoint: its sources are '
                       f'{state["sources"]}, those of the config {now}')
    self.passed, self.credit = list(state['passed']), list(state['credit'])
    self.place = [list(pair) for pair in state['place']]
    self.rates, self.begun = ([{int(index): rate for index, rate in each.items()} for each in known]
                              for known in (state['rates'], state['begun']))
    self.skipped = state['skipped']
    self._orders = {}

  def _choose(self):
    """The source with the largest claim; the claims of all grow by their weights."""
    weights = [share * (FLOOR + (1 - FLOOR) * 4 * p * (1 - p))
               for (_, share), p in zip(self.parts, self.passed)]
    self.credit = [c + w / sum(weights) for c, w in zip(self.credit, weights)]
    part = int(np.argmax(self.credit))
    self.credit[part] -= 1
    return part

  def _next(self, part):
    source = self.parts[part][0]
    for _ in range(3 * len(source)):
      epoch, place = self.place[part]
      order = self._order(part, epoch)
      if place >= len(order):
        self.place[part], self.begun[part] = [epoch + 1, 0], dict(self.rates[part])
        continue
      self.place[part][1] += 1
      index = int(order[place])
      record = source[index]
      if self.used and key(record) in self.used:
        self.skipped += 1
        continue
      return (part, index), record
    raise ValueError(f'{source.name} has no prompt left: all {len(source)} are answered rightly '
                     f'(pass rate {self.high} or more) or were used by earlier stages. Give more, '
                     'or raise config.curriculum.high')

  def _order(self, part, epoch):
    """Indices of a round, by what was known when it began."""
    if (part, epoch) not in self._orders:
      source = self.parts[part][0]
      order = np.random.default_rng([self.seed, part, epoch]).permutation(len(source))
      if len(source) <= FINITE:
        known = [self.begun[part][i] if i in self.begun[part] else source[i].get('pass_rate')
                 for i in range(len(source))]
        order = [i for i in order.tolist() if known[i] is None or known[i] < self.high]
        order.sort(key=lambda i: -_spread(known[i]))
      self._orders = {place: kept for place, kept in self._orders.items() if place[0] != part}
      self._orders[part, epoch] = order
    return self._orders[part, epoch]


def _spread(rate):
  """Variance of a reward of 0 or 1; a prompt nobody has tried counts as the most promising."""
  return 0.25 if rate is None else rate * (1 - rate)


def key(record):
  """Hash of a record's last question, its spaces and letter case put aside."""
  text = next((m['content'] for m in reversed(record['messages']) if m['role'] == 'user'), '')
  return hashlib.blake2b(' '.join(text.casefold().split()).encode(errors='surrogatepass'),
                         digest_size=8).hexdigest()
