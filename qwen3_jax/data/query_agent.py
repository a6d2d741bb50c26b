"""Calls of tools, several at once or none, and questions about documents that must be cited."""
from qwen3_jax.data.problems import NAMES, THINGS, WORDS
from qwen3_jax.data.query import Query, by

CITIES = ('Accra', 'Berlin', 'Cairo', 'Delhi', 'Lima', 'Madrid', 'Oslo', 'Quito', 'Seoul', 'Tunis')
_TEXT, _WHOLE = {'type': 'string'}, {'type': 'integer'}


def _weather(rng):
  city = rng.choice(CITIES)
  return {'city': city}, f'What is the weather in {city}?'


def _alarm(rng):
  hour, minute = rng.randint(0, 23), rng.randint(10, 59)
  return {'hour': hour, 'minute': minute}, f'Wake me at {hour}:{minute}.'


def _message(rng):
  name, text = rng.choice(NAMES), rng.choice(WORDS)
  return {'to': name, 'text': text}, f'Send {name} the message "{text}".'


def _buy(rng):
  thing, count = rng.choice(THINGS), rng.randint(2, 40)
  return {'item': thing, 'count': count}, f'Buy {count} {thing}.'


def _flight(rng):
  one, other = rng.sample(CITIES, 2)
  return {'origin': one, 'destination': other}, f'Find a flight from {one} to {other}.'


def _play(rng):
  title, times = rng.choice(WORDS), rng.randint(2, 9)
  return {'title': title, 'times': times}, f'Play the song "{title}" {times} times.'


def _lamp(rng):
  room, on = rng.choice(('kitchen', 'hall', 'cellar')), rng.random() < 0.5
  return {'room': room, 'on': on}, f'Turn the light in the {room} {"on" if on else "off"}.'


def _mark(rng):
  values = [rng.randint(1, 9) for _ in range(3)]
  return {'pages': values}, f'Mark the pages {", ".join(map(str, values))}.'


TOOLS = {
  'get_weather': (_weather, 'Tells the weather.', {'city': _TEXT}),
  'set_alarm': (_alarm, 'Sets an alarm.', {'hour': _WHOLE, 'minute': _WHOLE}),
  'send_message': (_message, 'Sends a message.', {'to': _TEXT, 'text': _TEXT}),
  'buy': (_buy, 'Buys something.', {'item': _TEXT, 'count': _WHOLE}),
  'find_flight': (_flight, 'Finds a flight.', {'origin': _TEXT, 'destination': _TEXT}),
  'play': (_play, 'Plays a song.', {'title': _TEXT, 'times': _WHOLE}),
  'set_light': (_lamp, 'Turns a light on or off.', {'room': _TEXT, 'on': {'type': 'boolean'}}),
  'mark_pages': (_mark, 'Marks pages.', {'pages': {'type': 'array', 'items': _WHOLE}})}


def _schema(name):
  _, said, properties = TOOLS[name]
  return {'type': 'function', 'function': {'name': name, 'description': said, 'parameters': {
    'type': 'object', 'properties': properties, 'required': list(properties)}}}


def make_tools(rng, d):
  """One call of one of `d` tools."""
  return _make_calls(rng, rng.sample(list(TOOLS), d), 1)


def make_tools_many(rng, d):
  """Two calls or more at once, maybe of one tool."""
  return _make_calls(rng, rng.sample(list(TOOLS), d), 2 + (d > 2) + (d > 4))


def _make_calls(rng, offered, count):
  calls, asked = [], []
  while len(calls) < count:
    name = rng.choice(offered)
    arguments, question = TOOLS[name][0](rng)
    if question not in asked:
      calls.append({'name': name, 'arguments': arguments})
      asked.append(question)
  wrong = [dict(call) for call in calls]
  first = wrong[0]['arguments']
  wrong[0]['arguments'] = first | {list(first)[-1]: 'something else'}
  expected = [{call['name']: {key: [value] for key, value in call['arguments'].items()}}
              for call in calls]
  steps = [f'{question} That is {call["name"]}.' for question, call in zip(asked, calls)]
  return Query(' '.join(asked), by('tools'), {'expected_calls': expected}, '', '', tuple(steps),
               tools=tuple(map(_schema, offered)), calls=tuple(calls), wrong_calls=tuple(wrong))


def make_tools_none(rng, d):
  """A wish that none of the tools can fulfil: no call is right."""
  wish, *offered = rng.sample(list(TOOLS), 1 + d)
  question = TOOLS[wish][0](rng)[1]
  call = {'name': offered[0], 'arguments': TOOLS[offered[0]][0](rng)[0]}
  return Query(question, by('tools'), {'expected_calls': []}, 'I have no tool that can do this.',
               '', (f'None of {", ".join(offered)} does it.',), tools=tuple(map(_schema, offered)),
               wrong_calls=(call,))


FACTS = (
  ('was born in {}', 'Where was {} born?', CITIES),
  ('likes {} best', 'What does {} like best?', THINGS),
  ('keeps {} keys', 'How many keys does {} keep?', tuple(map(str, range(12, 99)))),
  ('reads about the {}', 'What does {} read about?', WORDS))


def make_rag(rng, d):
  """A question about documents; the answer quotes the one that has it."""
  return _make_rag(rng, d, True)


def make_rag_none(rng, d):
  """A question that the documents do not answer."""
  return _make_rag(rng, d, False)


def _make_rag(rng, d, answerable):
  names = rng.sample(NAMES, 2 + d)
  told, asked, values = rng.choice(FACTS)
  other = rng.choice([fact for fact in FACTS if fact[0] != told])
  found = rng.sample(values, len(names))
  texts = [f'{name} {told.format(value)}.' for name, value in zip(names, found)]
  if d > 2:
    texts = [f'{text} {name} also {other[0].format(rng.choice(other[2]))}.'
             for name, text in zip(names, texts)]
  shown = 1 + d
  documents = [{'id': str(k + 1), 'text': text} for k, text in enumerate(texts[:shown])]
  k = rng.randrange(shown) if answerable else shown
  listed = '\n'.join(f'[{each["id"]}] {each["text"]}' for each in documents)
  fields = {'documents': documents, 'answerable': answerable}
  refusal = 'The documents do not say.'
  span = f'{names[k]} {told.format(found[k])}'
  cited = f'{span} [{k + 1}: "{span}"].'
  if answerable:
    fields['answer'] = found[k]
  elsewhere = f'{names[0]} {told.format(found[0])}'
  wrong = refusal if answerable else f'{elsewhere} [1: "{elsewhere}"].'
  question = (f'{listed}\n{asked.format(names[k])} Cite like [1: "words"], or say that the '
              'documents do not say.')
  steps = (f'Document {k + 1} speaks of {names[k]}.' if answerable
           else f'No document speaks of {names[k]}.',)
  return Query(question, by('citations'), fields, cited if answerable else refusal, wrong, steps)
