"""The estimate of a chip's memory against arrays that exist, and against XLA's own plan."""
import functools

import jax
import jax.numpy as jnp
import pytest

from qwen3_jax.generation.decode import make_pool
from qwen3_jax.model import lora, transformer
from qwen3_jax.scaling import memory
from qwen3_jax.spec import Spec
from qwen3_jax.training import losses, optim
from qwen3_jax.training import step as training

SPEC = Spec(layers=12, width=128, heads=4, kv_heads=2, mlp=384, vocab=4096, head_width=32,
            tied=True, max_position=1024)
MOE = Spec(layers=2, width=64, heads=4, kv_heads=2, mlp=128, vocab=512, head_width=16, experts=8,
           chosen=2, expert_mlp=64)


def held(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('spec', [SPEC, MOE])
def test_weights_moments_and_pages_are_those_of_arrays(spec):
  model = transformer.init(spec)
  parts = memory.training(spec, 2, 64, jnp.float32)
  assert parts['weights'] == parts['gradients'] == held(model)
  moments = held(optim.adamw().init(model))
  assert parts["Adam's moments"] <= moments <= parts["Adam's moments"] + 64  # and its counter
  drawn = memory.generation(spec, 3, 100, jnp.bfloat16, page=32)
  assert drawn['weights to draw with'] == held(transformer.cast(model, jnp.bfloat16))
  assert drawn['keys and values'] == held(make_pool(spec, 1 + 3 * 4, 32, jnp.bfloat16))


def test_adapters_are_all_that_has_moments():
  parts = memory.training(SPEC, 2, 64, jnp.bfloat16, rank=4)
  adapters = held(lora.make(SPEC, 4, 32.0))
  assert parts['adapters'] == parts['gradients'] == parts["Adam's moments"] / 2 == adapters
  assert parts['weights'] == memory.weights(SPEC, jnp.bfloat16)


@pytest.mark.parametrize('remat', ['full', 'none'])
def test_estimate_is_near_what_xla_plans(remat):
  """Within a third of the buffers of the compiled step, on one device."""
  optimizer, device = optim.adamw(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
  loss = functools.partial(losses.next_token, remat=remat, dtype=jnp.float32)
  step = jax.jit(training.make_step(loss, optimizer, lambda step: 1e-3), donate_argnums=0)
  state = jax.eval_shape(lambda: training.state_of(transformer.make(SPEC), optimizer))
  batch = {f'{name}_BT': jax.ShapeDtypeStruct((8, 512), jnp.float32 if name == 'weight'
                                              else jnp.int32)
           for name in ('tokens', 'segment', 'position', 'weight')}
  place = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                                         sharding=device))
  found = step.lower(place(state), place(batch)).compile().memory_analysis()
  planned = (found.argument_size_in_bytes + found.temp_size_in_bytes
             + found.output_size_in_bytes - found.alias_size_in_bytes)
  estimate = sum(memory.training(SPEC, 8, 512, jnp.float32, remat).values())
  assert planned / 1.33 < estimate < planned * 1.33, f"{estimate / planned:.2f} of XLA's plan"


def test_less_is_kept_the_more_is_computed_again():
  kept = [memory.training(SPEC, 8, 512, remat=remat)['saved activations']
          for remat in ('offload', 'full', 'attention_out', 'dots', 'none')]
  assert kept == sorted(kept) and len(set(kept)) == 5 and kept[0] == 0
  with pytest.raises(ValueError, match="remat is 'some'; want one of none, full"):
    memory.training(SPEC, 8, 512, remat='some')


def test_verdict():
  """What Colab's chips are for: 0.6b trains whole on a v5e-1, 1.7b does not, but with adapters."""
  name, free = memory.available()
  assert name == 'CPU' and free > 0
  parts = {size: memory.training(Spec.named(size), 4, 1024, jnp.bfloat16)
           for size in ('0.6b', '1.7b')}
  parts['adapters'] = memory.training(Spec.named('1.7b'), 4, 1024, jnp.bfloat16, rank=16)
  said = {case: memory.describe(each, 'TPU v5 lite', 16 * memory.GIB).splitlines()[-1]
          for case, each in parts.items()}
  assert said['0.6b'] == said['adapters'] == 'TPU v5 lite, 16.00 GiB free: it should fit'
  assert 'it will hardly fit. Take a smaller model' in said['1.7b']
  assert 'unknown memory' in memory.describe(parts['0.6b'], 'some chip', None)
