"""Runs on every host of a TPU VM, with nothing but Python: unpacks, starts, watches, tells.

  python3 host.py start FOLDER     begins what FOLDER/job.json says, unless it runs or has ended
  python3 host.py status FOLDER    prints one line of JSON: {"host", "state", "code", "tail"}
  python3 host.py logs FOLDER [LINES]
  python3 host.py stop FOLDER [SECONDS]   SIGTERM (the run saves), after SECONDS SIGKILL

job.json: {"arguments": [...], "hash": of code.tar.gz, "addresses": [...], "environment": {...},
"secrets": {NAME: Secret Manager's name}, "python": an interpreter that has everything, or null,
"try": number}. Arguments arrive as they were given: no shell reads them.
"""
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

PORT = 8476


def main(action, folder, *rest):
  folder = Path(folder).expanduser()
  actions = {'start': start, 'status': status, 'logs': logs, 'stop': stop, 'watch': watch}
  return actions[action](folder, *rest) or 0


def start(folder):
  """Unpacks the code and leaves a process behind that runs the job and writes down how it ends."""
  job = json.loads((folder / 'job.json').read_text())
  work = folder / f'host{number(job)}'
  work.mkdir(exist_ok=True)
  if running(work):
    print(f'runs already, process {read(work / "pid")}')
    return 0
  packed = folder / 'code.tar.gz'
  got = hashlib.sha256(packed.read_bytes()).hexdigest()
  if got != job['hash']:
    print(f'error: {packed} has hash {got[:12]}, the job wants {job["hash"][:12]}: copy it again',
          file=sys.stderr)
    return 78
  code = work / 'code'
  shutil.rmtree(code, ignore_errors=True)
  with tarfile.open(packed) as tar:
    tar.extractall(code, filter='data') if hasattr(tarfile, 'data_filter') else tar.extractall(code)
  (work / 'exit').unlink(missing_ok=True)
  with open(work / 'log', 'ab') as log:
    process = subprocess.Popen([sys.executable, __file__, 'watch', str(folder)],
                               stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                               start_new_session=True)
  write(work / 'pid', process.pid)
  print(f'started, process {process.pid}')
  return 0


def watch(folder):
  """Runs the job to its end; its exit code goes to the file `exit`, whole or not at all."""
  job = json.loads((folder / 'job.json').read_text())
  work = folder / f'host{number(job)}'
  code = 1
  try:
    python = job['python'] or make_environment(work / 'code')
    environment = dict(os.environ, **settings(job), PYTHONPATH=str(work / 'code'))
    for name, secret in job['secrets'].items():
      environment[name] = fetch_secret(secret)
    process = subprocess.Popen([python, '-m', 'qwen3_jax', *job['arguments']], cwd=work / 'code',
                               env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    code = process.wait()
  except (OSError, subprocess.CalledProcessError) as error:
    print(f'error: {error}', flush=True)
  write(work / 'exit', code if code >= 0 else 128 - code)
  return code


def settings(job):
  """The environment by which hosts find one another and nothing runs where it should not."""
  platform = {} if 'JAX_PLATFORMS' in os.environ else {'JAX_PLATFORMS': 'tpu'}
  hosts = len(job['addresses'])
  return {**platform, 'QWEN3_JAX_HOSTS': str(hosts), 'QWEN3_JAX_HOST': str(number(job)),
          'QWEN3_JAX_COORDINATOR': f'{job["addresses"][0]}:{job.get("port") or PORT}',
          'PYTHONUNBUFFERED': '1', **job['environment']}


def number(job):
  """This host's place among the addresses."""
  if 'QWEN3_JAX_HOST' in os.environ:
    return int(os.environ['QWEN3_JAX_HOST'])
  if len(job['addresses']) == 1:
    return 0
  for index, address in enumerate(job['addresses']):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
      try:
        probe.bind((address, 0))  # only an address of this host can be bound
        return index
      except OSError:
        continue
  raise SystemExit(f'error: no address of this host is among {job["addresses"]}')


def make_environment(code):
  """The interpreter of a virtual environment with the package and JAX for TPU; made once."""
  venv = Path('~/qwen3_jax_venv').expanduser()
  subprocess.run(['bash', '-c', 'repo=$PWD; source launch/venv.sh; prepare_venv tpu'], cwd=code,
                 env=dict(os.environ, QWEN3_JAX_VENV=str(venv)), check=True)
  return str(venv / 'bin/python')


def fetch_secret(name):
  """Asks Secret Manager; the value is in no argument, file or log."""
  done = subprocess.run(['gcloud', 'secrets', 'versions', 'access', 'latest', f'--secret={name}'],
                        stdout=subprocess.PIPE, check=True, text=True)
  return done.stdout.strip()


def status(folder):
  job = json.loads((folder / 'job.json').read_text())
  work = folder / f'host{number(job)}'
  code = read(work / 'exit')
  state = 'ended' if code is not None else 'running' if running(work) else 'lost'
  if not (work / 'pid').exists():
    state = 'new'
  tail = last_lines(work / 'log', 1)
  print(json.dumps({'host': number(job), 'try': job['try'], 'state': state,
                    'code': int(code) if code is not None else None,
                    'tail': tail[0] if tail else ''}))


def logs(folder, lines='40'):
  job = json.loads((folder / 'job.json').read_text())
  for line in last_lines(folder / f'host{number(job)}' / 'log', int(lines)):
    print(f'[host {number(job)}] {line}')


def stop(folder, patience='60'):
  job = json.loads((folder / 'job.json').read_text())
  work = folder / f'host{number(job)}'
  if not running(work):
    return
  group = int(read(work / 'pid'))
  os.kill(group, signal.SIGTERM)
  end = time.monotonic() + float(patience)
  while running(work) and time.monotonic() < end:
    time.sleep(0.2)
  if running(work):
    os.killpg(group, signal.SIGKILL)


def running(work):
  """Whether the process written down is alive, and is ours: numbers are used again."""
  pid = read(work / 'pid')
  if pid is None:
    return False
  try:
    words = Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\0')
    state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except OSError:
    return False
  return state != 'Z' and b'watch' in words and str(work.parent).encode() in words


def last_lines(path, count):
  try:
    with open(path, 'rb') as file:
      file.seek(max(0, path.stat().st_size - 200 * count - 2000))
      return file.read().decode(errors='replace').splitlines()[-count:]
  except OSError:
    return []


def read(path):
  try:
    return path.read_text().strip()
  except OSError:
    return None


def write(path, value):
  new = path.with_name(path.name + '.new')
  new.write_text(str(value))
  new.replace(path)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
