"""The mixed data of thinking-mode fusion: two filters and how their output is mixed.

Qwen3 report, section 4.3: thinking data by rejection sampling of the current model on the queries
of the cold start, other data checked by checklists, more translation. Its shares and rates are
unpublished: those of `mix` are ours.

With the argument `distill` (or `distill,tiny`) both halves are a teacher's right answers, with
thinking and without: the first phase of strong-to-weak distillation (section 4.5).
"""
import importlib.util
import inspect
from pathlib import Path

from ml_collections import ConfigDict

from qwen3_jax.data.fusion import fuse


def get_config(arg):
  spec = importlib.util.spec_from_file_location('filter', Path(__file__).with_name('filter.py'))
  filters = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(filters)
  options = arg.split(',') if arg else []
  distil = options[:1] == ['distill']
  tail = ''.join(f',{each}' for each in options[distil:])
  rates = {name: parameter.default for name, parameter in inspect.signature(fuse).parameters.items()
           if parameter.kind == parameter.KEYWORD_ONLY and name != 'size'}
  plain = filters.get_config(f'{"rejection" if distil else "plain"}{tail}')
  if distil:
    plain.candidates.enable_thinking = False
    if tail:  # a short answer may repeat a digit
      plain.candidates.sampling.presence_penalty = 0.0
  return ConfigDict(dict(thinking=filters.get_config(f'rejection{tail}'), plain=plain,
                         mix=dict(size=None, heldout=0.02) | rates), type_safe=False)
