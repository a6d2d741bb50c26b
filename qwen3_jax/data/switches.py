"""In which mode a prompt is asked, and how that is said: by the template, or by a flag."""
import hashlib

from qwen3_jax.data.fusion import FLAGS
from qwen3_jax.text.template import last_flag


def switch(record, thinking=0.5, flags=0.0):
  """A copy of a prompt's record that says its mode; a function of its last words alone.

  A record without `enable_thinking` thinks with probability `thinking`. In a share `flags` of all
  whose messages have no flag, the last user turn says it (`/think`, `/no_think`), and the template
  leaves the think block to the model.
  """
  record = dict(record)
  messages = record['messages']
  place = max((i for i, m in enumerate(messages) if m['role'] == 'user'), default=None)
  words = messages[place]['content'] if place is not None else ''
  draws = hashlib.blake2b(f'mode {words}'.encode(errors='surrogatepass'), digest_size=8).digest()
  mode, flag = (int.from_bytes(part) / 2 ** 32 for part in (draws[:4], draws[4:]))
  if record.get('enable_thinking') is None:
    given = last_flag(messages)
    record['enable_thinking'] = mode < thinking if given is None else True
  if flag < flags and place is not None and last_flag(messages) is None:
    think = record['enable_thinking']
    said = dict(messages[place], content=f'{words} {FLAGS[think]}')
    record |= dict(messages=[*messages[:place], said, *messages[place + 1:]], enable_thinking=True)
  return record


class Switched:
  """A source of prompts (see `queries.open_queries`), each with a mode (see `switch`)."""

  def __init__(self, source, thinking=0.5, flags=0.0):
    for name, share in (('thinking', thinking), ('flags', flags)):
      if not 0 <= share <= 1:
        raise ValueError(f'config.modes.{name} is {share}: want a share from 0 to 1')
    self.source, self.thinking, self.flags = source, thinking, flags
    self.name = source.name
    self.fingerprint = f'{source.fingerprint} thinking {thinking} flags {flags}'

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    return switch(self.source[i], self.thinking, self.flags)
