"""A store of documents with a search, and questions that lead from one document to the next."""
import re

from qwen3_jax.environments.environment import Environment, Refused, tool
from qwen3_jax.rewards import final

ENTRIES, LENGTH, FOUND = 500, 2000, 5  # of a store; characters of a value; results of a search


class Store(Environment):
  """Settings: `documents`, {key: {'title', 'text'}}; `answer`; and `stored`, {key: value} to put.

  Components: `answer`, `stored` (1 where nothing was to be put), and `goal`, which is both.
  """
  tools = (
    tool('search', 'Finds documents by words; the best first, each with its key and title.',
         ['query'], query={'type': 'string', 'minLength': 1, 'maxLength': 200}),
    tool('get', 'The document or value under a key.', ['key'], key={'type': 'string'}),
    tool('put', 'Stores a value under a key. Documents cannot be replaced.', ['key', 'value'],
         key={'type': 'string', 'minLength': 1, 'maxLength': 100},
         value={'type': 'string', 'maxLength': LENGTH}))

  def begin(self, settings):
    self.documents, self.values = settings['documents'], {}
    self.wanted, self.stored = settings['answer'], settings.get('stored', {})

  def call(self, name, arguments):
    if name == 'search':
      return self._search(arguments['query'])
    key = arguments['key']
    if name == 'put':
      if key in self.documents:
        raise Refused(f'{key} is a document, which cannot be replaced')
      if key not in self.values and len(self.values) >= ENTRIES:
        raise Refused(f'the store is full: it holds {ENTRIES} values')
      self.values[key] = arguments['value']
      return f'Stored under {key}.'
    if key in self.documents:
      return f'{self.documents[key]["title"]}\n{self.documents[key]["text"]}'
    if key not in self.values:
      raise Refused(f'there is nothing under {key[:100]!r}')
    return self.values[key]

  def _search(self, query):
    """Titles count three times as much as texts; equals stand in the order of their keys."""
    words, scores = _words(query), {}
    for key, document in self.documents.items():
      title, text = _words(document['title']), _words(document['text'])
      if score := 3 * len(words & title) + len(words & text):
        scores[key] = score
    best = sorted(scores, key=lambda key: (-scores[key], key))[:FOUND]
    return '\n'.join(f'{key}: {self.documents[key]["title"]}' for key in best) or 'Nothing found.'

  def goal(self):
    answer = float(final.agree(self.answer, self.wanted))
    right = [self.values.get(key, '').strip() == value for key, value in self.stored.items()]
    stored = sum(right) / len(right) if right else 1.0
    return {'goal': float(answer + stored == 2), 'answer': answer, 'stored': stored}


def _words(text):
  return set(re.findall(r'\w+', text.casefold()))


# Questions.

_STARTS = ('Ba', 'Cor', 'Del', 'Fen', 'Gal', 'Hol', 'Jar', 'Kel', 'Lun', 'Mar', 'Nor', 'Pel',
           'Quin', 'Ros', 'Sel', 'Tor', 'Ul', 'Ver', 'Wes', 'Zan')
_ENDS = ('bria', 'dale', 'mont', 'wick', 'sted', 'vara', 'lin', 'tova', 'mere', 'gard', 'nis',
         'ona')
# What leads from one kind of thing to the next: (kind, words in a document, words in a question).
_LINKS = (('person', 'reports to {}', 'the manager of {}'),
          ('company', 'works at {}', 'the employer of {}'),
          ('city', 'has its seat in {}', 'the city that is the seat of {}'),
          ('river', 'lies on the river {}', 'the river that flows through {}'),
          ('sea', 'flows into the {}', 'the sea that receives {}'))
_KINDS = ('person', *(kind for kind, _, _ in _LINKS))
_TITLES = {'company': '{} Works', 'sea': '{} Sea'}


def make(rng, difficulty):
  """(question, settings, plan): a chain of `difficulty` documents among three times as many."""
  begin = rng.randint(0, len(_LINKS) - difficulty)
  links, kinds = _LINKS[begin:begin + difficulty], _KINDS[begin:begin + difficulty + 1]
  names = [a + b for a in _STARTS for b in _ENDS]
  names = iter(rng.sample(names, len(names)))
  chains = [[_TITLES.get(kind, '{}').format(next(names)) for kind in kinds] for _ in range(3)]
  texts = {}
  for chain in chains:
    for title, target, kind, link in zip(chain, chain[1:], kinds, links):
      texts[title] = f'{title} is a {kind}. {title} {link[1].format(target)}.'
  keys = {title: f'doc-{number}' for title, number in
          zip(sorted(texts), rng.sample(range(100, 1000), len(texts)))}
  chain = chains[0]
  asked = chain[0]
  for link in links:
    asked = link[2].format(asked)
  question, settings = f'What is {asked}? Look it up in the store.', {'answer': chain[-1]}
  plan = []
  for title in chain[:-1]:
    plan += [(f'I look for {title}.', [_call('search', query=title)]),
             (f'The document of {title} is {keys[title]}.', [_call('get', key=keys[title])])]
  if difficulty > 2:
    place = f'answer-{rng.randint(10, 99)}'
    question += f' Also put the answer under the key {place}.'
    settings['stored'] = {place: chain[-1]}
    plan.append((f'It is {chain[-1]}, which goes under {place}.',
                 [_call('put', key=place, value=chain[-1])]))
  plan.append((f'The last document says {chain[-1]}.', f'The answer is {chain[-1]}.'))
  documents = {keys[title]: {'title': title, 'text': texts[title]} for title in sorted(keys)}
  return question, {'documents': documents, 'turns': len(plan) + 3, **settings}, plan


def _call(name, **arguments):
  return {'name': name, 'arguments': arguments}
