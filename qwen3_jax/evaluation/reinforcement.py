"""The report's part on reinforcement learning: rewards, entropy and length of answers."""
from qwen3_jax.evaluation.chart import Series, write_figure
from qwen3_jax.evaluation.tables import write_table


def write_rewards(stages, title):
  """Held-out reward before and after, and the curves, of stages whose metrics have a `reward`.

  `title(stage)` names a stage. '' where no stage is of this kind.
  """
  found = [stage for stage in stages if is_reinforcement(stage)]
  if not found:
    return ''
  rows = [_row(stage, title(stage)) for stage in found]
  table = write_table(('Stage', 'Reward before', 'after', 'Entropy before', 'after',
                       'Tokens before', 'after'), rows)
  charts = '\n'.join(_write_charts(stage, title(stage)) for stage in found)
  return ('<section><h2>Reinforcement learning</h2><p class="soft">Mean reward of answers drawn at '
          'temperature 1 to held-out prompts, with 95 % intervals; nats of entropy a token and '
          'tokens an answer, of the first and the last rollout.'
          f'</p>{table}{charts}</section>')


def is_reinforcement(stage):
  """Whether the stage's loss is that of a policy on rewards, which is no likelihood of a text."""
  method = (stage.get('config') or {}).get('method', 'rl')
  return method == 'rl' and any('reward' in line for line in stage.get('metrics') or ())


def _points(stage, key):
  lines = [line for line in stage['metrics'] if line.get(key) is not None]
  return [line['step'] for line in lines], [line[key] for line in lines]


def _row(stage, name):
  cells = [name]
  lines = [line for line in stage['metrics'] if line.get('heldout_reward') is not None]
  for line in (lines[:1] or [{}]) + (lines[-1:] or [{}]):
    low, high = line.get('heldout_reward_low'), line.get('heldout_reward_high')
    cells.append('–' if not line else f'{line["heldout_reward"]:.3f}' + (
      f' ({low:.2f}–{high:.2f})' if low is not None else ''))
  for key, form in (('rollout_entropy', '{:.3f}'), ('answer_tokens', '{:.0f}')):
    _, values = _points(stage, key)
    cells += [form.format(values[0]), form.format(values[-1])] if values else ['–', '–']
  return cells


def _write_charts(stage, name):
  def curve(key, label, color=0, style='line', low=None, high=None):
    ends = [_points(stage, each)[1] if each else () for each in (low, high)]
    return Series(label, *_points(stage, key), color, style, *ends)
  config = stage.get('config') or {}
  rewards = [curve('reward', 'rollouts', 0),
             curve('heldout_reward', 'held-out, 95 % shaded', 1, 'dots', 'heldout_reward_low',
                   'heldout_reward_high')]
  entropy = [curve('rollout_entropy', 'entropy', 0), curve('entropy_low', 'band', 3, 'dashed'),
             curve('entropy_high', 'band', 3, 'dashed')]
  parity = [curve('parity_max', 'largest', 1, 'dots'), curve('parity_mean', 'mean', 0, 'dots')]
  xs, gate = parity[1].xs, (config.get('parity') or {}).get('mean')
  parity += [Series('gate of the mean', xs, [gate] * len(xs), 3, 'dashed')] if gate else []
  figures = [
    write_figure(f'{name}: reward', 'Each rollout of new prompts, and held-out prompts.', rewards,
                 'updates', 'reward'),
    write_figure(f'{name}: entropy', 'Of the policy, in nats a token; dashed: the band that its '
                 'controller aims at.', entropy, 'updates', 'nats', zero=True),
    write_figure(f'{name}: length', 'Tokens that an answer has.',
                 [curve('answer_tokens', 'tokens of an answer')], 'updates', 'tokens', zero=True),
    write_figure(f'{name}: parity', "Engine's against trainer's log-probabilities of the drawn "
                 'tokens: absolute difference, logarithmic.', parity, 'updates', 'nats', log=True),
    write_figure(f'{name}: held-out reward by source', 'Each source of prompts by itself.',
                 _by_name(stage, 'heldout_reward_')[:8], 'updates', 'reward'),
    write_figure(f'{name}: parts of the reward', 'Each verifier by itself, on the rollouts.',
                 _by_name(stage, 'reward_')[:8], 'updates', 'mean')]
  return f'<div class="grid">{"".join(filter(None, figures))}</div>'


def _by_name(stage, prefix):
  """A series for each metric that begins with `prefix`, but for the ends of intervals."""
  keys = sorted({key for line in stage['metrics'] for key in line if key.startswith(prefix)
                 and key.rpartition('_')[2] not in ('low', 'high')})
  return [Series(key.removeprefix(prefix), *_points(stage, key), i, 'dots')
          for i, key in enumerate(keys)]
