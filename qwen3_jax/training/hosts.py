"""Many hosts as one program: they meet, agree on what they run, and start `jax.distributed`.

Environment: QWEN3_JAX_HOSTS, how many there are (unset or 1: nothing happens);
QWEN3_JAX_COORDINATOR, 'address:port' of the first (default: the first of TPU_WORKER_HOSTNAMES, port
8476); QWEN3_JAX_HOST, this one's number (default: TPU_WORKER_ID), which counts from the slice's
first host where QWEN3_JAX_SLICE and QWEN3_JAX_SLICE_HOSTS say which slice and how many each has.
JAX's own port is the coordinator's, the hosts meet at the next. `launch` sets all of them; nothing
else is needed, Pathways least of all.
"""
import contextlib
import hashlib
import json
import os
import platform
import socket
import time
from importlib import metadata
from pathlib import Path

PORT = 8476
PACKAGE = Path(__file__).resolve().parents[1]
AGREED = ('code', 'python', 'jax', 'jaxlib', 'libtpu')


class Missing(TimeoutError):
  """Hosts did not come in time."""
  exit_code = 75  # as of a hang: start again, and count it


class Disagreement(ValueError):
  """Hosts run different code or versions."""
  exit_code = 78  # starting again would not help


def join(limit=300, say=print):
  """Waits at most `limit` seconds for all hosts, then starts `jax.distributed`; before JAX is used.

  Returns (this host's number, hosts). Raises Missing, which says who is, Disagreement where hosts
  run different code or versions, ValueError where the environment does not say who is who.
  """
  count, index, coordinator = read_environment()
  if count == 1:
    return 0, 1
  host, _, port = coordinator.rpartition(':')
  meet(host, int(port) + 1, index, count, describe(), limit, say)
  import jax
  jax.distributed.initialize(coordinator, count, index, initialization_timeout=int(limit))
  return index, count


@contextlib.contextmanager
def in_turn(name):
  """Host 0 runs what is within, then the others do: they find what it made. `name` of the barrier.
  """
  count, index, _ = read_environment()
  if count > 1 and index:
    _wait(name)
  yield
  if count > 1 and not index:
    _wait(name)


def _wait(name):
  from jax.experimental import multihost_utils
  multihost_utils.sync_global_devices(name)


def read_environment():
  """(hosts, this one's number, coordinator) from the environment; ValueError if that is unclear."""
  count = int(os.environ.get('QWEN3_JAX_HOSTS') or 1)
  if count == 1:
    return 1, 0, ''
  first = os.environ.get('TPU_WORKER_HOSTNAMES', '').partition(',')[0]
  coordinator = os.environ.get('QWEN3_JAX_COORDINATOR') or (first and f'{first}:{PORT}')
  index = os.environ.get('QWEN3_JAX_HOST') or os.environ.get('TPU_WORKER_ID')
  if not coordinator or index is None:
    raise ValueError(f'QWEN3_JAX_HOSTS is {count}, but QWEN3_JAX_COORDINATOR is '
                     f'{coordinator or "not set"} and QWEN3_JAX_HOST {index or "not set"}: set '
                     "both, to the first host's address:port and this host's number from 0")
  before = int(os.environ.get('QWEN3_JAX_SLICE') or 0) * int(
    os.environ.get('QWEN3_JAX_SLICE_HOSTS') or 0)
  index = before + int(index)
  if not 0 <= index < count:
    raise ValueError(f'QWEN3_JAX_HOST makes this host {index}, but there are {count} hosts, '
                     'numbered from 0')
  return count, index, coordinator


def describe():
  """What hosts must agree on, by the names of AGREED."""
  def version(name):
    try:
      return metadata.version(name)
    except metadata.PackageNotFoundError:
      return 'none'
  return {'code': hash_code(), 'python': platform.python_version(),
          **{name: version(name) for name in ('jax', 'jaxlib', 'libtpu')}}


def hash_code(folder=PACKAGE):
  """12 hex digits of the package's source files, names and contents."""
  digest = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    digest.update(f'{path.relative_to(folder)}\0'.encode() + path.read_bytes() + b'\0')
  return digest.hexdigest()[:12]


def meet(address, port, index, count, facts, limit, say):
  """Host 0 waits for all others' facts and tells them what came of it; the others wait for that."""
  end = time.monotonic() + limit
  mine = {'index': index, 'name': socket.gethostname(), 'facts': facts}
  if index:
    fault = _report(address, port, mine, count, end)
  else:
    fault = _gather(port, mine, count, end, limit, say)
  if fault:
    raise (Missing if fault.startswith('have ') else Disagreement)(fault)


def _gather(port, mine, count, end, limit, say):
  """Host 0's part: '' where all came and agree, else what is wrong, which all who came are told."""
  seen, lines = {0: mine}, []
  with socket.create_server(('', port), backlog=count, reuse_port=False) as server:
    while len(seen) < count and (left := end - time.monotonic()) > 0:
      server.settimeout(min(left, 10))
      try:
        line, _ = server.accept()
        line.settimeout(5)
        other = json.loads(line.makefile().readline())
        seen[int(other['index'])] = {'name': other['name'], 'facts': dict(other['facts'])}
      except (TimeoutError, ValueError, OSError, KeyError, TypeError):
        say(f'have {len(seen)} of {count} hosts, waiting')
        continue
      lines.append(line)
      say(f'have {len(seen)} of {count} hosts')
    fault = compare(seen, count, limit)
    for line in lines:
      try:
        line.sendall((json.dumps(fault) + '\n').encode())
      except OSError:
        pass
      line.close()
  return fault


def compare(seen, count, limit):
  """'' where all `count` hosts are in `seen` {number: report} and their facts are one."""
  missing = [str(i) for i in range(count) if i not in seen]
  if missing:
    return (f'have {len(seen)} of {count} hosts after {limit:.0f} s; missing {", ".join(missing)}. '
            'Was the command started on every host, and can they reach host 0?')
  first = seen[0]
  for index, other in sorted(seen.items()):
    for key in AGREED:
      if other['facts'].get(key) != first['facts'].get(key):
        return (f'hosts disagree on {key}: host 0 ({first["name"]}) has {first["facts"].get(key)}, '
                f'host {index} ({other["name"]}) {other["facts"].get(key)}. Bring the same code '
                'and versions to all')
  return ''


def _report(address, port, mine, count, end):
  """The other hosts' part: tells host 0, trying again until it listens, and waits for its word."""
  begun = time.monotonic()
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection((address, port), timeout=min(left, 5)) as line:
        line.sendall((json.dumps(mine) + '\n').encode())
        line.settimeout(max(end - time.monotonic(), 1) + 10)
        if answer := line.makefile().readline():
          return json.loads(answer)
    except OSError:
      pass
    time.sleep(0.2)
  return (f'have no word from host 0 at {address}:{port} after {time.monotonic() - begun:.0f} s: '
          f'is it one of the {count} hosts that run this, and may they reach its port?')
