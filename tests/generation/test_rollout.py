"""Continuous batching over pages: who runs when changes nothing but the time it takes."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.generation import thinking
from qwen3_jax.generation.engine import Engine, Request
from qwen3_jax.generation.pages import Pages
from qwen3_jax.generation.sampling import NON_THINKING, Sampling
from qwen3_jax.kernels.head import token_logp
from qwen3_jax.mesh import make_mesh, shardings
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec

pytestmark = pytest.mark.usefixtures('quick_compilation')
HOT = Sampling(1.3, max_tokens=20, stop_ids=())
PROMPTS = [[40, 41, 42], list(range(60, 80)), [300], [99] * 9, [5, 250, 6, 251, 7]]


def group(prompts, samples, sampling=HOT, **options):
  return [Request(prompt, sampling, samples * place + k, **options)
          for place, prompt in enumerate(prompts) for k in range(samples)]


def tokens(outputs):
  return [out.tokens for out in outputs]


def talk(stop, turns, words=(7, 8, 9)):
  """A `respond` that answers each text `turns` times, with ids that depend on what it says."""
  asked = []

  def respond(ended):
    asked.append([index for index, _ in ended])
    replies = []
    for _, out in ended:
      assert out.tokens[-1] in stop and out.finish_reason == 'stop'
      done = sum(out.forced[1:] > out.forced[:-1]) >= turns
      replies.append(None if done else [*words, out.tokens[0]])
    return replies
  respond.asked = asked
  return respond


def trainer_logp(model, outputs):
  """log-probabilities of the answers' tokens by the training forward, all packed into one row."""
  whole = [out.prompt + out.tokens for out in outputs]
  ids = np.concatenate(whole)
  T = -(-len(ids) // 64) * 64
  tokens_BT, segment_BT, position_BT, target_BT = np.zeros((4, 1, T), np.int32)
  tokens_BT[0, :len(ids)], target_BT[0, :len(ids) - 1] = ids, ids[1:]
  segment_BT[0, :len(ids)] = np.repeat(np.arange(len(whole)) + 1, list(map(len, whole)))
  position_BT[0, :len(ids)] = np.concatenate([np.arange(len(text)) for text in whole])
  routes = None
  if model.spec.experts:
    routes = np.concatenate([out.routes for out in outputs]).astype(np.int32)
    assert len(routes) == len(ids)
    routes = np.pad(routes, ((0, T - len(ids)), (0, 0), (0, 0))).swapaxes(0, 1)[:, None]

  @jax.jit
  def run(model, routes):
    out = model(tokens_BT, segment_BT, position_BT, routes=routes)
    return token_logp(out.hidden_BTD, model.head(), target_BT)[0]
  logp_T, end, parts = np.asarray(run(model, routes)), 0, []
  for out in outputs:
    start, end = end + len(out.prompt), end + len(out.prompt) + len(out.tokens)
    parts.append(logp_T[start - 1:end - 1])
  return parts


@pytest.mark.parametrize('kind, paged', [
  ('model', False), ('moe_model', True), pytest.param('model', True, marks=pytest.mark.slow),
  pytest.param('moe_model', False, marks=pytest.mark.slow)])
def test_rollout_and_trainer_agree(kind, paged, tokenizer, request):
  """Groups that share pages, turns of an environment, and rows computed again for want of pages."""
  model = jax.tree.map(lambda w: w / 2, request.getfixturevalue(kind))
  stop = tuple(range(100, 140))
  sampling = dataclasses.replace(HOT, stop_ids=stop, max_tokens=40)
  engine = Engine(model, tokenizer, rows=8, pages=28, page=4, chunk=8, paged=paged,
                  with_routes=kind == 'moe_model', version=3)
  outputs = engine.run(group(PROMPTS, 4, sampling), talk(stop, 2))
  assert engine.preempted > 0
  error = 0.0
  for out, logp in zip(outputs, trainer_logp(model, outputs)):
    drawn = ~out.forced
    error += np.abs(out.logp_untempered - logp)[drawn].sum()
    np.testing.assert_allclose(out.logp_untempered[drawn], logp[drawn], atol=2e-5)
    assert out.version == 3 and not out.logp_untempered[out.forced].any()
  drawn = sum((~out.forced).sum() for out in outputs)
  assert drawn > 200 and any(out.forced.sum() == 8 for out in outputs)
  assert error / drawn <= 1e-6
  if engine.with_routes:
    assert all(out.routes.dtype == np.uint8 for out in outputs)


def test_scheduling_changes_no_token(model, tokenizer):
  """Few rows, few pages, pages of any size, shared or not, attended where they lie or copied."""
  requests = group(PROMPTS, 3)
  want = Engine(model, tokenizer, rows=16).run(requests)
  for options in (dict(rows=3), dict(rows=6, pages=9, page=8, chunk=4), dict(rows=16, share=False),
                  dict(rows=6, pages=9, page=8, chunk=4, paged=True)):
    engine = Engine(model, tokenizer, **options)
    got = engine.run(requests)
    assert tokens(got) == tokens(want), options
    for one, other in zip(got, want):
      np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)
    assert all(len(pages.free) == pages.count - 1 and not pages.known for pages in engine.pages)
    assert bool(engine.preempted) == ('pages' in options)
    again = engine.run(requests)
    assert tokens(again) == tokens(got)
    for one, other in zip(got, again):  # the same call, the same bits
      np.testing.assert_array_equal(one.logp, other.logp)
      np.testing.assert_array_equal(one.logp_untempered, other.logp_untempered)


def test_samples_of_a_prompt_run_it_once(model, tokenizer):
  long = [list(range(20, 120)), list(range(20, 84)) + [7] * 30]
  requests = group(long, 4, dataclasses.replace(HOT, max_tokens=4))
  shared = Engine(model, tokenizer, rows=8, page=16)
  alone = Engine(model, tokenizer, rows=8, page=16, share=False)
  assert tokens(shared.run(requests)) == tokens(alone.run(requests))
  assert alone.prefilled == 4 * (99 + 93)
  assert shared.prefilled == 99 + 93 - 64  # the second text begins like the first


def test_no_compilation_once_warm(model, tokenizer):
  """Any prompts, seeds, lengths and number of them up to what was warmed; new weights."""
  def requests(seed):
    draw = np.random.default_rng(seed)
    return [Request(draw.integers(0, 400, draw.integers(2, 30)).tolist(),
                    Sampling(1.0, max_tokens=int(draw.integers(20, 34))), seed * 100 + i)
            for i in range(20 + seed)]
  engine = Engine(model, tokenizer, rows=4, pages=40, page=16, chunk=8)
  engine.warm(64)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None)
  try:
    for seed in (1, 2):
      engine.load(jax.tree.map(lambda w: w, model), version=seed)
      outputs = engine.run(requests(seed))
      assert len(outputs) == 20 + seed and {out.version for out in outputs} == {seed}
    assert not compiled
    jnp.zeros(3).sum().block_until_ready()  # another shape: the listener does hear compilations
    jax.jit(lambda x: x * 3.14 + 1)(jnp.ones(7))
    assert compiled
  finally:
    jax.monitoring.clear_event_listeners()


def test_what_does_not_fit_is_refused_before_any_work(model, tokenizer):
  engine = Engine(model, tokenizer, rows=2, pages=8, page=4)
  with pytest.raises(ValueError, match='prompt 1 has 32 tokens: want 1 to 31'):
    engine.run([Request([5]), Request([5] * 32)])
  assert engine.pool is None
  out, = engine.run([Request([5] * 22, HOT)])
  assert len(out.tokens) == 10 and out.finish_reason == 'length'


def test_a_row_goes_on_after_an_environment(model, tokenizer):
  """What follows equals the answer to a prompt that holds the turn already; draws count on."""
  stop = tuple(range(100, 140))
  sampling = dataclasses.replace(HOT, temperature=0.0, stop_ids=stop, max_tokens=30)
  engine = Engine(model, tokenizer, rows=4, page=8, chunk=4)
  respond = talk(stop, 1)
  for out in engine.run(group(PROMPTS, 1, sampling), respond):
    if not out.forced.any():
      continue
    start, end = np.flatnonzero(out.forced)[[0, -1]]
    assert out.tokens[start - 1] in stop and end - start == 3 and not out.logp[start:end + 1].any()
    assert tokenizer.decode(out.tokens[:end + 1]) in out.text
    after, = engine.run([Request(out.prompt + out.tokens[:end + 1], sampling)])
    rest = out.tokens[end + 1:]
    assert after.tokens[:len(rest)] == rest and len(rest) > 0
  asked = sum(respond.asked, [])
  assert len(set(asked)) >= 3 and max(map(asked.count, asked)) == 2


def test_an_environment_text_without_room_ends_the_row(model, tokenizer):
  every = tuple(range(400))
  engine = Engine(model, tokenizer, rows=1, pages=4, page=8)
  out, = engine.run([Request([5] * 20, Sampling(stop_ids=every))], lambda ended: [[1] * 12])
  assert out.finish_reason == 'length' and len(out.tokens) == 1 and not out.forced.any()


@pytest.mark.slow
def test_the_thinking_budget_begins_anew_with_each_turn(model, tokenizer):
  """Each turn opens its own block, and is cut short after as many tokens."""
  stop, words = tuple(range(100, 200)), tokenizer.encode(thinking.STOP)
  opened = tokenizer.encode('the fox\n<think>\n')
  sampling = Sampling(2.0, max_tokens=400, stop_ids=stop, seed=5)
  engine = Engine(model, tokenizer, rows=2, chunk=8)
  out, = engine.run([Request(opened, sampling, 0, 2)],
                    lambda ended: [None if len(ended[0][1].tokens) > 250 else opened])
  starts = [i for i in range(len(out.tokens)) if out.tokens[i:i + len(words)] == words]
  turns = [0] + [i + len(opened) for i in range(1, len(out.tokens))
                 if out.tokens[i:i + len(opened)] == opened and out.forced[i]]
  cut = [start for start in starts if start - 2 in turns]
  assert len(turns) >= 2 and cut and all(out.forced[i:i + len(words)].all() for i in cut)
  for turn in turns:  # every turn spends the whole budget, stops before, or closes by itself
    said = out.tokens[turn:turn + 2]
    closed = any(id in stop or id == tokenizer.id('</think>') for id in said)
    assert closed or turn + 2 in cut or turn + 2 >= len(out.tokens)


def test_a_penalty_knows_what_earlier_calls_drew(model, tokenizer):
  row = dataclasses.replace(NON_THINKING, temperature=0.0, presence_penalty=1e4, max_tokens=40,
                            stop_ids=())
  engine = Engine(model, tokenizer, rows=3, pages=20, page=6, chunk=4)
  for out in engine.run(group(PROMPTS, 1, row)):
    assert len(set(out.tokens)) == 40


@pytest.mark.slow
@pytest.mark.parametrize('paged, shape', [
    (False, dict(fsdp=2, tensor=2)), (True, dict(fsdp=2, tensor=2)),
    (True, dict(expert=2, fsdp=1, tensor=2))], ids=str)
def test_sharded_like_training(tokenizer, paged, shape):
  """Two shards of rows and pages, heads split in two; the model's arrays are used as they are."""
  spec = Spec(2, 32, 4, 2, 64, vocab=512, head_width=16, experts=4, chosen=2, expert_mlp=32)
  model = jax.tree.map(lambda w: w * 2, transformer.init(spec))
  stop = tuple(range(100, 160))
  requests = group(PROMPTS, 3, dataclasses.replace(HOT, stop_ids=stop, max_tokens=24))
  options = dict(rows=8, page=4, chunk=8, paged=paged, with_routes=True)
  want = Engine(model, tokenizer, **options).run(requests, talk(stop, 1))
  mesh = make_mesh(shape)
  with jax.set_mesh(mesh):
    placed = jax.device_put(model, shardings(model, mesh))
    engine = Engine(placed, tokenizer, pages=60, **options)
    for ours, theirs in zip(jax.tree.leaves(engine.decoder.model), jax.tree.leaves(placed)):
      assert [x.data.unsafe_buffer_pointer() for x in ours.addressable_shards] == [
        x.data.unsafe_buffer_pointer() for x in theirs.addressable_shards]
    got = engine.run(requests, talk(stop, 1))
    assert engine.pool.layers[0].k_BKHS.sharding.shard_shape((64, 2, 16, 4)) == (32, 1, 16, 4)
    engine.load(model, version=7)  # elsewhere: it is moved
    moved = engine.run(requests[:2])
  assert tokens(got) == tokens(want)
  assert {out.version for out in moved} == {7} and {out.version for out in got} == {None}
  for one, other in zip(got, want):
    np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)
    np.testing.assert_array_equal(np.sort(one.routes), np.sort(other.routes))


def test_pages_are_held_by_count_and_known_by_their_ids():
  pages = Pages(8, 2)
  mine = pages.take(3)
  pages.name([1, 2, 3, 4, 5], mine, 'mine')
  assert pages.find([1, 2, 3, 4, 5]) == (mine[:2], mine[2], 'mine')
  assert pages.find([1, 2, 3, 4, 6]) == (mine[:2], None, 'mine')
  assert pages.find([1, 2, 3, 5]) == (mine[:1], None, 'mine')
  assert pages.find([3, 4]) == ([], None, None)
  pages.hold(mine[0])
  for page in mine:
    pages.drop(page)
  assert pages.find([1, 2, 3, 4]) == (mine[:1], None, 'mine') and len(pages.free) == 6
  pages.drop(mine[0])
  assert pages.find([1, 2]) == ([], None, None) and sorted(pages.free) == list(range(1, 8))
