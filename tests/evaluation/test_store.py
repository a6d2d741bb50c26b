"""Generations on disk: what decides them finds them, kills and bad disks lose no other line."""
import json
import os
import signal
import subprocess
import sys

import pytest

from qwen3_jax.evaluation.store import Part, digest

ABOUT = dict(model='m', benchmark='b', mode='thinking', budget=None, sampling=dict(top_p=0.95))


def test_lines_are_found_again(tmp_path):
  with Part(tmp_path, 'b thinking', ABOUT) as part:
    part.add([dict(key='a', text='é\u2028\ud800', score=1.0), dict(key='b', score=None)])
    assert json.loads((part.folder / 'about.json').read_text()) == ABOUT
  with Part(tmp_path, 'b thinking', ABOUT) as part:
    assert part.lines == {'a': dict(key='a', text='é\u2028\ud800', score=1.0),
                          'b': dict(key='b', score=None)}
    part.add([dict(key='b', score=0.5), dict(key='b', more=1)])
  with Part(tmp_path, 'b thinking', ABOUT) as part:
    assert part.lines['b'] == dict(key='b', score=0.5, more=1) and len(part.lines) == 2
    assert len(part.path.read_bytes().splitlines()) == 4


def test_every_setting_has_a_folder_of_its_own(tmp_path):
  changes = (dict(model='n'), dict(mode='plain'), dict(budget=0), dict(sampling=dict(top_p=0.9)))
  folders = set()
  for about in (ABOUT, *(ABOUT | change for change in changes)):
    with Part(tmp_path, '../b/thinking', about) as part:
      folders.add(part.folder)
      assert part.folder.parent == tmp_path
  assert len(folders) == 5
  assert digest(dict(a=1, b=2)) == digest(dict(b=2, a=1)) != digest(dict(a=1, b=3))


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path):
  with Part(tmp_path, 'b', ABOUT) as part:
    part.add([dict(key='a'), dict(key='b')])
    path = part.path
  path.write_bytes(path.read_bytes()[:-4])
  with Part(tmp_path, 'b', ABOUT) as part:
    assert list(part.lines) == ['a'] and part.damaged == 0
    part.add([dict(key='c')])
  with Part(tmp_path, 'b', ABOUT) as part:
    assert list(part.lines) == ['a', 'c']


def test_damaged_lines_are_counted_and_cost_no_other(tmp_path):
  with Part(tmp_path, 'b', ABOUT) as part:
    part.add([dict(key='a')])
    path = part.path
  path.write_bytes(b'\0\0\0\n' + path.read_bytes() + b'[]\n{"no": 1}\n\xff\n')
  with Part(tmp_path, 'b', ABOUT) as part:
    assert list(part.lines) == ['a'] and part.damaged == 4


def test_two_writers_are_refused(tmp_path):
  with Part(tmp_path, 'b', ABOUT):
    with pytest.raises(ValueError, match='another evaluation'):
      Part(tmp_path, 'b', ABOUT)
  Part(tmp_path, 'b', ABOUT).close()


def test_a_writer_that_is_killed_leaves_whole_lines(tmp_path):
  code = ('import sys\nfrom qwen3_jax.evaluation.store import Part\n'
          f'part = Part({str(tmp_path)!r}, "b", {ABOUT!r})\nnumber = 0\n'
          'while True:\n  part.add([dict(key=str(number), text="x" * 5000)])\n  number += 1\n'
          '  if number == 50: print("go", flush=True)\n')
  writer = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  assert writer.stdout.readline() == b'go\n'
  os.kill(writer.pid, signal.SIGKILL)
  writer.wait()
  writer.stdout.close()
  with Part(tmp_path, 'b', ABOUT) as part:
    count = len(part.lines)
    assert count >= 50 and part.damaged == 0
    assert list(part.lines) == [str(i) for i in range(count)]
