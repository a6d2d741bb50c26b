"""Thinking control: the mode of a conversation, and a budget that ends the thinking by itself."""
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

OPENING = '<think>\n'
# The words of Qwen3 Technical Report section 4.3, with the line ends of Qwen's published code.
STOP = ('\n\nConsidering the limited time by the user, I have to give the solution based on the '
        'thinking directly now.\n</think>\n\n')
STOP_AS_PRINTED = STOP.lstrip('\n').replace('</think>', '</think>.')  # as the report prints them

UNLIMITED = 1 << 30
UNOPENED, OPEN, CLOSED = range(3)  # before a think block; inside it; after it, or without one


@struct.dataclass
class Budget:
  """What the decoding loop needs to end the thinking of each row."""
  limit_B: jax.Array  # thinking tokens a row may use; UNLIMITED is off
  forced_P: jax.Array  # ids of OPENING, then of the stop text
  opening: jax.Array  # how many of them are OPENING
  tags: jax.Array  # ids of <think> and </think>


@struct.dataclass
class Progress:
  """How far the thinking of each row is."""
  phase_B: jax.Array
  spent_B: jax.Array  # tokens after <think>, neither tag counted
  place_B: jax.Array  # the next of the forced ids; past the end: none


def make_budget(tokenizer, limits, stop=STOP):
  """Budget of rows with `limits` thinking tokens each, None for no limit."""
  if any(limit is not None and limit < 0 for limit in limits):
    raise ValueError(f'thinking budgets are {limits}: want 0 or more, or None for no limit')
  opening, forced = tokenizer.encode(OPENING), tokenizer.encode(stop)
  tags = [tokenizer.id('<think>'), tokenizer.id('</think>')]
  if tags[1] not in forced:
    raise ValueError(f'the stop text {stop!r} does not close the thinking: it needs a </think>')
  return Budget(np.array([UNLIMITED if n is None else n for n in limits], np.int32),
                np.array(opening + forced, np.int32), np.int32(len(opening)),
                np.array(tags, np.int32))


def begin(budget, prompts):
  """Progress after the `prompts` (lists of ids): the last think tag of each tells its phase.

  A turn whose tags lie before the last `<|im_start|>` is a turn of history; the template strips
  those, so only a prompt of one's own making can be mistaken.
  """
  def phase(ids):
    last = next((id for id in reversed(ids) if id in budget.tags), None)
    return UNOPENED if last is None else OPEN if last == budget.tags[0] else CLOSED
  zero = np.zeros(len(prompts), np.int32)
  idle = np.full(len(prompts), len(budget.forced_P), np.int32)
  return Progress(np.array([phase(ids) for ids in prompts], np.int32), zero, idle)


def steer(progress, budget, token_B):
  """Replaces drawn tokens by forced ones where the budget is spent: (progress, token_B, forced_B).

  After `limit` tokens in the think block without `</think>`, the next tokens are the stop text's
  ids, exactly `encode(stop)`; newlines at the thinking's end stay before it (Qwen's code strips
  them, but tokens already shown cannot be taken back). A row that has not opened its block, which
  only limit 0 reaches, gets OPENING first. The first token decides whether a row thinks at all.
  """
  P = budget.forced_P.shape[0]
  phase_B, idle_B = progress.phase_B, progress.place_B >= P
  due_B = idle_B & (phase_B != CLOSED) & (progress.spent_B >= budget.limit_B)
  begin_B = jnp.where(phase_B == UNOPENED, 0, budget.opening)
  place_B = jnp.where(due_B, begin_B, progress.place_B)
  forced_B = place_B < P
  token_B = jnp.where(forced_B, budget.forced_P[jnp.minimum(place_B, P - 1)], token_B)
  opens_B, closes_B = token_B == budget.tags[0], token_B == budget.tags[1]
  counted_B = (phase_B == OPEN) & ~forced_B & ~closes_B
  stays_B = (phase_B == OPEN) & ~closes_B | (phase_B == UNOPENED) & opens_B
  phase_B = jnp.where(stays_B & ~forced_B, OPEN, CLOSED)
  progress = Progress(phase_B, progress.spent_B + counted_B, place_B + forced_B)
  return progress, token_B, forced_B
