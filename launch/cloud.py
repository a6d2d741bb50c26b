"""Google Cloud by its own program: every call is one argument list, shown before it is made.

`Cloud.call` is the only place that starts `gcloud`. With `dry_run` it prints the command and starts
nothing. No argument ever carries a secret or a user's text for a shell: those travel in files.
"""
import json
import shlex
import subprocess
import sys
from typing import NamedTuple

LABEL = 'qwen3-jax-run'  # on everything that is paid for
GONE = ('NOT_FOUND', 'not found', 'was not found')
LOST = ('FAILED', 'SUSPENDING', 'SUSPENDED', 'DELETING')  # of a queued resource: delete, make anew
WAITING = ('ACCEPTED', 'CREATING', 'PROVISIONING', 'WAITING_FOR_RESOURCES')


class CloudError(RuntimeError):
  """A call failed; the text has the command and what it said."""


class Node(NamedTuple):
  """A TPU VM: its state ('READY', ...) and its hosts' addresses in the order of their numbers."""
  name: str
  state: str
  addresses: tuple


class Cloud(NamedTuple):
  """Where calls go. `project` None: gcloud's own default."""
  zone: str
  project: str | None = None
  dry_run: bool = False

  def call(self, *arguments, check=True):
    """Runs gcloud; returns its completed process (empty in a dry run)."""
    argv = ['gcloud', *arguments, f'--zone={self.zone}',
            *([f'--project={self.project}'] if self.project else []), '--quiet']
    if '--' in argv:
      raise ValueError(f'no argument may follow --: {argv}')
    if self.dry_run:
      print(shlex.join(argv), flush=True)
      return subprocess.CompletedProcess(argv, 0, '', '')
    try:
      done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
      raise CloudError('gcloud is not on PATH: install the Google Cloud CLI '
                       '(https://cloud.google.com/sdk), then `gcloud auth login`') from None
    if check and done.returncode:
      raise CloudError(f'{shlex.join(argv)}\nended with {done.returncode}: {done.stderr.strip()}')
    return done

  def _describe(self, *arguments):
    """The JSON of a describe call, None where there is no such thing."""
    done = self.call(*arguments, '--format=json', check=False)
    if done.returncode:
      if any(word in done.stderr for word in GONE):
        return None
      raise CloudError(f'{shlex.join(done.args)}\nended with {done.returncode}: '
                       f'{done.stderr.strip()}')
    return json.loads(done.stdout) if done.stdout.strip() else None

  def state(self, name):
    """The state of queued resource `name`, None where there is none."""
    found = self._describe('compute', 'tpus', 'queued-resources', 'describe', name)
    return found and found.get('state', {}).get('state', 'UNKNOWN')

  def node(self, name):
    """The `Node` of that name or None."""
    found = self._describe('compute', 'tpus', 'tpu-vm', 'describe', name)
    return found and Node(name, found.get('state', 'UNKNOWN'), tuple(
      end['ipAddress'] for end in found.get('networkEndpoints', ())))

  def create(self, want):
    """Asks for the `Request`'s slices as one queued resource."""
    nodes = ([f'--node-id={want.name}'] if want.slices == 1 else
             [f'--node-count={want.slices}', f'--node-prefix={want.name}'])
    capacity = {'on-demand': [], 'spot': ['--spot'], 'reserved': ['--reserved']}[want.capacity]
    self.call('compute', 'tpus', 'queued-resources', 'create', want.name, *nodes,
              f'--accelerator-type={want.slice.accelerator}',
              f'--runtime-version={want.runtime}', *capacity,
              f'--labels={LABEL}={want.run}',
              f'--valid-until-duration={want.valid_minutes}m', '--async')

  def delete(self, name):
    """Deletes a queued resource with its nodes, if it exists."""
    done = self.call('compute', 'tpus', 'queued-resources', 'delete', name, '--force', '--async',
                     check=False)
    if done.returncode and not any(word in done.stderr for word in GONE):
      raise CloudError(f'{shlex.join(done.args)}\nended with {done.returncode}: '
                       f'{done.stderr.strip()}')

  def list_names(self, run=None):
    """Names of the queued resources that carry the label (of `run`, if one is given)."""
    match = f'labels.{LABEL}={run}' if run else f'labels.{LABEL}:*'
    done = self.call('compute', 'tpus', 'queued-resources', 'list', f'--filter={match}',
                     '--format=json')
    found = json.loads(done.stdout) if done.stdout.strip() else []
    return [each['name'].rpartition('/')[2] for each in found]

  def copy(self, node, paths, to):
    """Copies files to folder `to` (below the home folder) of every host of a node."""
    self.call('compute', 'tpus', 'tpu-vm', 'scp', *map(str, paths), f'{node}:{to}',
              '--worker=all')

  def ssh(self, node, command, worker='all', check=True):
    """Runs `command`, a constant text without anything of the user's, on hosts of a node."""
    return self.call('compute', 'tpus', 'tpu-vm', 'ssh', node, f'--worker={worker}',
                     f'--command={command}', check=check)


class Request(NamedTuple):
  """What to ask for. `name` is of the queued resource and its node or nodes."""
  run: str
  slice: object
  slices: int = 1
  capacity: str = 'on-demand'
  runtime: str = ''
  valid_minutes: int = 720

  @property
  def name(self):
    return f'qwen3-{self.run}'

  @property
  def nodes(self):
    """Names of the TPU VMs, one a slice."""
    return [self.name] if self.slices == 1 else [f'{self.name}-{i}' for i in range(self.slices)]


def say(text):
  print(text, file=sys.stderr, flush=True)
