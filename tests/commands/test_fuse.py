"""python -m qwen3_jax fuse: from queries, a model and chats to the mixed set of both modes."""
import json

import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.data import conversations, tasks
from tests.endpoint import serve

SPEC = 'tasks:kinds=chain+sum,difficulty=2-3,size=60'
SOLVED = {t.question: t for t in (tasks.open_tasks(SPEC[6:]).task(i) for i in range(60))}


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def play(body, number):
  """A model that thinks and is wrong on sums with a long question; a judge of checklists."""
  text = body['messages'][-1]['content']
  if 'write down what a very' in text:
    return 200, dict(content='{"points": ["It names a fruit.", "It is one sentence."]}')
  if 'Hold the answer against each point' in text:
    return 200, dict(content=json.dumps(dict(met=['apple' in text, True])))
  problem = next(t for question, t in SOLVED.items() if question in text)
  wrong = problem.kind == 'sum' and len(problem.question) % 2
  answer = 'unknown' if wrong else problem.answer
  return 200, dict(content=f'The answer is \\boxed{{{answer}}}.',
                   reasoning_content='\n'.join(problem.steps) + f'\nSo it is {answer}.')


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
  monkeypatch.setenv('QWEN3_JAX_CACHE', str(tmp_path / 'cache'))


def chats(tmp_path):
  """Conversations of which one fails its checklist, one thinks and one says nothing."""
  names = 'Ada Ben Chen Dora Emil Fatima Goran Hana Ivan Jun Kofi Lena Maya Noor Omar'.split()
  places = 'garden market harbour castle forest island valley temple'.split()
  def row(k, answer):
    question = f'{names[k % 15]} walks to the {places[k % 8]} number {k}. What does she eat there?'
    return dict(messages=[dict(role='user', content=question),
                          dict(role='assistant', content=answer)])
  rows = [row(k, f'In the {places[k % 8]} {names[k % 15]} eats apple number {k}.')
          for k in range(60)]
  rows += [row(60, 'A pear, nothing else.'), row(61, '<think> hm </think> An apple.'),
           row(62, ' ')]
  return write(tmp_path / 'chats.jsonl', rows)


def fuse(tmp_path, url, *more, heldout=0.1):
  return main(['fuse', f'--model={url}', f'--judge={url}', f'--queries={SPEC}',
               f'--plain={chats(tmp_path)}', f'--workdir={tmp_path}/out',
               f'--config.mix.heldout={heldout}', '--config.thinking.candidates.n=1',
               '--config.thinking.guess.least=3', *more])


def test_both_modes_are_filtered_and_mixed(tmp_path, capsys):
  with serve(play) as (url, _):
    assert fuse(tmp_path, url) == 0
  report = json.loads((tmp_path / 'out/report.json').read_text())
  rules = {line['name']: line['rules'] for line in report['stages']}
  wrong = sum(t.kind == 'sum' and len(t.question) % 2 for t in SOLVED.values())
  assert rules['thinking: candidates'] == {'no right answer': wrong}
  assert rules['plain: read'] == {'empty answer': 1}
  assert rules['plain: checklist'] == {'checklist': 1}
  rejected = read(tmp_path / 'out/plain/2_checklist/rejected.jsonl')
  assert 'It names a fruit.' in next(r['reason'] for r in rejected if r['rule'] == 'checklist')
  train, heldout = (conversations.read(str(tmp_path / f'out/{name}.jsonl'))
                    for name in ('fused', 'heldout'))
  def asked(source):
    words = {m['content'] for record in source for m in record['messages'] if m['role'] == 'user'}
    return {' '.join(w for w in text.split() if w not in ('/think', '/no_think'))
            for text in words} - {''}
  assert not asked(train) & asked(heldout) and asked(heldout)
  assert {record['kind'] for record in train} == {'thinking', 'plain', 'turns'}
  assert all(conversations.examples(record) for record in train)
  plain = read(tmp_path / 'out/plain/4_deduplicate/accepted.jsonl')
  assert 'An apple.' in [r['messages'][-1]['content'].strip() for r in plain]
  assert not any(m.get('reasoning_content') for r in plain for m in r['messages'])
  assert 'fused.jsonl: ' in capsys.readouterr().out


def test_again_it_asks_nothing_and_writes_the_same(tmp_path):
  with serve(play) as (url, asked):
    assert fuse(tmp_path, url) == 0
    before = (tmp_path / 'out/fused.jsonl').read_bytes()
    count = len(asked)
    assert fuse(tmp_path, url) == 0
    assert len(asked) == count and (tmp_path / 'out/fused.jsonl').read_bytes() == before


def test_a_judge_that_talks_nonsense_fails_records_and_rejects_none(tmp_path):
  def nonsense(body, number):
    if 'write down what a very' in body['messages'][-1]['content']:
      return 200, dict(content='Certainly! Points are overrated.')
    return play(body, number)
  with serve(nonsense) as (url, _):
    assert fuse(tmp_path, url, '--config.plain.patience=100') == 75
  counts = json.loads((tmp_path / 'out/plain/2_checklist/counts.json').read_text())
  assert counts['failed'] == 62 and counts['rejected'] == counts['accepted'] == 0
  assert not (tmp_path / 'out/fused.jsonl').exists()


def test_what_is_missing_is_said_before_any_work(tmp_path, capsys):
  assert main(['fuse', f'--queries={SPEC}', f'--plain={chats(tmp_path)}',
               f'--workdir={tmp_path}/out']) == 2
  assert 'needs a model' in capsys.readouterr().err
  assert main(['fuse', f'--queries={SPEC}', '--plain=x', f'--workdir={tmp_path}/out',
               '--config.mix.flag_rat=1']) == 78
  assert 'did you mean config.mix.flag_rate?' in capsys.readouterr().err


def test_a_model_that_is_never_right_ends_in_one_sentence(tmp_path, capsys):
  def wrong(body, number):
    if 'points' in body['messages'][-1]['content'].lower():
      return play(body, number)
    return 200, dict(content='The answer is 10000.', reasoning_content='So it is.')
  with serve(wrong) as (url, _):
    assert fuse(tmp_path, url) == 2
  assert 'no thinking record is left; the rejected.jsonl' in capsys.readouterr().err


def test_without_a_held_out_share_there_is_one_file(tmp_path):
  with serve(play) as (url, _):
    assert fuse(tmp_path, url, '--config.mix.size=30', heldout=0.0) == 0
  assert len(read(tmp_path / 'out/fused.jsonl')) == 30
  assert not (tmp_path / 'out/heldout.jsonl').exists()
