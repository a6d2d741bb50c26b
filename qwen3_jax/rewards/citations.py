"""Faithfulness to documents: does an answer say what its cited passages say?

A citation stands in or after the sentence it supports: `[id: "quoted span"]`, or `[id]` (`[1, 2]`)
for a whole document. What is compared is words: this finds what has no ground in the documents, it
does not understand (a negation passes).
"""

import re
import unicodedata

from qwen3_jax.rewards.prose import find_words, split_sentences

SPAN, MOST = (3, 60), 200  # words that a quoted span may have; citations of an answer
GROUND = 0.5  # share of a sentence's content words that its cited text must have
CLAIM = 2  # content words of a sentence that claims something
_CITATION = re.compile(r'\[([^\[\]:"“”\n]{1,64})(?::[ ]{0,3}["“]([^"“”]{1,800})["”])?[ ]{0,3}\]')
_MARK = re.compile('\ue000(\\d{1,6})\ue001')
_REFUSAL = re.compile(
  r"\b(?:can(?:no|')t|could(?: not|n't)|unable to|do(?:es)?(?: not|n't)|did(?: not|n't)|(?:is|are) "
  r"(?:not|no)|isn't|aren't|no|not)\b[^.!?\n]{0,60}\b(?:answer|mention|state|say|contain|provide|"
  r'include|specif|find|found|know|determin|information|documents?|sources?|passages?|context)'
  r'|(?:无法|不能|没有|未)[^。！？\n]{0,20}(?:回答|提到|提及|提供|说明|找到|信息|文档|资料)',
  re.IGNORECASE)
_COMMON = frozenset(
  'the a an of to in on at for by and or but is are was were be been being has have had do does it '
  'did its this that these those as with from not no he she they his her their there which who so '
  'what when where also than then into i you we our your can could will would may might must about '
  'should over under after before more most such each any all some only very just if while because '
  'according document documents source sources answer states says said one'.split())
_SIGNS = str.maketrans({'’': "'", '‘': "'", '“': '"', '”': '"', '–': '-', '—': '-', '−': '-'})


def verify(record, response):
  """How faithful the answer is, from 0 to 1: right x sound x covered.

  record['documents'] are {'id', 'text'}; record['answer'] (optional) is a text or a list of texts,
  one of which the answer must have; record['answerable'] False wants a refusal and gives 1 for it,
  0 for all else: a refusal is record['refusal'] as it stands, by default a sentence that the
  documents do not say, in at most 60 words, and it quotes nothing. Where there is an answer,
  record['refusal'] gets 0, and so does what has no sound citation, or more than 200.
  - right: 1 where an accepted answer (or none is given) stands in the answer and in a cited text;
    0.5 where it is not in the cited text; 0 where it is missing.
  - sound: the share of citations that are sound: of a document of the record, and a quoted span
    occurs in it, has 3 to 60 words (or is all of it) and is compared without regard to case, spaces
    and kinds of quotation marks and dashes.
  - covered: the share of claiming sentences (of two content words or more, not questions) that have
    a sound citation whose text has half of their content words and every number.
  Raises ValueError where the record has no documents.
  """
  documents = {str(one['id']).strip(): _normalise(one['text']) for one in record['documents']}
  if not documents:
    raise ValueError('record has no documents: wanted [{"id", "text"}]')
  text, cited = _take_citations(response.content, documents)
  refused = _refuses(record, text)
  if record.get('answerable') is False:
    return float(refused and not any(span for _, span in cited))
  grounds = [_find_ground(ids, span, documents) for ids, span in cited[:MOST + 1]]
  if len(cited) > MOST or not any(grounds) or refused and record.get('refusal'):
    return 0.0
  sound = sum(map(bool, grounds)) / len(grounds)
  return _judge_answer(record, text, grounds) * sound * _cover(text, grounds)


def _normalise(text):
  text = unicodedata.normalize('NFKC', text).translate(_SIGNS).casefold()
  return ' '.join(text.split())


def _take_citations(text, documents):
  """The text with each citation replaced by a mark, and the citations [(ids, span or None)].

  Brackets that neither quote nor name a document or number are text.
  """
  cited = []

  def take(match):
    ids = list(dict.fromkeys(id.strip() for id in re.split('[,;]', match[1])))
    if match[2] is None and not all(id in documents or id.isdecimal() for id in ids):
      return match[0]
    cited.append((ids, match[2]))
    return f'\ue000{len(cited) - 1}\ue001'

  text = re.sub('[\ue000\ue001]', '', text)
  return _CITATION.sub(take, text), cited


def _refuses(record, text):
  if record.get('refusal'):
    return _normalise(record['refusal']) in _normalise(text)
  plain = _normalise(_MARK.sub(' ', text))
  return len(find_words(plain)) <= SPAN[1] and bool(_REFUSAL.search(plain))


def _find_ground(ids, span, documents):
  """The text that a citation rests on, or '' where it is not sound."""
  if not all(id in documents for id in ids):
    return ''
  whole = ' '.join(documents[id] for id in ids)
  if span is None:
    return whole
  span = _normalise(span).strip(' .…')
  enough = SPAN[0] <= len(find_words(span)) <= SPAN[1] or span and span == whole.strip(' .…')
  return span if enough and all(span in documents[id] for id in ids) else ''


def _judge_answer(record, text, grounds):
  accepted = record.get('answer')
  if accepted is None:
    return 1.0
  accepted = [_words(one) for one in ([accepted] if isinstance(accepted, str) else accepted)]
  said, shown = _words(_MARK.sub(' ', text)), ' . '.join(map(_words, filter(None, grounds)))
  found = [one for one in accepted if f' {one} ' in f' {said} ']
  return 0.0 if not found else 1.0 if any(f' {one} ' in f' {shown} ' for one in found) else 0.5


def _words(text):
  return ' '.join(find_words(_normalise(text)))


def _cover(text, grounds):
  """The share of claiming sentences that their citations support."""
  supported = claims = 0
  for sentence, marks in _pair_citations(text):
    words = [word for word in find_words(_normalise(sentence)) if word not in _COMMON]
    if len(words) < CLAIM and not marks or sentence.rstrip().endswith(('?', '？', ':', '：')):
      continue
    claims += 1
    ground = set(find_words(' '.join(grounds[mark] for mark in marks)))
    shared = sum(word in ground for word in words)
    supported += bool(ground and shared >= GROUND * len(words) and all(
      word in ground for word in words if word.isdecimal()))
  return supported / claims if claims else 0.0


def _pair_citations(text):
  """[(sentence without marks, the citations in it or directly after it)]."""
  pairs = []
  for sentence in split_sentences(text):
    lead = re.match('[\\s.]*(?:\ue000\\d{1,6}\ue001[\\s.,;]*)+', sentence)
    if lead and pairs:
      pairs[-1][1].extend(int(mark) for mark in _MARK.findall(lead[0]))
      sentence = sentence[lead.end():]
    marks = [int(mark) for mark in _MARK.findall(sentence)]
    if sentence := _MARK.sub(' ', sentence).strip():
      pairs.append((sentence, marks))
  return pairs
