"""Answers of a form: JSON of a schema, a length, a mode of thinking, a language, open answers."""
import json

from qwen3_jax.data import tasks
from qwen3_jax.data.problems import NAMES, THINGS, WORDS
from qwen3_jax.data.query import Query, by
from qwen3_jax.data.query_rules import FOREIGN


def make_json(rng, d):
  """What is told, as JSON of a schema that is given field by field."""
  name, age, thing = rng.choice(NAMES), rng.randint(3, 90), rng.choice(THINGS)
  words = rng.sample(WORDS, 2)
  fields = [('name', 'string', name, f'{name}'), ('age', 'integer', age, f'is {age}'),
            ('wants', 'string', thing, f'wants {thing}'),
            ('words', 'array', words, f'says {words[0]} and {words[1]}'),
            ('happy', 'boolean', age % 2 == 0, f'is {"" if age % 2 == 0 else "not "}happy'),
            ('pet', 'object', {'kind': words[0]}, f'has a pet of the kind {words[0]}')]
  fields = fields[:1 + d]
  value = {key: content for key, _, content, _ in fields}
  schema = {'type': 'object', 'required': list(value), 'additionalProperties': False,
            'properties': {key: {'type': kind, 'const': content}
                           for key, kind, content, _ in fields}}
  told = ', '.join(each[3] for each in fields[1:])
  named = ', '.join(f'{key} ({kind})' for key, kind, *_ in fields)
  wrong = rng.choice((json.dumps({key: value[key] for key in list(value)[1:]}),
                      json.dumps(value | {'age': str(age)}), f'{json.dumps(value)} Done.'))
  return Query(f'{name} {told}. Write this as a JSON object of {named}, and nothing else.',
               by('schema'), {'schema': schema}, json.dumps(value), wrong,
               tuple(f'{key}: {json.dumps(value[key])}' for key in value))


def make_length(rng, d):
  """So many words, sentences or characters."""
  unit = rng.choice(('words', 'sentences', 'characters'))
  size = {'words': 4 + 4 * d, 'sentences': 1 + d, 'characters': 20 + 20 * d}[unit]
  low = rng.randint(size, 2 * size)
  how = rng.choice(('max', 'min', 'both'))
  limit = {'unit': unit, 'slope': 0.5}
  limit |= {'max': low} if how == 'max' else {'min': low} if how == 'min' else {
    'min': low, 'max': 2 * low}
  told = {'max': f'at most {low}', 'min': f'at least {low}',
          'both': f'between {low} and {2 * low}'}[how]
  asked = f'Tell {rng.choice(NAMES)} about {rng.choice(THINGS)}'
  return Query(f'{asked} in {told} {unit}.', by('length'), {'limit': limit},
               _fill(unit, low), _fill(unit, 4 * low) if how == 'max' else 'No.',
               (f'{told} {unit}.',))


def _fill(unit, count):
  if unit == 'words':
    return ' '.join(['Well'] * count) + '.'
  return ' '.join(['It is so.'] * count) if unit == 'sentences' else 'w' * count


def make_mode(rng, d):
  """Flags in the question, in the system message and in turns before: the last one counts."""
  word, flags = rng.choice(WORDS), []

  def put(text):
    if rng.random() < 0.6:
      flags.append(rng.random() < 0.5)
      return f'{text} {"/think" if flags[-1] else "/no_think"}'
    return text

  before = [{'role': 'system', 'content': put('Do what you are asked.')}] if d > 1 else []
  for _ in range(rng.randint(0, d // 2)):
    said = rng.choice(WORDS)
    before += [{'role': 'user', 'content': put(f'Say {said}.')},
               {'role': 'assistant', 'content': said}]
  question = put(f'Say {word}.')
  hard = rng.random() < 0.2
  if hard:  # the template closes the think block, whatever flags say
    flags.append(False)
  thinks = flags[-1] if flags else True
  return Query(question, {'mode': 0.5, 'math': 0.5}, {'answer': word, 'kind': 'exact'}, word, word,
               (f'I say {word}.',), tuple(before), enable_thinking=False if hard else True,
               thinks=thinks, wrong_thinks=not thinks)


def make_language(rng, d):
  """A question in one of several languages, to be answered in the same."""
  code = rng.choice(sorted(ASKED))
  question = ' '.join(sentence.format(*rng.sample(NAMES, 2))
                      for sentence in rng.sample(ASKED[code], 1 + d // 2))
  rule = {'id': 'language:response_language', 'kwargs': {'language': code}}
  return Query(question, by('instructions', language=-0.5),
               {'language': code, 'instructions': [rule]}, FOREIGN[code][1],
               'Today we go to the city together and buy fresh bread and milk.')


def make_judged(rng, d):
  """A story to tell again in one's own words; a judge compares with what happened."""
  problem = tasks.task('story', rng.getrandbits(48), d)
  story, _, _ = problem.question.rpartition(' How many')
  reference = ' '.join(problem.steps)
  return Query(f'Tell this again in your own words, and say how it ends: {story}', by('judge'),
               {'reference': reference}, reference, 'I do not know.', problem.steps)


ASKED = {
  'de': ('Was können {} und {} heute zusammen in der Stadt kaufen?',
         'Warum gehen {} und {} so gerne auf den Markt?',
         'Was würdest du für {} und {} zum Frühstück mitbringen?'),
  'fr': ("Qu'est-ce que {} et {} peuvent acheter aujourd'hui en ville ?",
         'Pourquoi {} et {} aiment-ils tant aller au marché ?',
         'Que pourrait-on apporter à {} et {} pour le petit déjeuner ?'),
  'es': ('¿Qué pueden comprar hoy {} y {} en la ciudad?',
         '¿Por qué les gusta tanto a {} y {} ir al mercado?',
         '¿Qué les llevarías a {} y {} para el desayuno de mañana?'),
  'it': ('Che cosa possono comprare oggi {} e {} in centro?',
         'Perché a {} e {} piace così tanto andare al mercato?',
         'Che cosa porteresti a {} e {} per la colazione di domani?'),
  'ru': ('Что сегодня могут купить {} и {} вместе в городе?',
         'Почему {} и {} так любят ходить на рынок?',
         'Что бы ты принёс на завтрак для {} и {}?')}
OPEN = ('Write a friendly greeting for {0}.', 'Describe {1} to someone who never saw any.',
        'Give {0} some advice on how to keep {1}.', 'Invent a name for a shop that sells {1}.',
        'Write two lines of a poem about {1}.', 'Explain to {0} why people collect {1}.',
        'Thank {0} for the {1}.', 'Plan an afternoon for {0} and some {1}.')


def make_open(rng, d):
  """A wish without a right answer: a reward model says how good one is."""
  question = rng.choice(OPEN).format(rng.choice(NAMES), rng.choice(THINGS))
  question += ''.join(f' Mention a {word}.' for word in rng.sample(WORDS, d - 1))
  return Query(question, by('preference', repetition=-0.5), {}, 'With pleasure: I wish you well.',
               'no ' * 40)
