"""Experience of reinforcement learning: what answers are worth, and which groups of them teach."""
import math

import numpy as np

from qwen3_jax.stages import tally
from qwen3_jax.stages.rollouts import Rollouts
from qwen3_jax.training import advantage
from qwen3_jax.training.entropy import select
from qwen3_jax.training.fit import Stuck

PATIENCE = 3  # rollouts in a row of which no group taught anything


class Exhausted(Stuck):
  """Every answer got the reward of its neighbours, again and again: there is nothing to learn."""


class Experience(Rollouts):
  """Rollouts with rewards and advantages.

  `settings` is the `policy.Policy`, `controller` (or None) sets the entropy bonus,
  `reference(batch)` (or None) gives the log-probabilities of the reference model; other arguments
  are those of `Rollouts`.
  """
  counters = *Rollouts.counters, 'idle', 'kept'

  def __init__(self, *args, settings, controller=None, reference=None, **kwargs):
    super().__init__(*args, **kwargs)
    self.settings, self.controller, self.reference = settings, controller, reference
    self.idle, self.kept, self.bonus = 0, 1.0, None

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
      for group in groups:
        self.curriculum.learn(group['place'], self.pass_rate(group['record'], group['rewards']))
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

  def grade(self, episodes):
    """Every answer is scored."""
    return self.score(episodes)

  def pass_rate(self, record, rewards):
    """Mean reward of a group as a share of the most it could be; None where none is known."""
    known = [x for x in rewards if math.isfinite(x)]
    most = sum(weight for weight in self.router.weigh(record).values() if weight > 0)
    return float(np.clip(np.mean(known) / most, 0, 1)) if known and most > 0 else None

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

  def describe(self, groups, tried, seconds):
    """Rewards and their parts beside what is known of the answers."""
    return tally.note(groups, tried, seconds)

  def check(self, params, step, drawn):
    """The gate, then the reference's log-probabilities and the entropy bonus of the rollout."""
    super().check(params, step, drawn)
    if self.reference:
      self.look_up(self.reference, drawn, 'reference_logp')
    if self.controller:
      self.bonus = self.controller.update(self.notes['rollout_entropy'])
      low, high = self.controller.band()
      self.notes |= dict(entropy_low=low, entropy_high=high, entropy_bonus=self.bonus)

  def pack(self, chosen, number):
    """The samples with the denominators of their aggregation, the bonus, tokens to hold back."""
    scale = advantage.aggregate([sample.weight.sum() for sample in chosen],
                                self.settings.aggregation, [s.group for s in chosen],
                                self.config.rollout.max_tokens)
    for sample, each in zip(chosen, scale):
      sample.scale = float(each)
    batch = super().pack(chosen, number)
    if self.bonus is not None:
      batch['bonus_B'] = np.full_like(batch['fresh_B'], self.bonus)
    if self.settings.entropy in ('clip_cov', 'kl_cov'):
      seed = [self.config.seed, self.settled, number]
      batch['covariance_BT'] = select(batch, self.settings.entropy, seed)
    return batch

  def state(self):
    return super().state() | dict(controller=self.controller.state() if self.controller else None)

  def restore(self, state):
    super().restore(state)
    if self.controller:
      self.controller.restore(state['controller'])


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
