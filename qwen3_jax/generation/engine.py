"""The engine: requests to texts, by continuous batching over pages of keys and values.

Texts join and leave between two calls of the compiled loop; those that begin alike share the pages
of what they share. Every size that decides a compilation (rows, prompt length, page columns) is
rounded up to a few. What a text draws depends on its request alone, and who runs when on all the
requests: a call repeated gives the same bits. Without a mesh one device works; under `jax.set_mesh`
rows and pages are split over data and fsdp, heads over tensor.
"""
import concurrent.futures
import os

import jax
import numpy as np

from qwen3_jax.generation import thinking
from qwen3_jax.generation.decode import (
  Decoder,
  Rows,
  decode,
  decode_copied,
  grow,
  make_pool,
  prefill,
  prepare,
  write,
)
from qwen3_jax.generation.pages import Pages
from qwen3_jax.generation.rows import Output, Request, Row
from qwen3_jax.generation.sampling import Sampling, Settings
from qwen3_jax.generation.scheduler import Scheduler
from qwen3_jax.mesh import is_alone, shardings
from qwen3_jax.model.cache import Pool, shards
from qwen3_jax.text.template import render

__all__ = ['Decoder', 'Engine', 'Output', 'Request', 'generate', 'prepare', 'stream']

SLOTS = 64  # the fewest positions a call is compiled for
PIECE = 512  # tokens of one text that are prefilled at once, at most
TOKENS = 4096  # tokens of all texts that are prefilled at once, at most
ROOM = 2 ** 26  # bytes of pages to begin with on CPU: engines of any number of rows share programs
USUAL = 256  # tokens of an answer that room is made for at once, lest the pool grows step by step
GROUP = 32  # rows of one call where pages are copied: texts of like length, few slots read in vain
DEAD = 8  # one in so many rows that ended, and waiting texts take their places


class Engine:
  """Runs requests on one set of weights at a time.

  `rows` texts run at once, over `pages` pages of `page` tokens (None: as many as it takes; more are
  made, and the calls compiled anew, as texts grow). Without room for all a text waits, or the
  youngest is set aside and computed again later. Up to `chunk` tokens are drawn between two looks
  at the texts. `with_routes` keeps the experts of every token. `share` False: no text reads
  another's pages. `paged`: attend to the pages where they lie instead of copying them once a chunk;
  by default everywhere but on CPU.
  """

  def __init__(self, model, tokenizer, rows=64, pages=None, page=None, chunk=32,
               stop_text=thinking.STOP, with_routes=False, share=True, paged=None, version=None):
    cpu = jax.default_backend() == 'cpu'
    self.tokenizer, self.stop_text, self.with_routes = tokenizer, stop_text, with_routes
    self.page, self.chunk, self.share = page or (32 if cpu else 128), chunk, share
    self.paged = not cpu if paged is None else paged
    self.shards, self.fixed, self.pool = shards(), pages is not None, None
    self.prefilled = self.preempted = 0  # tokens computed before decoding; texts set aside
    self.rows = -(-rows // self.shards)  # of each shard
    self.together = self.rows if self.paged else min(self.rows, GROUP)
    self.factor = 2 if self.paged else 8  # between the sizes of two calls
    # Programs of several devices wait for one another: those are not run side by side.
    self.threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count()) if is_alone() else None
    self.count = -(-pages // self.shards) + 1 if self.fixed else 1 + 2 * self.rows
    self.load(model, version)
    if not self.fixed and not self.paged:
      spec, dtype = self.decoder.model.spec, np.dtype(self.decoder.model.embed_VD.dtype)
      page = jax.tree.leaves(jax.eval_shape(lambda: Pool.make(spec, 1, self.page, dtype)))
      self.count = max(self.count, ROOM // sum(x.size * x.dtype.itemsize for x in page))

  def load(self, model, version=None):
    """Draws with `model` (or a `Decoder`) from now on; outputs carry `version`.

    Under a mesh its own arrays are used, moved only where their sharding is not the mesh's. On one
    CPU a fused copy is made.
    """
    if not isinstance(model, Decoder):
      mesh = jax.sharding.get_mesh()
      model = model if mesh.empty else jax.device_put(model, shardings(model, mesh))
      model = prepare(model, self.together)
    self.decoder, self.version = model, version

  def run(self, requests, respond=None, ended=None):
    """Outputs of the `requests`, in order; `ended(index, Output)` is told of each once it is over.

    `respond([(index, Output so far), ...])` is asked once a chunk about all texts that a stop id
    ended in it; it returns for each the ids to append, or None where it is over. A text goes on
    after them, with its thinking budget whole again and what is left of its `max_tokens`; one that
    has no room for them ends with reason 'length'. Raises ValueError for a prompt that has none.
    """
    steps = self.steps(requests, respond, ended)
    while True:
      try:
        next(steps)
      except StopIteration as end:
        return end.value

  def steps(self, requests, respond=None, ended=None):
    """`run`, a chunk at a time: yields {index: more of its text}, returns the outputs."""
    texts, outputs = self._open(requests), [None] * len(requests)
    pages = [Pages(self.count, self.page, self.share) for _ in range(self.shards)]
    schedule = Scheduler(texts, pages, self.rows, self.chunk, None if self.fixed else self._grow)
    self.pages = pages
    while running := schedule.plan():
      self._fill(running)
      self._decode(running, bool(schedule.waiting))
      for text in running:
        schedule.release(text)
      for text in self._ended(running, respond):
        schedule.leave(text)
        outputs[text.index] = text.output(self.version)
        if ended:
          ended(text.index, outputs[text.index])
      yield {text.index: text.delta for text in running if text.delta}
    self.preempted += schedule.preempted
    return outputs

  @property
  def longest(self):
    """Tokens that a prompt may have at most, so that its answer has a position."""
    positions = self.decoder.model.spec.max_position
    return (min(positions, (self.count - 1) * self.page) if self.fixed else positions) - 1

  def warm(self, longest, request=None):
    """Compiles every call that texts of up to `longest` tokens, prompt and answer, can need.

    `request` is one like those to come: they compile anew where filters, penalties, greedy rows or
    thinking budgets differ. Pages are those given at the start (without a number they still grow).
    """
    self._open([request or Request([0])])
    columns = sorted({self._columns([n]) for n in range(longest + 1)})
    self._make_pool()
    for B in self._sizes(self.factor, self.together):
      for C in columns[1:]:
        tables = self._tables([], [], B, C, (self.chunk + self.page - 2) // self.page + 1)
        self._draw([([], [], self._rows([], [], B), *tables, np.int32(1))])
    for T in sorted({piece(n) for n in range(1, longest + 1)}):
      most = next(B for B in self._sizes(4) if B >= min(self.rows, TOKENS // T) * self.shards)
      for B in (B for B in self._sizes(4) if B <= most):
        for C in columns:
          none = np.zeros(B, np.int32)
          tables = self._tables([], [], B, C, (T + self.page - 2) // self.page + 1)
          self.pool, _ = prefill(self.decoder, self.pool, np.zeros((B, T), np.int32), none, none,
                                 *tables, self.with_routes)

  def _open(self, requests):
    """Rows of the requests; ValueError for one that cannot be run."""
    for index, request in enumerate(requests):
      if not 0 < len(request.prompt) <= self.longest:
        raise ValueError(f'prompt {index} has {len(request.prompt)} tokens: want 1 to '
                         f'{self.longest}, so that the answer has a position')
    limits = [request.thinking_budget for request in requests]
    self.budget = None
    if any(limit is not None for limit in limits):
      self.budget = thinking.make_budget(self.tokenizer, limits, self.stop_text)
    texts = []
    for index, request in enumerate(requests):
      stops = request.sampling.stop_ids
      stops = tuple(self.tokenizer.stop_ids if stops is None else stops)
      texts.append(Row(index, request, stops, self.longest + 1 - len(request.prompt),
                       self.tokenizer.stream()))
      texts[-1].progress = self._begin(request.prompt)
      if request.sampling.presence_penalty:
        texts[-1].seen = np.zeros(self.decoder.model.spec.vocab, bool)
    self.settings = Settings.make([request.sampling for request in requests],
                                  [request.seed for request in requests], self.tokenizer.size)
    self.stops = max([4, *(len(text.stops) for text in texts)])
    return texts

  def _begin(self, ids):
    """Where the thinking of a turn is that begins after `ids`: three numbers."""
    if self.budget is None:
      return None
    progress = thinking.begin(self.budget, [ids])
    return [int(x[0]) for x in (progress.phase_B, progress.spent_B, progress.place_B)]

  def _grow(self, count):
    """Room for `count` pages a shard, and some to spare."""
    self.count = round_up(count, self.count)
    for pages in self.pages:
      pages.grow(self.count)
    if self.pool is not None:
      self.pool = grow(self.pool, self.count * self.shards)

  def _fill(self, running):
    """Runs what the texts hold that is in no page yet, but for the last id of each."""
    for wave in sorted({text.wave for text in running}):
      todo = [text for text in running if text.wave == wave]
      while todo := [text for text in todo if text.cached < len(text.ids) - 1]:
        self._fill_some(self._alike(todo))
    for text in running:
      if text.source is not None and self.with_routes:
        known = np.concatenate(text.source.routes) if text.source.routes else []
        text.learn_routes(0, known[:text.cached])
      text.wave, text.source = 0, None

  def _alike(self, todo):
    """The texts among `todo` that are prefilled in one call with the first of them."""
    def sizes(text):
      return piece(len(text.ids) - 1 - text.cached), self._columns([text.cached])
    T, _ = wanted = sizes(todo[0])
    alike = [[] for _ in range(self.shards)]
    for text in todo:
      if sizes(text) == wanted and len(alike[text.shard]) < max(1, TOKENS // T):
        alike[text.shard].append(text)
    return [text for part in alike for text in part], *wanted

  def _fill_some(self, group):
    texts, T, C = group
    place, B = self._place(texts, 4)
    tokens_BT, length_B, count_B = (np.zeros(shape, np.int32) for shape in ((B, T), B, B))
    for b, text in zip(place, texts):
      ids = text.ids[text.cached:len(text.ids) - 1][:T]
      tokens_BT[b, :len(ids)], length_B[b], count_B[b] = ids, text.cached, len(ids)
    tables = self._tables(place, texts, B, C, (T + self.page - 2) // self.page + 1)
    self._make_pool()
    self.pool, routes = prefill(self.decoder, self.pool, tokens_BT, length_B, count_B, *tables,
                                self.with_routes)
    routes = None if routes is None else np.asarray(routes)
    for b, text in zip(place, texts):
      if routes is not None:
        text.learn_routes(text.cached, routes[b, :count_B[b]])
      text.cached += int(count_B[b])
    self.prefilled += int(count_B.sum())

  def _make_pool(self):
    if self.pool is None or self.pool.layers[0].k_BKHS.is_deleted():
      model = self.decoder.model
      self.pool = make_pool(model.spec, self.count * self.shards, self.page,
                            np.dtype(model.embed_VD.dtype))

  def _columns(self, lengths):
    """Page columns of a call whose longest text holds so many tokens."""
    longest = max(lengths)
    return round_up(-(-longest // self.page), -(-SLOTS // self.page)) if longest else 0

  def _place(self, texts, factor, most=None):
    """The batch's row of each text, and how many rows it has: those of a shard lie together."""
    inside = [0] * self.shards
    for text in texts:
      inside[text.shard] += 1
    size = next(B // self.shards for B in self._sizes(factor, most)
                if B >= max(inside) * self.shards)
    seen, place = [0] * self.shards, []
    for text in texts:
      place.append(text.shard * size + seen[text.shard])
      seen[text.shard] += 1
    return place, size * self.shards

  def _sizes(self, factor, most=None):
    """Rows that a call may have, up to `most` of each shard."""
    most = most or self.rows
    sizes = [factor ** i for i in range(most.bit_length()) if factor ** i < most]
    return [size * self.shards for size in (*sizes, most)]

  def _tables(self, place, texts, B, C, W):
    """Pages to read (B, C), and to write from the first that is not full (B, W)."""
    read_BC, write_BW = np.zeros((B, C), np.int32), np.zeros((B, W), np.int32)
    for b, text in zip(place, texts):
      pages, first = text.pages[:C], text.cached // self.page
      read_BC[b, :len(pages)] = pages
      if text.borrowed is not None:
        read_BC[b, first] = text.borrowed
      pages = text.pages[first:first + W]
      write_BW[b, :len(pages)] = pages
    return read_BC, write_BW

  def _groups(self, running):
    """The texts of each call, `together` of each shard at most, by length."""
    ordered = sorted(running, key=lambda text: (text.cached, text.index))
    shards = [[text for text in ordered if text.shard == shard] for shard in range(self.shards)]
    for first in range(0, max(map(len, shards)), self.together):
      yield [text for texts in shards for text in texts[first:first + self.together]]

  def _decode(self, running, waiting):
    """Every running text gets its next tokens."""
    self._make_pool()
    calls = [self._call(texts, waiting) for texts in self._groups(running)]
    for (texts, place, *_), (columns, steps, progress) in zip(calls, self._draw(calls)):
      columns = {name: np.asarray(value)[:int(steps)].swapaxes(0, 1)
                 for name, value in columns.items()}
      if progress is not None:
        progress = np.stack([progress.phase_B, progress.spent_B, progress.place_B], 1).tolist()
      for b, text in zip(place, texts):
        text.delta = ''
        text.take({name: value[b] for name, value in columns.items()})
        if progress is not None:
          text.progress = progress[b]

  def _call(self, texts, waiting):
    """What one call reads: (texts, their rows, `Rows`, pages to read, pages to write, least)."""
    place, B = self._place(texts, self.factor, self.together)
    held = [len(text.pages) * self.page if self.paged else text.cached for text in texts]
    tables = self._tables(place, texts, B, max(1, self._columns(held)),
                          (self.chunk + self.page - 2) // self.page + 1)
    fewer = max((size for size in self._sizes(self.factor, self.together) if size < B), default=0)
    least = len(texts) - len(texts) // DEAD if waiting else min(len(texts), fewer + 1)
    return texts, place, self._rows(place, texts, B), *tables, np.int32(least)

  def _draw(self, calls):
    """Runs the calls, side by side where each has a copy of its pages; what each drew."""
    options = self.chunk, self.with_routes
    if self.paged:
      drawn = []
      for _, _, rows, read_BC, write_BW, least in calls:
        self.pool, *each = decode(self.decoder, self.pool, rows, read_BC, write_BW,
                                  np.int32(self.chunk), least, *options)
        drawn.append(each)
      return drawn

    def run(call):
      _, _, rows, read_BC, _, least = call
      return jax.block_until_ready(decode_copied(
        self.decoder, self.pool, rows, read_BC, np.int32(self.chunk), least, *options))
    drawn = list((self.threads.map if self.threads else map)(run, calls))
    for (_, _, rows, _, write_BW, _), (cache, *_) in zip(calls, drawn):
      self.pool = write(self.pool, cache, rows.length_B, write_BW)
    return [each for _, *each in drawn]

  def _rows(self, place, texts, B):
    """What `decode` reads of the texts; rows without one are not alive."""
    def column(values, dtype=np.int32, width=()):
      x = np.zeros((B, *width), dtype)
      if place:
        x[place] = values
      return x
    which = column([text.index for text in texts])
    closing = column([text.closing for text in texts], bool)
    stop_BJ = column([text.stops + (-1,) * (self.stops - len(text.stops)) for text in texts],
                     width=(self.stops,))
    budget = progress = seen_BV = None
    if self.budget is not None:
      budget = self.budget.replace(limit_B=self.budget.limit_B[which])
      progress = thinking.Progress(*column([text.progress for text in texts], width=(3,)).T.copy())
    if self.settings.penalised:
      seen_BV = np.zeros((B, self.decoder.model.spec.vocab), bool)
      for b, text in zip(place, texts):
        if text.seen is not None:
          seen_BV[b] = text.seen
    return Rows(
      column([text.ids[-1] for text in texts]), column([text.cached for text in texts]),
      column([text.count for text in texts]), column([text.limit for text in texts]),
      column([not text.closing for text in texts], bool), closing, stop_BJ,
      jax.tree.map(lambda x: x[which], self.settings), seen_BV, budget, progress)

  def _ended(self, running, respond):
    """The texts that are over; those that `respond` has ids for go on."""
    over = [text for text in running
            if text.reason and (not self.with_routes or text.cached == len(text.ids))]
    asked = [text for text in over if respond and text.stopped]
    said = respond([(text.index, text.output(self.version)) for text in asked]) if asked else []
    assert len(said) == len(asked), 'respond answers for every text'
    for text, ids in zip(asked, said):
      if ids is None:
        continue
      if text.count + len(ids) >= text.room or text.count >= text.limit:
        text.reason = 'length'
        continue
      text.append(list(ids), self._begin(ids))
      over.remove(text)
    return over


def piece(tokens):
  """Columns of the call that prefills so many tokens, or the first of them."""
  return min(PIECE, 32 << max(0, (tokens - 1) // 32).bit_length())


def round_up(n, least=16):
  """The next of least * (1, 1.5, 2, 3, 4, 6, ...): at most half is wasted, and few are compiled."""
  size, larger = least, max(least * 3 // 2, least + 1)
  while size < n:
    size, larger = larger, max(size * 2, larger + 1)
  return size


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
  ids = [_encode(tokenizer, prompt, enable_thinking) for prompt in prompts]
  each = _spread(sampling or Sampling(), len(ids), 'sampling')
  limits = _spread(thinking_budget, len(ids), 'thinking_budget')
  seeds = range(len(ids)) if seeds is None else _spread(seeds, len(ids), 'seeds')
  if not ids:
    return []
  engine = Engine(model, tokenizer, min(rows, len(ids)), chunk=chunk, stop_text=stop_text,
                  with_routes=with_routes)
  usual = max(len(prompt) + min(one.max_tokens, USUAL) for prompt, one in zip(ids, each))
  engine.count = max(engine.count, 1 + engine.rows * -(-usual // engine.page))
  steps = engine.steps([Request(*request) for request in zip(ids, each, seeds, limits)])
  while True:
    try:
      yield from next(steps).items()
    except StopIteration as end:
      return end.value


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
