"""What a model acts in: tools that it may call, a state that they change, a goal for the end."""
import dataclasses
import functools

from jsonschema import Draft202012Validator

TURNS, CALLS = 8, 4  # of an episode; of a turn
OUTPUT = 2000  # characters of one tool response
ARGUMENTS = 20_000  # characters of one call's arguments


class Refused(Exception):
  """What the model asked for cannot be done; the words are what it reads as the response."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """What follows a turn of the model: messages it reads next, and whether the episode is over."""
  messages: tuple[dict, ...]
  done: bool


def tool(name, description, required=(), **properties):
  """The JSON schema of a tool, in OpenAI's form; arguments beyond `properties` are refused."""
  return {'type': 'function', 'function': {
    'name': name, 'description': description, 'parameters': {
      'type': 'object', 'properties': properties, 'required': list(required),
      'additionalProperties': False}}}


class Environment:
  """Tools and what they act on. One object plays one episode: `reset`, then `step` a turn.

  A subclass has `tools` (JSON schemas), `begin(settings)`, `call(name, arguments)` -> text, and
  `goal()` -> components from 0 to 1. `call` sees arguments that fit the schema, and raises
  `Refused` for what cannot be done. Whatever the model writes is answered: an unknown tool, bad
  arguments or a call that is no JSON gives it a tool response that begins with 'Error: '. Any other
  exception is a fault of the environment, not of the model. What happens depends on the record and
  the messages alone.

  Settings of all environments: `turns` the model has, `calls` it may make in one of them, and
  `weights`, {component: weight}, what the reward is the mean of (default: `goal` alone).
  """
  tools = ()

  def reset(self, record):
    """Begins the episode of `record`, whose 'environment' are the settings."""
    settings = record['environment']
    self.turns, self.calls = settings.get('turns', TURNS), settings.get('calls', CALLS)
    self.weights = settings.get('weights', {'goal': 1})
    self.taken = self.called = self.refused = 0
    self.answer = ''
    self.begin(settings)

  def step(self, message):
    """Turn after the model's `message`, as `template.parse` reads it. One without calls is the end.

    Calls are made in order. In the last turn they still count, though nothing follows.
    """
    self.taken += 1
    calls, content = message.get('tool_calls') or [], message.get('content') or ''
    broken = content.count('<tool_call>')
    if not calls and not broken:
      self.answer = content
      return Turn((), True)
    texts = [self._answer(call) for call in calls[:self.calls]]
    if broken:
      texts.append(self._refuse(
        'a tool call must be <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call> with '
        'valid JSON, got one that is not'))
    if len(calls) > self.calls:
      texts.append(self._refuse(f'at most {self.calls} calls a turn; the last '
                                f'{len(calls) - self.calls} were not made'))
    messages = tuple({'role': 'tool', 'content': cap(text)} for text in texts)
    return Turn(messages, self.taken >= self.turns)

  def outcome(self):
    """The components of `goal`; `valid`, the share of calls not refused; `reward`, their mean."""
    parts = {**self.goal(), 'valid': 1 - self.refused / self.called if self.called else 1.0}
    reward = sum(weight * parts[name] for name, weight in self.weights.items())
    return {**parts, 'reward': reward / sum(self.weights.values())}

  def _answer(self, call):
    self.called += 1
    name, arguments = call['name'], call['arguments']
    validators = _validators(type(self))
    if name not in validators:
      return self._refuse(f'no tool {name[:60]!r}; there are: {", ".join(validators)}', again=True)
    try:
      _check(arguments, validators[name])
      return self.call(name, arguments)
    except Refused as reason:
      return self._refuse(str(reason), again=True)

  def _refuse(self, why, again=False):
    """`again`: the call is counted already."""
    self.called += not again
    self.refused += 1
    return f'Error: {why}'


@functools.cache
def _validators(kind):
  functions = [schema['function'] for schema in kind.tools]
  return {each['name']: Draft202012Validator(each['parameters']) for each in functions}


def _check(arguments, validator):
  try:
    if len(repr(arguments)) > ARGUMENTS:
      raise Refused(f'the arguments are longer than {ARGUMENTS} characters')
    error = next(validator.iter_errors(arguments), None)
  except RecursionError:
    raise Refused('the arguments are nested too deep') from None
  if error:
    where = ''.join(f' at {key}' for key in error.path)
    raise Refused(f'bad arguments{where}: {error.message[:200]}')


def cap(text, limit=OUTPUT):
  """`text` within `limit` characters, what was left out counted; lone surrogates become '?'."""
  text = text.encode('utf-8', 'replace').decode()
  if len(text) <= limit:
    return text
  return f'{text[:limit]}\n... ({len(text) - limit} more characters)'


def progress(start, end, goal):
  """How much of the way from `start` to `goal` is done, 0 to 1; all three are dicts.

  Every entry that should change counts, and each entry spoilt or added in vain takes one off.
  """
  def differ(one, other):
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
  wanted, missing = differ(start, goal), differ(end, goal)
  if not wanted:
    return float(not missing)
  return max(0, len(wanted) - len(missing)) / len(wanted)
