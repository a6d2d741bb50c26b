"""The report's part on distillation: the ways compared at their cost, and the student's curves."""
from qwen3_jax.evaluation.chart import Series, escape, format_number, write_figure
from qwen3_jax.evaluation.tables import write_table
from qwen3_jax.training.metrics import format_seconds

ABSENT = '–'


def is_distillation(stage):
  """Whether the stage's loss is a divergence from a teacher."""
  return (stage.get('config') or {}).get('method') == 'distill'


def write_distillation(stages, comparison, title):
  """The comparison (as Table 21 of the Qwen3 report) and the curves of stages with a teacher.

  `comparison` is what `evaluation.comparison` wrote, or None; `title(stage)` names a stage.
  """
  table = _write_comparison(comparison) if comparison else ''
  charts = ''.join(_write_charts(stage, title(stage)) for stage in stages
                   if is_distillation(stage))
  grid = f'<div class="grid">{charts}</div>' if charts else ''
  return f'<section><h2>Distillation</h2>{table}{grid}</section>' if table or grid else ''


def _write_comparison(comparison):
  rows = comparison['rows']
  ks = sorted({int(k) for row in rows for k in row.get('pass') or {}})
  columns = ('Way', 'Thinking', 'Not thinking', *(f'pass@{k}' for k in ks), 'FLOPs', 'Tokens',
             'Time')
  cells = [[row['name'], _rate(row.get('thinking')), _rate(row.get('plain')),
            *(_rate((row.get('pass') or {}).get(str(k))) for k in ks),
            f'{row["flops"]:.2g}' if row.get('flops') else ABSENT,
            format_number(row['tokens']) if row.get('tokens') else ABSENT,
            format_seconds(row['seconds']) if row.get('seconds') else ABSENT] for row in rows]
  series = []
  for i, (name, points) in enumerate((comparison.get('curves') or {}).items()):
    flops, rates, lows, highs = (list(column) for column in zip(*points))
    series.append(Series(name, flops, rates, i, 'dots', lows, highs))
  figure = write_figure(
    'Held-out accuracy against cost', 'What the student has cost since the ways part, generation '
    'and teacher included. Shaded: 95 % intervals.', series, 'FLOPs', 'accuracy', wide=True)
  student = comparison.get('student') or {}
  about = ', '.join(f'{name} {value}' for name, value in student.items()
                    if isinstance(value, (str, int, float)))
  prompts = comparison.get('prompts')
  return ('<p class="soft">One student' + escape(f' ({about})' if about else '')
          + ', one set of prompts' + escape(f' ({prompts})' if prompts else '')
          + ': what each way makes of it, in percent with 95 % intervals, and what it costs beyond '
          f'the checkpoint that all start from.</p>{write_table(columns, cells)}{figure}')


def _rate(value):
  """Percent of a graded dict of `rate`, `low` and `high`, or of a bare number."""
  if value is None:
    return ABSENT
  if not isinstance(value, dict):
    return f'{100 * value:.1f}'
  return f'{100 * value["rate"]:.1f}' + (
    f' ({100 * value["low"]:.0f}–{100 * value["high"]:.0f})' if 'low' in value else '')


def _write_charts(stage, name):
  def points(key, label, color, style='line'):
    lines = [line for line in stage['metrics'] if line.get(key) is not None]
    return Series(label, [line['step'] for line in lines], [line[key] for line in lines], color,
                  style)
  kind = (stage['config'].get('distillation') or {}).get('kind', 'divergence').replace('_', ' ')
  divergence = [points('kl', 'each update', 0), points('heldout_kl', 'held-out', 1, 'dots')]
  if not divergence[0].xs:
    divergence[0] = points('loss', 'each update', 0)
  parts = sorted({key for line in stage['metrics'] for key in line
                  if key.startswith('heldout_') and isinstance(line[key], float)
                  and key.rpartition('_')[2] not in ('kl', 'loss', 'tokens', 'low', 'high')})
  rates = [points(key, key.removeprefix('heldout_').replace('_', ' '), i, 'dots')
           for i, key in enumerate(parts[:8])]
  return ''.join([
    write_figure(f'{name}: divergence', f'Of student and teacher ({kind}), nats a token.',
                 divergence, 'updates', 'nats', zero=True),
    write_figure(f'{name}: held-out', 'Answers of the student to held-out prompts.', rates,
                 'updates', 'rate'),
    write_figure(f'{name}: length', 'Tokens that an answer has.',
                 [points('answer_tokens', 'tokens', 0)], 'updates', 'tokens', zero=True)])
