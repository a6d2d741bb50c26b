import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_jax
from qwen3_jax.generation import engine
from qwen3_jax.generation.sampling import GREEDY, NON_THINKING, Sampling
from qwen3_jax.mesh import make_mesh, shardings
from qwen3_jax.model import hf, transformer
from qwen3_jax.spec import Spec

PROMPTS = [[40, 41, 42], list(range(60, 80)), [300], [99] * 9, [5, 250, 6, 251, 7]]
SHORT = dataclasses.replace(GREEDY, max_tokens=20, stop_ids=())


@jax.jit
def forward(model, tokens_BT):
  out = model(tokens_BT)
  return model.logits(out.hidden_BTD), out.routes


def follow(model, ids, count):
  """Greedy continuation without a cache, and the log-probability of each token."""
  tokens, logps = list(ids), []
  for _ in range(count):
    padded = np.zeros((1, 64), np.int32)
    padded[0, :len(tokens)] = tokens  # causal: what comes later changes nothing
    logp_V = jax.nn.log_softmax(forward(model, padded)[0][0, len(tokens) - 1])
    tokens.append(int(logp_V[:400].argmax()))
    logps.append(float(logp_V[tokens[-1]]))
  return tokens[len(ids):], logps


@pytest.mark.parametrize('kind', ['model', 'moe_model'])
def test_greedy_equals_the_model_without_a_cache(kind, tokenizer, request):
  model = request.getfixturevalue(kind)
  outputs = engine.generate(model, tokenizer, PROMPTS, SHORT)
  for ids, out in zip(PROMPTS, outputs):
    tokens, logps = follow(model, ids, 20)
    assert out.tokens == tokens and out.prompt == ids and out.finish_reason == 'length'
    np.testing.assert_allclose(out.logp_untempered, logps, atol=1e-4)
    assert not out.logp.any() and not out.forced.any()


@pytest.mark.parametrize('name', ['a_dense_untied', 'b_dense_tied', 'c_moe', 'd_moe_mixed',
                                  'e_dense_yarn'])
def test_golden_greedy_tokens(golden, tokenizer, name):
  """HF transformers' own generations from left-padded prompts."""
  numbers = np.load(golden / 'models' / name / 'golden.npz')
  model = hf.load(golden / 'models' / name, dtype=jnp.float32)
  whole = _Stub(tokenizer, model.spec.vocab)
  prompts = [row[mask > 0].tolist()
             for row, mask in zip(numbers['gen_prompt_ids'], numbers['gen_prompt_mask'])]
  count = numbers['gen_tokens'].shape[1]
  outputs = engine.generate(model, whole, prompts,
                            dataclasses.replace(GREEDY, max_tokens=count, stop_ids=()))
  np.testing.assert_array_equal([out.tokens for out in outputs], numbers['gen_tokens'])
  np.testing.assert_allclose([out.logp_untempered for out in outputs],
                             numbers['gen_step_logprob'], atol=1e-4)


class _Stub:
  """A tokenizer for golden models: any id of the vocabulary is a piece of text."""

  def __init__(self, tokenizer, size):
    self.size, self._stream = size, tokenizer.stream

  def stream(self):
    stream = self._stream()
    push = stream.push
    stream.push = lambda id: push(id % 400)
    return stream


@pytest.mark.parametrize('rows', [1, 8])
def test_a_mixture_turned_or_not_gives_the_same(moe_model, tokenizer, rows):
  """`prepare` turns expert weights where a batch is of few rows; both ways work at any size."""
  expected = engine.generate(engine.prepare(moe_model, 512), tokenizer, PROMPTS[:rows], SHORT)
  turned = engine.prepare(moe_model, 2)
  assert hasattr(turned.model.stacks[1].mlp, 'gate_DEF')
  outputs = engine.generate(turned, tokenizer, PROMPTS[:rows], SHORT)
  assert [out.tokens for out in outputs] == [out.tokens for out in expected]


def test_samples_do_not_depend_on_the_batch(model, tokenizer):
  row = Sampling(1.0, top_k=50, top_p=0.95, max_tokens=24, seed=3)
  together = engine.generate(model, tokenizer, PROMPTS, row)
  for place in (0, 1, 4):
    alone, = engine.generate(model, tokenizer, [PROMPTS[place]], row, seeds=[place])
    assert alone.tokens == together[place].tokens
    np.testing.assert_allclose(alone.logp, together[place].logp, atol=1e-4)
  split = engine.generate(model, tokenizer, PROMPTS, row, rows=2)
  assert [out.tokens for out in split] == [out.tokens for out in together]
  same = engine.generate(model, tokenizer, [PROMPTS[0]] * 4, row)
  assert len({tuple(out.tokens) for out in same}) == 4  # one seed, four places: four samples


def test_stop_ids_end_a_row_and_are_kept_in_its_tokens(model, tokenizer):
  free = engine.generate(model, tokenizer, PROMPTS, SHORT)
  stops = (free[0].tokens[4], free[1].tokens[7])
  outputs = engine.generate(model, tokenizer, PROMPTS, dataclasses.replace(SHORT, stop_ids=stops))
  for out, whole in zip(outputs, free):
    end = next((i for i, id in enumerate(whole.tokens) if id in stops), 19)
    assert out.tokens == whole.tokens[:end + 1] and len(out.logp) == end + 1
    stopped = out.tokens[-1] in stops
    assert out.finish_reason == ('stop' if stopped else 'length')
    assert out.text == tokenizer.decode(out.tokens[:-1] if stopped else out.tokens)


def test_ids_beyond_the_tokenizer_are_never_drawn(model, tokenizer):
  """The embedding has 512 rows, the tokenizer 400 ids; the hottest sampling stays below."""
  outputs = engine.generate(model, tokenizer, PROMPTS, Sampling(50.0, max_tokens=60, stop_ids=()))
  assert max(max(out.tokens) for out in outputs) < tokenizer.size == 400 < model.spec.vocab


def test_presence_penalty_forbids_repetition(model, tokenizer):
  row = dataclasses.replace(SHORT, presence_penalty=1e4, max_tokens=50)
  for out in engine.generate(model, tokenizer, PROMPTS, row):
    assert len(set(out.tokens)) == 50


def test_stream_gives_the_text_in_order(model, tokenizer):
  row = dataclasses.replace(NON_THINKING, temperature=3.0, max_tokens=40)
  texts = [''] * len(PROMPTS)
  stream = engine.stream(model, tokenizer, PROMPTS, row, chunk=4, rows=3)
  while True:
    try:
      place, delta = next(stream)
      texts[place] += delta
    except StopIteration as end:
      outputs = end.value
      break
  for text, out in zip(texts, outputs):
    ids = out.tokens[:-1] if out.finish_reason == 'stop' else out.tokens
    assert text == out.text == tokenizer.decode(ids)
  assert [out.tokens for out in engine.generate(model, tokenizer, PROMPTS, row)] == [
    out.tokens for out in outputs]


def test_a_second_batch_of_like_sizes_compiles_nothing(model, tokenizer):
  row = dataclasses.replace(SHORT, max_tokens=40)
  decoder = engine.prepare(model)
  engine.generate(decoder, tokenizer, PROMPTS, row)
  functions = (engine.prefill, engine.decode, engine.grow, engine.make_pool)
  before = [f._cache_size() for f in functions]
  other = [[7] * 19, [8], [9] * 17, [10] * 5, [11]]
  engine.generate(decoder, tokenizer, other, dataclasses.replace(row, max_tokens=35))
  assert [f._cache_size() for f in functions] == before


def test_sizes_are_few_and_waste_little():
  sizes = sorted({engine.round_up(n) for n in range(1, 40_000)})
  assert len(sizes) == 24
  assert all(n <= engine.round_up(n) <= max(16, 1.5 * n) for n in range(1, 40_000))


def test_routes_are_those_of_one_forward_pass(moe_model, tokenizer):
  outputs = engine.generate(moe_model, tokenizer, PROMPTS[:3], SHORT, with_routes=True)
  for out in outputs:
    ids = out.prompt + out.tokens
    padded = np.zeros((1, 64), np.int32)
    padded[0, :len(ids)] = ids
    expected = forward(moe_model, padded)[1][:, 0, :len(ids)].swapaxes(0, 1)
    np.testing.assert_array_equal(np.sort(out.routes), np.sort(expected))


@pytest.mark.slow
@pytest.mark.parametrize('experts', [0, 4])
def test_sharded_equals_one_device(tokenizer, experts):
  spec = Spec(2, 32, 4, 2, 64, vocab=512, head_width=16, experts=experts, chosen=experts // 2,
              expert_mlp=32)
  model = jax.tree.map(lambda w: w * 4, transformer.init(spec))
  prompts = PROMPTS[:4]
  row = Sampling(0.8, top_k=20, max_tokens=20, stop_ids=())
  expected = engine.generate(model, tokenizer, prompts, [row, SHORT, row, SHORT])
  mesh = make_mesh(dict(fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    placed = jax.device_put(model, shardings(model, mesh))
    outputs = engine.generate(placed, tokenizer, prompts, [row, SHORT, row, SHORT])
  assert [out.tokens for out in outputs] == [out.tokens for out in expected]


def test_prompts_may_be_texts_ids_or_conversations(model, tokenizer):
  chat = [dict(role='user', content='the quick fox')]
  text = qwen3_jax.render(chat, add_generation_prompt=True)
  ids = tokenizer.encode(text)
  outputs = qwen3_jax.generate(model, tokenizer, [text, ids, chat], sampling=SHORT)
  assert len({tuple(out.tokens) for out in outputs}) == 1 and outputs[2].prompt == ids


def test_the_last_position_ends_a_text(model, tokenizer):
  spec = dataclasses.replace(model.spec, max_position=32)
  short = jax.tree.map(lambda w: w, model)
  short.spec = spec
  out, = engine.generate(short, tokenizer, [[5] * 22], SHORT)
  assert len(out.tokens) == 10 and out.finish_reason == 'length'
  with pytest.raises(ValueError, match='prompt 1 has 32 tokens'):
    engine.generate(short, tokenizer, [[5], [5] * 32], SHORT)
  with pytest.raises(ValueError, match='prompt 0 has 0 tokens'):
    engine.generate(short, tokenizer, [''], SHORT)
  with pytest.raises(ValueError, match='seeds has 1 entries for 2 prompts'):
    engine.generate(short, tokenizer, [[5], [6]], SHORT, seeds=[0])
