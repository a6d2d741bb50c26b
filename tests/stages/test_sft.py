"""The smallest supervised stage end to end: what it learns, how it resumes, what it refuses."""
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from qwen3_jax.__main__ import main
from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train
from qwen3_jax.data import conversations, mixture, packing, tasks
from qwen3_jax.stages import load, pretrain, sft
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.training import metrics

pytestmark = pytest.mark.usefixtures('quick_compilation')
STEPS = 12


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
  """A file of 300 short conversations of one and two turns, with and without thinking."""
  path, rows = tmp_path_factory.mktemp('chats') / 'chats.jsonl', []
  for i in range(300):
    problem = tasks.task('chain', i, 1)
    asked = dict(role='user', content=problem.question)
    answer = dict(role='assistant', content=f'{problem.answer}.')
    if i % 3:
      answer['reasoning_content'] = '\n'.join(problem.steps)
    again = [dict(role='user', content='Say it again.'), dict(role='assistant', content='No.')]
    rows.append(dict(messages=[asked, answer] + again * (i % 5 == 0)))
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@pytest.fixture(scope='module')
def settings(smallest, chats):
  """Function from changed fields to the overrides of a run on the chats."""
  def one(**changes):
    return smallest(**dict(prepare=None, data__sources=((str(chats), 1.0),), steps=STEPS,
                           save_every=4, evaluate_every=4, optim__peak_lr=0.02, data__length=160,
                           data__heldout=(str(chats),), measure=None) | changes)
  return one


def run(workdir, overrides):
  config = configs.load_config('configs/cold_start.py:tiny', overrides)
  return train.train(config, epath.Path(workdir))


def weights(workdir):
  return jax.tree.leaves(jax.tree.map(np.asarray, load.load(workdir, dtype=None)))


@pytest.fixture(scope='module')
def straight(settings, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('straight')
  assert run(workdir, settings()) == 0
  return workdir


def test_it_learns_and_says_what_it_left_out(straight):
  lines = metrics.read(straight)
  heldout = [line['heldout_loss'] for line in lines if 'heldout_loss' in line]
  assert heldout[-1] < heldout[0] - 0.2
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))


def test_resume_ends_in_the_same_bits(straight, settings, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(straight, copy)
  for step in (8, 12):
    shutil.rmtree(copy / 'checkpoints' / str(step))
  assert run(copy, settings()) == 0
  for a, b in zip(weights(straight), weights(copy), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_loss_is_that_of_the_trained_tokens_alone(straight, settings, chats):
  """Against log-softmax at each trained token, one conversation at a time."""
  config = configs.load_config('configs/cold_start.py:tiny', settings())
  model, tokenizer = load.load_model(straight, dtype='float32')
  examples = conversations.Examples(conversations.read(str(chats)), tokenizer, 160)
  total = weight = 0.0
  forward = jax.jit(lambda model, ids: model.logits(model(ids).hidden_BTD))
  for i in range(40):
    tokens = examples[i]
    ids = np.zeros(160, np.int32)
    ids[:len(tokens)] = tokens['id']  # what follows does not change what is before it
    logp = jax.nn.log_softmax(forward(model, ids[None])[0])
    for place in np.flatnonzero(tokens['weight'][1:]):
      total -= float(logp[place, ids[place + 1]])
    weight += tokens['weight'][1:].sum()
  first = _First(examples, 40)
  loss = jax.jit(pretrain.make_loss(config))
  nll = count = 0.0
  for batch in packing.fixed_batches(first, tokenizer.encode, 4, 160, 40, tokenizer.eod_id,
                                     keep_whole=8, whole=True):
    sums = loss(model, batch)[1]
    nll, count = nll + float(sums['nll']), count + float(sums['weight'])
  assert count == weight > 100
  assert nll == pytest.approx(total, rel=1e-5)


class _First:
  """The first `count` examples."""

  def __init__(self, examples, count):
    self.examples, self.count, self.name = examples, count, examples.name

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return self.examples[i]


def test_epochs_become_steps(settings, chats, tmp_path):
  """Two rounds through the data fill the rows of the steps."""
  assert run(tmp_path, settings(steps=None, epochs=2, data__heldout=())) == 0
  lines = metrics.read(tmp_path)
  tokenizer = load.load_model(tmp_path)[1]
  examples = conversations.Examples(conversations.read(str(chats), 'train'), tokenizer, 160)
  read = len(lines) * 4 * 160
  assert 2 * examples.sizes.sum() <= read < 2.2 * examples.sizes.sum() + 4 * 160


def test_a_length_mix_takes_its_shares_of_tokens(settings, chats):
  config = configs.load_config('configs/cold_start.py:tiny', settings(
    data__length_mix=((0.75, (0.5, 1.0)), (0.25, (0.0, 0.5)))))
  tokenizer = Tokenizer(config.data.tokenizer)
  opened = sft.open_examples(config, tokenizer, 'train')
  assert [share for _, share in opened] == [0.75, 0.25]
  assert opened[0][0].sizes.min() >= 80 >= opened[1][0].sizes.max()
  documents = mixture.mixture(opened, 0)
  tokens = [0, 0]
  for i in range(mixture.BLOCK):
    tokens[documents.locate(i)[0]] += len(documents[i][1])
  assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize('line, reason', [
  ('{"messages": [{"role": "robot", "content": "x"}]}', 'role'),
  ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>a"}]}',
   'think'),
  ('{"messages": [', 'not JSON')])
def test_a_bad_line_is_named_or_counted(line, reason, settings, chats, tmp_path, capsys):
  bad = tmp_path / 'bad.jsonl'
  bad.write_text(chats.read_text() + line + '\n')
  sources = ((str(bad), 1.0),)
  with pytest.raises(ValueError, match=f'line 301: .*{reason}'):
    run(tmp_path / 'run', settings(data__sources=sources))
  assert run(tmp_path / 'run', settings(data__sources=sources, data__skip_bad=True, steps=1,
                                        optim__warmup=0, data__heldout=())) == 0
  assert '1 refused' in capsys.readouterr().out


def test_without_data_the_command_says_what_to_give(tmp_path, capsys, straight):
  code = main(['train', '--config=configs/cold_start.py:8b', f'--workdir={tmp_path}',
               f'--tokenizer={straight}/tokenizer'])
  assert code == 2 and 'config.data.sources is None' in capsys.readouterr().err


def test_evaluate_measures_a_run_and_refuses_nonsense(straight, tmp_path, capsys):
  arguments = ['evaluate', f'--model={straight}', '--count=3', '--flags=2', '--max-tokens=4']
  assert main([*arguments, '--budgets=0,2', f'--to={tmp_path}/modes.json']) == 0
  found = json.loads((tmp_path / 'modes.json').read_text())
  assert found['thinking']['count'] == 3 and len(found['budgets']) == 2
  assert 'last flag obeyed: ' in capsys.readouterr().out
  for flag, message in (('--budgets=1,x', 'want whole numbers with commas'),
                        ('--count=0', '--limit must be at least 1'),
                        ('--tasks=gsm8k', 'which folder holds its data?'),
                        ('--tasks=tasks:kinds=nonsense', 'no kind of task'),
                        (f'--model={tmp_path}/none', 'no model in')):
    assert main([*arguments, flag]) == 2
    assert message in capsys.readouterr().err


def test_fusion_asks_the_model_that_it_starts_from(straight, smallest, tmp_path, capsys):
  """The whole stage with a model that knows nothing: it is sampled, judged, and never right."""
  tasks = 'tasks:kinds=chain,difficulty=1,size=6'
  assert main(['train', '--config=configs/fusion.py:tiny', f'--workdir={tmp_path}/fusion',
               *smallest(steps=2, init=str(straight), data__sources=None, data__heldout=None,
                         prepare__inputs__queries=(tasks,), prepare__inputs__plain=(tasks,),
                         prepare__set=('thinking.candidates.sampling.max_tokens=8',))]) == 2
  assert 'no thinking record is left' in capsys.readouterr().err
  assert main(['train', '--config=configs/fusion.py:tiny', f'--workdir={tmp_path}/none',
               f'--tokenizer={straight}/tokenizer']) == 2
  assert 'give one with --init=DIR' in capsys.readouterr().err
  rejected = tmp_path / 'fusion/data/thinking/2_candidates/rejected.jsonl'
  assert 'no right answer in 1' in rejected.read_text()
