"""The smallest on-policy distillation end to end: what it learns, resumes and refuses."""
import json
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train
from qwen3_jax.data import conversations, tasks
from qwen3_jax.stages import distill, load, teacher
from qwen3_jax.stages.samples import Sample
from qwen3_jax.text import tokenizer
from qwen3_jax.training import metrics
from tests.endpoint import serve

pytestmark = pytest.mark.usefixtures('quick_compilation')
STEPS = 8
CLOCK = 'seconds', 'rollout_seconds', 'rollout_tokens_per_s', 'tokens_per_s', 'mfu'
LARGER = dict(model__width=48, model__heads=3, model__vocab=328, seed=1)


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  """Questions of two sources, half of them without thinking; of verifiers, only held-out ones."""
  folder = tmp_path_factory.mktemp('prompts')
  for name, numbers in (('prompts', range(60)), ('heldout', range(60, 68))):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(dict(
      messages=[dict(role='user', content=f'cat {i} sat on {i % 7} hills' + ' and ran' * (i % 5))],
      source='hills' if i % 3 else 'cats', id=str(i), enable_thinking=i % 2 == 0,
      verifiers=dict(length=1.0), limit=dict(unit='characters', max=20, slope=60))) + '\n'
      for i in numbers))
  return folder


@pytest.fixture(scope='module')
def models(smallest, tmp_path_factory):
  """Folders of a student and of a wider teacher with more rows of the embedding, hardly trained."""
  folders = {}
  for name, own in (('student', {}), ('teacher', LARGER)):
    folders[name] = tmp_path_factory.mktemp(name)
    config = configs.load_config('configs/s1.py:tiny', smallest(
      steps=3, data__heldout=(), evaluate_every=None, **own))
    assert train.train(config, epath.Path(folders[name])) == 0
  return folders


@pytest.fixture(scope='module')
def settings(smallest, prompts, models):
  """Function from changed fields to the overrides of a run."""
  def one(**changes):
    own = dict(
      init=str(models['student']), teacher=str(models['teacher']),
      data__sources=((str(prompts / 'prompts.jsonl'), 1.0),),
      data__heldout=(str(prompts / 'heldout.jsonl'),), data__length=96, data__batch=8,
      rollout__prompts=16, rollout__updates=2, rollout__max_tokens=32, engine__rows=16,
      measure_reward__prompts=4, steps=STEPS, save_every=4, evaluate_every=8,
      optim__peak_lr=0.01, optim__warmup=1, parity__every=2, model__rope_theta=1e4)
    return [each for each in smallest(**(own | changes)) if 'heldout_batches' not in each]
  return one


def run(workdir, overrides):
  config = configs.load_config('configs/distill_on.py:tiny', overrides)
  return train.train(config, epath.Path(workdir))


def weights(workdir):
  return jax.tree.leaves(jax.tree.map(np.asarray, load.load(workdir, dtype=None)))


def logged(workdir):
  """The metrics without what the clock says."""
  return [{key: value for key, value in line.items() if key not in CLOCK}
          for line in metrics.read(workdir)]


@pytest.fixture(scope='module')
def straight(settings, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('straight')
  assert run(workdir, settings()) == 0
  return workdir


def test_the_student_comes_nearer_to_its_teacher(straight):
  lines = metrics.read(straight)
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert 0 < lines[-1]['kl'] < 0.8 * lines[0]['kl']
  assert [line['step'] for line in lines if 'answer_tokens' in line] == [1, 3, 5, 7]
  assert not any('reward' in line for line in lines)  # of training prompts nobody asks for one
  assert lines[0]['heldout_reward'] > 0 and lines[-1]['heldout_reward'] > 0
  assert lines[0]['parity_mean'] <= 1e-6 and 'parity_mean' in lines[4]
  first = json.loads((straight / 'rollouts' / '00000000.jsonl').read_text().splitlines()[0])
  assert first['answers'][0]['text'] and first['answers'][0]['reward'] is None


def test_flops_are_those_of_student_rollout_and_teacher(straight, models):
  """An update costs three forward passes of the student and one of the teacher on its tokens."""
  lines = metrics.read(straight)
  student, other = (load.load(models[name]).spec for name in ('student', 'teacher'))
  per_token = student.flops_per_token(50) + other.flops_per_token(50) / 3
  assert lines[1]['flops'] > lines[1]['tokens'] * per_token  # prompts are read too
  assert lines[1]['flops'] < 3 * lines[1]['tokens'] * per_token
  assert lines[0]['flops'] > lines[1]['flops']  # its rollout, and the gate


def test_resume_ends_in_the_same_bits(straight, settings, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(straight, copy)
  shutil.rmtree(copy / 'checkpoints' / '8')
  assert run(copy, settings()) == 0
  assert logged(copy) == logged(straight)
  for a, b in zip(weights(straight), weights(copy), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_offloaded_teacher_and_a_stop_between_two_updates_change_nothing(
    straight, settings, tmp_path, monkeypatch):
  """Preempted after update 3: the rollout's other batch waits, and the teacher reads it again."""
  from qwen3_jax.training.preemption import Preemption
  monkeypatch.setattr(Preemption, 'should_stop', lambda self, step: step == 3)
  apart = settings(teacher_offload=True)
  assert run(tmp_path, apart) == 42
  monkeypatch.undo()
  assert list((tmp_path / 'rollouts').glob('ready-*.npz'))
  assert run(tmp_path, apart) == 0
  assert logged(tmp_path) == logged(straight)
  for a, b in zip(weights(straight), weights(tmp_path), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_teacher_like_the_student_has_nothing_to_say(settings, models, tmp_path):
  """On a mesh of its own, and with adapters, which begin as nothing."""
  alike = settings(teacher=str(models['student']), teacher_mesh=dict(fsdp=2, tensor=2), steps=2,
                   lora__rank=2, save_every=None, evaluate_every=None, data__heldout=None)
  assert run(tmp_path, alike) == 0
  line = metrics.read(tmp_path)[0]
  assert line['kl'] == pytest.approx(0, abs=1e-6) and line['grad_norm'] < 1e-5


@pytest.mark.slow
def test_prompts_go_to_the_teacher_of_their_source(settings, models, tmp_path):
  """The student itself as teacher of one source: those updates have no divergence, at first."""
  two = dict(teacher=None, teachers=(('hills', str(models['teacher'])),
                                     ('cats', str(models['student']))))
  few = dict(steps=4, save_every=None, evaluate_every=None, data__heldout=None, optim__peak_lr=1e-9,
             rollout__updates=4, parity__every=None)
  assert run(tmp_path / 'two', settings(**two, **few)) == 0
  values = sorted(line['kl'] for line in metrics.read(tmp_path / 'two'))
  assert values[0] < 1e-5 and values[-1] > 0.01
  with pytest.raises(ValueError, match="no teacher for prompts of the source 'cats'"):
    run(tmp_path / 'one', settings(**two | dict(teachers=two['teachers'][:1]), **few))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['sampled', 'teacher_top', 'student_top'])
def test_other_kinds_ask_the_teacher_for_what_they_need(kind, settings, tmp_path):
  few = settings(distillation__kind=kind, teacher_top=20, steps=4, save_every=None,
                 evaluate_every=None, data__heldout=None, parity__every=None)
  assert run(tmp_path, few) == 0
  lines = metrics.read(tmp_path)
  assert all(line['grad_norm'] > 0 for line in lines)
  if kind == 'sampled':  # an estimate from a few hundred tokens, of a divergence of 0.02 nats
    assert lines[0]['ratio'] == 1.0 and abs(lines[0]['kl']) < 0.1
  else:
    assert 0 < lines[-1]['kl'] < lines[0]['kl']


def test_updates_are_shared_out_by_prompts():
  assert distill.share_out({0: 30, 1: 10}, 4) == {0: 3, 1: 1}
  assert distill.share_out({0: 98, 2: 1, 5: 1}, 3) == {0: 1, 2: 1, 5: 1}
  assert distill.share_out({0: 1, 1: 2}, 8) == {0: 1, 1: 2}  # none is empty
  lessons = distill.Lessons.__new__(distill.Lessons)  # without models
  lessons.settled, lessons.config = 0, types.SimpleNamespace(
    seed=0, rollout=types.SimpleNamespace(updates=4))
  drawn = [Sample(np.zeros(3), np.ones(3), np.zeros(3), group=g, teacher=g % 2)
           for g in range(10) for _ in range(2)]
  dealt = lessons.deal(drawn)
  assert sorted(sample.group for part in dealt for sample in part) == sorted(
    sample.group for sample in drawn)
  assert len(dealt) == 4 and all(len({s.teacher for s in part}) == 1 for part in dealt)


def test_another_tokenizer_is_refused_before_any_work(settings, smallest, models, tmp_path):
  words = ['some other words that ran under white clouds ' * 3, 'and 99 birds'] * 40
  own = tokenizer.train(words, 310, tmp_path / 'own')
  other = tmp_path / 'teacher'
  shutil.copytree(models['teacher'], other)
  shutil.rmtree(other / 'tokenizer')
  own.save(other / 'tokenizer')
  with pytest.raises(ValueError, match=r"differ: id 2\d\d is b'.*' and b'.*'\. On-policy"):
    run(tmp_path / 'run', settings(teacher=str(other)))
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_tokenizers_are_compared_by_their_ids_and_merges(golden, tmp_path):
  published = tokenizer.Tokenizer(golden / 'tokenizer')
  assert teacher.compare(published, tokenizer.Tokenizer(golden / 'tokenizer')) is None
  content = json.loads(published.file.read_text())
  merges = content['model']['merges']
  merges[7], merges[8] = merges[8], merges[7]
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  assert teacher.compare(published, tokenizer.Tokenizer(tmp_path)).startswith('merge 7 is (')
  content['added_tokens'] = content['added_tokens'][:-1]
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  lost = teacher.compare(published, tokenizer.Tokenizer(tmp_path))
  last = published.size - 1
  assert lost == f'id {last} is {published.piece(last)!r} and no token'


@pytest.mark.parametrize('changes, reason', [
  (dict(teacher=None), 'needs a teacher'), (dict(init=None), 'give one with --init'),
  (dict(rollout__prompts=1), 'needs a prompt'), (dict(placement__ahead=True), 'chips of its own'),
  (dict(rollout__updates=1, teachers=(('a', 'x'),)), 'an update has one teacher'),
  (dict(distillation__kind='forward'), 'forward'), (dict(modes__flags=2.0), 'want a share'),
  (dict(teacher='/nowhere'), 'no model in /nowhere'),
  (dict(teacher_dtype='float16'), 'want float32')])
def test_settings_that_do_not_fit_are_refused(settings, tmp_path, changes, reason):
  with pytest.raises((ValueError, FileNotFoundError), match=reason):
    run(tmp_path, settings(**changes))


def test_a_teacher_writes_right_answers_in_both_modes(tmp_path, monkeypatch):
  """Off-policy: asked with thinking and without; what is wrong in its mode is left out."""
  from qwen3_jax.__main__ import main
  spec = 'tasks:kinds=chain,difficulty=1,size=80'
  monkeypatch.setenv('QWEN3_JAX_CACHE', str(tmp_path / 'cache'))
  solved = {t.question: t for t in (tasks.open_tasks(spec[6:]).task(i) for i in range(80))}

  def play(body, number):
    problem = next(t for question, t in solved.items()
                   if question == body['messages'][-1]['content'])
    if 'chat_template_kwargs' not in body:  # who thinks by default is not told so
      return 200, dict(content=f'The answer is {problem.answer}.',
                       reasoning_content='\n'.join(problem.steps))
    good = len(problem.question) % 3
    return 200, dict(content=f'The answer is {problem.answer if good else "unknown"}.')
  with serve(play) as (url, _):
    assert main(['fuse', '--config=configs/fuse.py:distill,tiny', f'--model={url}',
                 f'--queries={spec}', f'--plain={spec}', f'--workdir={tmp_path}/out']) == 0
  kept = list(conversations.read(str(tmp_path / 'out/plain/3_responses/accepted.jsonl')))
  asked = {record['messages'][0]['content'] for record in kept}
  assert asked == {question for question in solved if len(question) % 3}
  fused = list(conversations.read(str(tmp_path / 'out/fused.jsonl')))
  words = ' '.join(m['content'] for record in fused for m in record['messages'])
  assert '/think' in words and '/no_think' in words
  thoughts = [bool(m.get('reasoning_content')) for record in fused for m in record['messages']
              if m['role'] == 'assistant']
  assert 0.2 < np.mean(thoughts) < 0.8
