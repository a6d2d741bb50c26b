"""python -m qwen3_jax filter: the pipelines from end to end, with an endpoint and with a model."""
import json
import os
import random
import subprocess
import sys

import pytest

from qwen3_jax.__main__ import main
from qwen3_jax.commands import config as configs
from qwen3_jax.data import conversations, tasks
from qwen3_jax.stages import pipelines
from tests.endpoint import serve


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def read(path):
  return [json.loads(line) for line in path.read_text().split('\n') if line]


def run(workdir, pipeline, *flags):
  return main(['filter', f'--config=configs/filter.py:{pipeline}', f'--workdir={workdir}', *flags])


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
  monkeypatch.setenv('QWEN3_JAX_CACHE', str(tmp_path / 'cache'))


NAMES = 'Ada Ben Chen Dora Emil Fatima Goran Hana Ivan Jun Kofi Lena'.split()
QUESTIONS = [dict(question=f'{name} has {k + 3} bags with {k} pencils each, how many pencils?',
                  answer=str(k * (k + 3)), n=k) for k, name in enumerate(NAMES, 2)]


def play(body, number):
  """A server that is judge, annotator and generator, told apart by what they are asked.

  Of 12 questions it refuses to judge one, calls another an essay, solves a third without thinking,
  answers a fourth wrongly every time, and every other time the rest; it is down now and then.
  """
  question = body['messages'][-1]['content']
  if number % 7 == 3:
    return 500, b'busy'
  record = next((r for r in QUESTIONS if r['question'] in question), None)
  if 'Reply with one JSON object' in question and 'verifiable' in question:
    if record['n'] == 2:
      return 200, dict(content='I would rather not say.')
    return 200, dict(content=json.dumps(dict(verifiable=record['n'] != 3, reason='an essay')))
  if 'You label texts' in question:
    return 200, dict(content='{"education": 3, "domain": "mathematics", "safety": "safe"}')
  n, answer = record['n'], record['answer']
  if body.get('chat_template_kwargs'):
    return 200, dict(content=f'\\boxed{{{answer if n == 4 else 1}}}')
  right = n != 5 and (n % 2 or body['seed'] % 2)
  worked = (f'Each bag has {n} pencils and there are {n + 3} bags, so I multiply the numbers '
            f'{n} * {n + 3} = {answer}, which means that the total is {answer}.')
  return 200, dict(content=f'There are \\boxed{{{answer if right else 1}}} pencils.',
                   reasoning_content=worked)


def test_cold_start_from_questions_to_chats(tmp_path, capsys):
  tests = write(tmp_path / 'tests.jsonl', [dict(problem=QUESTIONS[-1]['question'])])
  rows = [*QUESTIONS, QUESTIONS[6], dict(question='Write a poem about the sea.', answer='-')]
  flags = ['--input=' + write(tmp_path / 'in.jsonl', rows), f'--tests={tests}',
           '--config.endpoint.wait=0.001', '--config.candidates.n=3', '--config.balance.cap=100']
  with serve(play) as (url, seen):
    models = [f'--{role}={url}#m' for role in ('judge', 'annotator', 'generator')]
    assert run(tmp_path / 'w', 'cold_start', *flags, *models) == 75  # q 2 was never judged
    report = json.loads((tmp_path / 'w/report.json').read_text())
    asked = len(seen)
    assert run(tmp_path / 'w', 'cold_start', *flags, *models) == 75  # that alone is asked again
    assert len(seen) - asked <= 5
  lines = {line['name']: line for line in report['stages']}
  assert lines['verifiable']['rules'] == {'asks for free text': 1}
  assert lines['deduplicate']['rules'] == {'exact duplicate': 1}
  assert lines['decontaminate']['rules'] == dict(contaminated=1)
  assert (lines['judge']['failed'], lines['judge']['rules']) == (1, {'not verifiable': 1})
  assert lines['solvable']['rules'] == {'solved without thinking': 1}
  assert lines['candidates']['rules']['no right answer'] >= 1
  done = lines['responses']
  assert done['decided'] == 3 * done['read'] and set(done['rules']) == {'wrong answer'}
  failed, = read(tmp_path / 'w/5_judge/failed.jsonl')
  assert failed['failure'].startswith('no verdict in 3 answers') and failed['n'] == 2
  chats = conversations.read(str(tmp_path / 'w' / report['output']))
  assert len(chats) == done['accepted'] > 10
  chat = chats[0]
  assert chat['labels']['domain'] == 'mathematics' and chat['id'].startswith(chat['query'])
  assert chat['messages'][0]['content'].endswith('within \\boxed{}.')
  assert 'I multiply' in chat['messages'][1]['reasoning_content']
  out = capsys.readouterr().out
  assert 'solved without thinking' in out and '1 records failed' in out


def test_worked_solutions_need_no_model(tmp_path):
  rows = [dict(problem=f'Let x = {k}. What is x + {k} * {k}?', solution='We compute the square '
               f'{k} * {k} = {k * k} first, so the sum is {k} + {k * k} = {k + k * k}, hence '
               f'$\\boxed{{{k + k * k + (k == 7)}}}$.', answer=str(k + k * k)) for k in range(5, 9)]
  assert run(tmp_path / 'w', 'cold_start', '--config.read.solutions=True',
             '--skip=judge,solvable,annotate,balance,decontaminate,deduplicate',
             '--input=' + write(tmp_path / 'in.jsonl', rows)) == 0
  wrong, = read(tmp_path / 'w/3_candidates/rejected.jsonl')
  assert wrong['answer'] == '56' and wrong['rule'] == 'no right answer'
  assert len(read(tmp_path / 'w/4_responses/accepted.jsonl')) == 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A random model of 30,000 weights, as a folder."""
  from qwen3_jax.model import hf, transformer
  from qwen3_jax.spec import Spec
  from qwen3_jax.text import tokenizer
  folder = tmp_path_factory.mktemp('model')
  texts = [tasks.as_text(tasks.task(kind, k)) for kind in tasks.KINDS for k in range(20)]
  own = tokenizer.train(texts, 400, folder / 'tokenizer')
  spec = Spec(2, 32, 4, 2, 64, vocab=512, head_width=16, tied=True, max_position=256)
  hf.save(transformer.init(spec), folder / 'hf', tokenizer=own)
  return folder / 'hf'


def test_rl_band_with_a_model_in_memory(folder, tmp_path, quick_compilation):
  """A random model knows nothing: all is too hard."""
  flags = ['--input=tasks:size=2,kinds=add+sort,difficulty=1-2', f'--generator={folder}',
           '--skip=decontaminate', '--config.pass_rate.n=2',
           '--config.pass_rate.prompt={question}', '--config.pass_rate.sampling.max_tokens=6',
           '--config.engine.rows=4']
  assert run(tmp_path / 'w', 'rl', *flags) == 0
  rejected = read(tmp_path / 'w/5_band/rejected.jsonl')
  assert len(rejected) == 2 and {r['rule'] for r in rejected} == {'too hard'}
  assert rejected[0]['reason'] == '0 right of 2: pass rate 0, want above 0.0'
  assert rejected[0]['interval'] == [0.0, 0.6576] and rejected[0]['kind'] in ('add', 'sort')


def test_chats_and_texts(tmp_path):
  draw = random.Random(0)
  words = 'cats boats trees rivers houses songs stones letters gardens clouds'.split()
  texts = [' '.join(draw.choices(words, k=30)) + '.' for _ in range(9)]
  chats = [dict(instruction=f'Go on: {t[:20]}', output=t) for t in texts]
  chats += [dict(messages=[dict(role='user', content='hm')]),
            dict(instruction='Stop.', output='I cannot stop saying this now. ' * 40)]
  assert run(tmp_path / 'chat', 'chat', '--skip=decontaminate',
             '--input=' + write(tmp_path / 'chats.jsonl', chats)) == 0
  report = json.loads((tmp_path / 'chat/report.json').read_text())
  assert [line['rules'] for line in report['stages']] == [
    {'no assistant turn': 1}, dict(repetition=1), {}]
  rows = [dict(text=t) for t in [*texts, texts[2].upper()]]
  (tmp_path / 'more.jsonl').write_bytes(b'{"text": "\xff"}\nnot json\n')
  assert run(tmp_path / 'text', 'text', '--skip=decontaminate', '--input='
             + write(tmp_path / 'texts.jsonl', rows) + f',{tmp_path}/more.jsonl') == 0
  report = json.loads((tmp_path / 'text/report.json').read_text())
  assert [line['rules'] for line in report['stages']] == [
    {'unreadable line': 2}, {}, {'exact duplicate': 1}]


def test_synthetic_text_from_topics(tmp_path):
  def answer(body, number):
    question = body['messages'][0]['content']
    if 'You label texts' in question:
      safety = 'unsafe' if 'dynamite' in question else 'safe'
      return 200, dict(content=json.dumps(dict(education=3, domain='science', safety=safety)))
    topic = question.split('The subject is: ')[1].split('\n')[0]
    return 200, dict(content=f'Here is a section on {topic}, which explains {topic} well.')
  topics = write(tmp_path / 'topics.jsonl', [dict(topic=t) for t in ('tides', 'dynamite', 'moss')])
  with serve(answer) as (url, _):
    assert run(tmp_path / 'w', 'synthetic', f'--input={topics}', f'--generator={url}',
               f'--annotator={url}', '--skip=decontaminate',
               "--config.synthesise.kinds=('textbook',)") == 0
  report = json.loads((tmp_path / 'w/report.json').read_text())
  made = read(tmp_path / 'w' / report['output'])
  assert [r['seed'] for r in made] == ['topics:1', 'topics:3'] and made[0]['form'] == 'textbook'
  assert made[0]['labels']['education'] == 3


REST = '--skip=judge,solvable,annotate,candidates,responses,decontaminate'


@pytest.mark.parametrize('flags, message', [
  (['--skip=judge,decontaminate'], 'stage solvable needs a model: give --judge=DIR or URL, or '
   'leave the stage out with --skip=solvable'),
  (['--skip=judge,solvable,annotate,candidates'], 'stage decontaminate needs test files: give '),
  (['--skip=juge'], "no stage 'juge'; there are: read, verifiable, judge"),
  ([REST + ',read'], 'the first stage is read'),
  ([REST, '--annotator=nowhere'], 'no model in nowhere'),
  ([REST, '--input=absent.jsonl'], 'absent.jsonl: no such file'),
  ([REST.replace(',decontaminate', ''), '--tests=absent.jsonl'], 'absent.jsonl: no such file'),
  ([REST, '--config.read.kind=quary'], "no kind 'quary' of records; there are: query, chat"),
  ([REST, '--config.deduplicate.threshold=2.0'], 'threshold must lie in')])
def test_what_is_missing_is_said_before_any_work(tmp_path, capsys, flags, message):
  rows = write(tmp_path / 'in.jsonl', QUESTIONS)
  assert run(tmp_path / 'w', 'cold_start', f'--input={rows}', *flags) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and message in err and err.count('\n') == 1
  assert not (tmp_path / 'w/1_read').exists()


@pytest.mark.parametrize('flags, code, message', [
  (['--config.responses.keeep=1'], 78, 'did you mean config.responses.keep?'),
  (['--config=configs/filter.py:warm_start'], 78, "config argument 'warm_start': want cold_start")])
def test_mistyped_configs_are_refused(tmp_path, capsys, flags, code, message):
  assert main(['filter', '--config=configs/filter.py', f'--workdir={tmp_path}', '--input=x',
               *flags]) == code
  assert message in capsys.readouterr().err


@pytest.mark.parametrize('name', [
  'cold_start', 'rl', 'text', 'chat', 'synthetic', 'rejection', 'plain', 'cold_start,tiny'])
def test_each_pipeline_can_be_made(name, tmp_path):
  """Every section is one of a stage, and every option of a rule is taken by it."""
  tests = write(tmp_path / 'tests.jsonl', QUESTIONS)
  config = configs.load_config(f'configs/filter.py:{name}', [f'--config.decontaminate.tests='
                                                             f"('{tests}',)"])
  specs = dict.fromkeys(('generator', 'judge', 'annotator'), 'http://h/v1#m')
  made = pipelines.make_stages(config, specs, lambda spec: None)
  assert [stage.name for stage in made] == [s for s in config.stages if s not in config.skip]
  (tmp_path / 'accepted.jsonl').touch()
  (tmp_path / 'survey.json').write_text('{}')
  for stage in made:
    assert callable(stage.begin(tmp_path))
  general = {'stages', 'skip', 'workers', 'patience', 'engine', 'endpoint'}
  sections = {section for _, sections in pipelines.MAKERS.values() for section in sections}
  assert set(config) == general | sections


def test_a_served_model_may_move_but_not_change(tmp_path):
  config = configs.load_config('configs/filter.py:rl', ['--config.skip=("decontaminate",)'])
  def options(spec):
    made = pipelines.make_stages(config, dict(generator=spec), lambda spec: None)
    return next(stage.options for stage in made if stage.name == 'pass_rate')
  assert options('http://a/v1#m') == options('http://b/v1#m') != options('http://a/v1#n')
  assert options('http://a/v1') != options('http://b/v1')


def test_reasons_do_not_depend_on_the_process(tmp_path):
  """Python hashes words differently in each process; a run that is continued must not."""
  line = 'the {} cat of the old miller sat on the wide red wall beside the {} barn and slept; '
  names = ('grey', 'big'), ('black', 'low'), ('lame', 'new')
  text = ''.join(line.format(*pair) * 3 for pair in names)
  source = write(tmp_path / 'in.jsonl', [dict(text=text)])
  for seed in '12':
    command = [sys.executable, '-m', 'qwen3_jax', 'filter', '--config=configs/filter.py:text',
               f'--input={source}', f'--workdir={tmp_path}/{seed}', '--skip=decontaminate']
    subprocess.run(command, check=True, capture_output=True, cwd=configs.ROOT,
                   env=os.environ | dict(PYTHONHASHSEED=seed))
  one, two = ((tmp_path / seed / '2_rules/rejected.jsonl').read_bytes() for seed in '12')
  assert one == two and b'repeats a 12-word passage' in one
