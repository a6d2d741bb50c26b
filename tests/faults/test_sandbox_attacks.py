"""Hostile programs in the sandbox, run by this user and, if that is root, by an ordinary one too.

What a program could do is read from what it printed and from the host, never from its exit code.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import qwen3_jax
from qwen3_jax.rewards import sandbox

PACKAGE = Path(qwen3_jax.__file__).parent
NOBODY = 65534
MARK = 'qwen3-jax-attacker'
CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
  ctypes.set_errno(0)
  value = libc.syscall(number, *args)
  return os.strerror(ctypes.get_errno()) if value == -1 else f'allowed: {value}'
"""
COUNT = """
import errno
def tried(action):
  try:
    return f'allowed: {action()!r}'[:200]
  except BaseException as error:
    return type(error).__name__
"""
DENIED = {'x86_64': (41, 101, 165, 166, 155, 161, 272, 308, 425, 426, 427, 248, 249, 250, 321, 298,
                     323, 246, 175, 310, 311, 428, 429, 430, 432, 304, 438, 319, 29, 240),
          'aarch64': (198, 117, 40, 39, 41, 51, 97, 268, 425, 426, 427, 217, 218, 219, 280, 241,
                      282, 104, 105, 270, 271, 428, 429, 430, 432, 265, 438, 279, 194, 180)}
NUMBERS = DENIED[os.uname().machine]
CLONE = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]

# name: (program, what its Result must be, seconds). {secret}: a host file that all may read;
# {folder}: a host folder that all may write; {port}: a server of the host; {home}: ours.
ATTACKS = {
  'loop': ('while True: pass', lambda r: r['status'] == 'time', 1),
  'sleep': ('import time; time.sleep(600)', lambda r: r['status'] == 'time', 1),
  'loop that ignores the signal': (
    'import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass',
    lambda r: r['status'] == 'time', 1),
  'closes its descriptors and hangs': (
    'import os, time; os.closerange(0, 64); time.sleep(600)', lambda r: r['status'] == 'time', 1),
  'memory': ('x = bytearray(10 ** 9)', lambda r: r['status'] == 'memory', 5),
  'memory in pieces': ('x = []\nwhile True: x.append(bytearray(10 ** 6))',
                       lambda r: r['status'] == 'memory', 20),
  'output': ("while True: print('x' * 10 ** 5)",
             lambda r: r['status'] == 'output' and len(r['stdout']) <= 64_000, 20),
  'errors': ("import sys\nwhile True: print('x' * 10 ** 5, file=sys.stderr)",
             lambda r: r['status'] == 'output' and len(r['stderr']) <= 64_000, 20),
  'bytes that are no text': (
    'import os; os.write(1, bytes(range(256)) * 9)', lambda r: r['status'] == 'ok', 5),
  'recursion': ('import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda x: [f([x])]\nf(0)',
                lambda r: r['status'] in ('killed', 'error', 'memory', 'time'), 2),
  'disk': ("""
total = 0
try:
  for n in range(100):
    with open(f'/dev/shm/{n}' if n % 2 else f'/tmp/{n}', 'wb') as file:
      for _ in range(20):
        total += file.write(bytes(10 ** 6))
        file.flush()
except OSError:
  pass
print(total)""", lambda r: 10 ** 6 < int(r['stdout']) <= sandbox.DISK, 20),
  'host writes': (COUNT + """
for path in ('{folder}/x', '/x', '/etc/x', '/usr/lib/x', '/usr/bin/x', '{home}/x', '/home/x',
             '/var/tmp/x', '/dev/x', '/proc/sys/kernel/core_pattern', '/sys/x', '/run/x'):
  print(tried(lambda path=path: open(path, 'w')))""", lambda r: no_success(r, 12), 5),
  'host reads': (COUNT + """
import os
for path in ('{secret}', '{package}/__init__.py', '/etc/passwd', '/etc/shadow', '/etc/hostname',
             '/proc/1/environ', '/proc/self/environ', '/proc/self/mem', '/dev/mem', '/dev/tty',
             '/proc/1/root/etc/passwd', '{home}/.bashrc', '/sys/class/net'):
  print(tried(lambda: open(path, 'rb').read(99)))
for path in ('{home}/.ssh', '/etc', '/proc', '/sys', '/var', '/run', '{folder}'):
  print(tried(lambda: os.listdir(path)))""", lambda r: no_success(r, 20), 5),
  'environment': ("""
import glob, os
print(sorted(os.environ))
for path in glob.glob('/proc/*/environ') + ['/proc/1/environ', '/proc/self/environ']:
  try: print(open(path).read())
  except OSError as error: print(error)""", lambda r: r['status'] == 'ok' and (
    'HIDDEN' not in r['stdout'] and 's3cret' not in r['stdout'] and 'HOME' in r['stdout']), 5),
  'network': (COUNT + """
import socket
for address in (('169.254.169.254', 80), ('127.0.0.1', {port}), ('8.8.8.8', 53), ('::1', {port})):
  print(tried(lambda: socket.create_connection(address, 1)))
print(tried(lambda: socket.getaddrinfo('metadata.google.internal', 80)))
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_NETLINK, socket.AF_PACKET):
  print(tried(lambda: socket.socket(family, socket.SOCK_DGRAM)))
print(tried(lambda: __import__('urllib.request').request.urlopen('http://127.0.0.1:{port}/')))""",
              lambda r: no_success(r, 10), 10),
  'kills everyone': ("""
import os, signal
for pid in (-1, os.getppid(), 1, *range(2, 40000)):
  if pid != os.getpid():
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
print('still here')""", lambda r: r['stdout'] == 'still here\n', 5),
  'daemon': (f"""
import os, sys
if not os.fork():
  os.setsid()
  if not os.fork():
    os.execv(sys.executable, ['{MARK}', '-c', 'import time; time.sleep(600)'])
  os._exit(0)
os.wait()
print('left')""", lambda r: r['stdout'] == 'left\n' and r['seconds'] < 20, 30),
  'fork bomb': (f"""
import os, sys, time
try:
  while True: os.fork()
except OSError:
  os.execv(sys.executable, ['{MARK}', '-c', 'while True: pass'])""",
                lambda r: r['status'] in ('time', 'killed'), 1),
  'forks counted': ("""
import os, signal
n = 0
try:
  while n < 200:
    if not os.fork(): signal.pause()
    n += 1
except OSError: pass
print(n)""", lambda r: 1 < int(r['stdout']) <= 16, 10),
  'threads counted': ("""
import threading
n = 0
try:
  while n < 200:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    n += 1
except RuntimeError: pass
print(n, flush=True)
__import__('os')._exit(0)""", lambda r: 1 < int(r['stdout']) <= 16, 10),
  'descriptors counted': ("""
files = []
try:
  while len(files) < 2000: files.append(open('/dev/null'))
except OSError: pass
print(len(files))""", lambda r: 1 < int(r['stdout']) <= 64, 10),
  'namespaces': (CALLS + COUNT + f"""
print(call(272 if {CLONE} == 56 else 97, 0x10000000))
for flags in (0x10000000, 0x20000, 0x40000000, 0x20000000):
  print(call({CLONE}, flags | 17, 0, 0, 0, 0))
print(call(435, 0, 0))
import subprocess
print(subprocess.run(['unshare', '-Ur', 'true'], capture_output=True).returncode != 0)""",
                 lambda r: r['stdout'].splitlines() == ['Operation not permitted'] * 5 + [
                   'Function not implemented', 'True'], 10),
  'system calls': (CALLS + f"""
for number in {NUMBERS}: print(call(number, 0, 0, 0, 0, 0))
print(call(0x40000000 + 39))""", lambda r: r['stdout'].splitlines() == [
    'Operation not permitted'] * len(NUMBERS) + ['Function not implemented'], 10),
  'terminal': (COUNT + """
import fcntl
print(*(tried(lambda: fcntl.ioctl(0, number, b'x')) for number in (0x5412, 0x541C)))
""", lambda r: r['stdout'] == 'PermissionError PermissionError\n', 10),
  'privileges': (CALLS + COUNT + """
print(os.getuid() != 0 and os.geteuid() != 0)
print(tried(lambda: os.setuid(0)), tried(lambda: os.setgroups([0])), tried(lambda: os.chroot('/')))
print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0))
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
print(libc.capget(header, data), list(data))""", lambda r: r['stdout'] == (
    'True\nOSError PermissionError PermissionError\n1 2\n0 [0, 0, 0, 0, 0, 0]\n'), 10),
  'raises its limits': (COUNT + """
import resource
for name in ('AS', 'CPU', 'NPROC', 'FSIZE', 'NOFILE', 'CORE'):
  kind = getattr(resource, f'RLIMIT_{name}')
  print(tried(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)))""",
                        lambda r: no_success(r, 6), 10)}

DRIVER = """
import dataclasses, json, os, sys
from concurrent.futures import ThreadPoolExecutor
os.environ['HIDDEN'] = 's3cret'
from qwen3_jax.rewards.sandbox import Sandbox
sandbox = Sandbox()
def run(job):
  name, program, seconds = job
  return name, dataclasses.asdict(sandbox.run(program, seconds=seconds))
with ThreadPoolExecutor(3) as pool:
  found = dict(pool.map(run, json.load(sys.stdin)))
from qwen3_jax.rewards import code
from qwen3_jax.rewards.response import Response
def judge(setup, source):
  tests = {'kind': 'asserts', 'setup': setup, 'asserts': ['assert f(2) == 3']}
  return code.verify({'tests': tests}, Response.read(source, 1))
scores = [judge(setup, source) for setup in ('', 'import math')
          for source in ('def f(x): return x + 1', 'import os; os._exit(0)')]
print(json.dumps({'uid': os.getuid(), 'found': found, 'scores': scores}))
"""


def no_success(result, lines):
  """Whether a program printed so many lines of failures and no other."""
  printed = result['stdout'].splitlines()
  return len(printed) == lines and not [line for line in printed if 'allowed' in line]


def copy_package(folder):
  """The package where any user may read it; a folder for PYTHONPATH."""
  for room in ('rewards', 'text'):
    shutil.copytree(PACKAGE / room, folder / 'qwen3_jax' / room,
                    ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(PACKAGE / '__init__.py', folder / 'qwen3_jax')
  return folder


def open_to_all(folder):
  for path in [folder, *folder.rglob('*')]:
    path.chmod(0o777 if path.is_dir() else 0o644)
  return folder


@pytest.fixture(scope='module')
def place():
  """A folder that every user may read and write, with a copy of the package, and a server."""
  fault = sandbox.Sandbox()._find_fault()
  if fault:
    (pytest.fail if os.environ.get('CI') else pytest.skip)(f'NO SANDBOX: {fault}')
  with tempfile.TemporaryDirectory() as folder, socket.create_server(('127.0.0.1', 0)) as server:
    folder = Path(folder)
    copy_package(folder)
    (folder / 'secret').write_text('s3cret')
    (folder / 'writable').mkdir()
    server.setblocking(False)
    yield open_to_all(folder), server


@pytest.fixture(scope='module', params=['root', 'nobody'] if os.geteuid() == 0 else ['self'])
def attacked(request, place):
  """What became of every attack, by the user who ran the sandboxes, and the host afterwards."""
  folder, server = place
  filled = {'{secret}': str(folder / 'secret'), '{home}': str(Path.home()),
            '{folder}': str(folder / 'writable'),
            '{package}': str(folder / 'qwen3_jax'), '{port}': str(server.getsockname()[1])}
  fill = lambda text: re.sub('|'.join(map(re.escape, filled)), lambda m: filled[m[0]], text)
  jobs = [(name, fill(program), seconds) for name, (program, _, seconds) in ATTACKS.items()]
  command = [sys.executable]
  if request.param == 'nobody':
    command = ['setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}', '--clear-groups', '--',
               sandbox.find_interpreter()[0]]
  done = subprocess.run([*command, '-B', '-c', DRIVER], input=json.dumps(jobs), text=True,
                        capture_output=True, cwd='/', timeout=300,
                        env={**os.environ, 'PYTHONPATH': str(folder)})
  assert done.returncode == 0, done.stderr[-2000:]
  report = json.loads(done.stdout)
  assert report['uid'] == {'root': 0, 'nobody': NOBODY, 'self': os.getuid()}[request.param]
  return report


@pytest.mark.parametrize('name', ATTACKS)
def test_attack_is_contained(attacked, name):
  found = attacked['found'][name]
  assert ATTACKS[name][1](found), found


def test_code_is_judged_by_every_user(attacked):
  assert attacked['scores'] == [1.0, 0.0, 1.0, 0.0]


def test_host_is_untouched(attacked, place):
  folder, server = place
  assert not list((folder / 'writable').iterdir())
  with pytest.raises(BlockingIOError):
    server.accept()
  left = []
  for path in Path('/proc').glob('[0-9]*/cmdline'):
    try:
      left += [path] if MARK.encode() in path.read_bytes() else []
    except OSError:
      pass
  assert not left
