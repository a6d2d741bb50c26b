"""Whether the tool calls of an answer are those wanted, as BFCL's AST check has it."""

import re

OMITTED = ''  # among the accepted values of an argument: it may be left out
_LOOSE = re.compile(r'[ ,./\-_*^]')
_FLOATS = ('float', 'number', 'double')


def verify(record, response):
  """1 where the calls match record['expected_calls'] one to one in any order, else 0.

  Each expected call is {name: {argument: [accepted values]}}; '' among the values lets the argument
  be left out; none expected (empty or None) wants no call. A call matches by its name, has no other
  arguments, and each value equals an accepted one: of the same type (an integer does where
  record['tools'] wants a float, and for a float that is accepted), texts without regard to case,
  spaces and ,./-_*^, lists in order, objects by {name: [accepted values]}. Arguments that the tool
  requires may not be left out. Markup of a call that cannot be read is wrong. Raises ValueError
  where an expected call is of no tool of the record.
  """
  tools = {tool['name']: tool.get('parameters') or {}
           for tool in (tool.get('function', tool) for tool in record.get('tools') or ())}
  expected = [next(iter(call.items())) for call in record.get('expected_calls') or ()]
  if strange := {name for name, _ in expected} - tools.keys():
    raise ValueError(f'expected calls of tools that the record does not have: {sorted(strange)}')
  calls = response.tool_calls
  if len(calls) != len(expected) or re.search('</?tool_call>', response.content):
    return 0.0
  fits = [[call['name'] == name and _match_arguments(call['arguments'], accepted, tools[name])
           for name, accepted in expected] for call in calls]
  return float(_pair(fits))


def _pair(fits):
  """Whether rows and columns of a square truth table can be paired (Kuhn's augmenting paths)."""
  row_of = {}

  def place(row, seen):
    for column, fit in enumerate(fits[row]):
      if fit and column not in seen:
        seen.add(column)
        if column not in row_of or place(row_of[column], seen):
          row_of[column] = row
          return True
    return False

  return all(place(row, set()) for row in range(len(fits)))


def _match_arguments(given, accepted, parameters):
  types = parameters.get('properties') or {}
  required = set(parameters.get('required') or ())
  if given.keys() - accepted.keys() or (required & accepted.keys()) - given.keys():
    return False
  return all(any(_same(given[name], value, types.get(name) or {}) for value in values)
             if name in given else OMITTED in values for name, values in accepted.items())


def _same(given, wanted, schema):
  """Whether a value is an accepted one; `schema` is that of the argument, where there is one."""
  if isinstance(wanted, dict):
    return isinstance(given, dict) and _same_object(given, wanted, schema)
  if isinstance(wanted, list | tuple):
    items = schema.get('items')
    items = items if isinstance(items, dict) else {}
    return (isinstance(given, list) and len(given) == len(wanted)
            and all(_same(one, other, items) for one, other in zip(given, wanted)))
  if isinstance(wanted, str):
    return isinstance(given, str) and _spell(given) == _spell(wanted)
  if isinstance(wanted, bool) or isinstance(given, bool) or wanted is None:
    return type(given) is type(wanted) and given == wanted
  floats = schema.get('type') in _FLOATS or isinstance(wanted, float)
  kinds = (int, float) if floats else (int,)
  return isinstance(given, kinds) and given == wanted


def _same_object(given, wanted, schema):
  """Values are lists of accepted ones, or a plain value."""
  types = schema.get('properties')
  types = types if isinstance(types, dict) else {}
  if given.keys() - wanted.keys():
    return False
  for name, values in wanted.items():
    values = values if isinstance(values, list) else [values]
    inner = types.get(name) if isinstance(types.get(name), dict) else {}
    if name not in given:
      if OMITTED not in values:
        return False
    elif not (any(_same(given[name], value, inner) for value in values)
              or _same(given[name], values, inner)):
      return False
  return True


def _spell(text):
  return _LOOSE.sub('', text).lower().replace("'", '"')
