"""The search's arithmetic: nothing that cannot fit, the fastest first, meshes that divide."""
import pytest

from qwen3_jax.commands import config as configs
from qwen3_jax.model import transformer
from qwen3_jax.scaling import chips, search


def config(size, **data):
  config = configs.load_config(f'configs/s1.py:{size}', [])
  with config.unlocked():
    config.data.update(data)
  return config


def test_candidates_fit_and_divide():
  found = search.candidates(config('8b', batch=128), 'v5p:4x4x2', 32)
  assert found == sorted(found, key=search.rank)
  assert {each.remat for each in found} <= set(transformer.POLICIES)
  for each in found:
    assert each.bytes < chips.CHIPS['v5p'].usable
    rows = 128 // (32 // (each.tensor * each.context))
    assert rows % each.micro_batches == 0
  assert found[0].remat != 'full'  # 95 GiB have room for what need not be computed again


def test_small_memory_asks_for_more_recomputation():
  large = search.candidates(config('8b', batch=512), 'v5p:4x4x2', 32)[0]
  small = search.candidates(config('8b', batch=512), 'v5e:4x8', 32)
  assert small and small[0].micro_batches > large.micro_batches
  assert small[0].bytes < large.bytes


def test_what_fits_nowhere_has_no_candidates():
  assert search.candidates(config('235b-a22b', batch=4), 'v5e:2x2', 4) == []


@pytest.mark.parametrize('remat', search.AGAIN)
def test_time_follows_what_is_computed_again(remat):
  one = config('8b', batch=128)
  from qwen3_jax.spec import Spec
  chip = chips.CHIPS['v5p']
  def seconds(remat):
    return search.seconds_of(Spec.named('8b'), one, chip, 1, 1, remat, 1, 32)
  assert seconds('none') <= seconds(remat) <= seconds('full')
