"""Toy models and ragged batches for the tests of this folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.data import packing
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec

COMMON = dict(layers=2, width=32, heads=4, kv_heads=2, mlp=48, vocab=96, head_width=8)


@pytest.fixture(scope='session')
def specs():
  """Two toy specs by name: 'dense' (tied) and 'moe' (8 experts, 2 chosen; untied)."""
  return {'dense': Spec(**COMMON, tied=True),
          'moe': Spec(**COMMON, experts=8, chosen=2, expert_mlp=16)}


@pytest.fixture(scope='session')
def models(specs):
  """Random models of `specs`, filled on the host, which costs no compilation."""
  def fill(spec):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.make, spec))
    return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.1, x.shape), x.dtype), shapes)
  return {name: fill(spec) for name, spec in specs.items()}


@pytest.fixture(scope='package', autouse=True)
def quick_compilation():
  """LLVM would spend most of the time optimising code that runs once."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def draw_batch():
  """Function (B, T, seed) -> packed batch: rows of one to three segments, some with padding."""
  def draw(B=8, T=24, seed=0, vocab=COMMON['vocab']):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(B):
      used = rng.integers(T // 3, T + 1)
      cuts = np.sort(rng.choice(np.arange(2, used), rng.integers(0, 3), replace=False))
      rows.append(np.split(rng.integers(0, vocab, used), cuts))
    return packing.make_batch(rows, T)
  return draw
