"""Toy models and ragged batches for the tests of this folder."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.data import packing
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.training import advantage, policy

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


@pytest.fixture
def trl(request):
  """Function from a variant of TRL's losses to (its numbers, its parameters).

  The essential variants lie in fixtures/, all of them in ../shared.
  """
  def load(variant):
    numbers = np.load(Path(__file__).parents[1] / 'fixtures' / 'policy.npz')
    row = json.loads(str(numbers['variants'])).get(variant)
    if row is None:
      folder = request.getfixturevalue('golden') / 'loss'
      numbers = np.load(folder / 'grpo.npz')
      row = json.loads((folder / 'grpo_variants.json').read_text())[variant]
    return numbers, row
  return load


@pytest.fixture(scope='session')
def trl_batch():
  """Function from what `trl` loads to (`Policy`, the batch of its objective, samples as rows)."""
  kinds = {'bnpo': 'dapo'}

  def make(numbers, row):
    kind = 'gspo' if row['level'] == 'sequence' else kinds.get(row['loss_type'], row['loss_type'])
    clip = dict(clip_low=row['lo'], clip_high=row['hi'])
    clip = {'sapo': {}, 'cispo': dict(clip_low=1.0, clip_high=row['hi'] - 1)}.get(kind, clip)
    settings = policy.Policy(kind, **clip, beta=row['beta'], dual_clip=row.get('delta'),
                             kl='unbiased' if row.get('bias_kl') else 'k3')
    mask = numbers['mask']
    scale = advantage.aggregate(mask.sum(1), settings.aggregation, longest=row['max_len'])
    old = dict(old_logp_BT=numbers['old_logp']) if row['use_old'] else {}
    return settings, old | dict(
      weight_BT=mask, scale_BT=scale[:, None] * mask, segment_BT=np.ones(mask.shape, np.int32),
      advantage_BT=numbers['advantages'][:, None] * mask, reference_logp_BT=numbers['ref_logp'])
  return make
