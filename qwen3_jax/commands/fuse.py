"""Builds the data of thinking-mode fusion: both modes, flags, conversations of several turns.

Thinking answers are drawn from --model for --queries and kept where they are right and clean; the
conversations of --plain (and --translation) are kept where they meet their checklist. The mixture
goes to WORKDIR/fused.jsonl, a part of it to WORKDIR/heldout.jsonl, its counts to report.json. Run
the same command again and it goes on where it was. Exit code 75: records failed, run it again.

With --config=configs/fuse.py:distill, --model is a teacher and --plain are questions too, which it
answers without thinking: its right answers in both modes are what a student learns first.

Examples:
  python -m qwen3_jax fuse --model=runs/rl --queries='cold/*/accepted.jsonl' --workdir=runs/fuse \\
    --plain='chats/*.jsonl' --translation='translations/*.jsonl' --judge=http://localhost:8000/v1
  python -m qwen3_jax train --config=configs/fusion.py:8b --init=runs/rl --workdir=runs/fusion \\
    --config.data.sources="(('runs/fuse/fused.jsonl', 1.0),)"
  python -m qwen3_jax fuse --config=configs/fuse.py:distill --model=Qwen3-32B \\
    --queries='questions/*.jsonl' --plain='questions/*.jsonl' --workdir=runs/taught
"""
import json

from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import filter as filters


def add_arguments(parser):
  parser.add_argument('--config', default='configs/fuse.py', metavar='FILE:ARG',
                      help='thresholds, shares and rates')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='all is written here')
  parser.add_argument('--model', metavar='MODEL', help='whose thinking is sampled: the model that '
                      'will be trained on it; folder or http address')
  parser.add_argument('--queries', required=True, action='append', metavar='FILES',
                      help='questions with reference answers')
  parser.add_argument('--plain', required=True, action='append', metavar='FILES',
                      help='conversations answered without thinking (questions for a teacher)')
  parser.add_argument('--translation', action='append', metavar='FILES',
                      help='conversations that translate')
  parser.add_argument('--judge', metavar='MODEL', help='writes and scores checklists; without it '
                      'only rules are checked')
  parser.add_argument('--tests', action='append', metavar='FILES',
                      help='test items that must not be in the result')


def main(args):
  config = configs.load_given(args)
  given = {name: filters.split_files(getattr(args, name))
           for name in ('queries', 'plain', 'translation', 'tests')}
  return build(config, epath.Path(args.workdir), args.model, args.judge, **given)


def build(config, workdir, model, judge=None, queries=(), plain=(), translation=(), tests=()):
  """Runs the filters, then mixes; returns the exit code."""
  with config.unlocked():
    for part in (config.thinking, config.plain):
      part.decontaminate.tests = (*part.decontaminate.tests, *tests)
      if not part.decontaminate.tests:
        part.skip = (*part.skip, 'decontaminate')
    if not judge:
      config.plain.checklist.model = None
  code = 0
  parts = [('thinking', config.thinking, queries), ('plain', config.plain, plain)]
  if translation:
    parts.append(('translation', config.plain, translation))
  for name, part, inputs in parts:
    print(f'-- {name}', flush=True)
    code = filters.run(part, inputs, workdir / name, dict(generator=model, judge=judge)) or code
    accepted = json.loads((workdir / name / 'report.json').read_text())['stages'][-1]['accepted']
    if not accepted and not code:
      raise ValueError(f'no {name} record is left; the rejected.jsonl in the folders of '
                       f'{workdir / name} say why: give a better model or other data')
  if code:
    print('nothing is mixed while records have failed; run again')
    return code
  mix(config, workdir, [name for name, *_ in parts])
  return code


def mix(config, workdir, names):
  """Writes fused.jsonl, heldout.jsonl and report.json from what the filters accepted.

  No question is in both. Without `size` the mixture ends where the first pool has been used once.
  """
  from qwen3_jax.data import conversations, fusion
  reports = {name: json.loads((workdir / name / 'report.json').read_text()) for name in names}
  rates = dict(config.mix)
  wanted, share = rates.pop('size'), rates.pop('heldout')
  counts = {}
  parts = (('heldout', 'heldout'), ('fused', 'train')) if share else (('fused', None),)
  for file, split in parts:
    pools = {name: conversations.read(str(workdir / name / report['output']), split, share)
             for name, report in reports.items()}
    size = wanted and max(1, round(wanted * (share if split == 'heldout' else 1 - share)))
    size = size or fusion.fit({name: len(pool) for name, pool in pools.items()}, **rates)
    counts[file] = fusion.Counts()
    new = workdir / f'{file}.jsonl.new'
    with new.open('w') as out:
      for record in fusion.fuse(pools['thinking'], pools['plain'], pools.get('translation'),
                                size=size, **rates):
        counts[file].add(record)
        out.write(json.dumps(record, ensure_ascii=False) + '\n')
    new.replace(workdir / f'{file}.jsonl')
  stages = [dict(line, name=f'{name}: {line["name"]}')
            for name, report in reports.items() for line in report['stages']]
  (workdir / 'report.json').write_text(json.dumps(dict(stages=stages, mixed=counts), indent=2))
  for file, each in counts.items():
    print(f'{file}.jsonl: ' + ', '.join(f'{n:,} {name}' for name, n in sorted(each.items())))
