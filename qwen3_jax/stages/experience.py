"""Experience of reinforcement learning: prompts, rollouts, rewards, advantages, training batches.

One rollout batch serves several updates. What comes next is a function of `state` and the weights:
a run that continues draws the same prompts and the same tokens.
"""
import json
import math
import time

import jax
import numpy as np

from qwen3_jax import mesh as alphabet
from qwen3_jax.generation import rollout
from qwen3_jax.generation.engine import Engine
from qwen3_jax.generation.sampling import Sampling
from qwen3_jax.stages import parity, samples
from qwen3_jax.training import advantage
from qwen3_jax.training.entropy import select
from qwen3_jax.training.fit import Stuck

PATIENCE = 3  # rollout batches in a row of which no group taught anything


class Exhausted(Stuck):
  """Every answer got the reward of its neighbours, again and again: there is nothing to learn."""


class Experience:
  """Batches for `run.train`: `draw(params, step)`, `measure(params)`, `state`, `restore`.

  `curriculum` gives the prompts, `heldout` are records to measure on, `router` scores,
  `controller` (or None) moves the entropy coefficient, `values(params, batch)` are the trainer's
  log-probabilities (B, T), `reference(batch)` (or None) those of the reference model;
  `cast(params)` are the weights as the engine wants them.
  """

  def __init__(self, config, workdir, tokenizer, mesh, *, settings, cast, curriculum, heldout,
               router, controller=None, values=None, reference=None):
    self.config, self.tokenizer, self.mesh, self.settings = config, tokenizer, mesh, settings
    self.cast = cast
    self.folder = workdir / 'rollouts'
    self.curriculum, self.heldout, self.router = curriculum, heldout, router
    self.controller, self.values, self.reference = controller, values, reference
    self.engine, self.ready, self.notes = None, [], {}
    self.rollouts, self.groups, self.idle, self.kept = 0, 0, 0, 1.0
    r = config.rollout
    self.sampling = Sampling(r.temperature, max_tokens=r.max_tokens, seed=config.seed)

  def close(self):
    self.router.close()

  def draw(self, params, step):
    """The batch of the update after `step`; a new rollout where the last one is used up."""
    self.notes = {}
    if not self.ready:
      self.ready = self.collect(params, step)
    batch = self.ready.pop(0)
    if self.controller:
      bonus = np.full(len(batch['tokens_BT']), self.controller.coefficient, np.float32)
      batch = batch | dict(bonus_B=bonus)
    rows = len(batch['tokens_BT'])
    return alphabet.to_global(batch, range(rows), rows, self.mesh)

  def collect(self, params, step):
    """The batches of one rollout by `params`, one for each update."""
    begun = time.perf_counter()
    self.load(params, step)
    groups, tried = self.roll_groups()
    seconds = time.perf_counter() - begun
    drawn = [sample for group in groups for sample in group['samples']]
    self.weigh(groups)
    self.check(params, step, drawn)
    if self.reference:
      self.look_up(self.reference, drawn, 'reference_logp')
    self.note(groups, tried, seconds)
    self.keep(groups, step)
    self.rollouts += 1
    return self.batches(groups)

  def load(self, params, version):
    """Hands the weights, in the compute type, to the engine, which is made the first time."""
    params = self.cast(params)
    if self.engine is None:
      options = {name: value for name, value in self.config.engine.items() if value is not None}
      self.engine = Engine(params, self.tokenizer, with_routes=bool(params.spec.experts), **options)
    self.engine.load(params, version)

  def roll_groups(self):
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
      raise Exhausted(
        f'in {PATIENCE} rollouts in a row all samples of every prompt had the same reward (mean '
        f'{mean([x for group in tried for x in group["rewards"]]):.2f}, {len(tried)} prompts in '
        'the last). Give easier or harder prompts, more samples (config.rollout.samples), or look '
        f'at {self.folder}')
    return kept, tried

  def play(self, count):
    """`count` groups: the next prompts, each answered `rollout.samples` times and scored."""
    r = self.config.rollout
    drawn = self.curriculum.draw(count)
    first = self.groups * r.samples
    self.groups += count
    records = [record for _, record in drawn for _ in range(r.samples)]
    episodes = rollout.play(self.engine, records, self.sampling,
                            range(first, first + len(records)), r.thinking_budget)
    scored = self.score(episodes)
    groups = []
    for n, (place, record) in enumerate(drawn):
      part = slice(n * r.samples, (n + 1) * r.samples)
      rewards = [math.nan if each is None or each.reward is None else each.reward
                 for each in scored[part]]
      self.curriculum.learn(place, self.pass_rate(record, rewards))
      groups.append(dict(record=record, place=place, episodes=episodes[part], scored=scored[part],
                         rewards=rewards, samples=[
                           self.sample(episode, first + n) for episode in episodes[part]]))
    return groups

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
    return float(np.clip(mean(known) / most, 0, 1)) if known and most > 0 else None

  def sample(self, episode, group):
    """The `samples.Sample` of an episode; one that was cut off is masked where asked."""
    P = len(episode.prompt)
    whole = np.array(episode.prompt + list(episode.tokens), np.int32)
    weight, logp = np.zeros(len(whole), np.float32), np.zeros(len(whole), np.float32)
    weight[P:] = episode.drawn
    cut = episode.response is None or episode.response.finish_reason == 'length'
    if episode.response is None or cut and self.config.rollout.overlong == 'mask':
      weight[:] = 0
    logp[P:] = np.where(episode.drawn, episode.logp, 0)
    routes = episode.routes if self.config.rollout.replay == 'engine' else None
    return samples.Sample(whole, weight, logp, routes, group)

  def weigh(self, groups):
    """Sets each sample's advantage; a sample without a reward is not trained."""
    kind, rewards, weights = self.settings.advantage, [], None
    if kind == 'decoupled':
      rewards, weights = zip(*(components(group) for group in groups)) if groups else ((), ())
    else:
      rewards = [group['rewards'] for group in groups]
    found, valid = advantage.advantages(rewards, kind, weights=weights)
    for group, each, good in zip(groups, found, valid):
      for sample, value, known in zip(group['samples'], each, good):
        sample.advantage = float(value)
        if not known:
          sample.weight[:] = 0

  def check(self, params, step, drawn):
    """The trainer's own log-probabilities where they are needed; the parity gate where it is due.

    They are the ratio's old policy unless `rollout.old` is 'engine' (the engine's log-probabilities
    take that place, and no correction is due), and with one update a rollout nothing needs them.
    """
    r, every = self.config.rollout, self.config.parity.every
    due = every and self.rollouts % every == 0
    wanted = r.old == 'trainer' and r.updates > 1 or r.replay == 'trainer'
    if not drawn or not (due or wanted):
      return
    self.look_up(lambda batch: self.values(params, batch), drawn, 'old_logp')
    if due:
      measured = parity.measure(drawn)
      self.notes |= measured
      parity.check(measured, self.config.parity, step)
    if r.old == 'engine':
      for sample in drawn:
        sample.old_logp = sample.rollout_logp

  def look_up(self, values, drawn, name):
    """Gives each sample its part of `values(batch)`, in batches of `data.batch` rows.

    With `rollout.replay` 'trainer' the routes that this forward chose are kept as well (R2).
    """
    rows, B = samples.rows_of(drawn, self.config.data.length), self.config.data.batch
    for first in range(0, len(rows), B):
      part = rows[first:first + B]
      batch = samples.make_batch(part, B, self.config.data.length)
      logp_BT, routes = values(alphabet.to_global(batch, range(B), B, self.mesh))
      samples.take_back(part, np.asarray(logp_BT), name)
      if routes is not None:
        samples.take_back(part, np.asarray(routes), 'routes')

  def batches(self, groups):
    """The batches of all updates: whole groups dealt out at random, each sample in one update."""
    r, length = self.config.rollout, self.config.data.length
    order = np.random.default_rng([self.config.seed, self.rollouts]).permutation(len(groups))
    out = []
    for number, part in enumerate(np.array_split(order, r.updates)):
      chosen = [sample for n in part for sample in groups[n]['samples'] if sample.weight.any()]
      scale = advantage.aggregate([sample.weight.sum() for sample in chosen],
                                  self.settings.aggregation, [s.group for s in chosen],
                                  r.max_tokens)
      for sample, each in zip(chosen, scale):
        sample.scale = float(each)
      rows = samples.rows_of(chosen, length)
      count = samples.count_rows(len(rows), self.config.data.batch)
      batch = samples.make_batch(rows, count, length)
      if not chosen:
        batch |= {name: np.zeros((count, length), np.float32)
                  for name in ('weight_BT', 'scale_BT', 'advantage_BT')}
      batch['fresh_B'] = np.full(count, number == 0, np.float32)
      if self.settings.entropy in ('clip_cov', 'kl_cov') and chosen:
        batch['covariance_BT'] = select(batch, self.settings.entropy,
                                        [self.config.seed, self.rollouts, number])
      out.append(batch)
    return out

  def note(self, groups, tried, seconds):
    """What is logged of a rollout, beside the update that follows it."""
    episodes = [episode for group in tried for episode in group['episodes']]
    scored = [each for group in tried for each in group['scored'] if each is not None]
    rewards = [x for group in tried for x in group['rewards']]
    answered = [episode for episode in episodes if episode.response is not None]
    logp = np.concatenate([episode.logp[episode.drawn] for episode in answered] or [[0.0]])
    entropy = -float(logp.mean())
    if self.controller:
      self.controller.update(entropy)
      self.notes['entropy_bonus'] = self.controller.coefficient
    names = sorted({name for each in scored for name in each.components})
    tokens = sum(len(episode.tokens) for episode in answered)
    self.notes |= dict(
      reward=mean(rewards), rollout_entropy=entropy, kept_groups=len(groups) / len(tried),
      prompts=len(tried), missing=sum(not math.isfinite(x) for x in rewards),
      answer_tokens=tokens / max(1, len(answered)), rollout_seconds=seconds,
      rollout_tokens_per_s=tokens / seconds,
      cut_off=mean([e.response.finish_reason == 'length' for e in answered]),
      skipped_prompts=self.curriculum.skipped)
    for name in names:
      known = [each.components[name] for each in scored
               if each.components.get(name) is not None]
      self.notes[f'reward_{name}'] = mean(known)

  def keep(self, groups, step, shown=4):
    """Writes a few groups of each rollout where a person can read them."""
    self.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for group in groups[:shown]:
      answers = [dict(text=episode.response.text if episode.response else None,
                      failure=episode.failure, reward=None if math.isnan(reward) else reward,
                      components=each.components if each else {},
                      missing=each.missing if each else {})
                 for episode, each, reward in zip(group['episodes'], group['scored'],
                                                  group['rewards'])]
      lines.append(json.dumps(dict(step=step, messages=group['record']['messages'],
                                   source=group['record'].get('source'), answers=answers),
                              ensure_ascii=False))
    (self.folder / f'{step:08d}.jsonl').write_text('\n'.join(lines) + '\n')

  def measure(self, params):
    """Reward on the held-out prompts at the rollouts' own sampling, with its 95 % interval."""
    m = self.config.measure_reward
    if not self.heldout:
      return {}
    self.load(params, -1)
    records = [record for record in self.heldout for _ in range(m.samples)]
    episodes = rollout.play(self.engine, records, self.sampling, range(len(records)),
                            self.config.rollout.thinking_budget)
    scored = self.score(episodes)
    rewards = np.array([math.nan if each is None or each.reward is None else each.reward
                        for each in scored]).reshape(len(self.heldout), m.samples)
    found = interval(rewards)
    by_source = {}
    for record, each in zip(self.heldout, rewards):
      by_source.setdefault(record.get('source', 'prompts'), []).append(each)
    if len(by_source) > 1:
      found |= {f'heldout_reward_{name}': interval(np.array(each))['heldout_reward']
                for name, each in sorted(by_source.items())}
    tokens = [len(episode.tokens) for episode in episodes if episode.response is not None]
    return found | dict(heldout_tokens=mean(tokens))

  def state(self):
    """All that decides what comes next; JSON can hold it."""
    return dict(curriculum=self.curriculum.state(), router=self.router.state(),
                controller=self.controller.state() if self.controller else None,
                rollouts=self.rollouts, groups=self.groups, idle=self.idle, kept=self.kept,
                ready=self.put_away())

  def restore(self, state):
    self.curriculum.restore(state['curriculum'])
    self.router.restore(state['router'])
    if self.controller:
      self.controller.restore(state['controller'])
    for name in ('rollouts', 'groups', 'idle', 'kept'):
      setattr(self, name, state[name])
    self.ready = self.take_out(state['ready'])

  def put_away(self):
    """Writes batches that wait for their update; the file's name, None where none waits."""
    if not self.ready:
      return None
    self.folder.mkdir(parents=True, exist_ok=True)
    name = f'waiting-{self.rollouts:08d}-{len(self.ready)}.npz'
    new = self.folder / f'{name}.new'
    with new.open('wb') as file:
      np.savez(file, **{f'{n}/{key}': value for n, batch in enumerate(self.ready)
                        for key, value in batch.items()})
    new.replace(self.folder / name)
    return name

  def take_out(self, name):
    if name is None:
      return []
    with (self.folder / name).open('rb') as file, np.load(file) as arrays:
      batches = [{} for _ in {key.split('/')[0] for key in arrays}]
      for key in arrays:
        number, _, field = key.partition('/')
        batches[int(number)][field] = arrays[key]
    return batches


def differs(rewards):
  """Whether the rewards that are known are not all the same."""
  known = [x for x in rewards if math.isfinite(x)]
  return len(known) > 1 and max(known) > min(known)


def mean(values):
  """Mean of what is known; 0 where nothing is."""
  known = [x for x in values if math.isfinite(x)]
  return float(np.mean(known)) if known else 0.0


def interval(rewards):
  """Mean and 95 % interval of (prompts, samples) rewards, prompts being the independent draws."""
  known = rewards[np.isfinite(rewards).any(1)]
  if not len(known):
    return dict(heldout_reward=math.nan)
  means = np.nanmean(known, axis=1)
  half = 1.96 * means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
  return dict(heldout_reward=float(means.mean()), heldout_reward_low=float(means.mean() - half),
              heldout_reward_high=float(means.mean() + half))


def components(group):
  """(rewards (samples, components) with NaN for what is missing, weights) of a group."""
  names = sorted({name for each in group['scored'] if each for name in each.components})
  rows = [[math.nan if each is None or each.components.get(name) is None
           else each.components[name] for name in names] for each in group['scored']]
  return np.array(rows, float).reshape(len(rows), len(names)), group['weights'](names)
