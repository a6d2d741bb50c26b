"""What scores answers: the router of a config, its reward model, judge and sandbox."""
import concurrent.futures
import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.data import preferences
from qwen3_jax.generation.respond import Failure, open_responder
from qwen3_jax.generation.sampling import NON_THINKING
from qwen3_jax.model import reward
from qwen3_jax.rewards import code
from qwen3_jax.rewards.judge import Judge, break_tokens
from qwen3_jax.rewards.response import Unscored
from qwen3_jax.rewards.router import Router
from qwen3_jax.rewards.verifiers import RULES
from qwen3_jax.stages import load

SANDBOXES = 32  # at once
VERDICT = 512  # tokens that a judge of ours may write; an endpoint has its own settings
NOTHING = '(no answer)'
_last_reward = jax.jit(reward.last_reward)


def open_router(settings, mesh=None):
  """The Router of `settings`, which opens what is set and nothing else.

  Read are `defaults` ({source: {verifier: weight}}), `gates`, `workers`, `seconds`, `judge` (an
  http address or a model's folder), `reward_model` (the folder of a trained reward model), `code`
  (true: open the sandbox) and `functions` ((name, 'MODULE:FUNCTION') pairs, see `open_function`).
  Raises RuntimeError where there is no sandbox, and what opening the models raises.
  """
  settings = {key: value for key, value in dict(settings).items() if value is not None}
  scorers = {name: open_function(name, home) for name, home in settings.get('functions', ())}
  inline = []
  if settings.get('code'):
    code.SANDBOX.check()
    scorers['code'] = functools.partial(score_code, code.SANDBOX)
  if judge := settings.get('judge'):
    remote = bool(re.match('https?://', judge))
    responder = open_responder(judge, functools.partial(load.load_model, mesh=mesh))
    sampling = None if remote else dataclasses.replace(NON_THINKING, max_tokens=VERDICT)
    scorers['judge'] = Judge(functools.partial(ask, responder, sampling),
                             seconds=300.0 if remote else None)
    inline += [] if remote else ['judge']
  if folder := settings.get('reward_model'):
    scorers['preference'] = open_reward_model(folder, mesh)
    inline.append('preference')
  defaults = {source: dict(weights) for source, weights in dict(
    settings.get('defaults', {})).items()}
  return Router(scorers, defaults, tuple(settings.get('gates', ('mode',))), inline=tuple(inline),
                workers=settings.get('workers', 2), seconds=dict(settings.get('seconds', {})))


def open_function(name, home):
  """The scorer of a user's own verifier `name`: the function that `home`, 'MODULE:FUNCTION', names.

  It is called with (record, `Response`) in this process and gives a number from 0 to 1; what it
  raises makes the component of this answer missing. A notebook's own module is `__main__`. Raises
  ValueError where there is no such function, or a rule has the name.
  """
  module, _, function = home.partition(':')
  try:
    verify = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f'config.rewards.functions: {name!r} is {home!r}, want MODULE:FUNCTION of a '
                     f'module that can be imported ({error})') from error
  if name in RULES:
    raise ValueError(f'config.rewards.functions: {name!r} is a rule already; choose another name')

  def score(pairs):
    found = []
    for pair in pairs:
      try:
        found.append(verify(*pair))
      except Exception as error:
        found.append(error)
    return found
  return score


def score_code(sandbox, pairs):
  """The `code` component of each (record, response), several sandboxes at once."""
  def run(pair):
    try:
      return code.verify(*pair, sandbox)
    except (Unscored, ValueError, RuntimeError) as error:
      return error
  with concurrent.futures.ThreadPoolExecutor(min(SANDBOXES, max(1, len(pairs)))) as threads:
    return list(threads.map(run, pairs))


def ask(responder, sampling, conversations, attempt):
  """A judge's words on each conversation, without its reasoning, or a Failure."""
  answers = responder.respond(conversations, 1, sampling, enable_thinking=False, first=attempt)
  return [each if isinstance(each, Failure) else each[0].content for each in answers]


def open_reward_model(folder, mesh=None, dtype=jnp.bfloat16):
  """RewardScorer of the run in `folder`; ValueError where it is no reward model."""
  model, tokenizer = load.load_model(folder, mesh, dtype)
  if not isinstance(model, reward.RewardModel):
    raise ValueError(f'{folder} is no reward model but a language model; train one with '
                     'configs/reward_model.py')
  return RewardScorer(model, tokenizer)


class RewardScorer:
  """A scorer for `Router`: the reward model's number for each (record, response), unbounded.

  It reads the prompt and the answer without its reasoning (of an episode, all its messages), with
  control tokens broken; of an empty answer, NOTHING. Rows run sorted by length, `batch` at once,
  padded to a power of two from `shortest` on: one compilation for each such length. What is longer
  than the model's positions is Unscored.
  """

  def __init__(self, model, tokenizer, batch=8, shortest=64):
    self.model, self.tokenizer = model, tokenizer
    self.batch, self.shortest = batch, shortest

  def __call__(self, pairs):
    found = [self.encode(*pair) for pair in pairs]
    rewards = [each if isinstance(each, Exception) else None for each in found]
    order = sorted((i for i, each in enumerate(rewards) if each is None),
                   key=lambda i: len(found[i]))
    for first in range(0, len(order), self.batch):
      here = order[first:first + self.batch]
      T = max(self.shortest, 1 << (len(found[here[-1]]) - 1).bit_length())
      tokens_BT, segment_BT = np.zeros((2, self.batch, T), np.int32)
      for b, i in enumerate(here):
        tokens_BT[b, :len(found[i])], segment_BT[b, :len(found[i])] = found[i], 1
      reward_B = np.asarray(_last_reward(self.model, tokens_BT, segment_BT))
      for b, i in enumerate(here):
        rewards[i] = float(reward_B[b])
    return rewards

  def encode(self, record, response):
    """Token ids, or why there are none."""
    messages = list(response.messages) or [{'role': 'assistant', 'content': response.content,
                                            'tool_calls': list(response.tool_calls)}]
    messages = [{key: break_tokens(value) if key == 'content' and value else value
                 for key, value in message.items() if key != 'reasoning_content' and value}
                for message in messages]
    messages = [{'content': '' if message.get('tool_calls') else NOTHING} | message
                for message in messages]
    shared = {key: record[key] for key in ('tools',) if record.get(key)}
    try:
      ids = preferences.encode_last(self.tokenizer, shared | {
        'messages': [*record['messages'], *messages], 'enable_thinking': False})
    except (ValueError, RecursionError) as error:
      return Unscored(f'the reward model cannot read it: {error}')
    longest = self.model.spec.max_position
    if len(ids) > longest:
      return Unscored(f'{len(ids)} tokens, the reward model reads {longest}')
    return ids
