"""The report of a run: one self-contained HTML page with its curves, samples and figures.

The page loads nothing and runs no script; it follows the reader's light or dark setting and prints.
Text that a model wrote is hostile: all of it is escaped, and the page forbids scripts besides.
"""

import importlib.metadata
import json
import platform
import re

from etils import epath

from qwen3_jax.evaluation.chart import Band, Series, escape, format_number, write_figure
from qwen3_jax.evaluation.reinforcement import is_reinforcement, write_rewards
from qwen3_jax.evaluation.tables import write_filters, write_modes, write_table
from qwen3_jax.training import metrics

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1b1d21; --soft: #646b75;
  --rule: #e3e4e6; --grid: #ececee; --band: #f4f4f2; --c0: #2b62d9; --c1: #d0530f; --c2: #13805b;
  --c3: #8b46c9; }
@media (prefers-color-scheme: dark) { :root { --page: #111317; --card: #181b20; --ink: #e4e6ea;
  --soft: #979fab; --rule: #2b2f37; --grid: #262a31; --band: #21262f; --c0: #7ba4ff;
  --c1: #ff9b5e; --c2: #57cda2; --c3: #c79bf7; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif;
  font-variant-numeric: tabular-nums }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 44px 0 4px }
h3 { font-size: 15px; margin: 0 0 2px }
section > h3 { margin-top: 22px }
p { margin: 4px 0 12px; max-width: 72ch }
.soft, figcaption, .legend { color: var(--soft); font-size: 14px }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 24px 0 0 }
dl.facts div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 14px }
dt { color: var(--soft); font-size: 13px }
dd { margin: 0; font-size: 20px; font-weight: 600; overflow-wrap: anywhere }
figure { margin: 14px 0 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 14px 16px 10px; min-width: 0 }
.plot { overflow-x: auto }
.plot svg { display: block; width: 100%; height: auto; min-width: 440px }
.wide .plot svg { min-width: 820px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 14px; margin-top: 14px }
.grid figure { margin: 0 }
.legend { margin: 0 0 4px; display: flex; flex-wrap: wrap; gap: 2px 18px }
.legend span { display: inline-flex; align-items: center; gap: 6px }
.swatch { width: 26px; height: 10px }
svg.swatch path.faint { stroke-width: 2; stroke-opacity: .45 }
svg text { font-size: 12px; fill: var(--soft) }
svg text.name, svg text.band { fill: var(--ink) }
svg text.band { font-weight: 600 }
svg path { fill: none; stroke-width: 1.9; stroke-linejoin: round }
svg path.grid { stroke: var(--grid); stroke-width: 1 }
svg path.axis { stroke: var(--soft); stroke-width: 1 }
svg rect.b0 { fill: transparent } svg rect.b1 { fill: var(--band) }
svg rect.hover { fill: var(--ink); fill-opacity: 0 } svg rect.hover:hover { fill-opacity: .09 }
svg path.c0 { stroke: var(--c0) } svg path.c1 { stroke: var(--c1) }
svg path.c2 { stroke: var(--c2) } svg path.c3 { stroke: var(--c3) }
svg circle.c0 { fill: var(--c0) } svg circle.c1 { fill: var(--c1) }
svg circle.c2 { fill: var(--c2) } svg circle.c3 { fill: var(--c3) }
svg path.faint { stroke-width: 1; stroke-opacity: .32 } svg path.dashed { stroke-dasharray: 5 4 }
.scroll { overflow-x: auto; margin-top: 14px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 15px; white-space: nowrap }
th, td { padding: 8px 14px; text-align: right; border-top: 1px solid var(--rule) }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px }
th:first-child { text-align: left }
.sample { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 16px; margin-top: 12px; break-inside: avoid }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.prompt { color: var(--soft); margin-bottom: 8px; padding-bottom: 8px;
  border-bottom: 1px dashed var(--rule) }
.completion { max-height: 26em; overflow-y: auto }
.thinking { color: var(--soft); font-style: italic; opacity: .85 }
details { margin-top: 10px } summary { cursor: pointer }
details pre { font-size: 13px; padding: 10px 0 0 18px }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb;
    --grid: #ddd; --band: #f1f1f1; --c0: #1f4fbf; --c1: #b8450a; --c2: #0d6b4b; --c3: #7434b3 }
  body { font-size: 11pt } main { max-width: none; padding: 0 1px }
  figure, .scroll, tr { break-inside: avoid } h2 { break-after: avoid; margin-top: 28px }
  .grid { grid-template-columns: 1fr 1fr } .completion { max-height: none }
  .plot svg, .wide .plot svg { min-width: 0 } details { break-inside: avoid }
  table { font-size: 9pt; white-space: normal } th, td { padding: 5px 8px }
  thead { display: table-header-group } thead th { font-size: 8pt } @page { margin: 16mm }
}
"""

ORDER = ('s1', 's2', 's3', 'cold_start', 'reasoning_rl', 'fusion', 'general_rl', 'distill_off',
         'distill_on')
TITLES = {'s1': 'S1 general', 's2': 'S2 reasoning', 's3': 'S3 long context',
          'cold_start': 'Cold start', 'reasoning_rl': 'Reasoning RL', 'fusion': 'Fusion',
          'general_rl': 'General RL',
          'reward_model': 'Reward model', 'dpo': 'DPO'}


def write_report(path, title, stages, facts):
  """Writes the page to `path`, whole or not at all.

  `stages` are dicts of which only `name` must be there: `metrics` (lines of metrics.jsonl),
  `config`, `workdir`, `samples` (dicts of `prompt`, `completion`, perhaps `thinking` and
  `heading`; a <think> block in the completion is dimmed too) and `probe`, the mean loss by
  position in a long text: {'positions': [...], 'losses': {'before S3': [...], ...},
  'old_length': 256}, `modes` (see `evaluation.modes.measure`) and `filters` (the report of
  `stages.curate.run`). `facts` maps what stands at the top to its value; a dict among its values
  ('versions') goes to the foot.
  """
  path = epath.Path(path)
  tables = {name: value for name, value in facts.items() if isinstance(value, dict)}
  facts = {name: value for name, value in facts.items() if name not in tables}
  facts |= {name: value for name, value in _sum_up(stages).items() if name not in facts}
  parts = [
    '<header>', f'<h1>{escape(title)}</h1>', _write_summary(stages),
    _write_facts(facts), '</header>', write_modes(stages, _title),
    write_rewards(stages, _title), _write_curves(stages),
    _write_stages(stages), *[_write_probe(stage) for stage in stages],
    write_filters(stages, _title), _write_samples(stages), _write_details(stages, tables)]
  new = path.parent / f'{path.name}.new'
  new.write_text('\n'.join([
    '<!doctype html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
    '<meta http-equiv="Content-Security-Policy" '
    'content="default-src \'none\'; style-src \'unsafe-inline\'">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<title>{escape(title)}</title>', f'<style>{STYLE}</style>', '</head>', '<body>', '<main>',
    *filter(None, parts), '</main>', '</body>', '</html>', '']))
  new.replace(path)


def read_stages(workdir):
  """The stages found in a recipe's workdir, in the recipe's order; a single run is one stage.

  A stage is a folder with metrics.jsonl; config.json, samples.json and probe.json are optional.
  Raises FileNotFoundError if there is none, ValueError naming a file that is not JSON.
  """
  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f'no folder {workdir}; give the workdir of a run')
  folders = [workdir, *(path for path in workdir.iterdir() if path.is_dir())]
  folders = [path for path in folders if (path / 'metrics.jsonl').exists()]
  if not folders:
    raise FileNotFoundError(f'no metrics.jsonl in {workdir} or in a folder below it; '
                            'give the workdir of a run that has begun')
  stages = []
  for folder in folders:
    lines = metrics.read(folder)
    name = lines[0].get('stage', folder.name) if lines and folder == workdir else folder.name
    stages.append({'name': name, 'workdir': str(folder), 'metrics': lines, **{
      part: read_json(folder / f'{part}.json') for part in ('config', 'samples', 'probe', 'modes')},
      'filters': read_json(folder / 'data' / 'report.json')})
  rank = {name: i for i, name in enumerate(ORDER)}
  return sorted(stages, key=lambda stage: (rank.get(stage['name'], len(rank)), stage['name']))


def read_json(path):
  """Content of a JSON file, None if it is not there; ValueError names a broken one."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); delete it or write it again') from None


def list_versions():
  """What the figures depend on: this machine, Python and the libraries."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  versions = {'machine': platform.platform(), 'python': platform.python_version()}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


def _lines(stage):
  return stage.get('metrics') or []


def _title(stage):
  return TITLES.get(stage['name'], str(stage['name']))


def _total(stage, key):
  return sum(line.get(key) or 0 for line in _lines(stage))


def _last(stage, key, window=1):
  """Mean of the last `window` values of a metric, or None."""
  values = [line[key] for line in _lines(stage) if isinstance(line.get(key), (int, float))]
  return sum(values[-window:]) / len(values[-window:]) if values else None


def _sum_up(stages):
  """What can be said of the whole run from its metrics alone."""
  tokens, seconds = (sum(_total(stage, key) for stage in stages) for key in ('tokens', 'seconds'))
  heldout = [loss for stage in stages if (loss := _last(stage, 'heldout_loss')) is not None]
  found = {
    'Steps': sum(len(_lines(stage)) for stage in stages),
    'Tokens': tokens and format_number(tokens),
    'Wall time': seconds and metrics.format_seconds(seconds),
    'Held-out loss': heldout and f'{heldout[-1]:.3f}'}
  return {name: value for name, value in found.items() if value}


def _write_summary(stages):
  names = ', then '.join(escape(_title(stage)) for stage in stages)
  return f'<p class="soft">Training stages: {names}.</p>' if stages else ''


def _write_facts(facts):
  items = ''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
                  for name, value in facts.items())
  return f'<dl class="facts">{items}</dl>' if items else ''


def _place(stages):
  """x of every line, running on through the stages, with the bands and the name of x.

  x counts tokens if every line says how many, else steps.
  """
  lines = [line for stage in stages for line in _lines(stage)]
  by_tokens = bool(lines) and all(line.get('tokens') for line in lines)
  places, bands, start = [], [], 0
  for stage in stages:
    xs, x = [], start
    for line in _lines(stage):
      x = x + line['tokens'] if by_tokens else start + line['step']
      xs.append(x)
    places.append(xs)
    bands.append(Band(_title(stage), start, x))
    start = x
  return places, bands, 'tokens' if by_tokens else 'steps'


def _write_curves(stages):
  """The losses, and a grid of the smaller charts."""
  if not any(map(_lines, stages)):
    return '<p>No metrics were recorded.</p>'
  places, bands, x_label = _place(stages)

  def curve(key, name, color=0, style='line', smooth=None):
    return [Series(name, xs, _smooth(_values(stage, key), smooth), color, style)
            for stage, xs in zip(stages, places)
            if key != 'loss' or not is_reinforcement(stage)]

  losses = [*curve('loss', 'train, each step', 0, 'faint'),
            *curve('loss', 'train, smoothed', 0, smooth=25),
            *curve('heldout_loss', 'held-out', 1, 'dots')]
  small = [
    ('Learning rate', 'As scheduled, by stage.', curve('lr', 'learning rate'), {'zero': True}),
    ('Gradient norm', 'Before clipping; logarithmic.',
     curve('grad_norm', 'each step', 0, 'faint') + curve('grad_norm', 'smoothed', smooth=25),
     {'log': True}),
    ('Speed', 'Target tokens per second.',
     curve('tokens_per_s', 'each step', 2, 'faint')
     + curve('tokens_per_s', 'smoothed', 2, smooth=25), {'zero': True}),
    ('Expert balance', 'Balance loss, and the busiest expert against the mean; 1 is even.',
     curve('balance', 'balance loss', 3) + curve('expert_peak', 'busiest expert', 1), {})]
  figures = [write_figure(heading, caption, series, x_label, heading.lower(), bands=bands,
                           **options) for heading, caption, series, options in small]
  return '\n'.join([
    '<section>', '<h2>Curves</h2>',
    write_figure('Loss', 'Mean negative log-likelihood of the next token, in nats.', losses,
                  x_label, 'loss', wide=True, bands=bands),
    '<div class="grid">', *filter(None, figures), '</div>', '</section>'])


def _values(stage, key):
  """A metric's values, one a line; a vector (one a layer) as its mean."""
  values = (line.get(key) for line in _lines(stage))
  return [_mean(value) if isinstance(value, list) else value for value in values]


def _mean(values):
  values = [value for value in values if value is not None]
  return sum(values) / len(values) if values else None


def _smooth(values, share):
  """Centred running mean over 1/`share` of the values, a third as wide at both ends."""
  if share is None:
    return values
  half, sums, counts = len(values) // (2 * share), [0.0], [0]
  for value in values:
    sums.append(sums[-1] + (value or 0))
    counts.append(counts[-1] + (value is not None))
  smoothed = []
  for i in range(len(values)):
    reach = max(min(half, i, len(values) - 1 - i), half // 3)
    low, high = max(i - reach, 0), min(i + reach + 1, len(values))
    count = counts[high] - counts[low]
    smoothed.append((sums[high] - sums[low]) / count if count else None)
  return smoothed


def _write_stages(stages):
  """One row a stage."""
  columns = ('Stage', 'Steps', 'Tokens', 'Sequence length', 'Train loss', 'Held-out loss',
             'Tokens/s', 'MFU', 'Time')
  rows = []
  for stage in stages:
    seconds, shown = _total(stage, 'seconds'), lambda x, form: '–' if x is None else form.format(x)
    rows.append((
      _title(stage), len(_lines(stage)), format_number(_total(stage, 'tokens')),
      shown(_find(stage.get('config'), r'(seq(uence)?_?)?len(gth)?'), '{}'),
      shown(_last(stage, 'loss', 10), '{:.3f}'), shown(_last(stage, 'heldout_loss'), '{:.3f}'),
      shown(_last(stage, 'tokens_per_s', 50), '{:,.0f}'), shown(_last(stage, 'mfu', 50), '{:.1%}'),
      metrics.format_seconds(seconds)))
  return ('<section><h2>Stages</h2><p class="soft">Train loss is the mean of the last 10 steps; '
          'speed and MFU are of the last 50. Held-out loss is that of text or, in post-training, '
          f'of conversations.</p>{write_table(columns, rows)}</section>') if rows else ''


def _find(config, pattern):
  """The first value in nested dicts whose key matches, or None."""
  for key, value in config.items() if isinstance(config, dict) else ():
    found = _find(value, pattern) if isinstance(value, dict) else (
      value if re.fullmatch(pattern, key) else None)
    if found is not None:
      return found
  return None


def _write_probe(stage):
  probe = stage.get('probe')
  if not probe:
    return ''
  series = [Series(name, probe['positions'], losses, i % 4, 'line' if i else 'dashed')
            for i, (name, losses) in enumerate(probe['losses'].items())]
  old, last = probe.get('old_length'), max(probe['positions'])
  bands = [Band('trained length before', 0, old), Band('beyond it', old, last)] if old else []
  figure = write_figure(
    'Loss by position', 'Mean loss of held-out text against the position in it: lower to the right '
    'means that the model uses what lies far back.', series, 'position', 'loss', wide=True,
    bands=bands)
  return f'<section><h2>Long-context probe</h2>{figure}</section>' if figure else ''


def _write_samples(stages):
  parts = []
  for stage in stages:
    for sample in stage.get('samples') or ():
      heading = escape(sample.get('heading') or _title(stage))
      parts.append(
        f'<article class="sample"><h3>{heading}</h3>'
        f'<pre class="prompt">{escape(sample.get("prompt", ""))}</pre>'
        f'<pre class="completion">{_dim(sample)}</pre></article>')
  return '\n'.join(['<section>', '<h2>Samples</h2>', '<p class="soft">Drawn from the model at the '
                    'end of a stage; thinking is dimmed.</p>', *parts, '</section>'
                    ]) if parts else ''


def _dim(sample):
  """A completion as HTML with its thinking marked."""
  thinking, text = sample.get('thinking') or '', str(sample.get('completion', ''))
  block = re.match(r'\s*<think>(.*?)(</think>|\Z)', text, re.DOTALL)
  if block:
    thinking, text = thinking + block[1], text[block.end():]
  dimmed = f'<span class="thinking">{escape(thinking.strip())}</span>\n' if thinking.strip() else ''
  return dimmed + escape(text.strip() if dimmed else text)


def _write_details(stages, tables):
  """Configs and versions, folded."""
  tables = {f'Config of {_title(stage)}': stage['config'] for stage in stages
            if stage.get('config')} | {name.capitalize(): table for name, table in tables.items()}
  folded = [f'<details><summary>{escape(name)}</summary>'
            f'<pre>{escape(json.dumps(table, indent=2, default=str, ensure_ascii=False))}</pre>'
            '</details>' for name, table in tables.items()]
  return '\n'.join(['<section>', '<h2>How it was made</h2>', *folded, '</section>'
                    ]) if folded else ''
