"""What makes a student better, and at what cost: ways on from one checkpoint, on the same prompts.

As Table 21 of the Qwen3 report: the student as it is (off-policy distillation), with reinforcement
learning, with on-policy distillation. Accuracy in both modes, pass@k, and what each way has cost
since they parted: FLOPs of updates, rollouts and teacher, and time.
"""
import dataclasses
import json

import numpy as np

from qwen3_jax.data import sources, tasks
from qwen3_jax.evaluation import estimates, modes
from qwen3_jax.generation import engine
from qwen3_jax.generation.sampling import NON_THINKING, THINKING
from qwen3_jax.stages import load
from qwen3_jax.text.template import parse
from qwen3_jax.training import metrics

MODES = dict(thinking=True, plain=False)


def mark(folder, tasks, count, samples, max_tokens, plain_penalty=1.5, rows=64, dtype='float32'):
  """Right or not, {'thinking': (problems, samples), 'plain': ...}, of the model in `folder`.

  The problems are `count` distinct held-out ones of `tasks`, drawn by the report's sampling.
  """
  source = sources.open_source(tasks, 'heldout')
  model, tokenizer = load.load_model(folder, dtype=dtype)
  problems = modes.distinct(source, count)
  sampling = dict(thinking=dataclasses.replace(THINKING, max_tokens=max_tokens),
                  plain=dataclasses.replace(NON_THINKING, max_tokens=max_tokens,
                                            presence_penalty=plain_penalty))
  decoder, found = engine.prepare(model, min(rows, count * samples)), {}
  for name, think in MODES.items():
    prompts = [[dict(role='user', content=problem.question)] for problem in problems
               for _ in range(samples)]
    outputs = engine.generate(decoder, tokenizer, prompts, sampling[name], rows=rows,
                              enable_thinking=think)
    marks = [is_right(problems[i // samples], output) for i, output in enumerate(outputs)]
    found[name] = np.reshape(marks, (-1, samples)).tolist()
  return found


def is_right(problem, output):
  """Whether an answer ended and, behind its thinking, ends in the right result."""
  return output.finish_reason == 'stop' and tasks.check(problem, parse(output.text)['content'])


def spend(folder):
  """What the run in `folder` has cost: {'flops', 'seconds', 'tokens'}, tokens being those drawn.

  `seconds` are those of all updates, the first with its compilation and the first measurement.
  """
  lines, config = _read(folder)
  samples = config['rollout']['samples']
  return dict(flops=sum(line['flops'] for line in lines),
              seconds=sum(line['seconds'] for line in lines),
              tokens=round(sum(line['prompts'] * samples * line['answer_tokens'] for line in lines
                               if 'answer_tokens' in line)))


def curve(folder):
  """Held-out reward as the run in `folder` goes on: [[FLOPs, seconds, rate, low, high]].

  It begins at no cost. Seconds are without the first update, in which programs are compiled.
  """
  lines, _ = _read(folder)
  flops = np.cumsum([line['flops'] for line in lines])
  seconds = np.cumsum([line['seconds'] for line in lines]) - lines[0]['seconds']
  points = []
  for i, line in enumerate(lines):
    if line.get('heldout_reward') is None:
      continue
    cost = (float(flops[i]), float(seconds[i])) if i else (0.0, 0.0)  # measured before the update
    points.append([*cost, *(line[f'heldout_reward{end}'] for end in ('', '_low', '_high'))])
  return points


def _read(folder):
  return metrics.read(folder), json.loads((folder / 'config.json').read_text())


def merge(curves):
  """The mean of the curves of several seeds, point by point; their intervals are of the means.

  Seeds are independent draws of the training, the held-out prompts are the same: an interval of the
  mean is never narrower than that of all seeds' answers would be, were the prompts others.
  """
  points = np.array(curves)
  middle = points.mean(0)
  half = np.maximum((points[..., 4] - points[..., 3]).mean(0) / 2, (
    1.96 * points[..., 2].std(0, ddof=1) / len(points) ** 0.5 if len(points) > 1 else 0))
  middle[:, 3], middle[:, 4] = middle[:, 2] - half, middle[:, 2] + half
  return middle.tolist()


def reach(points, rate, column):
  """The cost (`column` 0 FLOPs, 1 seconds) at which a curve first comes to `rate`; None if never.

  Between two measurements it is taken for straight.
  """
  for before, after in zip(points, points[1:]):
    if before[2] >= rate:
      break
    if after[2] >= rate:
      share = (rate - before[2]) / (after[2] - before[2])
      return before[column] + share * (after[column] - before[column])
  return points[0][column] if points and points[0][2] >= rate else None


def compare_costs(slow, fast):
  """How much more `slow` costs than `fast` up to the highest rate that both of them reach.

  {'rate', 'flops', 'seconds'}: ratios; None where one of them never rises above its beginning.
  """
  rate = min(max(point[2] for point in points) for points in (slow, fast))
  if rate <= max(slow[0][2], fast[0][2]):
    return dict(rate=rate, flops=None, seconds=None)
  return dict(rate=rate, **{name: reach(slow, rate, column) / reach(fast, rate, column)
                            for column, name in enumerate(('flops', 'seconds'))})


def grade(marked):
  """Rates of one way from its marks by seed: both modes, and pass@k when thinking.

  A problem's value is its mean over seeds; the problems are the independent draws.
  """
  row = {}
  for name in MODES:
    marks = np.array([each[name] for each in marked], float)  # (seeds, problems, samples)
    row[name] = estimates.interval(marks.mean((0, 2)), marks.shape[0] * marks.shape[2])
    row[name]['seeds'] = marks.mean((1, 2)).tolist()
    if name == 'thinking':
      row['pass'] = {
        str(k): estimates.interval([np.mean([estimates.pass_at(seed[place], k) for seed in marks])
                                    for place in range(marks.shape[1])])
        for k in estimates.powers(marks.shape[2])}
  return row


def tabulate(ways, student, prompts):
  """The comparison as JSON holds it; `ways` maps a name to [(marks, run's folder or None)] by seed.

  {'student', 'prompts', 'rows', 'curves': {name: [[FLOPs, rate, low, high]]}, 'cost'}: `cost` maps
  'A against B' to `compare_costs` of every two ways that have a curve, in their order.
  """
  rows, curves = [], {}
  for name, runs in ways.items():
    folders = [folder for _, folder in runs if folder]
    costs = [spend(folder) for folder in folders] or [dict(flops=0.0, seconds=0.0, tokens=0)]
    rows.append(dict(name=name, **grade([marks for marks, _ in runs]), **{
      key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]}))
    if folders:
      curves[name] = merge([curve(folder) for folder in folders])
  names = list(curves)
  cost = {f'{a} against {b}': compare_costs(curves[a], curves[b])
          for i, a in enumerate(names) for b in names[i + 1:]}
  return dict(student=student, prompts=prompts, rows=rows, cost=cost, curves={
    name: [[flops, *rates] for flops, _, *rates in points] for name, points in curves.items()})


def describe(found):
  """The table as lines of text."""
  lines = [f'{"":>24} {"thinking":>20} {"plain":>20} '
           + ' '.join(f'{"pass@" + k:>7}' for k in found['rows'][0]['pass'])
           + f' {"FLOPs":>8} {"seconds":>8}']
  for row in found['rows']:
    rates = ['{rate:.1%} ({low:.0%} to {high:.0%})'.format(**row[mode]) for mode in MODES]
    lines.append(f'{row["name"]:>24} {rates[0]:>20} {rates[1]:>20} '
                 + ' '.join(f'{each["rate"]:>7.1%}' for each in row['pass'].values())
                 + f' {row["flops"]:>8.2g} {row["seconds"]:>8.0f}')
  count, seeds = (found['rows'][0]['thinking'][key] for key in ('count', 'seeds'))
  lines.append(f'{count} problems, {len(found["rows"][-1]["thinking"]["seeds"] or seeds)} seed(s); '
               '95 % intervals over problems')
  for names, each in found['cost'].items():
    told = (f'{each["flops"]:.1f} times the FLOPs and {each["seconds"]:.1f} times the time'
            if each['flops'] else 'no rate above the beginning is reached by both')
    lines.append(f'{names}, up to a held-out reward of {each["rate"]:.2f}: {told}')
  return lines
