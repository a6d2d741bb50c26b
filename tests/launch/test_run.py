"""From `python -m launch run` to processes on hosts: bytes, secrets, preemption, what is left."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def launch(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, '-m', 'launch', *arguments], cwd=REPO, text=True, stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(
      os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=2',
      **environment))


ODD = ['two words', 'it\'s "quoted"', '$(touch hacked)`id`', 'line\nbreak', '', '*', '--', 'ü€']


@pytest.fixture
def program(tmp_path):
  """An interpreter that writes down what it was started with instead of training."""
  path = tmp_path / 'python'
  path.write_text(f'#!{sys.executable}\nimport json, os, sys\n'
                  'open("started", "a").write(json.dumps([sys.argv[1:], os.environ.get("TOKEN"), '
                  'os.environ.get("KIND")]) + "\\n")\n'
                  'sys.exit(int(os.environ.get("CODE", "0")))\n')
  path.chmod(0o755)
  return path


def test_arguments_arrive_byte_for_byte(fake, program):
  done = launch('run', '--run=r', '--tpu=v6e:8', '--zone=z', '--poll=0.2', f'--python={program}',
                '--env=KIND=a b=c', '--', *ODD)
  out, _ = done.communicate(timeout=120)
  assert done.returncode == 0, out
  found = list((fake.folder / 'hosts').rglob('started'))
  assert len(found) == 1
  (arguments, _, kind), = map(json.loads, found[0].read_text().splitlines())
  assert arguments == ['-m', 'qwen3_jax', *ODD] and kind == 'a b=c'
  assert not list((fake.folder / 'hosts').rglob('hacked')) and not fake.resources()
  for argv in fake.calls():
    assert not any(odd in argument for odd in ODD if len(odd) > 2 for argument in argv)


def test_a_secret_is_in_no_argument_and_no_log(fake, program, tmp_path):
  secret = 'hunter2-very-secret'
  gcloud = tmp_path / 'bin' / 'gcloud'
  rest = gcloud.read_text().splitlines()[1]
  gcloud.write_text(f'#!/bin/sh\ncase "$1" in secrets) echo {secret}; exit;; esac\n{rest}\n')
  done = launch('run', '--run=r', '--tpu=v6e:8', '--zone=z', '--poll=0.2', f'--python={program}',
                '--secret=TOKEN=wandb-key', '--', 'train')
  out, _ = done.communicate(timeout=120)
  assert done.returncode == 0, out
  started = next((fake.folder / 'hosts').rglob('started'))
  assert json.loads(started.read_text())[1] == secret
  texts = [path.read_text(errors='replace') for path in fake.folder.rglob('*')
           if path.is_file() and path != started]
  assert not any(secret in text for text in [out, *texts])


def test_a_bad_config_is_not_started_again(fake, program):
  done = launch('run', '--run=r', '--tpu=v6e:8', '--zone=z', '--poll=0.2', f'--python={program}',
                '--env=CODE=78', '--', 'train')
  out, _ = done.communicate(timeout=120)
  assert done.returncode == 78 and 'would not change' in out
  assert len(fake.calls('create')) == 1 and not fake.resources()


@pytest.mark.parametrize('told, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_being_stopped_leaves_nothing(told, code, fake):
  fake.script(['WAITING_FOR_RESOURCES'])
  process = launch('run', '--run=r', '--tpu=v6e:8', '--zone=z', '--poll=0.2', '--', 'train')
  while not fake.resources() and process.poll() is None:
    time.sleep(0.1)
  process.send_signal(told)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == code, out
  assert not fake.resources()


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


@pytest.mark.slow
def test_preempted_training_ends_as_if_nothing_had_been(fake, tmp_path):
  """Two processes of two devices: the machines go after a checkpoint; new ones finish the run."""
  workdir = tmp_path / 'run'
  fake.script(['PROVISIONING', 'ACTIVE'])
  process = launch(
    'run', '--run=r', '--tpu=v6e:8', '--zone=z', '--poll=1', f'--python={sys.executable}',
    f'--env=QWEN3_JAX_COORDINATOR=127.0.0.1:{free_port()}', '--', 'train',
    '--config=configs/s1.py:tiny', f'--workdir={workdir}', '--config.steps=40',
    '--config.save_every=10', '--config.evaluate_every=40', '--config.data.heldout_batches=1',
    '--config.data.tokenizer_size=600', FAKE_HOSTS='2')
  lost = []

  def take_away():
    while process.poll() is None and not lost:
      if (workdir / 'checkpoints' / '10').exists():
        lost.append(time.monotonic())
        (fake.folder / 'lost').touch()
      time.sleep(0.1)
  thread = threading.Thread(target=take_away)
  thread.start()
  out, _ = process.communicate(timeout=600)
  thread.join()
  logs = [path.read_text() for path in (fake.folder / 'hosts').rglob('log')]
  assert process.returncode == 0, (out, logs)
  assert lost and len(fake.calls('create')) == 2 and not fake.resources()
  assert len(logs) == 2 and any('have 2 of 2 hosts' in text for text in logs)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps[-1] == 40 and sorted(set(steps)) == list(range(1, 41))
  assert (workdir / 'checkpoints' / '40').exists()
