"""Off-policy distillation: a student learns what a teacher wrote in both modes (report, 4.5).

The argument is the student: 0.6b, 1.7b, 4b, 8b, 14b, 30b-a3b or tiny; the teacher, a folder, is the
report's 32B or 235B-A22B. Its texts are filtered by verifiers, flagged and mixed by
`python -m qwen3_jax fuse --config=configs/fuse.py:distill --model=TEACHER`; name the output in
data.sources. The tiny form does so by itself with the folder that config.teacher names. The
settings are those of fine-tuning: the report's are unpublished.
"""
from qwen3_jax.stages.defaults import REASONING, make_student, supervised


def get_config(arg):
  config = supervised('distill_off', arg, tiny_steps=500)
  small = config.model.layers == 4
  make_student(config, arg)
  config.teacher = None
  if small:
    config.optim.update(dict(schedule='linear', peak_lr=3e-3))
    config.prepare = dict(
        by='fuse', config='configs/fuse.py:distill,tiny',
        set=('mix.size=6000', 'mix.turns_rate=0.25', 'mix.system_rate=0.2'),
        inputs=dict(queries=(f'{REASONING},size=1500,seed=2',),
                    plain=(f'{REASONING},size=2000,seed=3',)))
  return config
