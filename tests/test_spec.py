"""Sizes as published, configs read and written, faults named."""
import dataclasses
import json

import pytest

from qwen3_jax.spec import RELEASED, Spec, Yarn

WEIGHTS = {  # all; without embedding and head
    '0.6b': (596_049_920, 440_467_456), '1.7b': (1_720_574_976, 1_409_410_048),
    '4b': (4_022_468_096, 3_633_511_936), '8b': (8_190_735_360, 6_946_075_648),
    '14b': (14_768_307_200, 13_212_482_560), '32b': (32_762_123_264, 31_206_298_624),
    '30b-a3b': (30_532_122_624, 29_909_792_768),
    '235b-a22b': (235_093_634_560, 233_848_974_848)}
ACTIVE = {'30b-a3b': 3_353_032_704, '235b-a22b': 22_190_763_520}


@pytest.mark.parametrize('name', WEIGHTS)
def test_number_of_weights_is_the_published_one(name):
  spec = Spec.named(name)
  tables = spec.vocab * spec.width * (1 if spec.tied else 2)
  assert (spec.parameters(), spec.parameters() - tables) == WEIGHTS[name]
  assert spec.parameters(active=True) == ACTIVE.get(name, spec.parameters())


def test_number_of_weights_of_qwen2():
  assert Spec.named('qwen2.5-0.5b').parameters() == 494_032_768
  assert Spec.named('qwen2.5-7b').parameters() == 7_615_616_512
  assert Spec.named('qwen2-7b') == Spec.named('qwen2.5-7b')


def test_variants_differ_in_theta_and_length():
  for name in WEIGHTS:
    spec, base = Spec.named(name), Spec.named(f'{name}-base')
    assert (spec.rope_theta, spec.max_position, spec.stop_ids) == (1e6, 40_960, (151_645, 151_643))
    assert (base.rope_theta, base.max_position, base.stop_ids) == (1e6, 32_768, (151_643,))
    assert base.parameters() == spec.parameters()
  for name, theta in (('4b', 5e6), ('30b-a3b', 1e7), ('235b-a22b', 5e6)):
    for mode in ('instruct', 'thinking'):
      later = Spec.named(f'{name}-{mode}-2507')
      assert later == dataclasses.replace(Spec.named(name), rope_theta=theta, max_position=262_144)


def test_useful_flops():
  """By hand for 0.6b: every multiplied weight 6 times, and the triangle of attention."""
  spec = Spec.named('0.6b')
  multiplied = 440_467_456 + 151_936 * 1024  # the tied head multiplies too
  assert spec.flops_per_token(4096) == 6 * multiplied + 6 * 28 * 4096 * 16 * 128


def test_runs_of_layers():
  spec = Spec(layers=6, width=8, heads=1, kv_heads=1, mlp=8, experts=4, chosen=2, expert_mlp=4,
              sparse_step=2, mlp_only=(3,))
  assert [spec.sparse(i) for i in range(6)] == [False, True, False, False, False, True]
  assert spec.runs() == [(0, 1, False), (1, 1, True), (2, 3, False), (5, 1, True)]
  assert Spec.named('235b-a22b').runs() == [(0, 94, True)]


@pytest.mark.parametrize('fields, message', [
    (dict(heads=6, kv_heads=4), '6 query heads cannot share 4 kv heads'),
    (dict(experts=4, chosen=5), 'chosen=5 of experts=4: want 1 to 4'),
    (dict(experts=4), 'chosen=0 of experts=4'), (dict(head_width=7), 'head_width=7 is odd')])
def test_impossible_specs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Spec(**dict(layers=1, width=8, heads=2, kv_heads=1, mlp=8) | fields)


def test_unknown_name_gets_the_nearest():
  with pytest.raises(ValueError, match="no released size '30b-3b'; did you mean '30b-a3b'"):
    Spec.named('30b-3b')


def write(folder, config, name='config.json'):
  (folder / name).write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize('name', RELEASED)
def test_config_round_trip(name, tmp_path):
  spec = RELEASED[name]
  assert Spec.from_hf(write(tmp_path, spec.to_hf())) == spec


@pytest.mark.parametrize('yarn', [
    Yarn(4.0, 32_768), Yarn(2.0, 64, 16.0, 2.0, attention_factor=1.5, truncate=False)])
def test_config_round_trip_with_yarn(yarn, tmp_path):
  spec = dataclasses.replace(Spec.named('4b'), yarn=yarn, max_position=131_072)
  assert Spec.from_hf(write(tmp_path, spec.to_hf())) == spec


def test_written_config_has_the_published_values():
  config = Spec.named('235b-a22b-base').to_hf('bfloat16')
  published = dict(
      architectures=['Qwen3MoeForCausalLM'], attention_bias=False, decoder_sparse_step=1,
      eos_token_id=151643, head_dim=128, hidden_act='silu', hidden_size=4096,
      intermediate_size=12288, max_position_embeddings=32768, max_window_layers=94,
      mlp_only_layers=[], model_type='qwen3_moe', moe_intermediate_size=1536, norm_topk_prob=True,
      num_attention_heads=64, num_experts=128, num_experts_per_tok=8, num_hidden_layers=94,
      num_key_value_heads=4, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6,
      sliding_window=None, tie_word_embeddings=False, torch_dtype='bfloat16', vocab_size=151936)
  assert config.items() >= published.items()
  assert Spec.named('qwen2-7b').to_hf()['architectures'] == ['Qwen2ForCausalLM']


def test_stop_ids_of_generation_config_come_first(tmp_path):
  """The published config.json names only the first of two."""
  config = write(tmp_path, Spec.named('8b').to_hf() | dict(eos_token_id=151_645))
  assert Spec.from_hf(config).stop_ids == (151_645,)
  write(tmp_path, dict(eos_token_id=[151_645, 151_643]), 'generation_config.json')
  assert Spec.from_hf(config) == Spec.named('8b')


@pytest.mark.parametrize('change, message', [
    (dict(model_type='llama'), "model_type 'llama' is not supported; want one of qwen3, qwen3_moe"),
    (dict(hidden_act='gelu'), "hidden_act 'gelu' is not supported"),
    (dict(hidden_size=None), "field 'hidden_size' is missing"),
    (dict(num_experts=None), "field 'num_experts' is missing"),
    (dict(rope_theta=None), "neither 'rope_theta' nor"),
    (dict(rope_scaling=dict(rope_type='llama3', factor=8.)), "rope type 'llama3' is not supported"),
    (dict(rope_scaling=dict(type='dynamic', factor=2.)), "rope type 'dynamic' is not supported"),
    (dict(rope_scaling=dict(rope_type='yarn', factor=4.)), 'without .original_max_position_embed'),
    (dict(use_sliding_window=True, sliding_window=4096), 'sliding_window 4096 is not supported'),
    (dict(attention_bias=True), 'attention_bias true is not supported in qwen3_moe'),
    (dict(quantization_config=dict(quant_method='fp8')), 'quantization_config is not supported'),
])
def test_unsupported_configs_are_refused_by_field(change, message, tmp_path):
  write(tmp_path, Spec.named('30b-a3b').to_hf() | change)
  with pytest.raises(ValueError, match=f'config.json: .*{message}'):
    Spec.from_hf(tmp_path)


def test_unreadable_configs_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='config.json does not exist'):
    Spec.from_hf(tmp_path)
  for raw, message in ((b'{"model_type": ', 'is not JSON'), (b'\xff\xfe', 'is not JSON'),
                       (b'[]', 'holds a list; want a JSON object')):
    (tmp_path / 'config.json').write_bytes(raw)
    with pytest.raises(ValueError, match=f'config.json {message}'):
      Spec.from_hf(tmp_path)


def test_what_no_architecture_has_is_not_written():
  moe_with_bias = dataclasses.replace(Spec.named('30b-a3b'), qk_norm=False, qkv_bias=True)
  bare = dataclasses.replace(Spec.named('8b'), qk_norm=False)
  for spec in (moe_with_bias, bare):
    with pytest.raises(ValueError, match='no Hugging Face architecture has qk_norm=False'):
      spec.to_hf()
