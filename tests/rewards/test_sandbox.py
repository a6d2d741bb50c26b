"""The sandbox: what runs return, when it refuses, what it makes of a busy machine and leaves."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen3_jax.rewards import cgroup, child, sandbox, seccomp
from qwen3_jax.rewards.response import Unscored
from qwen3_jax.rewards.sandbox import Sandbox

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def box():
  fault = Sandbox()._find_fault()
  if fault:
    (pytest.fail if os.environ.get('CI') else pytest.skip)(f'NO SANDBOX: {fault}')
  return Sandbox()


def test_a_program_reads_its_input_and_files(box):
  result = box.run('print(input() + open("a.txt").read() + open("b").read())', stdin='x\n',
                   files={'a.txt': 'é', 'b': b'z'})
  assert (result.stdout, result.stderr, result.status, result.exit_code) == ('xéz\n', '', 'ok', 0)
  assert result.seconds < 60


def test_output_past_the_limit_of_a_program_that_ends_at_once(box):
  for size, status in ((64_000, 'ok'), (64_001, 'output'), (65_000, 'output')):
    result = box.run(f'import os; os.write(1, b"x" * {size})')
    assert (result.status, len(result.stdout)) == (status, 64_000)


@pytest.mark.parametrize('name', ['/etc/x', '../x', 'a/../../x', 'a\0b', '', 'x\n'])
def test_file_names_stay_in_the_working_folder(box, name):
  with pytest.raises(ValueError, match='want a relative path'):
    box.run('print(1)', files={name: ''})
  assert box.run('print(open("a/b c.txt").read())', files={'a/b c.txt': 'x'}).stdout == 'x\n'


def test_bad_commands_leave_nothing(box):
  before = list_left()
  with pytest.raises(ValueError, match='null byte'):
    box.run(['cat', 'a\0b'])
  assert list_left() == before


def test_commands_and_large_input(box):
  text = 'line of text\n' * 200_000
  assert box.run(['wc', '-c'], stdin=text).stdout.strip() == str(len(text))
  assert box.run(['python', '-c', 'import sys; print(sys.argv[1:])', 'a b']).stdout == "['a b']\n"


@pytest.mark.parametrize('program, status, code', [
  ('import sys; sys.exit(3)', 'error', 3), ('1/0', 'error', 1), ('this is no Python', 'error', 1),
  ('import os; os.kill(os.getpid(), 11)', 'killed', 139), ('raise MemoryError', 'memory', 1),
  ('print("x" * 70_000)', 'output', None), ('import time; time.sleep(60)', 'time', None)])
def test_status(box, program, status, code):
  result = box.run(program, seconds=0.5)
  assert (result.status, result.exit_code) == (status, code)


def test_runs_are_alike_and_share_nothing(box):
  program = ('import os; print(os.listdir("."), list({"a", "b", "c", "d"})); '
             'open("kept", "w").write("x")')
  assert len({box.run(program).stdout for _ in range(3)}) == 1


def test_nothing_of_this_project_can_be_imported(box):
  for name in ('qwen3_jax', 'numpy', 'jax', 'pytest'):
    assert 'ModuleNotFoundError' in box.run(f'import {name}').stderr


def test_session_keeps_names_until_a_cell_fails_its_limits(box):
  with box.session() as session:
    assert session.run('x = 20').stdout == ''
    assert session.run('print("hi")\nx + 1').stdout == 'hi\n21\n'
    result = session.run('1/0')
    assert result.status == 'error' and result.stderr.endswith('division by zero\n')
    assert 'harness' not in result.stderr
    assert session.run('exit()').status == 'error'
    assert session.run('x').stdout == '20\n'
    assert session.run('while True: pass', seconds=0.5).status == 'time'
    assert "'x' is not defined" in session.run('x').stderr
    assert session.run('print("x" * 10 ** 6)').status == 'output'
    assert session.run('"new"').stdout == "'new'\n"


def test_memory_of_all_processes_together(box):
  """Bounded by the group, or where none can be made by the limits per process."""
  program = """
import os, time
for _ in range(8):
  if not os.fork():
    try:
      x = bytearray(b'a') * (100 * 2 ** 20)
      print('had it', flush=True)
      time.sleep(1)
    finally:
      os._exit(0)
for _ in range(8): os.wait()
"""
  result = Sandbox(memory_mb=160).run(program, seconds=20)
  group = cgroup.take(2 ** 30)
  if group:
    cgroup.give(group)
    assert result.status == 'memory' or result.stdout.count('had it') < 8
  else:
    assert result.stdout.count('had it') <= 8


def test_filter_names_an_unknown_machine():
  with pytest.raises(ValueError, match="'sparc'"):
    seccomp.make_filter('sparc')
  assert len(seccomp.make_filter('aarch64')) % 8 == 0


def alter(monkeypatch, change):
  """Sandboxes started from here on have bubblewrap's arguments changed."""
  command = sandbox._bubblewrap()
  monkeypatch.setattr(sandbox, '_bubblewrap', lambda: change(command))


def is_refused(box, *reasons):
  fault = box._find_fault()
  assert fault and any(reason in fault for reason in reasons), fault
  sandbox._checked.clear()
  try:
    with pytest.raises(RuntimeError, match='no sandbox for model-written code'):
      box.run('print(1)')
    assert not box.available()
  finally:
    sandbox._checked.clear()


def test_refuses_to_run_as_root(box, monkeypatch):
  if os.geteuid() == 0:
    monkeypatch.setattr(sandbox, 'drop_root', list)
  else:
    alter(monkeypatch, lambda command: [*command[:1], '--uid', '0', *command[1:]])
  is_refused(box, 'runs as uid 0')


def test_refuses_without_a_filter(box, monkeypatch):
  allow_all = bytes([6, 0, 0, 0, 0, 0, 0xff, 0x7f])
  alter(monkeypatch, lambda command: [*command[:-1], allow_all])
  is_refused(box, 'the network is not denied')


@pytest.mark.parametrize('shown, reason', [
  (['--bind', '/usr/lib', '/usr/lib'], None), (['--ro-bind', '/etc', '/etc'], 'can be read'),
  (['--ro-bind', str(REPO), str(REPO)], 'can be read'), (['--setenv', 'KEY', 'x'], 'environment')])
def test_refuses_where_the_host_shows(box, monkeypatch, tmp_path, shown, reason):
  if reason is None:  # a folder of the host that the sandbox's user may write
    tmp_path.chmod(0o777)
    shown, reason = ['--bind', tmp_path, '/home'], 'can be written'
    for parent in tmp_path.parents:
      if not parent.stat().st_mode & 1:
        parent.chmod(parent.stat().st_mode | 1)
  elif str(REPO) in shown and os.geteuid() == 0 and not is_readable(REPO):
    return
  alter(monkeypatch, lambda command: [*command[:-2], *map(str, shown), *command[-2:]])
  is_refused(box, reason)


def is_readable(path):
  return subprocess.run([*sandbox.drop_root(), 'ls', path], capture_output=True).returncode == 0


def test_refuses_an_interpreter_that_its_user_cannot_run():
  box = Sandbox(python='/no/such/python')
  assert "the sandbox's user cannot run /no/such/python" in box._find_fault()


def test_refuses_without_bubblewrap(box, monkeypatch):
  monkeypatch.setattr(sandbox, '_bubblewrap', sandbox._bubblewrap.__wrapped__)
  monkeypatch.setenv('PATH', '/nowhere')
  with pytest.raises(RuntimeError, match='setpriv|apt-get install bubblewrap'):
    sandbox._bubblewrap()
  assert 'bubblewrap' in Sandbox()._find_fault()


def test_refuses_where_user_namespaces_are_off(box, tmp_path):
  """Inside a sandbox that forbids them, as in many containers."""
  from shutil import copytree, ignore_patterns
  with tempfile.TemporaryDirectory() as folder:
    for room in ('rewards', 'text'):
      copytree(REPO / 'qwen3_jax' / room, f'{folder}/qwen3_jax/{room}',
               ignore=ignore_patterns('__pycache__'))
    Path(folder, 'qwen3_jax', '__init__.py').touch()
    os.chmod(folder, 0o755)
    done = subprocess.run(
      [*sandbox.drop_root(), 'bwrap', '--unshare-user', '--disable-userns', '--dev-bind', '/', '/',
       sandbox.find_interpreter()[0], '-B', '-c', 'from qwen3_jax.rewards.sandbox import Sandbox\n'
       'print(Sandbox().available())\nSandbox().run("print(1)")'], capture_output=True, text=True,
      env={'PATH': os.environ['PATH'], 'PYTHONPATH': folder}, cwd='/', timeout=120)
  assert done.stdout == 'False\n' and done.returncode == 1
  assert 'RuntimeError: no sandbox for model-written code: bubblewrap did not begin' in done.stderr
  assert 'user namespaces must be allowed' in done.stderr


def test_failure_to_begin_is_nobodys_fault(box, monkeypatch):
  box.check()
  before = dict(sandbox.counts)
  alter(monkeypatch, lambda command: [*command[:-2], '--ro-bind', '/no/such', '/x', *command[-2:]])
  with pytest.raises(Unscored, match='failed twice: bubblewrap did not begin'):
    box.run('print(1)')
  assert sandbox.counts['unscored'] == before['unscored'] + 1
  assert sandbox.counts['runs'] == before['runs'] + 2


def test_want_of_descriptors_is_nobodys_fault(box):
  box.check()
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  taken = set(map(int, os.listdir('/proc/self/fd')))
  fourth = [n for n in range(soft) if n not in taken][3]
  resource.setrlimit(resource.RLIMIT_NOFILE, (fourth, hard))
  try:
    with pytest.raises(Unscored, match='Too many open files'):
      box.run('print(1)')
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  assert box.run('print(1)').status == 'ok'


def test_a_sandbox_killed_from_outside_is_nobodys_fault(box):
  box.check()
  with (pytest.raises(Unscored),
        box._start('import time; time.sleep(60)', '', None, 5.0) as running):
    threading.Timer(0.3, running.process.kill).start()
    running.wait(30.0)


@contextlib.contextmanager
def busy_processor(load):
  """This thread, and what it starts, on one processor with `load` processes that never rest."""
  before = os.sched_getaffinity(0)
  processor = {min(before)}
  os.sched_setaffinity(0, processor)
  hogs = [subprocess.Popen([sys.executable, '-S', '-c', 'while True: pass']) for _ in range(load)]
  try:
    yield
  finally:
    for hog in hogs:
      hog.kill()
      hog.wait()
    os.sched_setaffinity(0, before)


def test_a_busy_machine_is_waited_for(box, monkeypatch):
  """The program wants 0.4 s of processor and may take 0.6 s, of which it gets a third at best."""
  monkeypatch.setattr(child, 'PATIENCE', 50.0)
  program = 'import time\nwhile time.process_time() < 0.4: pass\nprint("done")'
  with busy_processor(2):
    start = time.monotonic()
    result = box.run(program, seconds=0.6)
  assert result.status == 'ok' and result.stdout == 'done\n'
  assert time.monotonic() - start > 0.6


def test_a_starved_program_is_not_judged(box, monkeypatch):
  """On a processor where it gets a thirteenth, a program that would end goes unscored."""
  monkeypatch.setattr(child, 'PATIENCE', 1.5)
  program = 'import time\nwhile time.process_time() < 0.39: pass'
  with busy_processor(12), pytest.raises(Unscored, match='s of processor in'):
    box.run(program, seconds=0.4)


def test_a_program_that_starves_itself_is_judged(box):
  program = 'import os\nfor _ in range(4): os.fork()\nwhile True: pass'
  assert box.run(program, seconds=0.5).status == 'time'


def test_measure_tree_sees_a_process_and_its_children():
  with subprocess.Popen(['sh', '-c', 'sleep 9 & sleep 9']) as process:
    deadline = time.monotonic() + 20
    while child.measure_tree(process.pid)[2] < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert child.measure_tree(process.pid)[2] == 3
    for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split():
      os.kill(int(pid), signal.SIGKILL)
    process.kill()


def list_left():
  """Descriptors, child processes and threads of this process, and files of the sandbox's user."""
  children = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
  owners = {sandbox.UID} if os.geteuid() == 0 else set()
  files = [entry.path for folder in ('/tmp', '/var/tmp', '/dev/shm', '/') for entry in
           (os.scandir(folder) if os.path.isdir(folder) else ())
           if entry.stat(follow_symlinks=False).st_uid in owners]
  return sorted(os.listdir('/proc/self/fd')), children, files


def run_many(box, sequential, parallel):
  """Different fates in turn, all right though they run beside each other."""
  fates = [('print({})', 'ok'), ('print({}); 1/0', 'error'), ('print("x" * 10 ** 6)', 'output'),
           ('import os; print({}, flush=True); os.fork(); os.abort()', 'killed')]

  def run(n):
    program, status = fates[n % len(fates)]
    result = box.run(program.format(n))
    assert result.status == status and (status == 'output' or result.stdout == f'{n}\n')

  box.check()
  before = list_left()
  for n in range(sequential):
    run(n)
  with ThreadPoolExecutor(parallel) as pool:
    list(pool.map(run, range(2 * parallel)))
  assert list_left() == before


def test_runs_leave_nothing(box):
  run_many(box, 12, 8)


@pytest.mark.slow
def test_a_thousand_runs_leave_nothing(box):
  run_many(box, 1000, 32)
