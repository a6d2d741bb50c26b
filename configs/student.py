"""A base for the tiny student: what S1 to S3 are to a released size, in a few seconds.

Students of a real size begin with a base that exists (Qwen3-8B-Base): this file has none for them.
"""
from qwen3_jax.stages.defaults import REASONING, make_student, pretraining


def get_config(arg):
  size, *options = arg.split(',') if arg else ['tiny']
  if size != 'tiny':
    raise ValueError(f'config argument {arg!r}: want tiny, or tiny,moe; a student of a real size '
                     'starts from a released base')
  config = make_student(pretraining('student', arg, tokens=0), arg)
  config.model.rope_theta = 1e6
  config.steps, config.data.batch = 400, 4
  config.save_every = config.evaluate_every = 200
  config.optim.update(dict(schedule='linear', final=0.1))
  config.data.sources = (('stdlib', 0.2), ('tasks', 0.1), (REASONING, 0.7))
  config.data.heldout = ('stdlib', f'{REASONING},size=400')
  return config
