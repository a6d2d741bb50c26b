"""The report's tables: the stages and their cost, what the data filters did."""

from qwen3_jax.evaluation.chart import escape, format_number
from qwen3_jax.training.metrics import format_seconds

COLUMNS = ('Stage', 'Starts from', 'Steps', 'Length', 'Tokens', 'drawn', 'FLOPs', 'Loss',
           'held-out', 'Tokens/s', 'MFU', 'Time', 'with all')


def write_stages(stages, title, of_policy):
  """A row a stage: where it came from, how much it did, at what cost; and the sums.

  `of_policy(stage)` says that its loss is no likelihood of a text.
  """
  if not stages:
    return ''
  rows = [_row(stage, title(stage), of_policy(stage)) for stage in stages]
  costs = [stage['cost'] for stage in stages if stage.get('cost')]
  if len(stages) > 1:
    steps, seconds = (f(each(stage) for stage in stages) for f, each in (
      (sum, lambda stage: len(stage.get('metrics') or ())), (sum, lambda s: total(s, 'seconds'))))
    whole = sum(_whole(stage) or 0 for stage in stages)
    rows.append(['Together', '', f'{steps:,}', '', format_number(sum(c.trained for c in costs)),
                 format_number(sum(c.drawn for c in costs)), f'{sum(c.flops for c in costs):.2g}',
                 '', '', '', '', format_seconds(seconds), format_seconds(whole) if whole else ''])
  table = write_table(COLUMNS, rows, close=True)
  return ('<section><h2>Stages, time and cost</h2><p class="soft">FLOPs are useful ones: 6 for '
          'each weight and token trained, 2 for each drawn or scored. Train loss is the mean of '
          'the last 10 steps; speed and MFU are of the last 50. Held-out loss is that of text '
          'or, in post-training, of conversations. Time with all: with the making of data, '
          f'measuring, and tries that were cut off.</p>{table}</section>')


def _row(stage, name, of_policy):
  def shown(x, form):
    return '–' if x is None else form.format(x)
  cost, config = stage.get('cost'), stage.get('config') or {}
  loss = None if of_policy else last(stage, 'loss', 10)
  return [name, stage.get('origin') or '–', f'{len(stage.get("metrics") or ()):,}',
          shown((config.get('data') or {}).get('length'), '{:,}'),
          format_number(cost.trained if cost else total(stage, 'tokens')),
          format_number(cost.drawn) if cost and cost.drawn else '–',
          shown(cost and cost.flops, '{:.2g}'), shown(loss, '{:.3f}'),
          shown(last(stage, 'heldout_loss'), '{:.3f}'),
          shown(last(stage, 'tokens_per_s', 50), '{:,.0f}'),
          shown(last(stage, 'mfu', 50), '{:.1%}'), format_seconds(total(stage, 'seconds')),
          format_seconds(_whole(stage)) if _whole(stage) else '–']


def _whole(stage):
  """Seconds of all tries of a stage, with the making of its data and the measuring; or None."""
  return sum((stage.get('times') or {}).values()) or None


def total(stage, key):
  return sum(line.get(key) or 0 for line in stage.get('metrics') or ())


def last(stage, key, window=1):
  """Mean of the last `window` values of a metric, or None."""
  values = [line[key] for line in stage.get('metrics') or ()
            if isinstance(line.get(key), (int, float))]
  return sum(values[-window:]) / len(values[-window:]) if values else None


def write_filters(stages, title):
  """How many records each filter read, kept and rejected, and by which rule; a table a stage."""
  parts = []
  for stage in stages:
    report = stage.get('filters')
    if not report:
      continue
    rows = []
    for line in report['stages']:
      rules = ', '.join(f'{rule}: {count:,}' for rule, count in sorted(
        line['rules'].items(), key=lambda pair: -pair[1]))
      rows.append([line['name'], *(f'{line[key]:,}' for key in ('read', 'accepted', 'rejected')),
                   rules or '–'])
    parts.append(f'<h3>{escape(title(stage))}</h3>' + write_table(
      ('Filter', 'Read', 'Kept', 'Rejected', 'Rules'), rows))
    if report.get('mixed'):
      rows = [[name, *(f'{part.get(name, 0):,}' for part in report['mixed'].values())]
              for name in sorted({name for part in report['mixed'].values() for name in part})]
      parts.append(write_table(('Mixed set', *report['mixed']), rows))
  return f'<section><h2>Data, by filter and rule</h2>{"".join(parts)}</section>' if parts else ''


def write_table(columns, rows, close=False):
  """A table, its columns `close` together where there are many; the first cell heads a row."""
  head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in columns)
  body = ''.join(
    f'<tr><th scope="row">{escape(first)}</th>' + ''.join(map(_write_cell, rest)) + '</tr>'
    for first, *rest in rows)
  kind = ' class="close"' if close else ''
  return (f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
          '</table></div>')


def _write_cell(cell):
  kind = ' class="long"' if len(str(cell)) > 40 else ''
  return f'<td{kind}>{escape(cell)}</td>'
