"""The recipe: the stages in order, each starting from the weights of the one before.

The argument is the size of the flagship and, after a comma, that of the student it teaches in the
end (8b,0.6b); without one there is no student, but for tiny and tiny,moe, whose student is made
here too. A released student starts from its base: --set=distill_off.init=Qwen3-0.6B-Base. `compare`
at the end (tiny,compare) also trains the student after distill_off by reinforcement learning and by
distillation on the same prompts, and tabulates what each reached at what cost.
"""
from ml_collections import ConfigDict

from qwen3_jax.stages.defaults import STUDENTS

STAGES = 's1', 's2', 's3', 'cold_start', 'reasoning_rl', 'fusion', 'general_rl'


def get_config(arg):
  arg = arg or 'tiny'
  comparing, arg = arg.endswith(',compare'), arg.removesuffix(',compare')
  size, _, student = arg.partition(',')
  if student in STUDENTS:
    arg = size
  elif size == 'tiny':
    student = arg
  else:
    student = None  # the argument itself is judged by the stages' configs
  stages = [(name, f'configs/{name}.py:{arg}') for name in STAGES]
  if student:
    tiny = size == 'tiny'
    if tiny:
      stages.append(('student', f'configs/student.py:{student}',
                     {'init': None, 'data.tokenizer': 's1/tokenizer'}))
    stages.append(('distill_off', f'configs/distill_off.py:{student}',
                   {'teacher': STAGES[-1]} | ({} if tiny else {'init': None})))
    stages.append(('distill_on', f'configs/distill_on.py:{student}', {'teacher': STAGES[-1]}))
  elif comparing:
    raise ValueError(f'config argument {arg},compare: a comparison needs a student, e.g. 8b,0.6b')
  compare = dict(config=f'configs/compare.py:{student}', init='distill_off', teacher=STAGES[-1])
  return ConfigDict(dict(stages=tuple(stages), seed=0, compare=compare if comparing else None),
                    type_safe=False)
