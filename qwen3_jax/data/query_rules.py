"""Instructions about the form of an answer that a rule can check, alone and together (IFEval's 25).

A rule's function gives (kwargs, the instruction in words, keep, spoil): the last two are (step,
text -> text) that make a text follow the rule or break it, or None where any text does. Steps are
done in order, so that one rule's work does not undo another's.
"""
import json
import string

from qwen3_jax.data.problems import NAMES, THINGS, WORDS
from qwen3_jax.data.query import Query, by

START, WORDING, LENGTH, LAYOUT, END, CASE = range(6)
FOREIGN = {
  'de': ('German', 'Heute gehen wir zusammen in die Stadt und kaufen frisches Brot und Milch.'),
  'fr': ('French', "Aujourd'hui nous allons en ville pour acheter du pain et du lait."),
  'es': ('Spanish', 'Hoy vamos juntos a la ciudad para comprar pan fresco y leche.'),
  'it': ('Italian', 'Oggi andiamo insieme in centro per comprare il pane fresco e il latte.'),
  'ru': ('Russian', 'Сегодня мы вместе идём в город, чтобы купить свежий хлеб и молоко.')}


def _add(*texts):
  return WORDING, lambda text: ' '.join([text, *texts])


def _exist(rng, d):
  words = rng.sample(WORDS, 1 + d // 3)
  return ({'keywords': words}, f'Use the {"words" if words[1:] else "word"} {" and ".join(words)}.',
          _add(*(f'There is the {word} too.' for word in words)), None)


def _repeat_word(rng, d):
  word, n = rng.choice(WORDS), rng.randint(2, 2 + d)
  if rng.random() < 0.3:
    return ({'keyword': word, 'frequency': n, 'relation': 'less than'},
            f'Use the word {word} less than {n} times.', None,
            _add(f'{word.title()}{f" {word}" * n}.'))
  return ({'keyword': word, 'frequency': n, 'relation': 'at least'},
          f'Use the word {word} at least {n} times.',
          _add(*[f'There is the {word} too.'] * n), None)


def _forbid(rng, d):
  words = rng.sample(WORDS, min(3, d))
  return ({'forbidden_words': words}, f'Do not use: {", ".join(words)}.', None,
          _add(f'There is the {words[0]} too.'))


def _count_letter(rng, d):
  letter, n = rng.choice(string.ascii_lowercase), rng.randint(2, 3 + 2 * d)
  return ({'letter': letter, 'let_frequency': n, 'let_relation': 'at least'},
          f'Use the letter {letter} at least {n} times.', _add(f'They all say {letter * n} now.'),
          (END, lambda text: 'BC'[letter == 'b'] + ''.join(
            c for c in text if c.lower() != letter)))


def _count_sentences(rng, d):
  n = rng.randint(4, 4 + d)
  if rng.random() < 0.4:
    n += 4
    return ({'num_sentences': n, 'relation': 'less than'}, f'Write less than {n} sentences.',
            None, (LENGTH, lambda text: text + ' All is well.' * n))
  return ({'num_sentences': n, 'relation': 'at least'}, f'Write at least {n} sentences.',
          (LENGTH, lambda text: text + ' All is well.' * n), (START, lambda text: 'Well.'))


def _count_words(rng, d):
  n = rng.randint(12, 10 + 10 * d)
  if rng.random() < 0.4:
    n += 60
    return ({'num_words': n, 'relation': 'less than'}, f'Write less than {n} words.',
            None, (LENGTH, lambda text: text + ' All is well.' * n))
  return ({'num_words': n, 'relation': 'at least'}, f'Write at least {n} words.',
          (LENGTH, lambda text: text + ' All is well.' * n), (START, lambda text: 'Well.'))


def _paragraphs(rng, d):
  n = rng.randint(2, 2 + d)
  return ({'num_paragraphs': n}, f'Write {n} paragraphs with *** between them.',
          (LAYOUT, lambda text: '\n***\n'.join([text] + ['All is well.'] * (n - 1))), None)


def _first_word(rng, d):
  n = rng.randint(2, 2 + d)
  nth, word = rng.randint(1, n), rng.choice(('first', 'here', 'now', 'so', 'then', 'today'))
  parts = [f'{word} is what comes.' if k == nth else 'All is well.' for k in range(1, n + 1)]
  return ({'num_paragraphs': n, 'nth_paragraph': nth, 'first_word': word},
          f'Write {n} paragraphs with a blank line between them; number {nth} begins with {word}.',
          (LAYOUT, lambda text: '\n\n'.join(f'{part} {text}' for part in parts)), None)


def _bullets(rng, d):
  n = rng.randint(2, 2 + d)
  return ({'num_bullets': n}, f'Write exactly {n} bullet points that begin with "* ".',
          (LAYOUT, lambda text: text + '\n* All is well.' * n), None)


def _highlights(rng, d):
  n = rng.randint(1, 1 + d)
  return ({'num_highlights': n}, f'Highlight at least {n} parts like *this*.',
          (LAYOUT, lambda text: text + ' They see *all* of it.' * n), None)


def _sections(rng, d):
  n = rng.randint(2, 2 + d)
  return ({'num_sections': n, 'section_spliter': 'SECTION'},
          f'Write {n} sections that begin with SECTION 1 and so on.',
          (LAYOUT, lambda text: '\n'.join(f'SECTION {k + 1}\n{text}' for k in range(n))), None)


def _title(rng, d):
  return {}, 'Give it a title like <<this>>.', (LAYOUT, lambda text: f'<<A title>>\n{text}'), None


def _placeholders(rng, d):
  n = rng.randint(1, 1 + d)
  return ({'num_placeholders': n}, f'Use at least {n} placeholders like [name].',
          _add(*['They wait for [name].'] * n), None)


def _upper(rng, d):
  return {}, 'Write in capital letters only.', (CASE, str.upper), None


def _lower(rng, d):
  return {}, 'Write in lowercase letters only.', (CASE, str.lower), None


def _capital_words(rng, d):
  n = rng.randint(1, 2 + d)
  return ({'capital_frequency': n, 'capital_relation': 'at least'},
          f'Write at least {n} words in capitals.', _add(*['It is BIG.'] * n), None)


def _no_comma(rng, d):
  return {}, 'Use no commas.', None, (END, lambda text: f'Well, {text}')


def _postscript(rng, d):
  marker = rng.choice(('P.S.', 'P.P.S'))
  return ({'postscript_marker': marker}, f'Add a postscript that begins with {marker}',
          (END, lambda text: f'{text} {marker} All is well.'), None)


def _ending(rng, d):
  phrase = rng.choice(('That is all.', 'Is there more?', 'So it goes.'))
  return ({'end_phrase': phrase}, f'End with: {phrase}', (END, lambda text: f'{text} {phrase}'),
          None)


def _quoted(rng, d):
  return {}, 'Put it all into double quotation marks.', (END, lambda text: f'"{text}"'), None


def _as_json(rng, d):
  return {}, 'Answer in JSON.', (END, lambda text: json.dumps({'answer': text})), None


def _constrained(rng, d):
  return ({}, 'Answer with "My answer is yes.", "My answer is no." or "My answer is maybe."',
          (END, lambda text: 'My answer is maybe.'), None)


def _two(rng, d):
  return ({}, 'Give two different answers with ****** between them.',
          (END, lambda text: f'{text}\n******\nAll is well.'), None)


def _language(rng, d):
  code, (name, text) = rng.choice(sorted(FOREIGN.items()))
  return {'language': code}, f'Write it in {name}.', (END, lambda _: text), None


RULES = {
  'keywords:existence': (_exist, 'words'), 'keywords:frequency': (_repeat_word, 'words'),
  'keywords:forbidden_words': (_forbid, 'words'),
  'keywords:letter_frequency': (_count_letter, 'words'),
  'length_constraints:number_sentences': (_count_sentences, 'length'),
  'length_constraints:number_words': (_count_words, 'length'),
  'length_constraints:number_paragraphs': (_paragraphs, 'layout'),
  'length_constraints:nth_paragraph_first_word': (_first_word, 'layout'),
  'detectable_format:number_bullet_lists': (_bullets, 'layout'),
  'detectable_format:number_highlighted_sections': (_highlights, 'layout'),
  'detectable_format:multiple_sections': (_sections, 'layout'),
  'detectable_format:title': (_title, 'layout'),
  'detectable_content:number_placeholders': (_placeholders, 'marks'),
  'change_case:english_capital': (_upper, 'case'),
  'change_case:english_lowercase': (_lower, 'case'),
  'change_case:capital_word_frequency': (_capital_words, 'case'),
  'punctuation:no_comma': (_no_comma, 'comma'),
  'detectable_content:postscript': (_postscript, 'end'), 'startend:end_checker': (_ending, 'end'),
  'startend:quotation': (_quoted, 'end'), 'detectable_format:json_format': (_as_json, 'alone'),
  'detectable_format:constrained_response': (_constrained, 'alone'),
  'combination:two_responses': (_two, 'alone'), 'combination:repeat_prompt': (None, 'alone'),
  'language:response_language': (_language, 'alone')}
APART = ({'length', 'layout'}, {'length', 'end'}, {'length', 'marks'}, {'case', 'layout'})


def make_rules(rng, d):
  """One rule at difficulty 1, three of different groups at 5."""
  return _make(rng, d, _choose(rng, 1 + (d > 1) + (d > 3)))


def make_rule(rng, d):
  """One rule, of any kind."""
  return _make(rng, d, [rng.choice(list(RULES))])


def _choose(rng, count):
  """Names of rules whose groups go together."""
  chosen = [rng.choice(list(RULES))]
  groups = {RULES[chosen[0]][1]}
  for name in rng.sample(list(RULES), len(RULES)):
    group = RULES[name][1]
    if len(chosen) == count or 'alone' in groups:
      break
    if group not in groups | {'alone'} and not any(
        pair <= groups | {group} for pair in APART):
      chosen.append(name)
      groups.add(group)
  return chosen


def _make(rng, d, chosen):
  asked = rng.choice(('Write about the {1} of {0}.', 'Tell {0} something about {1}.',
                      'Say what {0} does with the {1}.')).format(
                        rng.choice(NAMES), rng.choice(THINGS))
  rules, told, keeps, spoils = [], [], [], []
  for name in chosen:
    if name == 'combination:repeat_prompt':
      made = ({'prompt_to_repeat': asked}, 'First repeat the request above word for word.',
              (END, lambda text: f'{asked} {text}'), None)
    else:
      made = RULES[name][0](rng, d)
    rules.append({'id': name, 'kwargs': made[0]})
    told.append(made[1])
    keeps.append(made[2])
    spoils.append(made[3])
  begin = 'The things are on the shelf now.'
  return Query(f'{asked} {" ".join(told)}', by('instructions'),
               {'instructions': rules}, _write(begin, keeps), _write(begin, spoils),
               steps=tuple(f'I must: {each}' for each in told))


def _write(text, steps):
  for _, change in sorted(filter(None, steps), key=lambda step: step[0]):
    text = change(text)
  return text
