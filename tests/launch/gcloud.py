"""A stand-in for gcloud: records every call, keeps queued resources in a folder, and runs what ssh
is asked to run on this machine, once for each host, each with a home folder of its own.

FAKE_CLOUD is its folder: `script.json` lists, for each resource to be created, the states that
describe shows one after the other (the last one stays); `lost` takes the present one away.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

FAKE = Path(os.environ['FAKE_CLOUD'])


def main(argv):
  with open(FAKE / 'calls.jsonl', 'a') as calls:
    calls.write(json.dumps(argv) + '\n')
  take_away()
  words = [word for word in argv if not word.startswith('--')]
  flags = dict(word[2:].partition('=')[::2] for word in argv if word.startswith('--'))
  kind, action, *rest = words[2:]
  return globals()[f'{kind}_{action}'.replace('-', '_')](rest, flags)


def read():
  path = FAKE / 'resources.json'
  return json.loads(path.read_text()) if path.exists() else {}


def write(resources):
  (FAKE / 'resources.json').write_text(json.dumps(resources))


def queued_resources_create(names, flags):
  resources, scripts = read(), json.loads((FAKE / 'script.json').read_text())
  if names[0] in resources:
    print('ALREADY_EXISTS: the resource exists', file=sys.stderr)
    return 1
  made = len((FAKE / 'made').read_text().split()) if (FAKE / 'made').exists() else 0
  states = scripts[min(made, len(scripts) - 1)]
  if states[0] == 'REFUSED':
    with open(FAKE / 'made', 'a') as file:
      file.write(names[0] + '\n')
    print('RESOURCE_EXHAUSTED: no capacity', file=sys.stderr)
    return 1
  write(resources | {names[0]: dict(states=states, flags=flags)})
  with open(FAKE / 'made', 'a') as file:
    file.write(names[0] + '\n')
  return 0


def queued_resources_describe(names, flags):
  resources = read()
  if names[0] not in resources:
    print('ERROR: NOT_FOUND: no such resource', file=sys.stderr)
    return 1
  one = resources[names[0]]
  state = one['states'][0]
  one['states'] = one['states'][1:] or [state]
  write(resources)
  print(json.dumps({'name': f'x/{names[0]}', 'state': {'state': state}}))
  return 0


def queued_resources_delete(names, flags):
  resources = read()
  if resources.pop(names[0], None) is None:
    print('ERROR: NOT_FOUND: no such resource', file=sys.stderr)
    return 1
  kill_hosts()
  write(resources)
  return 0


def queued_resources_list(names, flags):
  print(json.dumps([{'name': f'projects/p/{name}'} for name in read()]))
  return 0


def tpu_vm_describe(names, flags):
  if not any(names[0].startswith(name) for name in read()):
    print('ERROR: NOT_FOUND', file=sys.stderr)
    return 1
  print(json.dumps({'state': 'READY', 'networkEndpoints': [
    {'ipAddress': '127.0.0.1'} for _ in homes(names[0])]}))
  return 0


def homes(node):
  count = int(os.environ.get('FAKE_HOSTS', '1'))
  return [FAKE / 'hosts' / f'{node}-{i}' for i in range(count)]


def tpu_vm_scp(names, flags):
  *sources, target = names
  node, _, folder = target.partition(':')
  for home in homes(node):
    for source in sources:
      shutil.copy(source, home / folder)
  return 0


def take_away():
  """Where `lost` lies, the machines are gone: nothing answers, and describe says so."""
  if not (FAKE / 'lost').exists():
    return
  (FAKE / 'lost').unlink()
  kill_hosts()
  write({name: one | {'states': ['SUSPENDED']} for name, one in read().items()})


def tpu_vm_ssh(names, flags):
  if any(one['states'][0] == 'SUSPENDED' for one in read().values()):
    print('ERROR: the machine does not answer', file=sys.stderr)
    return 255
  for index, home in enumerate(homes(names[0])):
    home.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, HOME=str(home), QWEN3_JAX_HOST=str(index))
    done = subprocess.run(['bash', '-c', flags['command']], cwd=home, env=environment,
                          stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
      return done.returncode
  return 0


def kill_hosts():
  """The machines go: every process of theirs, at once."""
  for pid in (FAKE / 'hosts').glob('*/qwen3_jax_runs/*/host*/pid'):
    try:
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    except (OSError, ValueError):
      pass
    pid.unlink(missing_ok=True)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
