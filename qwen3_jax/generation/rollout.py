"""Whole episodes of many records at once, in one run of the engine.

A transcript is exact to the token: the history is never rendered again (the chat template would
strip its reasoning); what an environment says is put behind the tokens that the model drew, as the
template writes it after a turn. Its words are hostile: a control token among them is plain
characters.
"""
import collections
import dataclasses
import functools
import queue
import threading
import time

import numpy as np

from qwen3_jax.environments.records import open_environment
from qwen3_jax.generation.engine import Request
from qwen3_jax.generation.sampling import Sampling
from qwen3_jax.rewards.response import Response, Unscored
from qwen3_jax.text.template import parse, render

WORKERS, DEADLINE = 16, 60.0  # environments that step at once; seconds for one step
IM_START, IM_END = '<|im_start|>', '<|im_end|>'


@dataclasses.dataclass
class Episode:
  """One record played. Arrays have one entry a token of `tokens`, which are all after the prompt.

  `response` is None where the machinery failed, and `failure` says how: such an episode has no
  reward, which is not a reward of zero.
  """
  record: dict
  prompt: list[int]
  tokens: list[int]
  drawn: np.ndarray  # bool: by the model; else put there by an environment or a thinking budget
  logp: np.ndarray  # under the distribution drawn from
  logp_untempered: np.ndarray
  routes: np.ndarray | None  # experts chosen, (prompt + tokens, MoE layers, X)
  version: int  # of the weights
  turns: int  # of the model
  response: Response | None
  failure: str | None


def play(engine, records, sampling=None, seeds=None, thinking_budget=None, enable_thinking=True,
         open_environment=open_environment, workers=WORKERS, deadline=DEADLINE):
  """An Episode for each record, in order; a record without 'environment' is one turn.

  `sampling`, `thinking_budget` (of each turn, where the record thinks) and `enable_thinking` (a
  record's own comes first): one for all, or a list. Record i draws with the key (sampling.seed,
  seeds[i]), i by default. `sampling.max_tokens` counts what is drawn in all turns; what tools say
  comes on top. After the turns that stop, environments step in threads, each within
  `deadline` seconds; what they say is applied in order, so that an episode depends on its record,
  settings and weights alone. An environment that raises or overruns, or a prompt that is too long,
  fails its own episode; a thread that overran is left behind. Raises ValueError for an environment
  that does not exist and for messages that cannot be rendered.
  """
  count = len(records)
  modes = spread(enable_thinking, count, 'enable_thinking')
  modes = [mode if record.get('enable_thinking') is None else record['enable_thinking']
           for record, mode in zip(records, modes)]
  rows = [_Row(engine.tokenizer, record, mode, open_environment)
          for record, mode in zip(records, modes)]

  def in_time(work):
    """The value of each (row, function); None, and the row's failure, where there is none."""
    values = run_in_time([call for _, call in work], workers, deadline)
    return [row.accept(value) for (row, _), value in zip(work, values)]

  in_time([(row, row.reset) for row in rows if row.environment])
  for row in rows:
    row.encode_prompt(engine.longest)
  asked = [place for place, row in enumerate(rows) if not row.failure]

  def respond(turns):
    found = [(rows[asked[index]], output.tokens) for index, output in turns]
    work = [(row, row.take(tokens, True)) for row, tokens in found]
    steps = [(row, functools.partial(row.step, message)) for row, message in work
             if row.environment]
    ids = iter(in_time(steps))
    return [row.append(next(ids)) if row.environment else None for row, _ in work]

  settings = spread(sampling or Sampling(), count, 'sampling')
  seeds = list(range(count)) if seeds is None else spread(seeds, count, 'seeds')
  budgets = spread(thinking_budget, count, 'thinking_budget')
  outputs = engine.run([Request(rows[place].prompt, settings[place], seeds[place],
                                budgets[place] if modes[place] else None)
                        for place in asked], respond) if asked else []
  for place, output in zip(asked, outputs):
    rows[place].end(output)
  in_time([(row, row.judge) for row in rows if row.environment and not row.failure])
  return [row.episode() for row in rows]


def spread(value, count, name):
  """One value for all, or a list with one for each, as a list."""
  values = list(value) if isinstance(value, (list, tuple, range, np.ndarray)) else [value] * count
  if len(values) != count:
    raise ValueError(f'{name} has {len(values)} entries for {count} records: give one, or one each')
  return values


class _Row:
  """The host's side of one episode."""

  def __init__(self, tokenizer, record, thinking, open_environment):
    self.tokenizer, self.record, self.thinking = tokenizer, record, thinking
    self.environment = open_environment(record) if record.get('environment') else None
    self.prompt, self.output, self.outcome, self.failure = [], None, None, None
    self.read = 0  # how many tokens are of turns that are over
    self.turns, self.text, self.messages, self.appended = 0, '', [], []

  def reset(self):
    self.environment.reset(self.record)

  def encode_prompt(self, longest):
    tools = self.record.get('tools') or (self.environment and list(self.environment.tools))
    text = render(self.record['messages'], tools, self.thinking, add_generation_prompt=True)
    self.prompt = self.tokenizer.encode(text)
    if len(self.prompt) > longest:
      self.failure = (f'the prompt has {len(self.prompt)} tokens, the engine takes {longest}: '
                      'leave it out, or give the engine more room')

  def take(self, tokens, stopped):
    """The message of the turn that the tokens end in; the last of them is what stopped it."""
    ids, self.read = tokens[self.read:], len(tokens)
    self.ended = bool(ids) and ids[-1] == self.tokenizer.id(IM_END)
    self.text = self.tokenizer.decode(ids[:-1] if stopped else ids)
    self.turns += 1
    self.messages.append(parse(self.text))
    return self.messages[-1]

  def step(self, message):
    """The environment's messages and their ids; None where the episode is over.

    Nothing can follow a turn that ended in another stop id than the template's.
    """
    turn = self.environment.step(message)
    if turn.done or not self.ended:
      return None
    return turn.messages, encode_turn(self.tokenizer, turn.messages, self.thinking)

  def accept(self, value):
    """The value of a call that was run in time, or None: then `failure` says why."""
    if not isinstance(value, BaseException):
      return value
    known = isinstance(value, (Unscored, TimeoutError))
    self.failure = f'the environment failed: {"" if known else type(value).__name__ + ": "}{value}'
    return None

  def append(self, said):
    """Notes what the environment said, and gives its ids to the engine."""
    if said is None:
      return None
    messages, ids = said
    self.messages += messages
    self.appended.append((self.read, ids))
    self.read += len(ids)
    return ids

  def end(self, output):
    self.output = output
    # A turn may be left that was cut off.
    if len(output.tokens) > self.read or not self.turns:
      self.take(output.tokens, output.finish_reason == 'stop')
    for start, ids in self.appended:
      assert output.tokens[start:start + len(ids)] == ids[:max(0, len(output.tokens) - start)]

  def judge(self):
    self.outcome = self.environment.outcome()

  def episode(self):
    output = self.output
    if output is None:
      none = np.zeros(0, np.float32)
      return Episode(self.record, self.prompt, [], none.astype(bool), none, none, None, 0, 0, None,
                     self.failure)
    drawn, response = ~output.forced, None
    if not self.failure:
      response = Response.read(self.text, int(drawn.sum()), output.finish_reason,
                               messages=tuple(self.messages), outcome=self.outcome)
    return Episode(self.record, self.prompt, output.tokens, drawn, output.logp,
                   output.logp_untempered, output.routes, output.version, self.turns, response,
                   self.failure)


def encode_turn(tokenizer, messages, thinking):
  """Ids of `messages` of tools and users behind a turn's <|im_end|>, and of the next turn's begin.

  As the template writes them, results of tools in a row in one user turn; `thinking=False` closes
  the think block. Control tokens in the messages become plain characters.
  """
  parts, before = ['\n'], None
  for message, after in zip(messages, [*messages[1:], {}]):
    role, content = message['role'], message['content']
    if role not in ('tool', 'user'):
      raise ValueError(f'an environment says things as tool or user, not as {role!r}')
    if role == 'user' or before != 'tool':
      parts += [(IM_START,), 'user' if role == 'tool' else 'user\n']
    parts += (['\n', ('<tool_response>',), f'\n{content}\n', ('</tool_response>',)]
              if role == 'tool' else [content])
    if role == 'user' or after.get('role') != 'tool':
      parts += [(IM_END,), '\n']
    before = role
  parts += [(IM_START,), 'assistant\n']
  if not thinking:
    parts += [('<think>',), '\n\n', ('</think>',), '\n\n']
  ids, plain = [], ''
  for part in [*parts, ()]:
    if isinstance(part, str):
      plain += part
      continue
    ids += tokenizer.encode(plain, special=False)
    ids += [tokenizer.id(name) for name in part]
    plain = ''
  return ids


def run_in_time(calls, workers, deadline):
  """The result of each function in `calls`, in order, or the exception that it raised.

  They run in up to `workers` threads; of one that takes more than `deadline` seconds the result is
  a TimeoutError, its place is given to the next, and its thread left to itself.
  """
  results, done = [None] * len(calls), queue.SimpleQueue()
  waiting, running = collections.deque(enumerate(calls)), {}

  def work(place, call):
    try:
      done.put((place, call()))
    except BaseException as error:  # a SystemExit would only end this thread
      done.put((place, error))

  while waiting or running:
    while waiting and len(running) < workers:
      place, call = waiting.popleft()
      running[place] = time.monotonic() + deadline
      threading.Thread(target=work, args=(place, call), daemon=True).start()
    try:
      place, result = done.get(timeout=max(0, min(running.values()) - time.monotonic()))
      if running.pop(place, None):
        results[place] = result
    except queue.Empty:
      for place in [place for place, end in running.items() if end <= time.monotonic()]:
        results[place] = TimeoutError(f'it took longer than {deadline:g} s')
        del running[place]
  return results
