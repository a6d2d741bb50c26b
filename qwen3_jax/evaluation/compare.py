"""Results of models side by side: a table for the terminal, Markdown, JSON and one HTML page."""
from pathlib import Path, PurePath

from qwen3_jax.evaluation import pictures, store, summary
from qwen3_jax.evaluation.chart import Series, escape, write_figure
from qwen3_jax.evaluation.style import write_style
from qwen3_jax.evaluation.tables import write_table

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>Evaluation</h1><p class="soft">{models}</p></header>
{parts}
</main>
</body>
</html>
"""


def compare(to):
  """All results below `to` as a dict that JSON can hold.

  {'models': {short name: {'model', 'fingerprint'}}, 'rows': [{'benchmark', 'mode', 'budget',
  'metric', 'parts': {short name: part}}]}. Raises FileNotFoundError where there are none.
  """
  results = [result for _, result in summary.read_results(to)]
  names = shorten([result['model'] for result in results],
                  [result['fingerprint'] for result in results])
  rows = {}
  for name, result in zip(names, results):
    for part in result['parts']:
      key = part['benchmark'], part['mode'], part['budget']
      row = dict(zip(('benchmark', 'mode', 'budget'), key), metric=part['metric'], parts={})
      rows.setdefault(key, row)['parts'][name] = part
  order = list(dict.fromkeys(key[0] for key in rows))
  ranked = sorted(rows, key=lambda key: (order.index(key[0]), key[1] != 'thinking',
                                         key[2] is not None, key[2] or 0))
  return dict(models={name: dict(model=result['model'], fingerprint=result['fingerprint'])
                      for name, result in zip(names, results)}, rows=[rows[key] for key in ranked])


def shorten(folders, marks):
  """The ends of paths, as short as keeps them distinct; equal paths (new weights) get marks."""
  parts = [PurePath(folder).parts for folder in folders]
  for size in range(1, 1 + max(map(len, parts))):
    names = ['/'.join(each[-size:]) for each in parts]
    if len(set(names)) == len(set(parts)):
      break
  return [f'{name} ({mark[:6]})' if names.count(name) > 1 else name
          for name, mark in zip(names, marks)]


def tabulate(table):
  """(columns, rows) of text: a row a benchmark and mode, a column a model, with 95 % intervals."""
  models = list(table['models'])
  rows = [[row['benchmark'], name_mode(row), row['metric'], describe_size(row),
           *(describe(row['parts'].get(model)) for model in models)] for row in table['rows']]
  return ['Benchmark', 'Mode', 'Metric', 'Questions', *models], rows


def name_mode(row):
  return row['mode'] if row['budget'] is None else f'{row["mode"]}, {row["budget"]} tokens'


def describe_size(row):
  """Questions, and samples of each where there are several; a range where models differ."""
  sizes = sorted({(part['count'], part['samples']) for part in row['parts'].values()})
  return ' or '.join(f'{count:,}' + (f' x {samples}' if samples > 1 else '')
                     for count, samples in sizes)


def describe(part):
  """A rate with its interval; shares in per cent."""
  if part is None or part['rate'] is None:
    return '–'
  form = '{:.1f}' if is_share(part) else '{:.3f}'
  scale = 100 if is_share(part) else 1
  rate, low, high = (None if part[key] is None else form.format(part[key] * scale)
                     for key in ('rate', 'low', 'high'))
  lost = f', {part["missing"]} missing' if part['missing'] else ''
  return f'{rate} ({low}–{high}{lost})' if low else f'{rate}{lost}'


def is_share(part):
  """Whether the rate is a share of 1, not bits per byte."""
  return part['metric'] != 'bits per byte'


def to_markdown(table):
  """The tables as Markdown."""
  parts = ['Shares in per cent, with 95 % intervals.', '', _markdown(*tabulate(table))]
  columns, rows = tabulate_samples(table)
  if rows:
    parts += ['', 'Several samples of each question:', '', _markdown(columns, rows)]
  return '\n'.join([*parts, '', 'Answers:', '', _markdown(*tabulate_answers(table)), ''])


def _markdown(columns, rows):
  clean = lambda cell: str(cell).replace('|', '\\|').replace('\n', ' ')
  lines = [columns, ['---'] * len(columns), *rows]
  return '\n'.join('| ' + ' | '.join(map(clean, line)) + ' |' for line in lines)


def tabulate_samples(table):
  """(columns, rows): pass@k and maj@k of all benchmarks with several samples."""
  rows = []
  for row, model, part in _each(table):
    for kind in ('pass', 'maj'):
      if kind in part:
        rows.append([row['benchmark'], name_mode(row), model, f'{kind}@k', ',  '.join(
          f'{k}: {describe(each | dict(metric="", missing=0))}'
          for k, each in part[kind].items())])
  return ['Benchmark', 'Mode', 'Model', 'Estimate', 'By k'], rows


def tabulate_answers(table):
  """(columns, rows): how long answers are, how many end by themselves, further metrics."""
  rows = []
  for row, model, part in _each(table):
    cells = [f'{part["tokens"]:,.0f}', f'{part["finished"]:.1%}', f'{part["forced"]:.1%}'
             ] if 'tokens' in part else ['–'] * 3
    more = ', '.join(f'{name} {value:.4g}' for name, value in part.get('details', {}).items()
                     if value is not None)
    rows.append([row['benchmark'], name_mode(row), model, *cells, more or '–'])
  return ['Benchmark', 'Mode', 'Model', 'Tokens', 'Ended by itself', 'Cut short by the budget',
          'Further'], rows


def _each(table):
  return [(row, model, part) for row in table['rows'] for model, part in row['parts'].items()]


def write(to):
  """Writes `to`/table.json, table.md, index.html and, of its figures, figures/*.svg (and PNG where
  it can be made); returns the table. See `compare`.
  """
  table, to = compare(to), Path(to)
  store.write_json(to / 'table.json', table)
  store.write_text(to / 'table.md', to_markdown(table))
  store.write_text(to / 'index.html', write_page(table))
  if draw_budgets(table):
    pictures.write_pictures(to / 'index.html', to / 'figures')
  return table


def write_page(table):
  """One HTML page that loads nothing: tables, budget curves, rates by group."""
  parts = [_section('Models side by side', 'Shares in per cent, with 95 % intervals.',
                    write_table(*tabulate(table)))]
  if figures := draw_budgets(table):
    parts.append(_section('Accuracy against thinking budget', 'The thinking is cut off at the '
                          'budget by the stop text, and the model answers from what it has.',
                          ''.join(figures)))
  columns, rows = tabulate_samples(table)
  if rows:
    parts.append(_section('Several samples', 'pass@k: the best of k; maj@k: the most frequent '
                          'final answer of k, ties shared. Both unbiased.',
                          write_table(columns, rows)))
  parts.append(_section('Answers', 'Tokens are a mean, thinking included.',
                        write_table(*tabulate_answers(table))))
  parts += [_write_groups(row) for row in table['rows']]
  models = '; '.join(f'{name}: {each["model"]} ({each["fingerprint"]})'
                     for name, each in table['models'].items())
  return PAGE.format(style=write_style(), models=escape(models),
                     parts='\n'.join(filter(None, parts)))


def _section(heading, said, body):
  return f'<section><h2>{escape(heading)}</h2><p class="soft">{escape(said)}</p>{body}</section>'


def draw_budgets(table):
  """A figure for each benchmark with several budgets: rate with its interval against budget."""
  figures = []
  for benchmark in dict.fromkeys(row['benchmark'] for row in table['rows']):
    rows = [row for row in table['rows'] if row['benchmark'] == benchmark]
    series, free = [], []
    for i, model in enumerate(table['models']):
      parts = {(row['mode'], row['budget']): row['parts'][model] for row in rows
               if model in row['parts']}
      xs = sorted(budget for _, budget in parts if budget is not None)
      if len(xs) < 2:
        continue
      curve = lambda key, parts=parts, xs=xs: [parts['thinking', x][key] for x in xs]
      series.append(Series(model, xs, curve('rate'), i, low=curve('low'), high=curve('high')))
      if ('plain', None) in parts:
        level = [parts['plain', None]['rate']] * len(xs)
        series.append(Series(f'{model}, not thinking', xs, level, i, 'dashed'))
      if ('thinking', None) in parts:
        free.append(f'{model} {parts["thinking", None]["rate"]:.1%}')
    said = 'Shaded: 95 % intervals.' + (f' Without a limit: {", ".join(free)}.' if free else '')
    figures.append(write_figure(benchmark, said, series, 'thinking budget, tokens', rows[0][
      'metric'], wide=True, zero=True))
  return list(filter(None, figures))


def _write_groups(row):
  """Rates by group (subject, language, kind), folded."""
  names = sorted({name for part in row['parts'].values() for name in part.get('groups', {})})
  if not names:
    return ''
  models = list(row['parts'])
  def cell(part, name):
    group = part.get('groups', {}).get(name)
    return describe(group and group | dict(metric=row['metric'], missing=0))
  rows = [[name, *(cell(row['parts'][model], name) for model in models)] for name in names]
  return (f'<details><summary>{escape(row["benchmark"])}, {escape(name_mode(row))}: by group'
          f'</summary>{write_table(["Group", *models], rows)}</details>')
