"""Makes training data: queries, answers, chats and texts through stages that say why they reject.

--config names the pipeline: cold_start (questions to checked answers with reasoning), rl (questions
of a learnable band), text and chat (rules, duplicates, test items), synthetic (new text from
seeds). Each stage has a folder in the workdir: accepted.jsonl, rejected.jsonl with the rule and the
reason, failed.jsonl with what a model could not be asked. Run the same command again and it goes on
where it was, and tries again what failed. Exit code 75: done, but records failed.

A model is a folder that the engine loads, or an OpenAI-compatible address, 'http://host:port/v1',
with '#name' if it serves several; the key is that of $OPENAI_API_KEY. FILES are paths or globs,
separated by commas; 'tasks:size=1000,...' (alone in its flag) are generated problems.

Examples:
  python -m qwen3_jax filter --config=configs/filter.py:cold_start --workdir=runs/cold \\
    --input='questions/*.jsonl' --tests='tests/*.jsonl' --judge=http://localhost:8000/v1 \\
    --annotator=http://localhost:8000/v1 --generator=Qwen3-8B
  python -m qwen3_jax filter --config=configs/filter.py:text --workdir=runs/text \\
    --input='texts/*.jsonl' --skip=decontaminate --config.repetition.share=0.4
"""
import functools

from qwen3_jax.commands import config as configs

FAILED_RECORDS = 75
ROLES = ('generator', 'judge', 'annotator')


def add_arguments(parser):
  parser.add_argument('--config', required=True, metavar='FILE:ARG',
                      help='e.g. configs/filter.py:cold_start')
  parser.add_argument('--input', required=True, action='append', metavar='FILES',
                      help='JSON lines of questions, chats, texts or seeds; may be repeated')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='a folder for each stage')
  for role in ROLES:
    parser.add_argument(f'--{role}', metavar='MODEL', help='folder of a model, or http address')
  parser.add_argument('--tests', action='append', metavar='FILES',
                      help='test and validation items that must not be in the result')
  parser.add_argument('--used', action='append', metavar='FILES',
                      help='conversations trained on before; rl leaves their questions out')
  parser.add_argument('--skip', default='', metavar='STAGES',
                      help='stages to leave out, separated by commas')


def main(args):
  config = configs.load_given(args)
  with config.unlocked():
    config.skip = (*config.skip, *filter(None, args.skip.split(',')))
    config.decontaminate.tests = (*config.decontaminate.tests, *split_files(args.tests))
    config.band.used = (*config.band.used, *split_files(args.used))
  return run(config, split_files(args.input), args.workdir,
             {role: getattr(args, role) for role in ROLES})


def split_files(given):
  """The specs in flags that may be repeated and hold commas; those of tasks are whole."""
  return [spec for text in given or ()
          for spec in ([text] if text.startswith('tasks:') else filter(None, text.split(',')))]


def run(config, inputs, workdir, models=None):
  """Runs the pipeline of `config` and prints its table; returns the exit code.

  `models` are {'generator': spec, 'judge': spec, 'annotator': spec}, where given.
  """
  from rich.console import Console

  from qwen3_jax.stages import curate, pipelines
  models = {role: spec for role, spec in (models or {}).items() if spec}
  check_models(models)
  opener = functools.cache(functools.partial(open_model, config))
  stages = pipelines.make_stages(config, models, opener)
  report = curate.run(stages, inputs, workdir, config.workers, config.patience,
                      functools.partial(print, flush=True))
  console = Console()
  curate.show(report, console)
  failed = sum(line['failed'] for line in report['stages'])
  console.print(f'{report["stages"][-1]["accepted"]:,} records in {workdir}/{report["output"]}',
                soft_wrap=True, highlight=False)
  if failed:
    console.print(f'{failed:,} records failed (failed.jsonl says why); run again to try them again')
  return FAILED_RECORDS if failed else 0


def check_models(models):
  """FileNotFoundError for a folder that holds no model."""
  for spec in models.values():
    if not spec.startswith(('http://', 'https://')):
      from qwen3_jax.stages import load
      load.find(spec)


def open_model(config, spec):
  """Responder of `spec`, with the config's options for its kind."""
  from qwen3_jax.generation.respond import open_responder
  if spec.startswith(('http://', 'https://')):
    return open_responder(spec, **config.endpoint)

  def load_folder(folder):
    import jax

    from qwen3_jax.stages import load
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    return load.load_model(folder, dtype=dtype)
  return open_responder(spec, load_folder, **config.engine)
