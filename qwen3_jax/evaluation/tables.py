"""The report's tables of what models can do in both modes, and of what the data filters did."""

from qwen3_jax.evaluation.chart import Series, draw, draw_legend, escape


def write_modes(stages, title):
  """Accuracy in both modes and obedience to flags, a row a stage, and the budget curves.

  `stages` have `modes`, what `evaluation.modes.measure` gave, or nothing; `title(stage)` names one.
  """
  measured = [(title(stage), stage['modes']) for stage in stages if stage.get('modes')]
  if not measured:
    return ''
  rows = [[name, *(_cell(modes.get(part)) for part in ('thinking', 'plain', 'following')),
           *(f'{modes[part]["tokens"]:.0f}' for part in ('thinking', 'plain'))]
          for name, modes in measured]
  count = measured[-1][1]['thinking']['count']
  table = write_table(('After', 'Thinking', 'Not thinking', 'Last flag obeyed',
                       'Tokens thinking', 'Tokens not thinking'), rows)
  return (f'<section><h2>Both modes</h2><p class="soft">Share of right final answers to {count} '
          'held-out problems that no training data contain, with 95 % intervals; and how often the '
          'think block obeys the last /think or /no_think of a conversation.</p>'
          f'{table}{_write_kinds(measured[-1])}{_write_budgets(measured)}</section>')


def _cell(graded):
  if not graded:
    return '–'
  return f'{graded["rate"]:.1%} ({graded["low"]:.0%}–{graded["high"]:.0%})'


def _write_kinds(measured):
  """The last stage's rates by kind of problem, and its obedience by where the flag stands."""
  name, modes = measured
  rows = [[kind, _cell(graded), _cell(modes['plain']['kinds'].get(kind))]
          for kind, graded in modes['thinking']['kinds'].items()]
  parts = write_table(('Kind of problem', 'Thinking', 'Not thinking'), rows)
  if modes.get('following'):
    rows = [[part, _cell(graded), graded['count']]
            for part, graded in modes['following']['parts'].items()]
    parts += write_table(('Flag, or where it stands', 'Obeyed', 'Conversations'), rows)
  return (f'<details><summary>{escape(name)}: by kind of problem and of flag</summary>{parts}'
          '</details>')


def _write_budgets(measured):
  curves = [(name, modes['budgets']) for name, modes in measured if modes.get('budgets')]
  if not curves:
    return ''
  series = []
  for i, (name, points) in enumerate(curves):
    xs = [point['budget'] for point in points]
    plain = dict(measured)[name]['plain']['rate']
    series += [Series(name, xs, [point['rate'] for point in points], i % 4),
               Series(f'{name}, not thinking', xs, [plain] * len(xs), i % 4, 'dashed')]
  plot = draw(series, 'thinking budget, tokens', 'accuracy', width=1040, height=320, zero=True)
  return (f'<figure class="wide"><h3>Accuracy against thinking budget</h3><figcaption>The thinking '
          'is cut off at the budget by the stop text, and the model answers from what it has; '
          f'dashed: without thinking.</figcaption>{draw_legend(series)}<div class="plot">{plot}'
          '</div></figure>')


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
  return f'<section><h2>Data</h2>{"".join(parts)}</section>' if parts else ''


def write_table(columns, rows):
  """A table; the first cell of each row is its heading."""
  head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in columns)
  body = ''.join(
    f'<tr><th scope="row">{escape(first)}</th>'
    + ''.join(f'<td>{escape(cell)}</td>' for cell in rest) + '</tr>' for first, *rest in rows)
  return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
          '</div>')
