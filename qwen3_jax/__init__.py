"""Qwen3 in JAX: the names a user imports; each loads its own module on first use."""

import importlib

_HOMES = {
  'Spec': 'qwen3_jax.spec',
  'load': 'qwen3_jax.stages.load',
  'save': 'qwen3_jax.model.hf',
  'Tokenizer': 'qwen3_jax.text.tokenizer',
  'render': 'qwen3_jax.text.template',
  'parse': 'qwen3_jax.text.template',
  'generate': 'qwen3_jax.generation.engine',
}
__all__ = sorted(_HOMES)


def __getattr__(name):
  if name not in _HOMES:
    raise AttributeError(f'module qwen3_jax has no attribute {name!r}; it has {", ".join(__all__)}')
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
  return __all__
