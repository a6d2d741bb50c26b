"""Ways on from a student: reinforcement learning, on-policy distillation (Qwen3 report, Table 21).

The argument is the student, as in distill_on; both ways have the prompts, held-out prompts and
student given here. The report compares on mathematics and code.
"""
from ml_collections import ConfigDict

from qwen3_jax.stages.defaults import REASONING, STUDENTS


def get_config(arg):
  arg = arg or 'tiny'
  small = arg in ('tiny', 'tiny,moe')
  if not small and arg not in STUDENTS:
    raise ValueError(f'config argument {arg!r}: want {", ".join(STUDENTS)}, or tiny, or tiny,moe')
  prompts = f'{REASONING},thinking=mixed' if small else 'tasks:thinking=mixed'
  measure = dict(tasks=REASONING if small else 'tasks', count=256, samples=8,
                 max_tokens=160 if small else 8192, plain_penalty=None if small else 1.5,
                 dtype='float32' if small else 'bfloat16')
  often = ('evaluate_every=8', 'save_every=8') if small else ()
  return ConfigDict(dict(
    init=None, teacher=None, seeds=(0,), start='off-policy',
    sources=((prompts, 1.0),), heldout=(prompts,), measure=measure,
    # name, config, overrides: what is not the student's or the prompts'
    ways=(('off-policy + RL', f'configs/reasoning_rl.py:{arg}', often),
          ('off-policy + on-policy', f'configs/distill_on.py:{arg}',
           (*often, 'modes.flags=0.0')))), type_safe=False)
