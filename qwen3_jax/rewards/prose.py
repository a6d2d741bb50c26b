"""Words and sentences of prose, counted in one pass over texts that may be hostile."""

import re

_UNSPACED = r'\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff'
_MARKS = r'\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0900-\u0dff'  # not \w, yet within words
_WORD = re.compile(rf'[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|[{_MARKS}])+')
_STOP = re.compile(  # possessive: one pass over a run of stops
  r'(?<![.!?…])[.!?…]++[)\]"\'”’»*_]*+(?=\s|\Z)|[。！？।॥؟۔։]+[」』”’"）]*')
_LETTERS = re.compile(r'[^\W\d_](?:\.[^\W\d_])*')  # initials: J, U.S
_SHORT = frozenset(
  'dr mr mrs ms prof st sr jr gen col sgt capt lt rev hon gov sen rep vs etc fig eq no nos vol pp '
  'ed eds al approx inc ltd co corp dept est ave blvd rd mt ft jan feb mar apr jun jul aug sep '
  'sept oct nov dec e.g i.e cf ca viz p.s p.p.s a.m p.m'.split())


def find_words(text):
  """Runs of letters, digits and underscores; of scripts without spaces, every character."""
  return _WORD.findall(text)


def split_sentences(text):
  """The sentences of `text`: what ends in . ! ? … or a full stop of another script, and the rest.

  No sentence ends after an abbreviation, an initial or a list's number at the start of a line, nor
  at an ellipsis before a lower-case letter. A line break alone ends none, as in the Punkt tokenizer
  with which IFEval counts, so that a heading belongs to the sentence after it.
  """
  sentences, start = [], 0
  for stop in _STOP.finditer(text):
    if _goes_on(text, start, stop):
      continue
    sentences.append(text[start:stop.end()].strip())
    start = stop.end()
  return [sentence for sentence in (*sentences, text[start:].strip())
          if _WORD.search(sentence)]


def _goes_on(text, start, stop):
  """Whether the sentence does not end at `stop`."""
  mark, after = stop[0], text[stop.end():stop.end() + 3].lstrip()[:1]
  if mark.startswith(('..', '…')):
    return after.islower()
  if not mark.startswith('.') or not after:
    return False
  before = text[max(start, stop.start() - 20):stop.start()]
  line = before.rpartition('\n')[2]
  given = (line.split() or [''])[-1].lstrip('("\'“‘*_[')
  word = given.lower()
  if word.isdigit():
    return line.strip(' \t*#') == word and len(line) < 20
  if word in _SHORT:
    return word not in ('etc', 'a.m', 'p.m', 'no', 'co', 'al') or not after.isupper()
  if not _LETTERS.fullmatch(word) or word == 'i':
    return False
  return after.islower() if len(word) > 1 else given.isupper()
