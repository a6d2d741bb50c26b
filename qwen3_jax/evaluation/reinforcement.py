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
  """Whether the stage's loss is that of a policy, which is no likelihood of a text."""
  return any('reward' in line for line in stage.get('metrics') or ())


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
  def curve(key, label, color=0, style='line'):
    return Series(label, *_points(stage, key), color, style)
  rewards = [curve('reward', 'rollouts', 0, 'faint'),
             curve('heldout_reward', 'held-out', 1, 'dots'),
             curve('heldout_reward_low', 'held-out, 95 %', 1, 'dashed'),
             curve('heldout_reward_high', 'held-out, 95 %', 1, 'dashed')]
  entropy = [curve('rollout_entropy', 'entropy', 2), curve('entropy_low', 'band', 3, 'dashed'),
             curve('entropy_high', 'band', 3, 'dashed')]
  length = [curve('answer_tokens', 'tokens of an answer', 3)]
  parts = sorted({key for line in stage['metrics'] for key in line
                  if key.startswith('heldout_reward_') and key.rpartition('_')[2] not in (
                    'low', 'high')})
  kinds = [curve(key, key.removeprefix('heldout_reward_'), i % 4) for i, key in enumerate(parts)]
  figures = [
    write_figure(f'{name}: reward', 'Each rollout of new prompts, and held-out prompts.', rewards,
                 'updates', 'reward'),
    write_figure(f'{name}: entropy', 'Of the policy, in nats a token; dashed: the band that its '
                 'controller aims at.', entropy, 'updates', 'nats', zero=True),
    write_figure(f'{name}: length', 'Tokens that an answer has.', length, 'updates', 'tokens',
                 zero=True),
    write_figure(f'{name}: held-out reward by source', 'Each source of prompts by itself.',
                 kinds[:8], 'updates', 'reward')]
  return f'<div class="grid">{"".join(filter(None, figures))}</div>'

