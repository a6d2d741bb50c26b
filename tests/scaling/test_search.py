"""The search's arithmetic: nothing that cannot fit, the fastest first, meshes that divide."""
import math

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
    rows = 128 // (32 // math.prod(size for _, size in each.mesh))
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
    mesh = dict(data=1, fsdp=32, context=1, tensor=1)
    return search.seconds_of(Spec.named('8b'), one, chip, mesh, remat, 1, 32)
  assert seconds('none') <= seconds(remat) <= seconds('full')


def test_slices_split_the_data_axis_and_pay_for_the_network():
  one = config('0.6b', batch=256)
  found = search.candidates(one, 'v5e:4x4', 32, slices=2)
  assert found and all(dict(each.mesh)['data'] == 2 for each in found)
  chip = chips.CHIPS['v5e']
  from qwen3_jax.spec import Spec
  spec, mesh = Spec.named('0.6b'), dict(data=2, fsdp=16, context=1, tensor=1)
  network = 2 * 4 * spec.parameters() / 16 / chip.dcn  # an all-reduce of each shard, in float32
  assert search.seconds_of(spec, one, chip, mesh, 'full', 1, 32) >= network
  single = search.bytes_of(spec, one, 1, dict(mesh, data=1, fsdp=32), 'full', 32)
  twice = search.bytes_of(spec, one, 1, mesh, 'full', 32)
  assert twice - single == 18 * spec.parameters() / 32  # each slice has all weights


def test_a_choice_is_what_its_overrides_say():
  choice = search.Choice((('data', 1), ('context', 2), ('tensor', 4)), 'dots', 8, 0.0, 0.0)
  given = config('0.6b')
  said = configs.load_config('configs/s1.py:0.6b', choice.overrides)
  assert choice.apply(given).to_dict() == said.to_dict()
  assert given.micro_batches == 1


class Said:
  """Of an estimate what the search reads."""

  def __init__(self, hbm, seconds=1.0):
    self.hbm, self.room, self.seconds, self.fits = hbm, 100, seconds, hbm <= 100


def test_what_was_compiled_decides_what_is_compiled_next():
  def choice(remat, size, mesh=(('tensor', 1),)):
    return search.Choice(mesh, remat, 1, size, 0.0)
  tried = [(choice('none', 80), Said(160)), (choice('dots', 60), Said(60))]
  assert not search.is_worth(choice('none', 70), tried)  # 140, by what the first took
  assert search.is_worth(choice('none', 40), tried)
  assert not search.is_worth(choice('dots', 50), tried)  # fits already, in fewer parts
  assert search.is_worth(choice('dots', 50, mesh=(('tensor', 2),)), tried)
  assert search.is_worth(choice('full', 90), tried)


def test_a_search_compiles_few_and_gives_the_fastest_that_fits_first(monkeypatch):
  from qwen3_jax.scaling import plan
  asked = []

  def run(one, topology, slices, say, folder):
    asked.append((one.remat, one.micro_batches, str(one.mesh)))
    room = 2**36
    said = Said(1.2 * room if len(asked) == 1 else room / 2, 9.0 - len(asked))
    said.room, said.fits = room, len(asked) > 1
    return [said]
  monkeypatch.setattr(plan, 'run', run)
  monkeypatch.setattr(plan, 'get_devices', lambda *_: range(32))
  tried = search.search(config('8b', batch=128), 'v5p:4x4x2', most=3, say=lambda _: None)
  assert len(tried) == len(asked) == len(set(asked)) == 3
  assert [each.fits for _, each in tried] == sorted((each.fits for _, each in tried), reverse=True)
  assert [each.seconds for _, each in tried] == [6.0, 7.0, 8.0]


def test_advice_names_settings_that_fit():
  one = config('0.6b')
  said = search.advise(one, 'v5e:2x2', 4, 1, Said(1000))
  best = search.candidates(one, 'v5e:2x2', 4)[0]
  assert said.endswith(' '.join(best.overrides)) and best.micro_batches > 1
  present = best.apply(one)  # which did not fit after all
  short = Said(1.01 * chips.CHIPS['v5e'].usable)
  short.room, short.fits = chips.CHIPS['v5e'].usable, False
  again = search.advise(present, 'v5e:2x2', 4, 1, short)
  assert again != said and 'this fits' in again
  assert 'take more' in search.advise(config('235b-a22b'), 'v5e:2x2', 4, 1, Said(1000))


def test_experts_are_split_where_that_moves_less():
  """Gathering 30 billion parameters of experts on each chip takes longer than sending tokens."""
  found = search.candidates(config('30b-a3b', batch=128), 'v5p:4x4x2', 32)
  chip, spec = chips.CHIPS['v5p'], configs_spec('30b-a3b')
  def seconds(expert):
    mesh = dict(data=1, fsdp=32 // expert, context=1, tensor=1, expert=expert)
    slow = chip._replace(ici=chip.ici / 100)  # where the interconnect decides
    return search.seconds_of(spec, config('30b-a3b', batch=128), slow, mesh, 'full', 1, 32)
  assert seconds(4) < seconds(1)
  assert {dict(each.mesh)['expert'] for each in found} > {1, 4}


def configs_spec(size):
  from qwen3_jax.spec import Spec
  return Spec.named(size)


@pytest.mark.parametrize('remat', search.WHOLE)
def test_a_tensor_axis_splits_what_has_not_the_models_width(remat):
  from qwen3_jax.scaling import memory
  spec = configs_spec('8b')
  whole, half = (search.activations_of(spec, 8192, remat, tensor) for tensor in (1, 2))
  assert whole == sum(memory.activations(spec, 8192, remat=remat).values())
  assert 0.5 * whole < half < whole
  if remat != 'offload':
    residual = 8192 * 2 * spec.layers * spec.width  # of every layer's input nothing is split
    assert search.activations_of(spec, 8192, remat, 1e9) > residual
