"""The report of a run: one self-contained HTML page with its curves, tables and transcripts.

The page loads nothing and runs no script; it follows the reader's light or dark setting and prints.
Text that a model wrote is hostile: all of it is escaped, and the page forbids scripts besides.
"""

import json

from etils import epath

from qwen3_jax.evaluation.chart import escape, format_number
from qwen3_jax.evaluation.curves import write_curves, write_probe
from qwen3_jax.evaluation.distilled import is_distillation, write_distillation
from qwen3_jax.evaluation.heat import write_heat
from qwen3_jax.evaluation.progress import write_modes
from qwen3_jax.evaluation.reinforcement import is_reinforcement, write_rewards
from qwen3_jax.evaluation.style import write_style
from qwen3_jax.evaluation.tables import last, total, write_filters, write_stages
from qwen3_jax.evaluation.transcripts import write_samples
from qwen3_jax.evaluation.workdir import title as name_stage
from qwen3_jax.training.metrics import format_seconds


def write_report(path, title, stages, facts, comparison=None):
  """Writes the page to `path`, whole or not at all.

  `stages` are dicts of which only `name` must be there (see `workdir.read_stages`): `metrics`
  (lines of metrics.jsonl), `config`, `workdir`, `samples` (see `transcripts`), `probe`, the mean
  loss by position in a long text: {'positions': [...], 'losses': {'before S3': [...], ...},
  'old_length': 256}, `modes` (see `progress`), `arrays` (see `heat`), `filters`
  (the report of `stages.curate.run`), `origin`, `cost`, `times`. `facts` maps what stands at the
  top to its value; a dict among its values ('versions') goes to the foot. `comparison`: see
  `distilled`.
  """
  path = epath.Path(path)
  tables = {name: value for name, value in facts.items() if isinstance(value, dict)}
  facts = {name: value for name, value in facts.items() if name not in tables}
  facts |= {name: value for name, value in _sum_up(stages).items() if name not in facts}
  parts = [
    '<header>', f'<h1>{escape(title)}</h1>', _write_way(stages), _write_facts(facts), '</header>',
    write_modes(stages, name_stage), write_rewards(stages, name_stage),
    write_distillation(stages, comparison, name_stage),
    write_curves(stages, name_stage, _of_policy), *[write_probe(stage) for stage in stages],
    write_heat(stages, name_stage), write_stages(stages, name_stage, _of_policy),
    write_filters(stages, name_stage), write_samples(stages, name_stage),
    _write_details(stages, tables)]
  new = path.parent / f'{path.name}.new'
  new.write_text('\n'.join([
    '<!doctype html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
    '<meta http-equiv="Content-Security-Policy" '
    'content="default-src \'none\'; style-src \'unsafe-inline\'">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<title>{escape(title)}</title>', f'<style>{write_style()}</style>', '</head>', '<body>',
    '<main>', *filter(None, parts), '</main>', '</body>', '</html>', '']))
  new.replace(path)


def _of_policy(stage):
  return is_reinforcement(stage) or is_distillation(stage)


def _sum_up(stages):
  """What can be said of the whole run from its metrics alone."""
  tokens, seconds = (sum(total(stage, key) for stage in stages) for key in ('tokens', 'seconds'))
  flops = sum(stage['cost'].flops for stage in stages if stage.get('cost'))
  heldout = [loss for stage in stages if (loss := last(stage, 'heldout_loss')) is not None]
  found = {
    'Steps': sum(len(stage.get('metrics') or ()) for stage in stages),
    'Tokens learnt': tokens and format_number(tokens),
    'FLOPs': flops and f'{flops:.2g}',
    'Time of training': seconds and format_seconds(seconds),
    'Held-out loss': len(heldout) == 1 and f'{heldout[-1]:.3f}'}
  return {name: value for name, value in found.items() if value}


def _write_way(stages):
  items = ''.join(f'<li>{escape(name_stage(stage))}</li>' for stage in stages)
  return f'<ol class="way">{items}</ol>' if items else ''


def _write_facts(facts):
  items = ''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
                  for name, value in facts.items())
  return f'<dl class="facts">{items}</dl>' if items else ''


def _write_details(stages, tables):
  """Configs, folded, and versions."""
  folded = {f'Config of {name_stage(stage)}': stage['config'] for stage in stages
            if stage.get('config')}
  parts = [f'<h3>{escape(name.capitalize())}</h3>{_write_facts(table)}'
           for name, table in tables.items()]
  parts += [f'<details><summary>{escape(name)}</summary>'
            f'<pre>{escape(json.dumps(table, indent=2, default=str, ensure_ascii=False))}</pre>'
            '</details>' for name, table in folded.items()]
  return '\n'.join(['<section class="made">', '<h2>How it was made</h2>', *parts, '</section>'
                    ]) if parts else ''
