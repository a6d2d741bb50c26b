"""A request, its answer, and the row between them: the host's record of a text that grows."""
import dataclasses

import numpy as np

from qwen3_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt (ids) to continue. It draws with the key (sampling.seed, seed) and nothing else."""
  prompt: list[int]
  sampling: Sampling = Sampling()
  seed: int = 0
  thinking_budget: int | None = None  # thinking tokens of each turn


@dataclasses.dataclass
class Output:
  """One prompt's answer. Arrays have one entry a token; the token that stopped it is the last."""
  text: str  # of `tokens`, without the one that stopped it
  tokens: list[int]
  logp: np.ndarray  # under the distribution each token was drawn from; 0 where greedy or forced
  logp_untempered: np.ndarray  # under the model's plain softmax; 0 where appended by an environment
  forced: np.ndarray  # bool: not drawn, but put there by the thinking budget or an environment
  finish_reason: str  # 'stop' (a stop id) or 'length' (max_tokens, or the last position or page)
  prompt: list[int]
  routes: np.ndarray | None = None  # experts chosen, (prompt + tokens, MoE layers, X)
  version: int | None = None  # of the weights


class Row:
  """A text between two calls. `ids[:cached]` lie in `pages`; the last id never does while it grows.

  `limit` tokens may follow the prompt, appended ones counted; `room` is how many could at most.
  """

  def __init__(self, index, request, stops, room, stream):
    self.index, self.request, self.stops, self.stream = index, request, stops, stream
    self.prompt = len(request.prompt)
    self.ids, self.cached = list(request.prompt), 0
    self.room, self.limit = room, min(request.sampling.max_tokens, room)
    self.logp, self.plain, self.forced, self.routes = [], [], [], []
    self.text, self.delta, self.stopped, self.reason = [], '', False, None
    self.seen = self.progress = None
    self.shard, self.pages, self.borrowed, self.wave, self.source = 0, [], None, 0, None

  @property
  def count(self):
    """Tokens after the prompt."""
    return len(self.ids) - self.prompt

  @property
  def closing(self):
    """Whether it ended before its last token was run."""
    return self.reason is not None

  def take(self, column):
    """Adds what a call drew for it: arrays of one entry a step, as `decode` returns them."""
    count, ran = int(column['real'].sum()), int(column['ran'].sum())
    ids = column['token'][:count].tolist()
    self.cached += ran
    self.ids += ids
    self.logp += column['logp'][:count].tolist()
    self.plain += column['logp_untempered'][:count].tolist()
    self.forced += column['forced'][:count].tolist()
    if 'routes' in column:
      self.learn_routes(self.cached - ran, column['routes'][:ran])
    if self.seen is not None:
      self.seen[ids] = True
    if ids:
      self.stopped = ids[-1] in self.stops and not self.forced[-1]
      self.reason = 'stop' if self.stopped else 'length' if self.count >= self.limit else None
    self._say(ids[:-1] if self.stopped else ids)

  def append(self, ids, progress):
    """Goes on after `ids`, which it did not draw."""
    self._say(self.ids[-1:])
    self.ids += ids
    self.logp += [0.0] * len(ids)
    self.plain += [0.0] * len(ids)
    self.forced += [True] * len(ids)
    self.limit = min(self.limit + len(ids), self.room)
    self.stopped, self.reason, self.progress = False, None, progress
    self._say(ids)

  def learn_routes(self, start, routes):
    """Keeps the routes of the ids from `start` on; what is known already stays."""
    known = sum(map(len, self.routes))
    if start + len(routes) > known:
      self.routes.append(routes[known - start:])

  def _say(self, ids):
    delta = ''.join(map(self.stream.push, ids))
    self.delta += delta
    self.text.append(delta)

  def output(self, version):
    routes = np.concatenate(self.routes) if self.routes else None
    return Output(''.join(self.text), self.ids[self.prompt:], np.array(self.logp, np.float32),
                  np.array(self.plain, np.float32), np.array(self.forced, bool),
                  self.reason or 'length', self.ids[:self.prompt], routes, version)
