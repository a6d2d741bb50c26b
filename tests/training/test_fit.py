"""The loop: what it draws, reports and saves; how it stops, and goes on."""

import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from flax import struct

from qwen3_jax.training import fit, losses, metrics, optim
from qwen3_jax.training import step as training
from qwen3_jax.training.checkpoint import Checkpoints

OPTIMIZER = optim.adamw(clip=10.0)


@struct.dataclass
class Line:
  """The smallest model the step takes: y = slope x."""

  @struct.dataclass
  class Weight:
    value: jax.Array
  slope: Weight
  spec: object = struct.field(pytree_node=False)


def loss(params, batch):
  error_BT = (params.slope.value - 3.0) * batch['weight_BT']
  return jnp.sum(error_BT ** 2), dict(nll=jnp.sum(error_BT ** 2), weight=batch['weight_BT'].sum())


@pytest.fixture(scope='module')
def step():
  return jax.jit(training.make_step(loss, OPTIMIZER, lambda step: 0.1))


class Run:
  """`fit` of the toy in a folder, from its newest checkpoint: batch n has weights n + 1."""

  def __init__(self, folder, step, spec):
    self.folder, self.step, self.spec = folder, step, spec
    self.drawn, self.evaluated = [], []

  def draw(self, params, number):
    self.drawn.append(number)
    weight = np.full((2, 3), number + 1.0, np.float32)
    return dict(weight_BT=weight, segment_BT=np.ones((2, 3), np.int32))

  def evaluate(self, params):
    self.evaluated.append(self.drawn[-1] + 1)
    return dict(heldout_loss=params.slope.value)

  def __call__(self, steps, **options):
    state = training.state_of(Line(Line.Weight(jnp.zeros(())), self.spec), OPTIMIZER)
    checkpoints = Checkpoints(self.folder / 'checkpoints', keep=9)
    if checkpoints.latest() is not None:
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
      _, state, self.cursor = checkpoints.restore(abstract)
    console = rich.console.Console(file=io.StringIO())
    try:
      with metrics.Metrics(self.folder, steps, 'toy', int(state.step), console=console) as report:
        return fit.fit(state, self.step, self.draw, steps=steps, checkpoints=checkpoints,
                       metrics=report, cursor=lambda: {'drawn': len(self.drawn)},
                       evaluate=self.evaluate, **options)
    finally:
      checkpoints.close()
      self.saved = checkpoints.steps()


@pytest.fixture
def toy(tmp_path, step, specs):
  return Run(tmp_path, step, specs['dense'])


def test_draws_reports_evaluates_and_saves_in_time(toy):
  state = toy(7, save_every=3, evaluate_every=2, config={'name': 'toy'})
  assert toy.drawn == list(range(7))
  assert toy.saved == [3, 6, 7]
  assert toy.evaluated == [2, 4, 6, 7]
  lines = metrics.read(toy.folder)
  assert [line['step'] for line in lines] == list(range(1, 8))
  assert [line['step'] for line in lines if 'heldout_loss' in line] == [2, 4, 6, 7]
  assert lines[-1]['heldout_loss'] == float(state.params.slope.value) > 0.5
  kept = Checkpoints(toy.folder / 'checkpoints')
  assert kept.config() == {'name': 'toy'}
  assert json.loads((toy.folder / 'checkpoints/6/data.json').read_text()) == {'drawn': 6}
  kept.close()


def test_without_intervals_only_the_end_counts(toy):
  toy(4, save_every=None, evaluate_every=None)
  assert (toy.saved, toy.evaluated) == ([4], [4])


def test_finished_run_draws_nothing_more(toy):
  first = toy(3)
  toy.drawn.clear()
  again = toy(3)
  assert toy.drawn == [] and again.params.slope.value == first.params.slope.value
  assert int(toy(5).step) == 5 and toy.drawn == [3, 4]


def test_a_loss_that_is_enough_ends_the_run_and_stays_the_end(toy, capsys):
  def left(params):
    return dict(heldout_loss=3 - params.slope.value)
  toy.evaluate = left
  whole = toy(20, save_every=3, evaluate_every=2)
  losses_at = {line['step']: line['heldout_loss'] for line in metrics.read(toy.folder)
               if 'heldout_loss' in line}
  enough = losses_at[6] + 1e-6
  toy.folder = toy.folder / 'short'
  short = toy(20, save_every=4, evaluate_every=2, stop_loss=enough)
  assert int(short.step) == 6 < int(whole.step) and toy.saved == [4, 6]
  assert f'ends at step 6: the held-out loss is {losses_at[6]:.4f}' in capsys.readouterr().out
  toy.drawn.clear()
  assert int(toy(20, evaluate_every=2, stop_loss=enough).step) == 6 and toy.drawn == []
  assert int(toy(20, evaluate_every=2).step) == 20  # asked for all steps, it goes on


@pytest.mark.parametrize('moment', [3, 6])
def test_sigterm_saves_and_the_next_run_goes_on(toy, tmp_path_factory, moment, step, specs):
  whole = Run(tmp_path_factory.mktemp('whole'), step, specs['dense'])
  want = whole(6, save_every=4)
  plain, draw = signal.getsignal(signal.SIGTERM), toy.draw

  def told_to_leave(params, number):
    if number == moment - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return draw(params, number)
  toy.draw = told_to_leave
  if moment == 6:  # the last step is finished as always
    got = toy(6, save_every=4)
    assert toy.saved == [4, 6]
  else:
    with pytest.raises(fit.Preempted, match='stopped by SIGTERM after step 3 of 6'):
      toy(6, save_every=4)
    assert toy.saved == [3]
    toy.draw = draw
    got = toy(6, save_every=4)
    assert toy.cursor == {'drawn': 3} and toy.drawn == list(range(6))
  assert signal.getsignal(signal.SIGTERM) == plain
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  drop = lambda lines: [{k: v for k, v in line.items() if k in ('step', 'loss', 'grad_norm', 'lr')}
                        for line in lines]
  assert drop(metrics.read(toy.folder)) == drop(metrics.read(whole.folder))


def spoil(toy, first, last):
  draw = toy.draw

  def bad(params, number):
    batch = draw(params, number)
    if first <= number + 1 <= last:
      batch['weight_BT'][:] = np.inf
    return batch
  toy.draw = bad


def test_a_run_of_updates_that_are_not_finite_stops(toy):
  spoil(toy, 4, 99)
  with pytest.raises(FloatingPointError, match='not finite in steps 4 to 8; all these updates'):
    toy(20, save_every=2)
  assert toy.drawn[-1] + 1 <= 9  # the line of step 8 is read when step 9 has been started
  lines = metrics.read(toy.folder)
  assert [line['streak'] for line in lines[:8]] == [0, 0, 0, 1, 2, 3, 4, 5]
  assert lines[4]['loss'] is None and max(toy.saved) == 6
  toy.draw = Run.draw.__get__(toy)  # as after mending the data
  before = float(lines[2]['loss'])
  assert float(toy(10, save_every=2).params.slope.value) > 0 and before > 0
  assert metrics.read(toy.folder)[-1]['skipped'] == 3  # 4, 5 and 6 were saved as skipped


def test_a_few_such_updates_are_counted_and_passed(toy):
  spoil(toy, 3, 6)
  assert int(toy(9).skipped) == 4
  assert [line['streak'] for line in metrics.read(toy.folder)] == [0, 0, 1, 2, 3, 4, 0, 0, 0]


def test_evaluator_weighs_batches_by_their_tokens(models, draw_batch):
  batches = {'heldout_loss': [draw_batch(B=2, seed=1), draw_batch(B=2, seed=2)],
             'heldout_tasks': [draw_batch(B=2, seed=3)]}
  nll = jax.jit(losses.next_token)
  got = fit.evaluator(losses.next_token, batches)(models['dense'])
  for name, each in batches.items():
    sums = [nll(models['dense'], batch)[1] for batch in each]
    want = sum(s['nll'] for s in sums) / sum(batch['weight_BT'][:, 1:].sum() for batch in each)
    np.testing.assert_allclose(got[name], want, rtol=1e-6)
  assert fit.evaluator(losses.next_token, {})(models['dense']) == {}


def test_optax_state_counts_only_updates(toy):
  spoil(toy, 2, 3)
  state = toy(5)
  assert (int(state.step), int(optax.tree.get(state.opt, 'count'))) == (5, 3)
