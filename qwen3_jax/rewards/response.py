"""What a model wrote, as verifiers see it, and the word for not knowing what it is worth."""
import dataclasses
import json

from qwen3_jax.text.template import parse


class Unscored(Exception):
  """The machinery failed, not the model: the reward is missing, never zero."""


@dataclasses.dataclass(frozen=True)
class Response:
  """One answer to a prompt; of an episode of several turns, its last turn.

  A verifier is a function (record, response) -> a number from 0 to 1, or raises `Unscored`.
  `record` is the prompt's JSON object: `messages`, `source`, and what its verifiers want.
  """
  text: str  # as the model wrote it, tags and all
  reasoning: str | None
  content: str
  tool_calls: tuple[dict, ...]  # {'name', 'arguments'}
  tokens: int  # drawn by the model, in all turns
  finish_reason: str  # 'stop' or 'length'
  messages: tuple[dict, ...] = ()  # of an episode: all that came after the prompt
  outcome: dict | None = None  # of an episode: what its environment says of the end

  @classmethod
  def read(cls, text, tokens, finish_reason='stop', **more):
    """The Response in `text`, split as the chat template would."""
    message = parse(text)
    calls = tuple(_plain(call) for call in message.get('tool_calls') or ())
    return cls(text, message.get('reasoning_content'), message['content'] or '', calls, tokens,
               finish_reason, **more)


def _plain(call):
  call = call.get('function', call)
  arguments = call['arguments']
  return dict(name=call['name'],
              arguments=json.loads(arguments) if isinstance(arguments, str) else arguments)
