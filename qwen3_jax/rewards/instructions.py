"""Whether an answer follows the instructions of its prompt: IFEval's rules, strict or loose."""

from qwen3_jax.rewards.instruction_rules import RULES


def verify(record, response, loose=False, whole=False):
  """The share of record['instructions'] that the answer follows; `whole`: 1 if all, else 0.

  Instructions are {'id', 'kwargs'} (see `instruction_rules.RULES`). Only what follows the reasoning
  is judged. The benchmark's prompt-level accuracy is the mean of `whole`, strict.
  """
  verdicts = follow(record['instructions'], response.content, loose)
  return float(all(verdicts)) if whole else sum(verdicts) / len(verdicts)


def follow(instructions, text, loose=False):
  """For each instruction, whether `text` follows it; an empty text follows none.

  `loose`: one of eight texts is enough: as it is, without its first line, its last or both, and
  each of these without asterisks. Raises ValueError for an instruction that cannot be checked.
  """
  if not instructions:
    raise ValueError('wanted at least one instruction, got none')
  texts = [one for one in (loosen(text) if loose else [text]) if one.strip()]
  found = []
  for instruction in instructions:
    id, arguments = check(instruction)
    found.append(any(RULES[id][0](one, **arguments) for one in texts))
  return found


def loosen(text):
  """The eight texts that the benchmark's loose score tries."""
  lines = text.split('\n')
  parts = ('\n'.join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))
  plain = [text, *parts]
  return plain + [one.replace('*', '') for one in plain]


def check(instruction):
  """(id, arguments) of an instruction; arguments that are None count as absent.

  Raises ValueError for an unknown id, or arguments that are missing, unknown or of a wrong type.
  """
  id = instruction.get('id')
  if id not in RULES:
    raise ValueError(f'no rule {id!r}; there are: {", ".join(RULES)}')
  given = {name: value for name, value in (instruction.get('kwargs') or {}).items()
           if value is not None}
  wanted = RULES[id][1]
  if given.keys() != wanted.keys():
    raise ValueError(f'{id} wants the arguments {sorted(wanted)}, got {sorted(given)}')
  for name, kind in wanted.items():
    value = given[name]
    if isinstance(kind, tuple):
      right = value in kind
    elif kind is list:
      right = isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
    else:
      right = isinstance(value, kind) and not isinstance(value, bool) and value != ''
    if not right:
      wish = ' or '.join(map(repr, kind)) if isinstance(kind, tuple) else {
        list: 'a list of words', str: 'a text', int: 'a whole number'}[kind]
      raise ValueError(f'{id}: {name} is {value!r:.80}; wanted {wish}')
  return id, given
