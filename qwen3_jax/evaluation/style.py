"""The report's looks: colours for light and dark, the page's style sheet, that of its charts.

Of the eight colours of lines the first four are told apart best. All eight differ under the three
kinds of colour blindness (CIE76 distance 15 or more in simulation) and stand out from the page;
charts with more lines go on with dashes.
"""
import re

LIGHT = {
  'page': '#fafaf8', 'card': '#fff', 'ink': '#1b1d21', 'soft': '#616873', 'rule': '#e2e3e6',
  'grid': '#ececee', 'band': '#f4f4f2', 'better': '#0d7a4d', 'worse': '#b3370a',
  'c0': '#1f57b5', 'c1': '#e2470b', 'c2': '#00966b', 'c3': '#8a8f9f', 'c4': '#a8903c',
  'c5': '#7a6ff0', 'c6': '#4b2937', 'c7': '#8e402d'}
DARK = {
  'page': '#111317', 'card': '#181b20', 'ink': '#e4e6ea', 'soft': '#9aa2ae', 'rule': '#2b2f37',
  'grid': '#262a31', 'band': '#20252d', 'better': '#58d39b', 'worse': '#ff9a68',
  'c0': '#5a8cff', 'c1': '#f08a3c', 'c2': '#3ee08f', 'c3': '#8f8a99', 'c4': '#f5e95a',
  'c5': '#e9a0f5', 'c6': '#c0e6ff', 'c7': '#f0455a'}
COLORS = 8

CHARTS = """
svg text { font-size: 12px; fill: var(--soft) }
svg text.name, svg text.band { fill: var(--ink) }
svg text.band { font-weight: 600 }
svg path { fill: none; stroke-width: 1.9; stroke-linejoin: round }
svg path.grid { stroke: var(--grid); stroke-width: 1 }
svg path.axis { stroke: var(--soft); stroke-width: 1 }
svg rect.b0 { fill: none } svg rect.b1 { fill: var(--band) }
svg rect.hover { fill: var(--ink); fill-opacity: 0 }
svg rect.empty { fill: var(--grid) }
""" + ''.join(
  f'svg path.c{i} {{ stroke: var(--c{i}) }} svg circle.c{i}, svg rect.c{i}, svg path.area.c{i} '
  f'{{ fill: var(--c{i}) }}\n' for i in range(COLORS)) + """
svg path.area { stroke: none; fill-opacity: .16 }
svg path.d1 { stroke-dasharray: 9 3 } svg path.d2 { stroke-dasharray: 2 3 }
svg path.faint { stroke-width: 1; stroke-opacity: .36 } svg path.dashed { stroke-dasharray: 5 4 }
"""

PAGE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif;
  font-variant-numeric: tabular-nums }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 52px 0 4px }
h3 { font-size: 15px; margin: 0 0 2px }
section > h3, details > h3 { margin-top: 22px }
p { margin: 4px 0 12px; max-width: 76ch }
.soft, figcaption, .legend { color: var(--soft); font-size: 14px }
.way { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 0; margin: 10px 0 0; padding: 0 }
.way li { font-size: 13px; padding: 2px 10px; border: 1px solid var(--rule);
  border-radius: 99px; background: var(--card); white-space: nowrap }
.way li + li { margin-left: 20px; position: relative }
.way li + li::before { content: '\\2192'; position: absolute; left: -18px; color: var(--soft) }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px;
  margin: 24px 0 0 }
dl.facts div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 14px }
dt { color: var(--soft); font-size: 13px }
dd { margin: 0; font-size: 20px; font-weight: 600; overflow-wrap: anywhere }
.made dd { font-size: 14px; font-weight: 400 }
figure { margin: 14px 0 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 14px 16px 10px; min-width: 0 }
.plot { overflow-x: auto }
.plot svg { display: block; width: 100%; height: auto; min-width: 400px }
.wide .plot svg { min-width: 820px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 14px; margin-top: 14px }
.grid figure { margin: 0 }
.legend { margin: 0 0 4px; display: flex; flex-wrap: wrap; gap: 2px 18px }
.legend span { display: inline-flex; align-items: center; gap: 6px }
.swatch { width: 26px; height: 10px; flex: none }
svg.swatch path.faint { stroke-width: 2; stroke-opacity: .5 }
svg rect.hover:hover { fill-opacity: .09 }
.scroll { overflow-x: auto; margin-top: 14px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 15px; white-space: nowrap }
th, td { padding: 8px 14px; text-align: right; border-top: 1px solid var(--rule) }
thead tr:first-child th { border-top: 0 }
thead th { color: var(--soft); font-weight: 500; font-size: 13px }
thead th[colspan] { text-align: center; color: var(--ink); font-weight: 600 }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card) }
td[colspan] { text-align: center }
table.close { font-size: 14px } table.close th, table.close td { padding: 7px 8px }
tbody th { font-weight: 500 } tr.part th { padding-left: 30px; font-weight: 400 }
tr.part td, tr.part th { border-top: 0; padding-top: 2px; padding-bottom: 4px; font-size: 14px }
td.first, th.first { border-left: 1px solid var(--rule) }
td small { display: block; color: var(--soft); font-size: 12px; line-height: 1.3 }
td i { font-style: normal; font-size: 13px; color: var(--soft); margin-left: 5px }
td i.better { color: var(--better); font-weight: 600 }
td i.worse { color: var(--worse); font-weight: 600 }
td.long { white-space: normal; text-align: left; min-width: 240px; font-size: 14px }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 16px; margin-top: 12px }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.prompt { color: var(--soft); padding-bottom: 10px }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 235px), 1fr));
  gap: 1px; padding: 1px }
.answers > div { background: var(--card); padding: 8px 12px 10px; min-width: 0;
  box-shadow: 0 0 0 1px var(--rule) }
.answers h4 { margin: 0 0 4px; font-size: 13px; font-weight: 600; color: var(--soft) }
.answers pre { max-height: 22em; overflow-y: auto; font-size: 13px }
.thinking { margin: 0 0 6px; color: var(--soft); font-size: 13px }
.thinking pre { font-style: italic; padding: 4px 0 4px 10px; border-left: 2px solid var(--rule) }
details { margin-top: 10px } summary { cursor: pointer }
section > details > pre { font-size: 13px; padding: 10px 0 0 18px }
"""

PRINT = """
@media print {
  :root { --page: #fff }
  body { font-size: 10.5pt } dd { font-size: 12pt } .made dd { font-size: 8pt }
  main { max-width: none; padding: 0 1px }
  figure, .scroll, tr, dl.facts div, .answers > div { break-inside: avoid }
  article { break-inside: avoid } th:first-child { position: static }
  h2, h3 { break-after: avoid } h2 { margin-top: 26px } .prompt { break-after: avoid }
  .grid { grid-template-columns: 1fr 1fr } .answers { grid-template-columns: 1fr 1fr 1fr }
  .plot, .scroll { overflow: visible } .answers pre { max-height: none; font-size: 8pt }
  .plot svg, .wide .plot svg { min-width: 0; max-height: 82mm }
  details::details-content { content-visibility: visible; block-size: auto }
  table, table.close { font-size: 8.5pt; white-space: normal } th, td { padding: 4px 6px }
  td small { font-size: 7pt } td i { font-size: 7.5pt } td.long { min-width: 0; font-size: 8pt }
  thead { display: table-header-group } thead th { font-size: 8pt } @page { margin: 14mm }
  section > details > pre { font-size: 7.5pt; columns: 2 }
}
"""


def write_style():
  """The page's style sheet."""
  def root(colors):
    return ':root { ' + ' '.join(f'--{name}: {value};' for name, value in colors.items()) + ' }'
  dark = f'@media screen and (prefers-color-scheme: dark) {{ {root(DARK)} }}'
  return f':root {{ color-scheme: light dark }} {root(LIGHT)}\n{dark}\n{PAGE}{CHARTS}{PRINT}'


def write_chart_style():
  """The rules of charts with the light colours filled in, for a picture that stands alone."""
  return re.sub(r'var\(--(\w+)\)', lambda match: LIGHT[match[1]], CHARTS)
