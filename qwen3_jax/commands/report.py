"""Writes the report of a run: curves, tables, transcripts and figures on one HTML page.

Reads DIR/<stage>/metrics.jsonl, config.json, samples.json, modes.json and what else every stage has
kept (or those of DIR itself, for a single run), DIR/compared/comparison.json and DIR/facts.json;
what is missing is left out. The page needs no network and no scripts. Every figure is written into
a folder beside it too, as SVG and as PNG.

Examples:
  python -m qwen3_jax report --workdir=runs/tiny
  python -m qwen3_jax report --workdir=runs/tiny --to=report.html --title='Tiny, second try'
"""

from pathlib import Path

from qwen3_jax.evaluation.pictures import write_pictures
from qwen3_jax.evaluation.report import write_report
from qwen3_jax.evaluation.workdir import list_versions, read_json, read_stages


def add_arguments(parser):
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of the run')
  parser.add_argument('--to', metavar='FILE', help='the page; DIR/report.html if absent')
  parser.add_argument('--title', help='heading; names the folder if absent')


def main(args):
  path = Path(args.to) if args.to else None
  print(f'report: {write(Path(args.workdir), path, args.title)}')


def write(workdir, path=None, title=None):
  """Writes the page of the run in `workdir` and its pictures; returns the page's path."""
  stages = read_stages(workdir)
  facts = read_json(workdir / 'facts.json') or {}
  path = path or workdir / 'report.html'
  title = title or f'Qwen3 in JAX: {workdir.resolve().name}'
  write_report(path, title, stages, {'versions': list_versions()} | facts,
               read_json(workdir / 'compared' / 'comparison.json'))
  problem = write_pictures(path, path.parent / f'{path.stem}_figures')
  if problem:
    print(f'figures are SVG only: {problem}')
  return path.resolve()
