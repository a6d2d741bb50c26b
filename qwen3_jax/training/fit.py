"""The one training loop: draw, step, report, evaluate, save."""
import functools
import math

import jax

from qwen3_jax.training import losses
from qwen3_jax.training.preemption import Preemption
from qwen3_jax.training.watchdog import Watchdog

PATIENCE = 5  # updates in a row that may be skipped as not finite


class Preempted(Exception):
  """The machine is going away; the state was saved. Start again to continue."""


class Stuck(Exception):
  """There is nothing to go on with: what `draw` found cannot be learnt from."""


def fit(state, step, draw, *, steps, checkpoints, metrics, cursor=dict, config=None, save_every=500,
        evaluate=None, evaluate_every=500, stop_loss=None):
  """Trains from `state.step` up to `steps` and returns the last state, saved.

  `step(state, batch) -> (state, values)` is jitted and donates its state; `draw(params, n)` gives
  the batch of step n (from 0), `cursor()` the data's position behind what was drawn, saved beside
  the state. `evaluate(params)` gives a dict of values, every `evaluate_every` steps and at the end;
  without `save_every` or `evaluate_every` only at the end. With `stop_loss` the end is where its
  `heldout_loss` is no larger.
  Raises Preempted after SIGTERM, FloatingPointError when updates were not finite PATIENCE times in
  a row: what is saved is then from before, or unharmed (such updates are skipped whole). A step
  that hangs ends the process (`watchdog`).
  """
  def learnt(values):
    return stop_loss is not None and float(values.get('heldout_loss', math.inf)) <= stop_loss

  if stop_loss is not None and _due(int(state.step), evaluate_every) and int(state.step):
    if learnt(evaluate(state.params)):  # it ended here
      return state
  with Preemption() as preemption, Watchdog() as watch:
    for number in range(int(state.step) + 1, steps + 1):
      state, values = step(state, draw(state.params, number - 1))
      _stop_if_diverged(metrics.write(number, values))
      last = number == steps
      if evaluate and (_due(number, evaluate_every) or last):
        with metrics.paused(), watch.paused():
          values = evaluate(state.params)
          metrics.write(number, values)
        if not last and learnt(values):
          print(f'ends at step {number}: the held-out loss is {values["heldout_loss"]:.4f}, '
                f'{stop_loss} is enough (config.stop_loss)', flush=True)
          last = True
      leave = preemption.should_stop(number)
      if _due(number, save_every) or last or leave:
        _stop_if_diverged(metrics.flush())
        with watch.paused():
          checkpoints.save(number, state, cursor(), config or {})
      if leave and not last:
        checkpoints.wait()
        raise Preempted(f'stopped by SIGTERM after step {number} of {steps}, which is saved; '
                        'run the same command to continue')
      if last:
        break
      watch.beat()
  checkpoints.wait()
  return state


def _due(number, every):
  return bool(every) and number % every == 0


def _stop_if_diverged(line):
  if line and line.get('streak', 0) >= PATIENCE:
    first = line['step'] - line['streak'] + 1
    raise FloatingPointError(
        f'loss or gradient was not finite in steps {first} to {line["step"]}; all these updates '
        'were skipped. Lower config.optim.peak_lr, or look at the data of these steps')


def evaluator(loss, batches, report=losses.report, frozen=()):
  """`evaluate(params) -> values` over the fixed batches (global arrays) of each name.

  `report` is that of the step (see `step.make_step`). Its `loss` bears the name of the batches,
  its other values `<name less _loss>_<value>`. `loss(params, batch, *frozen)`: as for the step.
  """
  @jax.jit
  def one(params, batch, *frozen):
    return loss(params, batch, *frozen)[1]

  def values(params, name, batches):
    sums = functools.reduce(losses.merge, [one(params, batch, *frozen) for batch in batches])
    return {name if key == 'loss' else f'{name.removesuffix("_loss")}_{key}': value
            for key, value in report(sums).items()}

  def evaluate(params):
    return {key: value for name, each in batches.items() if each
            for key, value in values(params, name, each).items()}
  return evaluate
