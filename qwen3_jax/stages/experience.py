"""Experience of reinforcement learning: prompts, rollouts, rewards, advantages, training batches.

One rollout serves several updates. What comes next is a function of `state` and the weights: a run
that continues draws the same prompts and the same tokens.
"""
import concurrent.futures
import math
import time

import jax
import numpy as np

from qwen3_jax import mesh as alphabet
from qwen3_jax.generation import rollout
from qwen3_jax.generation.engine import Engine
from qwen3_jax.generation.sampling import Sampling
from qwen3_jax.stages import parity, samples, tally
from qwen3_jax.stages.placement import hand_over
from qwen3_jax.training import advantage
from qwen3_jax.training.entropy import select
from qwen3_jax.training.fit import Stuck

PATIENCE = 3  # rollouts in a row of which no group taught anything


class Exhausted(Stuck):
  """Every answer got the reward of its neighbours, again and again: there is nothing to learn."""


class Experience:
  """Batches for `run.train`: `draw(params, step)`, `measure(params)`, `state`, `restore`.

  `settings` is the `policy.Policy`; `cast(params)` are the weights as the engine wants them;
  `curriculum` gives the prompts, `heldout` are records to measure on, `router` scores, `controller`
  (or None) sets the entropy bonus; `values(params, batch)` are the trainer's log-probabilities
  (B, T) and routes, `reference(batch)` (or None) those of the reference model. The engine lives on
  `rollout_mesh`; with `placement.ahead` it draws the next rollout while the trainer learns from the
  last one, by weights one rollout old.
  """

  def __init__(self, config, workdir, tokenizer, mesh, rollout_mesh, *, settings, cast, curriculum,
               heldout, router, values, controller=None, reference=None):
    self.config, self.tokenizer, self.settings, self.cast = config, tokenizer, settings, cast
    self.mesh, self.rollout_mesh, self.folder = mesh, rollout_mesh, workdir / 'rollouts'
    self.curriculum, self.heldout, self.router = curriculum, heldout, router
    self.controller, self.values, self.reference = controller, values, reference
    self.engine, self.ready, self.notes, self.coming = None, [], {}, None
    self.rollouts, self.groups, self.idle, self.kept, self.settled = 0, 0, 0, 1.0, 0
    self.thread = concurrent.futures.ThreadPoolExecutor(1, 'rollout')
    self.sampling = Sampling(config.rollout.temperature, max_tokens=config.rollout.max_tokens,
                             seed=config.seed)

  def close(self):
    self.thread.shutdown(cancel_futures=True)
    self.router.close()

  def draw(self, params, step):
    """The batch of the update after `step`; of a new rollout where the last one is used up.

    `params()` gives the weights: merging adapters is work that only a new rollout needs.
    """
    self.notes = {}
    if not self.ready:
      params = params()
      before = {} if self.settled else self.measure(params)  # what the stage begins with
      drawn = self.coming.result() if self.coming else self.roll(params, step)
      self.coming = None
      if self.config.placement.ahead:
        self.load(params, step)  # before the trainer overwrites them
        self.coming = self.thread.submit(self.roll, None, step)
      self.ready = self.settle(params, step, *drawn)
      self.notes |= before
    batch = self.ready.pop(0)
    rows = len(batch['tokens_BT'])
    return alphabet.to_global(batch, range(rows), rows, self.mesh)

  def load(self, params, version):
    """Hands the weights, in the compute type, to the engine, which is made the first time."""
    params = hand_over(self.cast(params), self.rollout_mesh)
    with jax.set_mesh(self.rollout_mesh):
      if self.engine is None:
        options = {name: value for name, value in self.config.engine.items() if value is not None}
        self.engine = Engine(params, self.tokenizer, with_routes=bool(params.spec.experts),
                             **options)
      self.engine.load(params, version)

  def roll(self, params, step):
    """One rollout: its samples with their advantages, and what to log of it.

    `params` None: those that the engine has.
    """
    begun = time.perf_counter()
    if params is not None:
      self.load(params, step)
    groups, tried = self.gather()
    self.weigh(groups)
    notes = tally.note(groups, tried, time.perf_counter() - begun)
    notes |= dict(skipped_prompts=self.curriculum.skipped, weights_version=step)
    tally.write(self.folder / f'{step:08d}.jsonl', groups or tried, step)
    self.rollouts += 1
    drawn = [sample for group in groups for sample in group['samples']]
    return [sample for sample in drawn if sample.weight.any()], notes

  def gather(self):
    """Groups whose samples differ in reward, refilled up to `rollout.rounds` times; all tried.

    Dynamic sampling (DAPO, 2503.14476): a group of equal rewards has no gradient, so further
    prompts take its place. Each round draws as many as the share kept so far lets expect.
    Raises Exhausted where no group of PATIENCE rollouts in a row differed.
    """
    r, kept, tried = self.config.rollout, [], []
    for _ in range(r.rounds):
      lacking = r.prompts - len(kept)
      groups = self.play(math.ceil(lacking / max(self.kept, 1 / 8)) if tried else lacking)
      tried += groups
      kept += [group for group in groups if differs(group['rewards'])]
      self.kept = 0.5 * self.kept + 0.5 * len(kept) / len(tried)
      if len(kept) >= r.prompts:
        break
    self.idle = 0 if kept else self.idle + 1
    if self.idle >= PATIENCE:
      reward = tally.mean([x for group in tried for x in group['rewards']])
      raise Exhausted(
        f'in {PATIENCE} rollouts in a row all samples of every prompt had the same reward (mean '
        f'{reward:.2f}, {len(tried)} prompts in the last). Give easier or harder prompts, or more '
        f'samples (config.rollout.samples); answers are in {self.folder}')
    return kept, tried

  def play(self, count):
    """`count` groups: the next prompts, each answered `rollout.samples` times and scored."""
    r = self.config.rollout
    drawn = self.curriculum.draw(count)
    first, self.groups = self.groups, self.groups + count
    records = [record for _, record in drawn for _ in range(r.samples)]
    episodes = self.answer(records, first * r.samples)
    scored, groups = self.score(episodes), []
    for n, (place, record) in enumerate(drawn):
      part = slice(n * r.samples, (n + 1) * r.samples)
      group = dict(record=record, episodes=episodes[part], scored=scored[part],
                   rewards=rewards_of(scored[part]),
                   samples=[self.sample(episode, first + n) for episode in episodes[part]])
      self.curriculum.learn(place, self.pass_rate(record, group['rewards']))
      groups.append(group)
    return groups

  def answer(self, records, seed=0):
    """An Episode for each record, drawn by the seeds from `seed` on."""
    with jax.set_mesh(self.rollout_mesh):
      return rollout.play(self.engine, records, self.sampling, range(seed, seed + len(records)),
                          self.config.rollout.thinking_budget)

  def score(self, episodes):
    """A `router.Scored` for each episode, None where there was no response."""
    whole = [episode for episode in episodes if episode.response is not None]
    scored = iter(self.router.score([episode.record for episode in whole],
                                    [episode.response for episode in whole]))
    return [next(scored) if episode.response is not None else None for episode in episodes]

  def pass_rate(self, record, rewards):
    """Mean reward of a group as a share of the most it could be; None where none is known."""
    known = [x for x in rewards if math.isfinite(x)]
    most = sum(weight for weight in self.router.weigh(record).values() if weight > 0)
    return float(np.clip(np.mean(known) / most, 0, 1)) if known and most > 0 else None

  def sample(self, episode, group):
    """The `samples.Sample` of an episode; one that was cut off is masked where asked."""
    P = len(episode.prompt)
    tokens = np.array(episode.prompt + list(episode.tokens), np.int32)
    weight, logp = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
    weight[P:], logp[P:] = episode.drawn, np.where(episode.drawn, episode.logp, 0)
    cut = episode.response is None or episode.response.finish_reason == 'length'
    if (episode.response is None or cut and self.config.rollout.overlong == 'mask'
        or len(tokens) > self.config.data.length):  # what tools say may overflow a row
      weight[:] = 0
    routes = episode.routes if self.config.rollout.replay == 'engine' else None
    return samples.Sample(tokens, weight, logp, routes, group)

  def weigh(self, groups):
    """Sets each sample's advantage; a sample without a reward is not trained."""
    kind, weights = self.settings.advantage, None
    rewards = [group['rewards'] for group in groups]
    if kind == 'decoupled' and groups:
      rewards, weights = zip(*(components(group, self.router) for group in groups))
    found, valid = advantage.advantages(rewards, kind, weights=weights)
    for group, each, good in zip(groups, found, valid):
      for sample, value, known in zip(group['samples'], each, good):
        sample.advantage = float(value)
        if not known:
          sample.weight[:] = 0

  def settle(self, params, step, drawn, notes):
    """The batches of all updates on the samples `drawn`, by the weights that they begin with."""
    self.notes = notes | dict(staleness=step - notes['weights_version'])
    self.check(params, step, drawn)
    if self.reference:
      self.look_up(self.reference, drawn, 'reference_logp')
    bonus = None
    if self.controller:
      low, high = self.controller.band()
      bonus = self.controller.update(notes['rollout_entropy'])
      self.notes |= dict(entropy_low=low, entropy_high=high, entropy_bonus=bonus)
    batches = self.batches(drawn, bonus)
    self.settled += 1
    return batches

  def check(self, params, step, drawn):
    """The trainer's own log-probabilities where they are needed; the parity gate where it is due.

    They are the ratio's old policy unless `rollout.old` is 'engine' (the engine's log-probabilities
    take that place, and no correction is due). Samples of older weights pass ungated: there engine
    and trainer are to differ.
    """
    r, every = self.config.rollout, self.config.parity.every
    due = every and self.settled % every == 0
    if drawn and (due or r.replay == 'trainer' or r.old == 'trainer' and (
        r.updates > 1 or self.config.placement.ahead)):
      self.look_up(lambda batch: self.values(params, batch), drawn, 'old_logp')
    if drawn and due:
      measured = parity.measure(drawn)
      self.notes |= measured
      if not self.notes['staleness']:
        parity.check(measured, self.config.parity, step)
    if r.old == 'engine':
      for sample in drawn:
        sample.old_logp = sample.rollout_logp

  def look_up(self, values, drawn, name):
    """Gives each sample its part of `values(batch)`, in batches of `data.batch` rows.

    Routes that come with them are kept as the ones to replay (R2).
    """
    rows, B = samples.rows_of(drawn, self.config.data.length), self.config.data.batch
    for first in range(0, len(rows), B):
      part = rows[first:first + B]
      batch = samples.make_batch(part, B, self.config.data.length)
      logp_BT, routes = values(alphabet.to_global(batch, range(B), B, self.mesh))
      samples.take_back(part, np.asarray(logp_BT), name)
      if routes is not None:
        samples.take_back(part, np.asarray(routes), 'routes')

  def batches(self, drawn, bonus):
    """Whole groups dealt out at random over the updates: each sample is in one of them."""
    r, length = self.config.rollout, self.config.data.length
    numbers = np.unique([sample.group for sample in drawn])
    order = np.random.default_rng([self.config.seed, self.settled]).permutation(numbers)
    out = []
    for number, part in enumerate(np.array_split(order, r.updates)):
      chosen = [sample for sample in drawn if sample.group in part]
      scale = advantage.aggregate([sample.weight.sum() for sample in chosen],
                                  self.settings.aggregation, [s.group for s in chosen],
                                  r.max_tokens)
      for sample, each in zip(chosen, scale):
        sample.scale = float(each)
      rows = samples.rows_of(chosen, length)
      count = samples.count_rows(len(rows), self.config.data.batch)
      batch = samples.make_batch(rows, count, length)
      batch['fresh_B'] = np.full(count, number == 0, np.float32)
      if bonus is not None:
        batch['bonus_B'] = np.full(count, bonus, np.float32)
      if self.settings.entropy in ('clip_cov', 'kl_cov'):
        seed = [self.config.seed, self.settled, number]
        batch['covariance_BT'] = select(batch, self.settings.entropy, seed)
      out.append(batch)
    return out

  def measure(self, params):
    """Reward on the held-out prompts, drawn as rollouts are, with its 95 % interval."""
    if not self.heldout:
      return {}
    self.wait()  # the engine does one thing at a time
    self.load(params, -1)
    many = self.config.measure_reward.samples
    episodes = self.answer([record for record in self.heldout for _ in range(many)])
    rewards = np.array(rewards_of(self.score(episodes)))
    return tally.measure(self.heldout, rewards.reshape(len(self.heldout), many), episodes)

  def wait(self):
    """Lets the rollout that is drawn ahead end; its (samples, notes), or None."""
    return self.coming.result() if self.coming else None

  def state(self):
    """All that decides what comes next; JSON can hold it."""
    coming = self.wait()
    return dict(
      curriculum=self.curriculum.state(), router=self.router.state(),
      controller=self.controller.state() if self.controller else None,
      **{name: getattr(self, name) for name in COUNTERS},
      ready=samples.save(self.folder / f'ready-{self.settled:08d}-{len(self.ready)}.npz',
                         self.ready) if self.ready else None,
      coming=samples.save(self.folder / f'coming-{self.rollouts:08d}.npz',
                          samples.to_arrays(coming[0])) if coming else None,
      coming_notes=coming[1] if coming else None)

  def restore(self, state):
    """Goes on from `state()`; batches and samples that waited are in files beside."""
    self.curriculum.restore(state['curriculum'])
    self.router.restore(state['router'])
    if self.controller:
      self.controller.restore(state['controller'])
    for name in COUNTERS:
      setattr(self, name, state[name])
    if state['ready']:
      self.ready = samples.load(self.folder / state['ready'])
    if state['coming']:
      drawn = samples.from_arrays(samples.load(self.folder / state['coming']))
      self.coming = concurrent.futures.Future()
      self.coming.set_result((drawn, state['coming_notes']))


COUNTERS = ('rollouts', 'groups', 'idle', 'kept', 'settled')


def rewards_of(scored):
  """The rewards of `Scored`s as numbers, NaN where missing."""
  return [math.nan if each is None or each.reward is None else each.reward for each in scored]


def differs(rewards):
  """Whether the rewards that are known are not all the same."""
  known = [x for x in rewards if math.isfinite(x)]
  return len(known) > 1 and max(known) > min(known)


def components(group, router):
  """(rewards (samples, components), NaN where missing; the weights) of a group's record."""
  weights = router.weigh(group['record'])
  rows = [[math.nan if each is None or each.components.get(name) is None
           else each.components[name] for name in weights] for each in group['scored']]
  return np.array(rows, float).reshape(len(rows), len(weights)), np.array([*weights.values()])
