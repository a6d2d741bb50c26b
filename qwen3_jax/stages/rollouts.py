"""Answers of the model itself as training batches: prompts, rollouts, packing, held-out reward.

What reinforcement learning (`stages.experience`) and on-policy distillation (`stages.distill`)
share. One rollout serves several updates. What comes next is a function of `state` and the weights:
a run that continues draws the same prompts and the same tokens.
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
from qwen3_jax.training import policy


class Rollouts:
  """Batches for `run.train`: `draw(params, step)`, `measure(params)`, `state`, `restore`.

  `spec` and `cast(params)` are the model and its weights as the engine wants them; `curriculum`
  gives the prompts, `heldout` are records to measure on, `router` scores them; `values(params,
  batch)` are the trainer's log-probabilities (B, T) and routes. The engine lives on `rollout_mesh`;
  with `placement.ahead` it draws the next rollout while the trainer learns from the last one, by
  weights one rollout old.

  A stage adds what its samples are worth: `gather` (which groups count), `weigh`, `settle`, `pack`.
  The notes of an update have its `flops` (useful ones, see `Spec.flops_per_token`), those of its
  rollout and of every forward pass on it counted at its first update.
  """
  counters = 'rollouts', 'groups', 'settled'

  def __init__(self, config, workdir, tokenizer, mesh, rollout_mesh, *, spec, cast, curriculum,
               heldout, router, values):
    self.config, self.tokenizer, self.spec, self.cast = config, tokenizer, spec, cast
    self.mesh, self.rollout_mesh, self.folder = mesh, rollout_mesh, workdir / 'rollouts'
    self.curriculum, self.heldout, self.router = curriculum, heldout, router
    self.values = values
    self.engine, self.ready, self.notes, self.coming = None, [], {}, None
    self.rollouts, self.groups, self.settled = 0, 0, 0
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
    frozen = self.config.lora.rank is not None
    self.spend(batch, lambda length: self.spec.flops_per_token(length, frozen))
    return self.finish(batch)

  def finish(self, batch):
    """The batch that is trained on, as global arrays."""
    return self.spread(batch)

  def spread(self, batch):
    """A batch of the host as global arrays of the train mesh."""
    rows = len(batch['tokens_BT'])
    return alphabet.to_global(batch, range(rows), rows, self.mesh)

  def spend(self, batch, flops_per_token):
    """Notes the FLOPs of a pass over `batch`; `flops_per_token(length)` are those of a token."""
    tokens, sequences = int((batch['segment_BT'] > 0).sum()), int(batch['segment_BT'].max(1).sum())
    spent = tokens * flops_per_token(tokens / max(1, sequences))
    self.notes['flops'] = self.notes.get('flops', 0.0) + spent

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
    """One rollout: its samples, and what to log of it.

    `params` None: those that the engine has.
    """
    begun = time.perf_counter()
    if params is not None:
      self.load(params, step)
    groups, tried = self.gather()
    self.weigh(groups)
    notes = self.describe(groups, tried, time.perf_counter() - begun)
    lengths = [len(episode.prompt) + len(episode.tokens)
               for group in tried for episode in group['episodes']]
    notes |= dict(skipped_prompts=self.curriculum.skipped, weights_version=step, flops=sum(
      lengths) * forward_flops(self.spec, sum(lengths) / max(1, len(lengths))))
    tally.write(self.folder / f'{step:08d}.jsonl', groups or tried, step)
    self.rollouts += 1
    drawn = [sample for group in groups for sample in group['samples']]
    return [sample for sample in drawn if sample.weight.any()], notes

  def gather(self):
    """(groups to learn from, all groups that were drawn)."""
    groups = self.play(self.config.rollout.prompts)
    return groups, groups

  def play(self, count):
    """`count` groups: the next prompts, each answered `rollout.samples` times."""
    r = self.config.rollout
    drawn = self.curriculum.draw(count)
    first, self.groups = self.groups, self.groups + count
    records = [record for _, record in drawn for _ in range(r.samples)]
    episodes = self.answer(records, first * r.samples)
    scored, groups = self.grade(episodes), []
    for n, (place, record) in enumerate(drawn):
      part = slice(n * r.samples, (n + 1) * r.samples)
      groups.append(dict(
        record=record, place=place, episodes=episodes[part], scored=scored[part],
        rewards=rewards_of(scored[part]),
        samples=[self.sample(episode, first + n) for episode in episodes[part]]))
    return groups

  def answer(self, records, seed=0):
    """An Episode for each record, drawn by the seeds from `seed` on."""
    with jax.set_mesh(self.rollout_mesh):
      return rollout.play(self.engine, records, self.sampling, range(seed, seed + len(records)),
                          self.config.rollout.thinking_budget)

  def grade(self, episodes):
    """What the answers to learn from are worth: here nobody asks."""
    return [None] * len(episodes)

  def score(self, episodes):
    """A `router.Scored` for each episode, None where there was no response."""
    whole = [episode for episode in episodes if episode.response is not None]
    scored = iter(self.router.score([episode.record for episode in whole],
                                    [episode.response for episode in whole]))
    return [next(scored) if episode.response is not None else None for episode in episodes]

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
    """Sets what each sample of the groups is worth."""

  def describe(self, groups, tried, seconds):
    """What to log of a rollout."""
    return tally.note_answers(tried, seconds)

  def settle(self, params, step, drawn, notes):
    """The batches of all updates on the samples `drawn`, by the weights that they begin with."""
    self.notes = notes | dict(staleness=step - notes['weights_version'])
    self.check(params, step, drawn)
    batches = self.batches(drawn)
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
      self.spend(batch, lambda length: forward_flops(self.spec, length))
      logp_BT, routes = values(self.spread(batch))
      samples.take_back(part, np.asarray(logp_BT), name)
      if routes is not None:
        samples.take_back(part, np.asarray(routes), 'routes')

  def batches(self, drawn):
    """The batches of the rollout's updates: each sample is in one of them."""
    return [self.pack(chosen, number) for number, chosen in enumerate(self.deal(drawn))]

  def deal(self, drawn, updates=None):
    """Whole groups dealt out at random over the updates: a list of samples for each."""
    numbers = np.unique([sample.group for sample in drawn])
    order = np.random.default_rng([self.config.seed, self.settled]).permutation(numbers)
    return [[sample for sample in drawn if sample.group in part]
            for part in np.array_split(order, updates or self.config.rollout.updates)]

  def pack(self, chosen, number):
    """The batch of the rollout's update `number` on the samples `chosen`."""
    rows = samples.rows_of(chosen, self.config.data.length)
    count = samples.count_rows(len(rows), self.config.data.batch)
    batch = samples.make_batch(rows, count, self.config.data.length)
    batch['fresh_B'] = np.full(count, number == 0, np.float32)
    return batch

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
      **{name: getattr(self, name) for name in self.counters},
      ready=samples.save(self.folder / f'ready-{self.settled:08d}-{len(self.ready)}.npz',
                         self.ready) if self.ready else None,
      coming=samples.save(self.folder / f'coming-{self.rollouts:08d}.npz',
                          samples.to_arrays(coming[0])) if coming else None,
      coming_notes=coming[1] if coming else None)

  def restore(self, state):
    """Goes on from `state()`; batches and samples that waited are in files beside."""
    self.curriculum.restore(state['curriculum'])
    self.router.restore(state['router'])
    for name in self.counters:
      setattr(self, name, state[name])
    if state['ready']:
      self.ready = samples.load(self.folder / state['ready'])
    if state['coming']:
      drawn = samples.from_arrays(samples.load(self.folder / state['coming']))
      self.coming = concurrent.futures.Future()
      self.coming.set_result((drawn, state['coming_notes']))


def forward_flops(spec, length):
  """Useful FLOPs of a token's forward pass in sequences of `length`."""
  return spec.flops_per_token(length) / 3


def rewards_of(scored):
  """The rewards of `Scored`s as numbers, NaN where missing."""
  return [math.nan if each is None or each.reward is None else each.reward for each in scored]


def check(config, spec):
  """ValueError for settings of rollouts that contradict one another."""
  r = config.rollout
  wrong = None
  if not config.init:
    wrong = f'{config.method} improves a model that answers: give one with --init=DIR'
  elif jax.process_count() > 1:
    wrong = (f'{config.method} runs in one process so far: start it on one host (of any number of '
             'chips)')
  elif r.prompts < r.updates or min(r.prompts, r.samples, r.updates) < 1:
    wrong = (f'config.rollout has {r.prompts} prompts for {r.updates} updates of {r.samples} '
             'samples: all must be at least 1, and every update needs a prompt')
  elif config.placement.ahead and config.placement.kind == 'colocated':
    wrong = ('config.placement.ahead draws the next rollout beside the training: it needs chips of '
             "its own, config.placement.kind 'split' or 'by_slice'")
  elif r.old not in ('trainer', 'engine') or r.overlong not in ('mask', None):
    wrong = (f"config.rollout has old={r.old!r}, overlong={r.overlong!r}; want 'trainer' or "
             "'engine', and 'mask' or None")
  elif r.replay not in (None, 'engine', 'trainer') or r.replay and not spec.experts:
    wrong = (f"config.rollout.replay is {r.replay!r}; want 'engine' (R3) or 'trainer' (R2) for a "
             'mixture of experts, None for a dense model')
  elif config.micro_rows and config.data.batch % config.micro_rows:
    wrong = (f'config.data.batch is {config.data.batch}: rows come in multiples of it, so it must '
             f'be one of config.micro_rows ({config.micro_rows})')
  if wrong:
    raise ValueError(wrong)


def trainer_values(config, temperature, dtype, size):
  """values(params, batch) -> (log-probabilities (B, T), routes (B, T, layers, X) or None)."""
  wants_routes = config.rollout.replay == 'trainer'

  def values(params, batch):
    logp_BT, _, routes = policy.token_values(params, batch, temperature=temperature, size=size,
                                             remat=config.remat, dtype=dtype)
    return logp_BT, routes.transpose(1, 2, 0, 3) if wants_routes else None
  return jax.jit(values)
