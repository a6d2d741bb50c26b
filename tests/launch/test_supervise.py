"""One run from first call to last: states, budgets, the deadline, and nothing left behind."""
import itertools
import json
import shlex
import subprocess

import pytest

from launch import __main__ as launch
from launch import shapes, supervise
from launch.cloud import Cloud, CloudError, Node, Request
from launch.supervise import CONFIG, DONE, HUNG, OVER, PREEMPTED, Clock, Limits

LIMITS = Limits(poll=1, backoff=1, longest=4, failures=2, preemptions=3, deadline=1000)


class Time:
  """A clock that only sleeping moves."""

  def __init__(self):
    self.seconds = 0

  def sleep(self, seconds):
    self.seconds += max(seconds, 0.01)

  def clock(self):
    return Clock(lambda: self.seconds, self.sleep)


class Sky:
  """A cloud in memory. `codes` are the exit codes of each try's hosts, None where machines go."""
  dry_run, zone = False, 'z'

  def __init__(self, codes, states=('PROVISIONING', 'ACTIVE'), hosts=2):
    self.codes, self.states, self.hosts = iter(codes), states, hosts
    self.live, self.made, self.present, self.started = {}, 0, None, 0

  def state(self, name):
    if name not in self.live:
      return None
    return next(self.live[name])

  def create(self, want):
    assert not self.live, 'two at once are paid for'
    self.made += 1
    self.live[want.name] = itertools.chain(self.states, itertools.repeat(self.states[-1]))

  def delete(self, name):
    self.live.pop(name, None)
    self.present = None

  def node(self, name):
    return Node(name, 'READY', ('a',) * self.hosts)

  def copy(self, node, paths, to):
    pass

  def ssh(self, node, command, check=True):
    out = ''
    if ' start ' in command:
      self.present, self.started = next(self.codes), self.started + 1
      if self.present is None:
        self.live = dict.fromkeys(self.live, itertools.repeat('SUSPENDED'))
    if ' status ' in command and self.present is not None:
      out = '\n'.join(json.dumps(dict(host=i, state='ended', code=code, tail=''))
                      for i, code in enumerate(self.present))
    return subprocess.CompletedProcess(command, 0, out, '')


def go(sky, tmp_path, time=None, **limits):
  path = tmp_path / 'r' / 'job.json'
  path.parent.mkdir(exist_ok=True)
  want = Request('r', shapes.parse('v6e:8'), runtime='v')
  return supervise.supervise(sky, want, lambda nodes, number: path, {}, LIMITS._replace(**limits),
                             (time or Time()).clock())


@pytest.mark.parametrize('codes, wanted, starts, made', [
  ([[0, 0]], DONE, 1, 1),
  ([[42, 42], [42, 1], [0, 0]], DONE, 3, 1),
  ([None, [0, 0]], DONE, 2, 2),
  ([[1, 0], [75, 134], [0, 0]], DONE, 3, 1),
  ([[78, 1]], CONFIG, 1, 1),
  ([[2, 2]], 2, 1, 1),
  ([[3, 1]], 3, 1, 1),
  ([[1, 1]] * 9, OVER, 3, 1),
  ([[42, 42]] * 9, OVER, 4, 1),
  ([None] * 9, OVER, 4, 4)])
def test_ends(codes, wanted, starts, made, tmp_path, capsys):
  sky = Sky(codes)
  assert go(sky, tmp_path) == wanted
  assert (sky.started, sky.made) == (starts, made)
  assert not sky.live
  said = capsys.readouterr().err
  if wanted == OVER:
    assert 'giving up' in said and '--max-' in said


@pytest.mark.parametrize('states', [
  ('WAITING_FOR_RESOURCES',), ('ACCEPTED', 'PROVISIONING', 'PROVISIONING')])
def test_the_deadline_holds_where_the_state_never_changes(states, tmp_path, capsys):
  time, sky = Time(), Sky([], states)
  assert go(sky, tmp_path, time, deadline=500) == OVER
  assert 500 <= time.seconds < 600 and not sky.live
  assert 'the deadline of' in capsys.readouterr().err


def test_a_resource_that_failed_is_deleted_and_asked_for_again(tmp_path):
  sky = Sky([[0, 0]], ('PROVISIONING', 'FAILED'))
  create = sky.create

  def better(want):
    create(want)
    if sky.made == 2:
      sky.live[want.name] = itertools.repeat('ACTIVE')
  sky.create = better
  assert go(sky, tmp_path) == DONE and sky.made == 2 and not sky.live


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_whatever_happens_nothing_is_left(error, tmp_path):
  sky = Sky([[0, 0]])

  def fall(node, paths, to):
    raise error
  sky.copy = fall
  with pytest.raises(error):
    go(sky, tmp_path)
  assert sky.made == 1 and not sky.live


@pytest.mark.parametrize('codes, wanted', [
  ([0, 0], DONE), ([0, 42], PREEMPTED), ([134, 75], HUNG), ([42, 78], CONFIG), ([None, 0], 1),
  ([134, 0], 134)])
def test_one_code_for_all(codes, wanted):
  assert supervise.worst(codes) == wanted


def test_missing_gcloud_is_said(monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  with pytest.raises(CloudError, match='gcloud is not on PATH'):
    Cloud('z').state('x')


def shown(capsys, *arguments):
  code = launch.main(list(arguments))
  return code, capsys.readouterr()


@pytest.mark.parametrize('flags, wanted', [
  (['--tpu=v5e:16'], '--node-id=qwen3-r --accelerator-type=v5litepod-16 '
   '--runtime-version=v2-alpha-tpuv5-lite'),
  (['--tpu=v5p:16', '--spot'], '--node-id=qwen3-r --accelerator-type=v5p-32 '
   '--runtime-version=v2-alpha-tpuv5 --spot'),
  (['--tpu=v6e:4x8', '--reserved', '--slices=4'], '--node-count=4 --node-prefix=qwen3-r '
   '--accelerator-type=v6e-32 --runtime-version=v2-alpha-tpuv6e --reserved'),
  (['--tpu=v5p:4x4x8', '--runtime=mine'], '--node-id=qwen3-r --accelerator-type=v5p-256 '
   '--runtime-version=mine')])
def test_dry_run_prints_the_commands_and_starts_none(flags, wanted, fake, capsys):
  code, out = shown(capsys, 'run', '--run=r', '--zone=z', '--project=p', '--dry-run', *flags, '--',
                    'train', '--config=a b')
  lines = out.out.splitlines()
  assert code == 0 and not fake.calls()
  assert lines[0] == (f'gcloud compute tpus queued-resources create qwen3-r {wanted} '
                      '--labels=qwen3-jax-run=r --valid-until-duration=720m --async --zone=z '
                      '--project=p --quiet')
  assert all(shlex.split(line)[0] == 'gcloud' for line in lines)
  assert 'queued-resources delete qwen3-r' in lines[-1]


@pytest.mark.parametrize('flags, says', [
  (['run', '--run=R!', '--tpu=v5p:16', '--zone=z', '--', 'x'], '--run='),
  (['run', '--run=r', '--tpu=v5p:17', '--zone=z', '--', 'x'], 'no slice of 17'),
  (['run', '--run=r', '--tpu=v5p:16', '--zone=z'], 'nothing to run'),
  (['run', '--run=r', '--tpu=tpu7x:4', '--zone=z', '--', 'x'], 'render'),
  (['run', '--run=r', '--tpu=v5p:4x4x12', '--zone=z', '--', 'x'], 'render'),
  (['run', '--run=r', '--tpu=v5p:16', '--zone=z', '--env=A', '--', 'x'], 'want NAME=VALUE'),
  (['run', '--run=r', '--tpu=v5p:16', '--slices=0', '--zone=z', '--', 'x'], 'at least 1'),
  (['down', '--zone=z'], 'say which')])
def test_bad_input_costs_nothing(flags, says, fake, capsys):
  code, out = shown(capsys, *flags)
  assert code == CONFIG and says in out.err and not fake.calls()


def test_down_all_finds_by_label(fake, capsys):
  (fake.folder / 'resources.json').write_text(json.dumps({'qwen3-a': {}, 'qwen3-b': {}}))
  assert shown(capsys, 'down', '--all', '--zone=z')[0] == 0
  assert not fake.resources()
  assert '--filter=labels.qwen3-jax-run:*' in fake.calls('list')[0]


def test_no_capacity_is_asked_for_again_and_nothing_stays(fake, tmp_path):
  fake.script(['REFUSED'], ['REFUSED'], ['REFUSED'])
  want = Request('r', shapes.parse('v6e:8'), runtime='v')
  code = supervise.supervise(Cloud('z'), want, None, {}, LIMITS, Time().clock())
  assert code == OVER and len(fake.calls('create')) == 3 and not fake.resources()
