"""Prompts to texts: prefill once, then a jitted loop that decodes many tokens a call.

Rows of a batch are padded on the left, so that one number says how many cache slots are written.
Every size that decides a compilation (rows, prompt length, cache slots) is rounded up to a few, and
the cache doubles as the texts grow. Without a mesh one device works; under `jax.set_mesh`, with a
model made or loaded sharded, rows are split over data and fsdp, heads over tensor.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen3_jax.generation import thinking
from qwen3_jax.generation.sampling import Sampling, Settings, logp_of, sample
from qwen3_jax.mesh import constrain
from qwen3_jax.model import rope
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.text.template import render


@dataclasses.dataclass
class Output:
  """One prompt's answer. Arrays have one entry a token; the token that stopped it is the last."""
  text: str  # of `tokens`, without the one that stopped it
  tokens: list[int]
  logp: np.ndarray  # under the distribution each token was drawn from; 0 where greedy or forced
  logp_untempered: np.ndarray  # under the model's plain softmax
  forced: np.ndarray  # bool: put there by the thinking budget, not drawn
  finish_reason: str  # 'stop' (a stop id) or 'length' (max_tokens, or the model's last position)
  prompt: list[int]
  routes: np.ndarray | None = None  # experts chosen, (prompt + tokens, MoE layers, X)


@struct.dataclass
class Decoder:
  """A model made ready to decode: layers unstacked once, the head turned for one-token products."""
  model: Qwen3
  head_DV: jax.Array


@struct.dataclass
class Rows:
  """What each row was asked to do."""
  settings: Settings
  stop_BJ: jax.Array  # stop ids, -1 where there are fewer
  limit_B: jax.Array  # tokens a row may generate
  budget: thinking.Budget | None


@struct.dataclass
class State:
  """Where each row is: `hidden_BD` predicts its next token."""
  cache: Cache
  hidden_BD: jax.Array
  count_B: jax.Array  # tokens generated
  position_B: jax.Array  # of the next token
  alive_B: jax.Array
  seen_BV: jax.Array | None  # generated ids, where a presence penalty asks
  progress: thinking.Progress | None


@functools.partial(jax.jit, static_argnums=1)
def prepare(model, rows=1):
  """Decoder of `model`, best for batches of `rows`.

  It holds a copy of the weights: drop the model where memory is short.
  """
  split = model.split(rows if jax.sharding.get_abstract_mesh().empty else None)
  if not model.spec.tied:
    del split.head_VD
  return Decoder(split, constrain(model.head().T, 'DV'))


def generate(model, tokenizer, prompts, sampling=None, thinking_budget=None, seeds=None, **options):
  """Continues each prompt; a list of `Output`, in order.

  `prompts`: strings, lists of ids, or conversations (lists of messages, rendered with a generation
  prompt). `sampling` and `thinking_budget`: one for all, or a list with one for each. Prompt i
  draws with the key (sampling.seed, seeds[i]), `seeds` being 0, 1, ... by default; neither its
  neighbours nor the batch change what it draws. Further options: see `stream`. Raises ValueError on
  an empty or too long prompt.
  """
  deltas = stream(model, tokenizer, prompts, sampling, thinking_budget, seeds, **options)
  while True:
    try:
      next(deltas)
    except StopIteration as end:
      return end.value


def stream(model, tokenizer, prompts, sampling=None, thinking_budget=None, seeds=None,
           enable_thinking=True, stop_text=thinking.STOP, rows=64, chunk=32, with_routes=False):
  """Iterates over (prompt's index, more of its text); returns the outputs (`StopIteration.value`).

  `model` may be a `Decoder`. `rows` prompts are decoded together, `chunk` tokens between two looks
  at the texts. `stop_text` is what a spent thinking budget inserts. `enable_thinking` goes to the
  template of conversations.
  """
  decoder = model if isinstance(model, Decoder) else prepare(model, _rows(min(rows, len(prompts))))
  ids = [_encode(tokenizer, prompt, enable_thinking) for prompt in prompts]
  each = _spread(sampling or Sampling(), len(ids), 'sampling')
  limits = _spread(thinking_budget, len(ids), 'thinking_budget')
  seeds = range(len(ids)) if seeds is None else _spread(seeds, len(ids), 'seeds')
  longest = decoder.model.spec.max_position
  for place, prompt in enumerate(ids):
    if not 0 < len(prompt) < longest:
      raise ValueError(f'prompt {place} has {len(prompt)} tokens: want 1 to {longest - 1}, so that '
                       'the answer has a position')
  outputs = []
  for first in range(0, len(ids), rows):
    part = slice(first, first + rows)
    batch = _Batch(decoder, tokenizer, ids[part], each[part], limits[part], seeds[part], stop_text,
                   chunk, with_routes)
    for place, delta in batch.run():
      yield first + place, delta
    outputs += batch.finish()
  return outputs


def _encode(tokenizer, prompt, enable_thinking):
  if isinstance(prompt, str):
    return tokenizer.encode(prompt)
  if len(prompt) and isinstance(prompt[0], dict):
    return tokenizer.encode(render(prompt, enable_thinking=enable_thinking,
                                   add_generation_prompt=True))
  return [int(id) for id in prompt]


def _spread(value, count, name):
  values = list(value) if isinstance(value, (list, tuple, range, np.ndarray)) else [value] * count
  if len(values) != count:
    raise ValueError(f'{name} has {len(values)} entries for {count} prompts: give one, or one each')
  return values


def _rows(count):
  """The next power of two."""
  return 1 << (count - 1).bit_length() if count else 1


SLOTS = 64  # of the smallest cache


def round_up(n, least=16):
  """The next of least * (1, 1.5, 2, 3, 4, 6, ...): at most half is wasted, and few are compiled."""
  size = least
  while size < n:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


class _Batch:
  """The host's side of rows that are decoded together."""

  def __init__(self, decoder, tokenizer, prompts, each, limits, seeds, stop_text, chunk,
               with_routes):
    self.decoder, self.tokenizer, self.prompts = decoder, tokenizer, prompts
    self.chunk, self.with_routes = chunk, with_routes
    self.stops = [tokenizer.stop_ids if row.stop_ids is None else row.stop_ids for row in each]
    self.limits = [min(row.max_tokens, decoder.model.spec.max_position - len(ids))
                   for row, ids in zip(each, prompts)]
    self.texts = [tokenizer.stream() for _ in prompts]
    self.parts = [[] for _ in prompts]  # of each row, the text so far
    self.columns = []  # of each call, its arrays (steps, B)
    extra = _rows(len(prompts)) - len(prompts)
    width = max(4, *map(len, self.stops))
    stop = [list(ids) + [-1] * (width - len(ids)) for ids in self.stops] + [[-1] * width] * extra
    budget = None
    if any(limit is not None for limit in limits):
      budget = thinking.make_budget(tokenizer, list(limits) + [None] * extra, stop_text)
    settings = Settings.make(list(each) + [each[0]] * extra, list(seeds) + [0] * extra,
                             tokenizer.size)
    self.rows = Rows(settings, np.array(stop, np.int32),
                     np.array(self.limits + [0] * extra, np.int32), budget)
    self.progress = thinking.begin(budget, prompts + [[0]] * extra) if budget else None

  def run(self):
    """Decodes until every row has finished, yielding (row, more text)."""
    T = round_up(max(map(len, self.prompts)))
    tokens_BT = np.zeros((len(self.rows.limit_B), T), np.int32)
    segment_BT = np.zeros_like(tokens_BT)
    for row, ids in enumerate(self.prompts):
      tokens_BT[row, T - len(ids):], segment_BT[row, T - len(ids):] = ids, 1
    state, self.prompt_routes = prefill(self.decoder, tokens_BT, segment_BT, self.rows,
                                        self.progress, self.with_routes)
    slots = used = T
    most = round_up(T + max(self.limits), SLOTS)
    while True:
      if slots == used:
        slots = min(round_up(2 * used, SLOTS), most)
        state = grow(state, slots)
      state, out, steps, alive = decode(self.decoder, state, self.rows, slots - used, self.chunk,
                                        self.with_routes)
      steps = int(steps)
      used += steps
      self.columns.append({name: np.asarray(value)[:steps] for name, value in out.items()})
      yield from self._show(self.columns[-1])
      if not alive:
        return

  def _show(self, column):
    for row in range(len(self.prompts)):
      ids = column['token'][:, row][column['real'][:, row]]
      forced = column['forced'][:, row]
      if ids.size and ids[-1] in self.stops[row] and not forced[ids.size - 1]:
        ids = ids[:-1]
      delta = ''.join(map(self.texts[row].push, ids.tolist()))
      if delta:
        self.parts[row].append(delta)
        yield row, delta

  def finish(self):
    """The outputs; what a text's last, unfinished character leaves is added here."""
    whole = {name: np.concatenate([c[name] for c in self.columns]) for name in self.columns[0]}
    return [self._output(row, {name: value[whole['real'][:, row], row]
                               for name, value in whole.items()})
            for row in range(len(self.prompts))]

  def _output(self, row, column):
    ids = column['token'].tolist()
    stopped = ids[-1] in self.stops[row] and not column['forced'][-1]
    routes = None
    if self.with_routes:
      prompt = np.asarray(self.prompt_routes)[row, -len(self.prompts[row]):]
      routes = np.concatenate([prompt, column['routes']])
    return Output(''.join(self.parts[row]), ids, column['logp'], column['logp_untempered'],
                  column['forced'], 'stop' if stopped else 'length', self.prompts[row], routes)


@functools.partial(jax.jit, static_argnums=5)
def prefill(decoder, tokens_BT, segment_BT, rows, progress, with_routes):
  """State after the prompts (left padded), and their routes (B, T, layers, X) where asked for."""
  model = decoder.model
  B, T = tokens_BT.shape
  tokens_BT, segment_BT = constrain(tokens_BT, 'BT'), constrain(segment_BT, 'BT')
  position_BT = jnp.maximum(jnp.cumsum(segment_BT, axis=1) - 1, 0)
  cache = Cache.make(model.spec, B, T, model.embed_VD.dtype)
  out = model(tokens_BT, segment_BT, position_BT, cache)
  cache = out.cache.replace(length=jnp.asarray(out.cache.length, jnp.int32))
  seen_BV = jnp.zeros((B, model.spec.vocab), bool) if rows.settings.penalised else None
  state = State(cache, out.hidden_BTD[:, -1],
                jnp.zeros(B, jnp.int32), segment_BT.sum(1), rows.limit_B > 0, seen_BV, progress)
  return state, out.routes.transpose(1, 2, 0, 3) if with_routes else None


@functools.partial(jax.jit, static_argnums=1)
def grow(state, slots):
  """The state with room for `slots` tokens."""
  return state.replace(cache=state.cache.grow(slots))


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def decode(decoder, state, rows, room, chunk, with_routes):
  """Up to min(`room`, `chunk`) tokens a row, fewer once every row has finished.

  Returns (state, columns, steps, whether a row is alive): columns are arrays (chunk, B, ...), of
  which the first `steps` are written: token, real (the row was alive), forced, logp,
  logp_untempered and, where asked for, routes.
  """
  slots = jnp.arange(state.cache.segment_BS.shape[1])
  rotation = rope.rotation(slots[None], *rope.spec_frequencies(decoder.model.spec))
  advance = functools.partial(_step, decoder, rows, with_routes, [turn[0] for turn in rotation])
  _, shapes = jax.eval_shape(advance, state)
  columns = {name: jnp.zeros((chunk, *x.shape), x.dtype) for name, x in shapes.items()}
  steps = jnp.minimum(room, chunk)

  def more(carry):
    i, state, _ = carry
    return (i < steps) & state.alive_B.any()

  def step(carry):
    i, state, columns = carry
    state, column = advance(state)
    return i + 1, state, {name: columns[name].at[i].set(column[name]) for name in columns}

  i, state, columns = jax.lax.while_loop(more, step, (jnp.int32(0), state, columns))
  return state, columns, i, state.alive_B.any()


def _step(decoder, rows, with_routes, rotation, state):
  """Draws one token a row, and runs the model on it: (state, what is kept of the step)."""
  logits_BV = jnp.dot(state.hidden_BD, decoder.head_DV, preferred_element_type=jnp.float32)
  token_B, logp_B, plain_B = sample(constrain(logits_BV, 'BV'), rows.settings, state.count_B,
                                    state.seen_BV)
  alive_B, progress, forced_B = state.alive_B, state.progress, jnp.zeros_like(state.alive_B)
  if progress is not None:
    progress, token_B, forced_B = thinking.steer(progress, rows.budget, token_B)
    logp_B = jnp.where(forced_B, 0.0, logp_B)
    plain_B = logp_of(logits_BV, token_B)
  seen_BV = state.seen_BV
  if seen_BV is not None:
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  count_B = state.count_B + alive_B
  stopped_B = (token_B[:, None] == rows.stop_BJ).any(-1) & ~forced_B
  out = decoder.model(token_B[:, None], alive_B[:, None].astype(jnp.int32),
                      state.position_B[:, None], state.cache,
                      rotation=[turn[state.position_B][:, None] for turn in rotation])
  column = dict(token=token_B, real=alive_B, forced=forced_B, logp=logp_B, logp_untempered=plain_B)
  if with_routes:
    column['routes'] = out.routes[:, :, 0].swapaxes(0, 1)
  state = State(out.cache, out.hidden_BTD[:, 0], count_B, state.position_B + alive_B,
                alive_B & ~stopped_B & (count_B < rows.limit_B), seen_BV, progress)
  return state, column
