"""Line charts as inline SVG, coloured by the page's style sheet and readable without scripts."""

import html
import math
import re
from typing import NamedTuple

from qwen3_jax.evaluation.style import COLORS

LEFT, RIGHT, TOP, BOTTOM = 54, 12, 40, 40
UNITS = ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k'))
UNSAFE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


class Series(NamedTuple):
  """One line of a chart; those of one name share a legend entry and a colour.

  `color` is any whole number: the lines from the fifth on differ by dashes too. `style` is 'line',
  'faint' (raw values behind a smoothed line), 'dashed' or 'dots'. `low` and `high`, where given,
  are the ends of each value's interval, which is shaded.
  """
  name: str
  xs: list
  ys: list
  color: int = 0
  style: str = 'line'
  low: list = ()
  high: list = ()


class Band(NamedTuple):
  """A named stretch of the x axis."""
  name: str
  start: float
  stop: float


def draw(series, x_label, y_label, width=520, height=250, bands=(), log=False, zero=False):
  """SVG text of a line chart; values that are None are left out, '' if none is left.

  `log` makes the y axis logarithmic, `zero` starts it at 0.
  """
  series = [each for each in (_clean(each, log) for each in series) if each.xs]
  if not series:
    return ''
  xs = [x for each in series for x in each.xs] + [x for band in bands for x in band[1:]]
  ys = [y for each in series for y in (*each.ys, *each.low, *each.high)] + [0] * zero
  x_ticks = find_ticks(min(xs), max(xs), width / 90)
  y_low, y_high, y_ticks = _lay_out_y(min(ys), max(ys), height, log)
  x_of = _scale(min(xs), max(xs), LEFT, width - RIGHT)
  y_of = _scale(y_low, y_high, height - BOTTOM, TOP, log)
  names = ', '.join(dict.fromkeys(each.name for each in series))
  parts = [
    f'<svg viewBox="0 0 {width} {height}" role="img" '
    f'aria-label="{escape(f"{y_label} ({names}) against {x_label}")}">',
    *_draw_bands(bands, x_of, height),
    *_draw_axes(x_ticks, y_ticks, x_of, y_of, width, height),
    f'<text class="name" x="{width - RIGHT}" y="{height - 6}" text-anchor="end">'
    f'{escape(x_label)}</text>',
    f'<text class="name" x="2" y="12">{escape(y_label)}</text>',
    *[part for each in series if each.low for part in _draw_area(each, x_of, y_of)],
    *[part for each in series for part in _draw_series(each, x_of, y_of)],
    *_draw_hovers(series, x_label, x_of, width, height),
    '</svg>']
  return '\n'.join(parts)


def draw_legend(series):
  """HTML of a legend: one entry a name, a swatch in its colour and style."""
  entries = {each.name: each for each in series if any(y is not None for y in each.ys)}
  swatch = '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">{}</svg>{}'
  return '<p class="legend">' + ''.join(
    '<span>' + swatch.format(
      f'<path class="{_look(each)}" d="M1 5H25"/>'
      + (f'<circle class="c{each.color % COLORS}" cx="13" cy="5" r="3"/>'
         if each.style == 'dots' else ''),
      escape(each.name)) + '</span>'
    for each in entries.values()) + '</p>'


def write_figure(heading, caption, series, x_label, y_label, wide=False, **options):
  """A chart with its heading, caption and legend as HTML; '' where nothing is to be drawn."""
  size = {'width': 1040, 'height': 360} if wide else {}
  plot = draw(series, x_label, y_label, **size, **options)
  if not plot:
    return ''
  legend = draw_legend(series) if len({each.name for each in series}) > 1 else ''
  return (f'<figure class="{"wide" if wide else "small"}"><h3>{escape(heading)}</h3>'
          f'<figcaption>{escape(caption)}</figcaption>{legend}<div class="plot">{plot}</div>'
          '</figure>')


def escape(text):
  """Text safe in HTML; control characters, those of text direction included, become U+FFFD."""
  return html.escape(UNSAFE.sub('\ufffd', str(text).replace('\r\n', '\n')))


def format_number(x, short_from=1e4):
  """Short form: 950, 0.0213, 3e-05, and from `short_from` on 12.5k, 3.2M, 4.1B, 36T."""
  if abs(x) < short_from:
    return f'{x:,.0f}' if float(x).is_integer() else f'{x:.4g}'
  size, unit = next(each for each in UNITS if abs(x) >= each[0])
  return f'{x / size:.3g}{unit}' if abs(x) < 1e15 else f'{x:.2e}'


def find_ticks(low, high, count):
  """Round values (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count`."""
  if high <= low:
    return [low]
  rough = (high - low) / max(count, 1)
  power = 10 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def _clean(series, log):
  """The series without the points that have no place in the chart."""
  rows = [(x, y, *ends) for x, y, *ends in zip(series.xs, series.ys, *filter(
    len, (series.low, series.high))) if None not in (x, y, *ends)
    and all(math.isfinite(v) and (v > 0 or not log) for v in (y, *ends))]
  columns = [list(column) for column in zip(*rows)] or [[], []]
  return series._replace(xs=columns[0], ys=columns[1], low=columns[2] if columns[2:] else (),
                         high=columns[3] if columns[2:] else ())


def _look(series):
  dashes = series.color // 4 % 3 if series.style in ('line', 'dots') else 0
  return f'c{series.color % COLORS} {series.style}' + (f' d{dashes}' if dashes else '')


def _lay_out_y(low, high, height, log):
  """Range and ticks of the y axis; the range is at least as wide as one can read."""
  if log:
    if high < 2 * low:
      low, high = low / 1.5, high * 1.5
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [f * 10.0**p for p in powers for f in factors]
    return low, high, [tick for tick in ticks if low <= tick <= high]
  margin = (high - low) * 0.05 or abs(high) * 0.1 or 1
  low, high = (low - margin if low else 0), high + margin
  return low, high, find_ticks(low, high, height / 50)


def _scale(low, high, start, stop, log=False):
  convert = math.log if log else float
  low, high = convert(low), convert(high)
  return lambda value: start + (convert(value) - low) / ((high - low) or 1) * (stop - start)


def _draw_bands(bands, x_of, height):
  for i, band in enumerate(bands):
    x, wide = x_of(band.start), x_of(band.stop) - x_of(band.start)
    name = escape(band.name)
    yield (f'<rect class="band b{i % 2}" x="{x:.1f}" y="{TOP}" width="{max(wide, 0):.1f}" '
           f'height="{height - TOP - BOTTOM}"><title>{name}</title></rect>')
    short = next((each for each in (band.name, band.name.split()[0], '')
                  if wide > 7 * len(each)), '')
    if short:
      yield (f'<text class="band" x="{x + wide / 2:.1f}" y="{TOP - 7}" text-anchor="middle">'
             f'{escape(short)}</text>')


def _draw_axes(x_ticks, y_ticks, x_of, y_of, width, height):
  for tick in y_ticks:
    y = f'{y_of(tick):.1f}'
    yield f'<path class="grid" d="M{LEFT} {y}H{width - RIGHT}"/>'
    yield (f'<text x="{LEFT - 7}" y="{y}" dy="0.32em" text-anchor="end">'
           f'{format_number(tick, 1e3)}</text>')
  base = height - BOTTOM
  yield f'<path class="axis" d="M{LEFT} {base}H{width - RIGHT}"/>'
  for tick in x_ticks:
    x = f'{x_of(tick):.1f}'
    yield f'<path class="axis" d="M{x} {base}v4"/>'
    yield f'<text x="{x}" y="{base + 17}" text-anchor="middle">{format_number(tick, 1e3)}</text>'


def _draw_area(series, x_of, y_of):
  edge = [*zip(series.xs, series.low), *reversed(list(zip(series.xs, series.high)))]
  path = 'L'.join(f'{x_of(x):.1f} {y_of(y):.1f}' for x, y in edge)
  yield f'<path class="area c{series.color % COLORS}" d="M{path}Z"/>'


def _draw_series(series, x_of, y_of):
  points = [(x_of(x), y_of(y)) for x, y in _thin(list(zip(series.xs, series.ys)))]
  path = 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in points)
  dots = series.style == 'dots' and len(points) <= 60 or len(points) == 1
  yield f'<path class="{_look(series)}" d="{path}"/>'
  for x, y in points if dots else ():
    yield f'<circle class="c{series.color % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'


def _thin(points, limit=600):
  """At most `limit` points: of each run of neighbours the lowest and the highest."""
  size = math.ceil(2 * len(points) / limit)
  if size <= 2:
    return points
  runs = (points[i:i + size] for i in range(0, len(points), size))
  return [point for run in runs for point in sorted(
    {min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})]


def _draw_hovers(series, x_label, x_of, width, height, columns=90):
  """Invisible columns whose <title> says the values there."""
  wide = (width - LEFT - RIGHT) / columns
  values = {}
  for each in series:
    for x, y in zip(each.xs, each.ys) if each.style != 'faint' else ():
      values.setdefault(min(int((x_of(x) - LEFT) / wide), columns - 1), {})[each.name] = x, y
  for column, said in sorted(values.items()):
    x = max(x for x, _ in said.values())
    lines = [f'{format_number(x)} {x_label}', *(f'{n}: {y:.4g}' for n, (_, y) in said.items())]
    yield (f'<rect class="hover" x="{LEFT + column * wide:.1f}" y="{TOP}" width="{wide:.1f}" '
           f'height="{height - TOP - BOTTOM}"><title>{escape(chr(10).join(lines))}</title></rect>')
