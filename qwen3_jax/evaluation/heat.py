"""The report's heat map of how the experts of a mixture are used, layer by layer."""
from qwen3_jax.evaluation.chart import escape

LEFT, TOP, BOTTOM, WIDTH = 54, 22, 40, 1040
FULL = 4  # times the mean load, where the colour is full
TITLED = 3000  # cells; more have no tooltips


def write_heat(stages, title):
  """A figure a stage that has `arrays`: {'step', 'expert_load_LE': a row a layer}."""
  figures = []
  for stage in stages:
    loads = (stage.get('arrays') or {}).get('expert_load_LE')
    if loads:
      figures.append(
        f'<figure class="wide"><h3>{escape(title(stage))}: load of the experts</h3><figcaption>'
        f'Tokens routed to each expert at step {stage["arrays"]["step"]:,}, against the mean of '
        f'its layer: no colour is even, full colour {FULL} times the mean, or nothing at all.'
        '</figcaption>'
        f'{_write_legend()}<div class="plot">{draw(loads)}</div></figure>')
  return f'<section><h2>Experts</h2>{"".join(figures)}</section>' if figures else ''


def draw(loads):
  """SVG of loads, a row a layer, a column an expert."""
  count, many = len(loads[0]), sum(map(len, loads))
  wide, high = (WIDTH - LEFT - 12) / count, max(6, min(28, 560 / len(loads)))
  height = TOP + high * len(loads) + BOTTOM
  parts = [f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
           f'aria-label="load of {count} experts in {len(loads)} layers">',
           '<text class="name" x="2" y="12">layer</text>']
  for row, values in enumerate(loads):
    mean, y = sum(values) / count, TOP + row * high
    if row % max(1, round(14 / high)) == 0:
      parts.append(f'<text x="{LEFT - 7}" y="{y + high / 2:.1f}" dy="0.32em" text-anchor="end">'
                   f'{row}</text>')
    for column, value in enumerate(values):
      ratio = value / mean if mean else 1.0
      said = f'layer {row}, expert {column}: {ratio:.2f} times the mean'
      inside = f'><title>{said}</title></rect>' if many <= TITLED else '/>'
      parts.append(f'<rect {_color(ratio)} x="{LEFT + column * wide:.1f}" y="{y:.1f}" '
                   f'width="{wide * 0.96:.2f}" height="{high * 0.94:.2f}"{inside}')
  for column in range(0, count, max(1, -(-count // 16))):
    parts.append(f'<text x="{LEFT + (column + 0.5) * wide:.1f}" y="{height - 23:.0f}" '
                 f'text-anchor="middle">{column}</text>')
  parts.append(f'<text class="name" x="{WIDTH - 12}" y="{height - 6:.0f}" text-anchor="end">expert'
               '</text></svg>')
  return '\n'.join(parts)


def _color(ratio):
  """Class and opacity: colour 1 above the mean, 0 below, the fuller the further."""
  far = min((ratio - 1) / (FULL - 1), 1) if ratio > 1 else 1 - ratio
  return f'class="c{int(ratio > 1)}" fill-opacity="{max(far, 0.02):.2f}"'


def _write_legend():
  swatch = ('<span><svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
            '<rect {} x="1" y="0" width="24" height="10"/></svg>{}</span>')
  return '<p class="legend">' + ''.join(swatch.format(_color(ratio), f'{ratio:g} x') for ratio in (
    0, 0.5, 1, 2, 4)) + '</p>'
