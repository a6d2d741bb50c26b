"""The report's table of what each stage's model can do, in both modes, and its budget curves."""
from qwen3_jax.evaluation.chart import Series, escape, write_figure

MODES = 'thinking', 'plain'


def write_modes(stages, title):
  """Accuracies and obedience to flags, a row a measure, two columns a stage; the budget curves.

  As Table 22 of the Qwen3 report. `stages` have `modes`, what `evaluation.modes.measure` gave, or
  nothing; `title(stage)` names one.
  """
  measured = [(title(stage), stage['modes']) for stage in stages if stage.get('modes')]
  if not measured:
    return ''
  count = measured[-1][1]['thinking']['count']
  table = _write_table([(name, _measures(modes)) for name, modes in measured])
  return (
    '<section><h2>Both modes, stage by stage</h2><p class="soft">Percent of right final answers '
    f'to {count} held-out problems that no training data contain; below each its 95 % interval, '
    'beside it the change since the stage before, in colour where it leaves the intervals. Flags: '
    'how often the think block obeys the last /think or /no_think of a conversation.</p>'
    f'{table}{_write_budgets(measured)}</section>')


def _measures(modes):
  """{row: (its level, {mode: graded})}, graded being a dict of `rate` and perhaps `low`, `high`."""
  rows = {'Right answers': (0, {mode: modes[mode] for mode in MODES})}
  for kind in modes['thinking'].get('kinds', {}):
    rows[kind] = 1, {mode: modes[mode]['kinds'][kind] for mode in MODES
                     if kind in modes[mode]['kinds']}
  following = modes.get('following')
  if following:
    parts = following['parts']
    rows['Last flag obeyed'] = 0, {'both': following}
    rows['/think, /no_think'] = 1, {mode: parts[flag] for mode, flag in zip(
      MODES, ('/think', '/no_think')) if flag in parts}
    rows |= {f'flag in {place}': (1, {'both': graded}) for place, graded in parts.items()
             if not place.startswith('/')}
  rows['Tokens of an answer'] = 0, {mode: {'plainly': modes[mode]['tokens']} for mode in MODES}
  return rows


def _write_table(measured):
  names = {}
  for _, rows in measured:
    names |= {name: level for name, (level, _) in rows.items()}
  head = ''.join(f'<th colspan="2" class="first" scope="colgroup">{escape(name)}</th>'
                 for name, _ in measured)
  modes = ('<th class="first" scope="col">Thinking</th><th scope="col">Not thinking</th>'
           * len(measured))
  body = ''
  for name, level in names.items():
    cells, before = '', {}
    for _, rows in measured:
      graded = rows.get(name, (level, {}))[1]
      if 'both' in graded:
        cells += f'<td class="first" colspan="2">{_cell(graded["both"], before.get("both"))}</td>'
      else:
        cells += ''.join(f'<td{" class=first" * (i == 0)}>{_cell(graded.get(m), before.get(m))}'
                         '</td>' for i, m in enumerate(MODES)).replace('=first', '="first"')
      before |= graded
    kind = ' class="part"' if level else ''
    body += f'<tr{kind}><th scope="row">{escape(name)}</th>{cells}</tr>'
  return (f'<div class="scroll"><table><thead><tr><th></th>{head}</tr><tr><th></th>{modes}</tr>'
          f'</thead><tbody>{body}</tbody></table></div>')


def _cell(graded, before=None):
  """Percent, the change since `before`, and the interval."""
  if not graded:
    return '–'
  if 'plainly' in graded:
    return f'{graded["plainly"]:.0f}'
  rate, text = graded['rate'], f'{100 * graded["rate"]:.1f}'
  if before and 'rate' in before:
    change = rate - before['rate']
    clear = 'low' in before and not before['low'] <= rate <= before['high'] and (
      not graded['low'] <= before['rate'] <= graded['high'])
    kind = (' class="better"' if change > 0 else ' class="worse"') if clear else ''
    text += f'<i{kind}>{100 * change:+.1f}</i>'
  if 'low' in graded:
    text += f'<small>{100 * graded["low"]:.0f}–{100 * graded["high"]:.0f}</small>'
  return text


def _write_budgets(measured):
  measured, series = [(name, modes) for name, modes in measured if modes.get('budgets')], []
  for i, (name, modes) in enumerate(measured):
    xs = [point['budget'] for point in modes['budgets']]
    rates, *ends = ([point[key] for point in modes['budgets']]
                    for key in ('rate', 'low', 'high'))
    series += [Series(name, xs, [modes['plain']['rate']] * len(xs), i, 'dashed'),
               Series(name, xs, rates, i, 'dots', *ends)]
  return write_figure(
    'Accuracy against thinking budget', 'The thinking is cut off at the budget by the stop text, '
    'and the model answers from what it has. Shaded: 95 % intervals. Dashed: without '
    'thinking.',
    series, 'thinking budget, tokens', 'accuracy', wide=True, zero=True)
