"""Rules for questions and worked answers: None where the text passes, else why it does not."""

import re
from collections import Counter

import numpy as np
import rensa

from qwen3_jax.data.duplicates import shingle
from qwen3_jax.rewards import answers, math

_WORD = re.compile(r'[㐀-鿿぀-ヿ가-힣]|[^\W_㐀-鿿぀-ヿ가-힣]+')
_GUESS = re.compile(
  r"(?:i(?:'ll| will| am going to|'m going to| would| have to| can only|'d)?|let me|let's|we)"
  r"(?: just| simply| have to| must| can only| will| take a| make a(?:n)?| wild| random| educated|"
  r" best)* (?:guess|pick (?:one|an answer|a number|randomly)|choose randomly|gamble)\b"
  r'|\b(?:just|purely|only|simply) (?:guessing|a (?:wild |random |lucky )?guess)\b'
  r'|\bmy (?:best |wild |educated |final )?guess (?:is|would be)\b|\bat random, i\b'
  r'|\b(?:pick|choose|choosing|picking|answer(?:ing)?) (?:one |an answer |a number )?at random\b'
  r"|\bi (?:have no idea|don't know how to|can't solve|cannot solve|give up)\b"
  r"|\b(?:not sure|no idea|unsure|uncertain)[^.\n]{0,40}\b(?:but|so)[^.\n]{0,30}\b"
  r'(?:guess|go with|pick|choose|say)\b|我(?:就|只能|来|随便)?(?:猜|蒙)|随便(?:选|猜|填)'
  r'|瞎猜|猜一个', re.IGNORECASE)
_REASON = re.compile(
  r'=|\d\s*[-+*/×÷^<>]\s*\d|\\(?:frac|times|cdot|implies|Rightarrow|equiv|sum|int|sqrt|le|ge)\b|[≈⇒∴→≡]'
  r'|\b(?:so|because|since|thus|therefore|hence|then|if|means|implies|follows|gives|must|only|'
  r'given|let|consider|note|which|by)\b|因为|所以|因此|故|由于|则|如果|根据|得', re.IGNORECASE)


def find_guess(reasoning, answer, least=8, share=0.1, tail=0.3):
  """None, or why `reasoning` is no reasoning for `answer` (the text after it).

  It is empty or shorter than `least` words (characters of Chinese) or than `share` of the answer;
  or its last part (`tail` of it, at least 400 characters) says that it guesses and nothing is
  worked out after that; or the final answer does not occur before the last sentence, and there is
  neither computation nor inference.
  """
  words = len(_WORD.findall(reasoning))
  asked = len(_WORD.findall(answer))
  if words < max(least, share * asked):
    return f'{words} words of reasoning for an answer of {asked}'
  start = len(reasoning) - max(400, int(tail * len(reasoning)))
  hedges = [hedge for hedge in _GUESS.finditer(reasoning) if hedge.start() >= start]
  if hedges and len(_REASON.findall(reasoning[hedges[-1].end():])) < 8:
    return f'guesses at the end: {" ".join(hedges[-1][0].split())[:60]!r}'
  steps = len(_REASON.findall(reasoning))
  if steps * 60 >= words:
    return None
  final = math.extract(answer)
  body = re.split(r'(?<=[.!?。！？])\s*', reasoning.strip())[:-1]
  if final and answers.plain(final) not in answers.plain(' '.join(body)):
    return f'the answer {final[:40]!r} comes from nowhere: {steps} inferences in {words} words'
  return None


def find_inconsistency(reasoning, content, same=math.same):
  """None, or how the stated conclusion of `reasoning` differs from the answer in `content`.

  Passes where the reasoning states none (`\\boxed{}`, `answer is`, `####`) or the content has none.
  """
  concluded = math.extract(reasoning, strict=True)
  final = math.extract(content)
  if not concluded or not final or len(concluded) > 200:
    return None
  if same(final, concluded) or same(concluded, final):
    return None
  return f'the reasoning concludes {concluded[:60]!r}, the answer says {final[:60]!r}'


def find_wrong_answer(content, reference, verify=math.agree):
  """None, or the answer in `content` that `verify(content, reference)` rejects."""
  if verify(content, reference):
    return None
  return f'answers {(math.extract(content) or "nothing")[:60]!r}, not {reference[:60]!r}'


class Similar:
  """Validation texts by the hashes of their 3-word shingles: exact overlaps, 12 bytes a shingle.

  For a few thousand texts exact counts are as fast as MinHash and have no error.
  """

  def __init__(self, texts, width=3, least=8):
    """`texts` are (id, text) pairs; of those with fewer than `least` shingles nothing is said."""
    self.width, self.names, hashes, owners = width, [], [], []
    for name, text in texts:
      grams = shingle(text, width)
      if len(grams) >= least:
        hashes.append(_hash(grams))
        owners.append(np.full(len(grams), len(self.names), np.uint32))
        self.names.append(name)
    self.sizes = np.array([len(part) for part in hashes])
    keys = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    order = np.argsort(keys, kind='stable')
    self.keys = keys[order]
    self.owners = np.concatenate(owners)[order] if owners else np.empty(0, np.uint32)

  def measure(self, text):
    """(id, Jaccard similarity, contained share of it) of the closest text, or None."""
    grams = _hash(shingle(text, self.width))
    first = np.searchsorted(self.keys, grams)
    last = np.searchsorted(self.keys, grams, 'right')
    hits = [self.owners[a:b] for a, b in zip(first, last) if b > a]
    if not hits:
      return None
    owner, count = np.unique(np.concatenate(hits), return_counts=True)
    contained = count / self.sizes[owner]
    similar = count / (self.sizes[owner] + len(grams) - count)
    best = int(np.maximum(similar, contained).argmax())
    return self.names[owner[best]], float(similar[best]), float(contained[best])


def _hash(grams):
  return np.array(rensa.RMinHash.hash_token_sets([list(grams)])[0], np.uint64)


def find_similar(text, index, similarity=0.5, contained=0.7):
  """None, or the item of the Similar `index` that `text` nearly is, or nearly contains."""
  found = index.measure(text)
  if found is None or (found[1] < similarity and found[2] < contained):
    return None
  return f'like validation item {found[0]} (Jaccard {found[1]:.2f}, contains {found[2]:.0%} of it)'


_PARTS = re.compile(r'(?:^|[\s:;.,])[(]?([a-hA-H]|i{1,3}|iv|[1-6])[).](?=\s+\S)', re.MULTILINE)
_ASK = re.compile(
  r'\b(?:find|determine|compute|calculate|what|how|which|who|whose|evaluate|give|state|list|write|'
  r'explain|sketch|solve|prove|show)\b|多少|几|什么|哪|怎', re.IGNORECASE)
_AND_ALSO = re.compile(
  r'\b(?:and|then|after that),? also (?:find|determine|compute|calculate|state|explain)\b'
  r'|(?:^|[.?!]\s+)also,? (?:find|determine|compute|calculate|explain|prove|show)\b',
  re.IGNORECASE | re.MULTILINE)
# Where an instruction begins: at a sentence's start or after a request.
_START = (r'(?:(?:^|[.!?:;]["”)]?\s+|\b(?:please|can you|could you|i want you to|your task is to|'
          r'you (?:must|should|will|need to|have to))\s+)(?:now |then |also |first )?)')
_PROOF = re.compile(
  rf'{_START}(?:(?:dis)?prove|show|verify|demonstrate|justify)\s+(?:that|whether|why|it|this|'
  r'for all|your|the (?:following|statement|identity|inequality|theorem))\b'
  r'|[,;.]?\s+and (?:dis)?prove (?:that|it|your)\b|\b(?:give|write|provide) (?:a|the|your) '
  r'(?:formal |rigorous )?proof\b|(?:^|[，。；：])\s*(?:求证|证明)', re.IGNORECASE | re.MULTILINE)
_OPEN = re.compile(
  rf'{_START}(?:(?:write|compose|draft|create|generate|produce|make|tell(?: me)?|plan|build)\b'
  r'(?! (?:your|the|its|their) answer)(?: [\w-]+){0,6}? (?:essay|poem|story|stories|letter|email|'
  r'e-mail|haiku|song|lyrics|speech|article|paragraph|review|blog|post|tweet|slogan|advertisement|'
  r'ad|report|summary|script|joke|dialogue|conversation|description|outline|plan|menu|recipe|riddle|'
  r'resume|bio|announcement|message|note|sentences?|limerick|caption|tagline|headline|itinerary)\b'
  r'|(?:explain|describe|discuss|summari[sz]e|paraphrase|rephrase|suggest|recommend|critique|'
  r'brainstorm|elaborate|argue|advise|design|outline|invent|imagine that you|come up with|'
  r'compare and contrast|edit the|improve the)\b|rewrite (?!.{0,40}(?:\$|\\|as an?\b)))'
  r'|\b(?:list|give|provide|share|offer|suggest)\b[^.?!$]{0,30}\b(?:tips|ideas|advice|suggestions|'
  r'recommendations|words of)\b|\bin your own words\b|\b(?:what|how) (?:do|would) you (?:think|'
  r'recommend|suggest|say|feel|do if)\b|\bwhy (?:is|are|do|does|did|was|were|should)\b[^.]*\?'
  r'|(?:写|撰写|创作)一?(?:篇|首|个|封|段)|请(?:解释|描述|谈谈|说明|论述)',
  re.IGNORECASE | re.MULTILINE)
_LATIN = re.compile('[a-z]+')
# Words without one of which the patterns above and below cannot match (looked up: much faster).
_PROVING = frozenset('prove disprove show verify demonstrate justify proof'.split())
_MAKING = frozenset(
  'write compose draft create generate produce make tell plan build explain describe discuss '
  'summarize summarise paraphrase rephrase suggest recommend critique brainstorm elaborate argue '
  'advise design outline invent imagine come compare edit improve rewrite list give provide share '
  'offer own you why'.split())
_POINTING = frozenset(
  'which choose select figure diagram picture graph image drawing chart photo map table'.split())
_STEM = re.compile(
  r'\bwhich (?:(?:one )?of (?:the following|these|them|the (?:options|statements|choices) below)|'
  r'(?:option|choice|statement)s?)\b|\bchoose the (?:correct|best|right)\b|\bselect all\b'
  r'|(?:下列|以下|下面)(?:各项|选项|说法|哪)', re.IGNORECASE)
_OPTION = re.compile(
  r'(?:^|[\s$(\\{])(?:\\text(?:bf)?\{)?\(?([A-Ea-e1-5])\)?\s?[).:]|\\textbf\{\(([A-E])\)|^\s*[-*•]\s+\S'
  r'|\\item\b|\b(I{1,3}|IV)\.', re.MULTILINE)
_FIGURE = re.compile(
  r'\b(?:figure|diagram|picture|graph|image|drawing|chart|photo|map|table) (?:\w+ )?(?:below|above|'
  r'at (?:the )?(?:right|left)|to the (?:right|left)|shown|provided)\b'
  r'|\b(?:shown|pictured|drawn|depicted|illustrated|indicated|given) (?:\w+ )?(?:in|on|by) '
  r'(?:the|this) (?:\w+ )?(?:figure|diagram|picture|graph|image|chart|drawing|map)\b'
  r'|\b(?:in|from|see|using) (?:the|this) (?:\w+ )?(?:figure|diagram|picture|image)\b'
  r'|\bthe (?:figure|diagram|graph|picture) (?:below|above|shows)\b|如图|下图|上图|图中',
  re.IGNORECASE)
_DRAWN = re.compile(
  r'\[asy\]|\\begin\{(?:tikz|array|tabular|picture)|^.*\|.*\|.*$|!\[|<img|<svg|```',
  re.MULTILINE)
_DRAWING = re.compile(r'\[asy\].*?(?:\[/asy\]|\Z)', re.DOTALL)
_QUOTED = re.compile(r'"[^"\n]{1,300}"|“[^”\n]{1,300}”|``[^\'\n]{1,300}\'\'')


def find_unverifiable(question):
  """None, or why the answer of `question` cannot be checked against one reference.

  Several sub-questions; a proof; open generation or explanation; a multiple-choice stem without
  its options; a figure that is not there (Asymptote, tables and the like are one).
  """
  said = _QUOTED.sub(' ', _DRAWING.sub(' ', question))
  words = set(_LATIN.findall(said.lower()))
  maybe = not said.isascii()
  return (_find_parts(said, 'also' in words)
          or (maybe or words & _PROVING) and _named(_PROOF, said, 'asks for a proof')
          or (maybe or words & _MAKING) and _named(_OPEN, said, 'asks for free text')
          or (maybe or words & _POINTING) and _find_missing(question) or None)


def _named(pattern, text, reason):
  found = pattern.search(text)
  return f'{reason}: {" ".join(found[0].split())[:60]!r}' if found else None


def _find_parts(question, also):
  labels = [label.lower() for label in _PARTS.findall(question)]
  for first, second in (('a', 'b'), ('i', 'ii'), ('1', '2')):
    if first in labels and second in labels[labels.index(first) + 1:]:
      parts = _PARTS.split(question)
      asks = sum(bool(_ASK.match(part.strip())) or '?' in part for part in parts[2::2])
      if asks >= 2:
        return f'{asks} labelled sub-questions'
  extra = also and _AND_ALSO.search(question)
  if extra:
    return f'several questions: {" ".join(extra[0].split())!r}'
  sentences = re.split(r'(?<=[.?!？。！])', question) if {'?', '？'} & set(question) else []
  asks = [ask for ask in sentences
          if ask.endswith(('?', '？')) and _ASK.search(ask) and len(_WORD.findall(ask)) >= 4]
  again = asks and re.match(r'\s*(?:that is|in other words|i\.e)\b', asks[-1], re.IGNORECASE)
  return f'{len(asks)} questions' if len(asks) - bool(again) > 1 else None


def _find_missing(question):
  stem = _STEM.search(question)
  if stem:
    options = Counter(next(filter(None, m.groups()), '-') for m in _OPTION.finditer(question))
    listed = re.search(r':\s*\S+.*?(?:,|;|\n)\s*\S+', question[stem.end():], re.DOTALL)
    if sum(options.values()) < 2 and not listed and question[stem.end():].count('$') < 4:
      return f'options are missing: {stem[0]!r}'
  figure = _FIGURE.search(question)
  if figure and not _DRAWN.search(question):
    return f'a figure is missing: {" ".join(figure[0].split())[:60]!r}'
  return None
