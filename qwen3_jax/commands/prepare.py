"""Makes the data that a stage's config asks for, before the stage trains."""
import json

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import filter as filters
from qwen3_jax.commands import fuse


def prepare(config, workdir):
  """Runs `config.prepare`, if there is one, in workdir/data; returns an exit code.

  `prepare.by` is 'filter' or 'fuse', `prepare.config` that command's config with `prepare.set` as
  overrides, `prepare.inputs` its inputs by name. The model they ask is `config.teacher`, where a
  config has one, else `config.init`. The config then trains on what was made, unless
  `data.sources` names something else.
  """
  todo = config.get('prepare')
  if not todo:
    return 0
  model = config.get('teacher') or config.init
  if todo.by == 'fuse' and not model:
    raise ValueError('fusion samples the model that it continues: give one with --init=DIR')
  data = workdir / 'data'
  settings = configs.load_config(todo.config, [f'--config.{each}' for each in todo.set])
  inputs = {name: list(specs) for name, specs in todo.inputs.items()}
  if todo.by == 'filter':
    models = dict.fromkeys(('generator', 'judge'), model)
    code = filters.run(settings, inputs['input'], data, models)
    made = data / json.loads((data / 'report.json').read_text())['output']
  else:
    code = fuse.build(settings, data, model, **inputs)
    made = data / 'fused.jsonl'
  with config.unlocked():
    config.data.sources = config.data.sources or ((str(made), 1.0),)
    if todo.by == 'fuse':
      config.data.heldout = config.data.heldout or (str(data / 'heldout.jsonl'),)
  return code
