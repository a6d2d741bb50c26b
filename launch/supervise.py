"""Keeps one run going until it ends: describe, decide, act, again; and leaves nothing paid behind.

What is read from the cloud decides every step, so that a second supervisor of the same run goes on
where a first one stopped. Preemptions and failures have budgets of their own.
"""
import json
import time
from typing import NamedTuple

from launch.cloud import LOST, WAITING, CloudError, say

DONE, PREEMPTED, HUNG, CONFIG = 0, 42, 75, 78
FINAL = (DONE, CONFIG, 2, 3)  # again would not help: done, bad input, training that cannot go on
OVER = 70  # the supervisor's own: a budget or the deadline is used up
FOLDER = 'qwen3_jax_runs'


class Limits(NamedTuple):
  """Seconds and counts."""
  deadline: float = 30 * 24 * 3600
  preemptions: int = 1000
  failures: int = 3
  poll: float = 30
  backoff: float = 15  # doubles with every retry in a row ...
  longest: float = 300  # ... up to this
  unreachable: int = 10  # polls in a row without an answer


class Clock(NamedTuple):
  """Time, for tests another."""
  now: object = time.monotonic
  sleep: object = time.sleep


class Spent(Exception):
  """A budget or the deadline is used up."""


class Watch:
  """The budgets of one run and what it has used of them."""

  def __init__(self, limits, clock):
    self.limits, self.clock = limits, clock
    self.begun = clock.now()
    self.preemptions = self.failures = self.retries = self.tries = 0

  def wait(self, seconds=None):
    left = self.begun + self.limits.deadline - self.clock.now()
    if left <= 0:
      raise Spent(f'the deadline of {self.limits.deadline / 3600:g} hours is over')
    self.clock.sleep(min(left, seconds or self.limits.poll))

  def back_off(self):
    self.retries += 1
    self.wait(min(self.limits.longest, self.limits.backoff * 2 ** min(self.retries - 1, 20)))

  def count(self, kind, why):
    """One more of `kind` ('preemptions' or 'failures'); Spent where that is one too many."""
    used, allowed = getattr(self, kind) + 1, getattr(self.limits, kind)
    setattr(self, kind, used)
    say(f'{why} ({used} of at most {allowed} {kind})')
    if used > allowed:
      raise Spent(f'{used} {kind}; --max-{kind}={allowed}')


def supervise(cloud, want, job, files, limits, clock=None, keep=False):
  """Brings up what `want` asks for, runs `job` on it, again if need be; returns an exit code.

  `files` are local paths by name; job.json is written for every try by `job(nodes, number)`, which
  gives its path. Whatever happens, Ctrl-C included, the queued resource is deleted in the end,
  unless `keep`.
  """
  watch = Watch(limits, clock or Clock())
  try:
    return _supervise(cloud, want, job, files, watch)
  except Spent as spent:
    say(f'error: giving up: {spent}')
    return OVER
  finally:
    if not keep:
      remove(cloud, want, watch)
    else:
      say(f'{want.name} is kept and goes on costing: python -m launch down --run={want.run} '
          f'--zone={cloud.zone}')


def _supervise(cloud, want, job, files, watch):
  while True:
    nodes = bring_up(cloud, want, watch)
    if cloud.dry_run:
      deploy(cloud, nodes, job(nodes, 1), files)
      return DONE
    code = follow(cloud, want, nodes, job, files, watch)
    if code in FINAL:
      say('the run is done' if code == DONE else
          f'the run ended with exit code {code}, which starting again would not change')
      return code
    if code == PREEMPTED:
      watch.count('preemptions', 'preempted and saved')
    elif code is None:
      watch.count('preemptions', 'the machines were taken away')
      replace(cloud, want, watch)
    else:
      watch.count('failures', f'a host ended with exit code {code}'
                  + (', which is a hang' if code == HUNG else ''))
      watch.back_off()


def bring_up(cloud, want, watch):
  """The nodes, all ready, asked for if they are not there; what was lost is deleted and made anew.
  """
  if cloud.dry_run:
    cloud.create(want)
    return [Ready(name, tuple(f'HOST{i}' for i in range(want.slice.hosts))) for name in want.nodes]
  shown = None
  while True:
    state = cloud.state(want.name)
    if state != shown:
      say(f'{want.name}: {state or "does not exist"}')
      shown = state
    if state is None:
      create(cloud, want, watch)
    elif state in LOST:
      watch.count('preemptions', f'{want.name} is {state}')
      replace(cloud, want, watch)
    elif state == 'ACTIVE':
      nodes = [cloud.node(name) for name in want.nodes]
      if all(node and node.state == 'READY' for node in nodes):
        watch.retries = 0
        return nodes
      if any(node is None or node.state not in ('READY', *WAITING) for node in nodes):
        watch.count('preemptions', f'{want.name} lost a slice')
        replace(cloud, want, watch)
    watch.wait()


class Ready(NamedTuple):
  """A node of a dry run."""
  name: str
  addresses: tuple


def create(cloud, want, watch):
  say(f'asking for {want.slices} x {want.slice.describe()}, {want.capacity}, as {want.name}')
  try:
    cloud.create(want)
  except CloudError as error:
    if 'ALREADY_EXISTS' in str(error):
      return
    if any(word in str(error) for word in ('PERMISSION_DENIED', 'INVALID_ARGUMENT', 'not on PATH',
                                           'unrecognized arguments', 'UNAUTHENTICATED')):
      raise
    watch.count('failures', str(error))
    watch.back_off()


def replace(cloud, want, watch):
  """Deletes the queued resource and waits until it is gone."""
  cloud.delete(want.name)
  while cloud.state(want.name) is not None:
    watch.wait()
  watch.back_off()


def remove(cloud, want, watch):
  """Deletes at the end, however the run ended; tries a few times, and says where it could not."""
  for turn in range(5):
    try:
      cloud.delete(want.name)
      if cloud.dry_run or cloud.state(want.name) in (None, 'DELETING', 'SUSPENDING'):
        return
    except CloudError as error:
      say(f'could not delete {want.name}: {error}')
    watch.clock.sleep(watch.limits.backoff * (turn + 1))
  say(f'WARNING: {want.name} may still exist and cost: python -m launch down --run={want.run} '
      f'--zone={cloud.zone}')


def deploy(cloud, nodes, job, files):
  """Copies code and job to every host and starts them; harmless where the job runs already."""
  run = job.parent.name
  for node in nodes:
    cloud.ssh(node.name, f'mkdir -p {FOLDER}/{run}')
    cloud.copy(node.name, [*files.values(), job], f'{FOLDER}/{run}/')
  for node in nodes:
    cloud.ssh(node.name, on_host('start', run))


def on_host(action, run):
  """The command that asks host.py of a run for something."""
  return f'python3 {FOLDER}/{run}/host.py {action} {FOLDER}/{run}'


def stop(cloud, want, nodes):
  for node in nodes:
    cloud.ssh(node.name, on_host('stop', want.run), check=False)


def follow(cloud, want, nodes, job, files, watch):
  """Starts the job, or joins it where it runs, and waits: its exit code, None if machines are lost.
  """
  states = ask(cloud, want, nodes)
  if not states or {each['state'] for each in states} != {'running'}:
    watch.tries += 1
    if states and any(each['state'] == 'running' for each in states):
      stop(cloud, want, nodes)  # what is left of a try whose other hosts are gone
    try:
      deploy(cloud, nodes, job(nodes, watch.tries), files)
    except CloudError as error:
      say(f'could not start on all hosts: {error}')
      return None if cloud.state(want.name) != 'ACTIVE' else 1
    say(f'started on {sum(len(node.addresses) for node in nodes)} hosts, try {watch.tries}')
  silent, ended_first = 0, None
  while True:
    watch.wait()
    states = ask(cloud, want, nodes)
    if states is None:
      silent += 1
      if is_lost(cloud, want) or silent > watch.limits.unreachable:
        return None
      continue
    silent = 0
    say('; '.join(f'host {each["host"]}: {each["tail"] or each["state"]}' for each in states[:1]))
    running = [each for each in states if each['state'] == 'running']
    ended = [each for each in states if each['state'] != 'running']
    if ended and not running:
      return worst(each['code'] for each in ended)
    if ended:
      ended_first = ended_first or watch.clock.now()
      if watch.clock.now() - ended_first > 10 * watch.limits.poll:
        stop(cloud, want, nodes)


def ask(cloud, want, nodes):
  """Every host's status, sorted by number; None where not all of them answer."""
  states = []
  for node in nodes:
    done = cloud.ssh(node.name, on_host('status', want.run), check=False)
    for line in done.stdout.splitlines():
      if line.startswith('{'):
        states.append(json.loads(line))
  expected = sum(len(node.addresses) for node in nodes)
  return sorted(states, key=lambda each: each['host']) if len(states) == expected else None


def is_lost(cloud, want):
  if cloud.state(want.name) != 'ACTIVE':
    return True
  nodes = [cloud.node(name) for name in want.nodes]
  return any(node is None or node.state != 'READY' for node in nodes)


def worst(codes):
  """One exit code for all hosts: what cannot be cured, else what was, else the first other one."""
  codes = [1 if code is None else code for code in codes]
  for code in (CONFIG, 2, 3, HUNG):
    if code in codes:
      return code
  if PREEMPTED in codes:  # the others end as they can when one leaves
    return PREEMPTED
  return next((code for code in codes if code), DONE)
