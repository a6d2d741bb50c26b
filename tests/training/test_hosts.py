"""Hosts meet, count, compare what they run, and say who is missing."""
import socket
import threading

import pytest

from qwen3_jax.training import hosts


def free_port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def meet_all(count, facts, present=None, limit=20):
  """What each host's `meet` raised (None where nothing), and what host 0 said."""
  port, said, ends = free_port(), [], {}

  def one(index):
    try:
      hosts.meet('127.0.0.1', port, index, count, facts[index], limit, said.append)
      ends[index] = None
    except Exception as error:
      ends[index] = error
  threads = [threading.Thread(target=one, args=(i,)) for i in present or range(count)]
  for thread in reversed(threads):  # host 0 last: the others wait for it
    thread.start()
  for thread in threads:
    thread.join(60)
  return ends, said


def test_all_come_and_agree():
  facts = dict.fromkeys(hosts.AGREED, '1')
  ends, said = meet_all(3, [facts] * 3)
  assert ends == {0: None, 1: None, 2: None} and said[-1] == 'have 3 of 3 hosts'


def test_other_code_is_refused_on_every_host():
  facts = [dict.fromkeys(hosts.AGREED, '1') for _ in range(3)]
  facts[2]['code'] = 'ffff'
  ends, _ = meet_all(3, facts)
  for error in ends.values():
    assert isinstance(error, ValueError)
    assert 'disagree on code: host 0' in str(error) and 'ffff' in str(error)


def test_who_is_missing_is_said_in_time():
  facts = dict.fromkeys(hosts.AGREED, '1')
  ends, _ = meet_all(3, [facts] * 3, present=(0, 2), limit=1.5)
  for error in ends.values():
    assert isinstance(error, TimeoutError)
    assert 'have 2 of 3 hosts' in str(error) and 'missing 1' in str(error)


def test_without_host_0_nobody_waits_for_ever():
  facts = dict.fromkeys(hosts.AGREED, '1')
  ends, _ = meet_all(2, [facts] * 2, present=(1,), limit=1)
  assert isinstance(ends[1], TimeoutError) and 'no word from host 0' in str(ends[1])


def test_a_stranger_at_the_port_is_ignored():
  port, said, ends = free_port(), [], []
  facts = dict.fromkeys(hosts.AGREED, '1')

  def host(index):
    hosts.meet('127.0.0.1', port, index, 2, facts, 20, said.append)
    ends.append(index)
  first = threading.Thread(target=host, args=(0,))
  first.start()
  while True:
    try:
      with socket.create_connection(('127.0.0.1', port), timeout=1) as line:
        line.sendall(b'GET / HTTP/1.1\r\n\r\n')
      break
    except OSError:
      continue
  host(1)
  first.join(20)
  assert sorted(ends) == [0, 1]


@pytest.mark.parametrize('environment, wanted', [
    ({}, (1, 0, '')),
    (dict(QWEN3_JAX_HOSTS='4', TPU_WORKER_HOSTNAMES='a,b', TPU_WORKER_ID='1'), (4, 1, 'a:8476')),
    (dict(QWEN3_JAX_HOSTS='2', QWEN3_JAX_COORDINATOR='x:1', QWEN3_JAX_HOST='0',
          TPU_WORKER_ID='7'), (2, 0, 'x:1')),
    (dict(QWEN3_JAX_HOSTS='8', QWEN3_JAX_COORDINATOR='x:1', QWEN3_JAX_HOST='3', QWEN3_JAX_SLICE='1',
          QWEN3_JAX_SLICE_HOSTS='4'), (8, 7, 'x:1'))])
def test_environment(monkeypatch, environment, wanted):
  for name in ('QWEN3_JAX_HOSTS', 'QWEN3_JAX_COORDINATOR', 'QWEN3_JAX_HOST',
               'TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID', 'QWEN3_JAX_SLICE', 'QWEN3_JAX_SLICE_HOSTS'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert hosts.read_environment() == wanted


def test_unclear_environments_are_refused(monkeypatch):
  monkeypatch.delenv('TPU_WORKER_HOSTNAMES', raising=False)
  monkeypatch.setenv('QWEN3_JAX_HOSTS', '2')
  monkeypatch.setenv('QWEN3_JAX_HOST', '1')
  with pytest.raises(ValueError, match='QWEN3_JAX_COORDINATOR is not set'):
    hosts.read_environment()
  monkeypatch.setenv('QWEN3_JAX_COORDINATOR', 'x:1')
  monkeypatch.setenv('QWEN3_JAX_HOST', '2')
  with pytest.raises(ValueError, match='numbered from 0'):
    hosts.read_environment()
