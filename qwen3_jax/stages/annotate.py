"""Labels that a model gives each example: education value, domain, safety."""
from qwen3_jax.generation.respond import Failure, find_object, judge
from qwen3_jax.stages.records import Accept, Fail, Reject, words_of

DOMAINS = ('mathematics', 'science', 'engineering', 'computing', 'medicine', 'law', 'economics',
           'history', 'society', 'language', 'arts', 'daily life', 'other')

TEMPLATE = """\
You label texts for a training collection. Read the text between the lines and judge it by itself.

education: how much a student would learn from it. 0 nothing (advertising, lists, broken text); \
1 a few facts; 2 some substance, badly told; 3 clear and correct, useful in school; 4 well \
explained, like a textbook; 5 outstanding: thorough, ordered, with reasons and examples.
domain: the one of these that fits best: {domains}.
safety: "safe", or "unsafe" if it helps to hurt people, is hateful or sexually explicit, or \
reveals someone's private data.

----
{excerpt}
----

Reply with one JSON object and nothing else: {"education": 0 to 5, "domain": "...", "safety": "..."}
"""


def reader_of(domains):
  """read(text) -> labels, for a judge; ValueError for anything but the three labels."""
  def read(text):
    labels = find_object(text)
    education, domain = labels.get('education'), str(labels.get('domain')).strip().lower()
    safety = str(labels.get('safety')).strip().lower()
    if isinstance(education, bool) or education not in range(6):
      raise ValueError(f'education {education!r}: wanted a whole number from 0 to 5')
    if domain not in domains:
      raise ValueError(f'domain {domain!r:.60}: wanted one of {", ".join(domains)}')
    if safety not in ('safe', 'unsafe'):
      raise ValueError(f'safety {safety!r:.60}: wanted safe or unsafe')
    return dict(education=int(education), domain=domain, safety=safety)
  return read


def begin_annotating(_, model, domains=DOMAINS, characters=4000, tries=3, least_education=None,
                     safe_only=False):
  """Adds 'labels' to each record; of long texts the first `characters` are shown.

  `least_education` and `safe_only` reject by the labels.
  """
  responder, read = model(), reader_of(domains)

  def decide(records):
    asked = [dict(excerpt=excerpt(record, characters), domains=', '.join(domains))
             for record in records]
    return [_judge(record, labels, least_education, safe_only) for record, labels in zip(
      records, judge(responder, TEMPLATE, asked, read, tries))]
  return decide


def excerpt(record, characters):
  """What is shown of a record: a query, a document, or a conversation's words."""
  text = words_of(record)
  return text if len(text) <= characters else text[:characters] + ' [...]'


def _judge(record, labels, least_education, safe_only):
  if isinstance(labels, Failure):
    return Fail(record, labels.reason)
  record = record | dict(labels=(record.get('labels') or {}) | labels)
  if safe_only and labels['safety'] != 'safe':
    return Reject(record, 'unsafe', 'the annotator calls it unsafe')
  if least_education is not None and labels['education'] < least_education:
    return Reject(record, 'little to learn', f'education value {labels["education"]}, want '
                  f'{least_education} or more')
  return Accept(record)
