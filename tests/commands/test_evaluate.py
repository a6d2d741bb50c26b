"""python -m qwen3_jax evaluate: benchmarks in both modes, kills, new scores, tables, complaints."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qwen3_jax import save
from qwen3_jax.__main__ import main
from qwen3_jax.commands import evaluate
from qwen3_jax.evaluation import compare, run
from qwen3_jax.generation import engine
from qwen3_jax.rewards import code
from qwen3_jax.rewards.sandbox import Sandbox
from tests.generation.conftest import model, tokenizer  # noqa: F401 (fixtures)

TASKS = 'tasks:kinds=chain+coin,difficulty=1'
pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def folder(model, tokenizer, tmp_path_factory):  # noqa: F811
  found = tmp_path_factory.mktemp('models') / 'random'
  save(model, found, tokenizer=tokenizer)
  return found


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  found = tmp_path_factory.mktemp('data')
  (found / 'gsm8k').mkdir()
  (found / 'gsm8k/test.jsonl').write_text(''.join(json.dumps(dict(
    question=f'What is {i} + 1?', answer=f'It is one more.\n#### {i + 1}')) + '\n'
    for i in range(10)))
  (found / 'humaneval').mkdir()
  (found / 'humaneval/test.jsonl').write_text(json.dumps(dict(
    task_id='HumanEval/0', prompt='def f():\n', entry_point='f', canonical_solution='  return 1\n',
    test='def check(f):\n  assert f() == 1\n')) + '\n')
  return found


def words(folder, data, to, *more):
  return ['evaluate', f'--model={folder}', '--tasks=gsm8k', f'--data={data}', f'--to={to}',
          '--limit=3', '--max-tokens=8', '--rows=1', *more]


def kept(to):
  return {path.parent.name: path.read_bytes() for path in to.glob('generations/*/*.jsonl')}


def test_benchmarks_become_a_table_of_models(folder, data, tmp_path, capsys):
  other = tmp_path / 'other'
  other.symlink_to(folder)
  assert main(words(f'{folder},{other}', data, tmp_path / 'to', '--budgets=0,3')) == 0
  said = capsys.readouterr().out
  assert 'gsm8k thinking: 3/3' in said and 'gsm8k thinking 3: 3/3' in said
  table = json.loads((tmp_path / 'to/table.json').read_text())
  assert [(row['mode'], row['budget']) for row in table['rows']] == [
    ('thinking', None), ('thinking', 0), ('thinking', 3), ('plain', None)]
  # For the same weights under another name nothing is drawn.
  assert set(table['models']) == {'random', 'other'} and len(kept(tmp_path / 'to')) == 4
  assert all(row['parts']['random'] == row['parts']['other'] for row in table['rows'])
  assert '| gsm8k | plain | accuracy | 3 |' in (tmp_path / 'to/table.md').read_text()
  page = (tmp_path / 'to/index.html').read_text()
  assert page.count('<svg') >= 1 and '<script' not in page
  before = kept(tmp_path / 'to')
  assert main(['evaluate', '--tasks=gsm8k', f'--data={data}', f'--to={tmp_path}/to',
               '--rescore']) == 0
  assert capsys.readouterr().out.count('3 answers, all scores as kept') == 8
  assert kept(tmp_path / 'to') == before


def test_killed_and_run_again_no_answer_is_repeated(folder, data, tmp_path, monkeypatch):
  """SIGKILL while answers come; the table is that of a run that nobody disturbed."""
  more = '--samples=40', '--modes=thinking'
  process = subprocess.Popen([sys.executable, '-m', 'qwen3_jax',
                              *words(folder, data, tmp_path / 'cut', *more)],
                             stdout=subprocess.DEVNULL)
  until = time.monotonic() + 300
  while sum(text.count(b'"text"') for text in kept(tmp_path / 'cut').values()) < 5:
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  before, = kept(tmp_path / 'cut').values()
  before = before[:before.rfind(b'\n') + 1]
  drawn, steps = [], engine.Engine.steps
  def spy(self, requests, *args, **options):
    drawn.extend(requests)
    return steps(self, requests, *args, **options)
  monkeypatch.setattr(engine.Engine, 'steps', spy)
  assert main(words(folder, data, tmp_path / 'cut', *more)) == 0
  after, = kept(tmp_path / 'cut').values()
  assert after.startswith(before) and after.count(b'"text"') == 120
  assert 5 <= before.count(b'"text"') == 120 - len(drawn) < 120
  assert main(words(folder, data, tmp_path / 'whole', *more)) == 0
  assert len(drawn) == 240 - before.count(b'"text"')
  cut, whole = (json.loads((tmp_path / name / 'table.json').read_text())
                for name in ('cut', 'whole'))
  assert cut == whole and '40' in cut['rows'][0]['parts']['random']['pass']


def test_code_needs_a_sandbox(folder, data, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(code, 'SANDBOX', Sandbox(python='/nowhere/python'))
  assert main(words(folder, data, tmp_path / 'to', '--tasks=gsm8k,humaneval')) == 2
  said = capsys.readouterr().err
  assert 'no sandbox for model-written code' in said and 'Nothing was run' in said
  assert not (tmp_path / 'to').exists()


def test_bad_input_is_one_sentence(folder, data, tmp_path, capsys):
  for flag, message in (('--tasks=gsm9k', "did you mean 'gsm8k'"), ('--budgets=x', 'whole numbers'),
                        ('--tasks=math', 'get them from'), ('--modes=loud', "no mode 'loud'"),
                        ('--samples=0', '--samples must be at least 1'),
                        ('--to=x.json', 'want a folder'), ('--model=', '--model=DIR is missing'),
                        (f'--model={folder},{tmp_path}/none', 'no model in'),
                        ('--limt=3', 'did you mean --limit')):
    try:
      assert main([*words(folder, data, tmp_path / 'to'), flag]) == 2
    except SystemExit as error:  # argparse
      assert error.code == 2
    assert message in capsys.readouterr().err
  assert not (tmp_path / 'to').exists()
  assert main(['evaluate', '--tasks=gsm8k', f'--data={data}', f'--to={tmp_path}',
               '--rescore']) == 2
  assert 'no results in' in capsys.readouterr().err


def test_list_says_where_data_come_from(capsys):
  assert main(['evaluate', '--list']) == 0
  said = capsys.readouterr().out
  assert 'gsm8k: ' in said and 'https://github.com/openai/grade-school-math' in said


def test_commas_separate_tasks_and_options():
  assert evaluate.split_tasks(f'{TASKS},gsm8k,mmlu:choices') == [TASKS, 'gsm8k', 'mmlu:choices']


def test_names_of_models_are_short_and_distinct():
  assert compare.shorten(['runs/a/fusion', 'runs/b/fusion'], 'ab') == ['a/fusion', 'b/fusion']
  assert compare.shorten(['runs/a/fusion', 'runs/a/s3'], 'ab') == ['fusion', 's3']
  assert compare.shorten(['x', 'x'], ['a' * 8, 'b' * 8]) == ['x (aaaaaa)', 'x (bbbbbb)']


def test_the_page_shows_hostile_names_as_text(tmp_path):
  part = dict(run.summary.estimates.interval([1, 0]), benchmark='<b>', title='', mode='thinking',
              metric='accuracy', samples=1, folder='x', missing=1, details={'<i>': 0.5})
  run.summary.keep(dict(model='<script>', fingerprint='f', parts=[
    part | dict(budget=budget) for budget in (None, 1, 8)]), tmp_path)
  compare.write(tmp_path)
  page, text = ((tmp_path / name).read_text() for name in ('index.html', 'table.md'))
  assert '<script>' not in page and '<b>' not in page and '&lt;b&gt;' in page and '<svg' in page
  assert '50.0 (9.5–90.5, 1 missing)' in text
