"""The figures of a report as files of their own: SVG, and PNG where it can be made."""
import html
import re
from xml.etree import ElementTree

from qwen3_jax.evaluation.style import LIGHT, write_chart_style

SVG = 'http://www.w3.org/2000/svg'
FONTS = "Arial, Helvetica, 'Liberation Sans', 'DejaVu Sans', sans-serif"
EDGE, LETTER = 16, 6.6  # px around a figure; px that a letter of a legend takes
ZOOM = 2


def write_pictures(page, folder):
  """Writes every figure of the page into `folder`, named by its heading; old ones go.

  Returns what kept it from writing PNGs, or None.
  """
  folder.mkdir(exist_ok=True)
  for old in (*folder.glob('*.svg'), *folder.glob('*.png')):
    old.unlink()
  render, problem = _find_renderer()
  for figure in re.findall('<figure .*?</figure>', page.read_text(), re.DOTALL):
    name, text = draw_picture(figure)
    (folder / f'{name}.svg').write_text(text)
    if render:
      (folder / f'{name}.png').write_bytes(render(text))
  return problem


def _find_renderer():
  """(function from SVG text to the bytes of a PNG, None), or (None, why there is none)."""
  try:
    import resvg_py
  except ImportError:
    return None, 'PNGs need the package resvg-py (pip install resvg-py)'

  def render(text):
    return bytes(resvg_py.svg_to_bytes(svg_string=text, zoom=ZOOM, background=LIGHT['card']))
  blank = f'<svg xmlns="{SVG}" width="9" height="9">{{}}</svg>'
  letter = f'<text y="9" font-family="{html.escape(FONTS)}">A</text>'
  if render(blank.format(letter)) == render(blank.format('')):
    return None, 'this machine has no fonts, which PNGs need (apt install fonts-dejavu-core)'
  return render, None


def draw_picture(figure):
  """(file name, SVG text) of a <figure> of the page: heading, caption, legend and plot in one."""
  root = ElementTree.fromstring(figure)
  plot = root.find('div/svg')
  wide, high = map(float, plot.get('viewBox').split()[2:])
  for parent in list(plot.iter()):
    for child in [child for child in parent if child.get('class') == 'hover'
                  or child.tag == 'title']:
      parent.remove(child)
  heading = root.findtext('h3')
  lines = [f'<text class="name" x="{EDGE}" y="{EDGE + 15}" style="font-size: 16px; '
           f'font-weight: 600">{html.escape(heading)}</text>']
  y = EDGE + 22
  for line in _wrap(root.findtext('figcaption') or '', int(wide / LETTER)):
    y += 17
    lines.append(f'<text x="{EDGE}" y="{y}">{html.escape(line)}</text>')
  y, legend = _lay_out_legend(root.findall("p[@class='legend']/span"), y + 8, wide)
  plot.attrib |= dict(x=str(EDGE), y=f'{y + 8}', width=f'{wide:g}', height=f'{high:g}')
  width, height = wide + 2 * EDGE, y + 8 + high + EDGE
  drawn = ElementTree.tostring(plot, encoding='unicode')
  name = re.sub('[^a-z0-9]+', '-', heading.lower()).strip('-') or 'figure'
  return name, (
    f'<svg xmlns="{SVG}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
    f'height="{height:g}"><style>svg {{ font-family: {FONTS} }}{write_chart_style()}</style>'
    f'<rect width="100%" height="100%" fill="{LIGHT["card"]}"/>{"".join(lines)}{legend}{drawn}'
    '</svg>\n')


def _wrap(text, letters):
  lines = ['']
  for word in text.split():
    if len(lines[-1]) + len(word) >= letters:
      lines.append('')
    lines[-1] = f'{lines[-1]} {word}'.strip()
  return lines if text else []


def _lay_out_legend(entries, y, width):
  """(y below it, SVG) of a legend's swatches and names, in as many lines as they need."""
  x, parts = EDGE, []
  y += 12 if entries else 0
  for entry in entries:
    swatch, name = entry.find('svg'), entry.find('svg').tail or ''
    need = 34 + LETTER * len(name) + 18
    if x > EDGE and x + need > width:
      x, y = EDGE, y + 18
    swatch.tail = None
    swatch.attrib |= dict(x=f'{x:g}', y=f'{y - 9}', width='26', height='10')
    parts.append(ElementTree.tostring(swatch, encoding='unicode')
                 + f'<text x="{x + 34:g}" y="{y}">{html.escape(name)}</text>')
    x += need
  return y, ''.join(parts)
