"""On-policy distillation: a teacher scores every token of the student's own answers (report, 4.5).

The argument is the student: 0.6b, 1.7b, 4b, 8b, 14b, 30b-a3b or tiny. --config.teacher=DIR names
the teacher, the report's 32B or 235B-A22B; give --init=DIR, the student after off-policy
distillation, and prompts in data.sources. The report aligns logits by minimising a KL divergence;
direction, rate and batch are unpublished. Here it is reverse KL over the whole vocabulary, and the
rest is ours, not measured at real sizes.
"""
from qwen3_jax.stages.defaults import REASONING, make_student, reinforcement


def get_config(arg):
  config = reinforcement('distill_on', arg)
  small = config.model.layers == 4
  make_student(config, arg)
  config.method = 'distill'
  for section in ('policy', 'reference', 'entropy', 'curriculum'):
    del config[section]
  del config.rollout.rounds
  config.teacher, config.teachers = None, ()  # (('beginning of a source', folder), ...) go first
  config.teacher_mesh = config.teacher_dtype = None  # those of the student
  config.teacher_offload = False  # in the host's memory while it does not score
  config.teacher_top = 64  # ids, of the kinds that know the teacher at a few
  config.distillation = dict(kind='reverse_kl', mix=0.5, temperature=1.0, few=None,
                             correction='token_tis')
  config.modes = dict(thinking=0.5, flags=0.5)  # of prompts that say nothing of their own
  config.rollout.update(dict(prompts=512, samples=1, updates=4, max_tokens=16_384, overlong=None,
                             old='engine'))
  config.steps, config.save_every, config.evaluate_every = 600, 40, 20
  config.optim.update(dict(schedule='constant', peak_lr=5e-6, warmup=20))
  if small:
    config.lora.rank = None
    config.rollout.update(dict(prompts=256, updates=4, max_tokens=128))
    # `mode` has flags in earlier turns: without it the student forgets whom to obey
    config.data.sources = (f'{REASONING},thinking=mixed', 1.0), ('mode:difficulty=1', 0.25)
    config.data.heldout = (f'{REASONING},thinking=mixed',)
    config.modes.flags = 0.25
    config.data.batch = 8
    config.steps, config.save_every, config.evaluate_every = 200, 40, 40
    config.optim.update(dict(schedule='linear', peak_lr=3e-3, warmup=5, b2=0.98))
  return config
