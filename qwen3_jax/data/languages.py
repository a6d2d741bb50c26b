"""Inappropriate language mixing, by paragraph and by script."""

import functools
import re
from collections import Counter

_NOT_PROSE = re.compile(
  r'```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|<tool_call>.*?(?:</tool_call>|\Z)|<<[^>\n]*>>'
  r'|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\$\$.*?\$\$|\$[^$\n]{1,400}\$|\\\(.*?\\\)|\\\[.*?\\\]'
  r'|\\[A-Za-z]+|https?://\S+|\S+@\S+\.\w+|</?\w[^>\n]*>|^[ \t]*[\[{].*$|^(?:\t| {4,}).*$',
  re.DOTALL | re.MULTILINE)
_MENTION = re.compile(  # what is named or quoted is no mixing
  r'"[^"\n]{1,80}"|“[^”\n]{1,80}”|«[^»\n]{1,80}»|‘[^’\n]{1,80}’|「[^」\n]{1,80}」|『[^』\n]{1,80}』'
  r'|《[^》\n]{1,80}》|\([^()\n]{1,80}\)|（[^（）\n]{1,80}）|_[^_\n]{1,80}_|\*[^*\n]{1,80}\*')
_SCRIPTS = {
  'Latin': 'A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ', 'Chinese': '㐀-䶿一-鿿豈-﫿', 'Japanese': 'ぁ-ゖァ-ヺー',
  'Korean': '가-힣ᄀ-ᇿ', 'Cyrillic': 'Ѐ-ԯ', 'Arabic': 'ء-يٮ-ۓݐ-ݿ', 'Hebrew': 'א-ת', 'Thai': 'ก-ฮะ-ๆ',
  'Devanagari': 'ऀ-ॿ', 'Bengali': 'ঀ-৿', 'Gujarati': '઀-૿', 'Gurmukhi': '਀-੿', 'Tamil': '஀-௿',
  'Telugu': 'ఀ-౿', 'Kannada': 'ಀ-೿', 'Malayalam': 'ഀ-ൿ', 'Sinhala': '඀-෿', 'Georgian': 'ა-ჿ',
  'Armenian': 'Ա-֏', 'Ethiopic': 'ሀ-፿', 'Khmer': 'ក-៿', 'Burmese': 'က-႟', 'Lao': 'ກ-໿'}
_DENSE = {'Chinese': 2, 'Japanese': 2, 'Korean': 2}  # letters that make a run; 4 elsewhere
_TOGETHER = {'Japanese': {'Chinese'}, 'Korean': {'Chinese'}}
_OF_LANGUAGE = {
  'zh': 'Chinese', 'yue': 'Chinese', 'wuu': 'Chinese', 'ja': 'Japanese', 'ko': 'Korean',
  'ru': 'Cyrillic', 'uk': 'Cyrillic', 'bg': 'Cyrillic', 'be': 'Cyrillic', 'mk': 'Cyrillic',
  'sr': 'Cyrillic', 'kk': 'Cyrillic', 'ky': 'Cyrillic', 'mn': 'Cyrillic', 'tg': 'Cyrillic',
  'tt': 'Cyrillic', 'ba': 'Cyrillic', 'ar': 'Arabic', 'arz': 'Arabic', 'ary': 'Arabic',
  'fa': 'Arabic', 'ur': 'Arabic', 'ps': 'Arabic', 'ug': 'Arabic', 'he': 'Hebrew', 'th': 'Thai',
  'hi': 'Devanagari', 'mr': 'Devanagari', 'ne': 'Devanagari', 'sa': 'Devanagari', 'bn': 'Bengali',
  'as': 'Bengali', 'gu': 'Gujarati', 'pa': 'Gurmukhi', 'ta': 'Tamil', 'te': 'Telugu',
  'kn': 'Kannada', 'ml': 'Malayalam', 'si': 'Sinhala', 'ka': 'Georgian', 'hy': 'Armenian',
  'am': 'Ethiopic', 'km': 'Khmer', 'my': 'Burmese', 'lo': 'Lao'}
_LETTER = {name: re.compile(f'[{letters}]') for name, letters in _SCRIPTS.items()}
_ENGLISH = frozenset(
  'the of and to a in is that it for was with as on be he by at are this have from or had an they '
  'which one you were her all she there would their we him been has when who will more no if out '
  'so what up into than them can only other time some could these my then do its how many each'
  .split())
_LATIN_WORD = re.compile(r'[A-Za-z]+')
# What the classifier takes for one another in short texts.
_FAMILIES = ({'zh', 'yue', 'wuu'}, {'no', 'nn', 'da', 'sv', 'fo'}, {'hr', 'sr', 'bs', 'sl', 'mk'},
             {'id', 'ms', 'jv'}, {'pt', 'gl', 'es', 'an', 'ext', 'ca', 'oc', 'ast'},
             {'cs', 'sk', 'pl'}, {'en', 'pcm'}, {'ru', 'uk', 'be', 'bg', 'mk'},
             {'hi', 'mr', 'ne', 'sa'}, {'fa', 'ar', 'arz', 'ary', 'ur', 'ps'}, {'nl', 'af', 'fy'},
             {'it', 'vec', 'lij', 'la'}, {'zu', 'xh', 'st', 'nso'}, {'tr', 'az', 'crh', 'tk'},
             {'tt', 'ba', 'kk', 'ky'}, {'fr', 'wa', 'gcr', 'gcf'}, {'de', 'lb'}, {'et', 'fi'})


def find_mixing(text, expected=None, allowed=(), letters=80, confidence=0.9, doubt=0.01,
                share=0.05):
  """None, or where `text` leaves its language, with the measure.

  `expected` are the languages it should be in (ISO 639-1 codes, or one), by default the one most
  of it is in; `allowed` are further ones (of a translation task, say). Code, formulas, URLs and
  quoted, emphasised or bracketed mentions do not count.
  - By script, in any paragraph: a run of 2 Chinese, Japanese or Korean letters or 4 letters of
    another script that belongs to no wanted language and makes less than half of the text. Greek
    is everywhere in formulas and counts nowhere; Latin names and terms occur in every language, so
    there a run is 8 words, most in lower case.
  - By language (py3langid), in paragraphs of `letters` letters or more (a third of that in scripts
    without spaces): the best language has probability `confidence`, no wanted one or close
    relative `doubt`, and all such paragraphs are the share `share` of the letters.
  """
  prose = _NOT_PROSE.sub(' ', text)
  if isinstance(expected, str):
    expected = (expected,)
  wanted = {*(expected or ()), *allowed}
  scripts = {'Latin': len(_LATIN_WORD.findall(prose))} if prose.isascii() else _count(prose)
  total = sum(scripts.values())
  if not total:
    return None
  return (_find_foreign_script(prose, scripts, total, expected, wanted)
          or _find_foreign_paragraph(prose, expected, wanted, letters, confidence, doubt, share))


def _count(text):
  counts = {}
  others = Counter(text)
  for name, letter in _LETTER.items():
    count = sum(n for character, n in others.items() if letter.match(character))
    if count:
      counts[name] = count
  return counts


def _find_foreign_script(prose, scripts, total, expected, wanted):
  if scripts.keys() == {'Latin'} and not expected:
    return None
  own = {_OF_LANGUAGE.get(language, 'Latin') for language in wanted}
  if not expected:
    # A Chinese character says as much as four Latin letters.
    weight = {name: n * (4 if name in _DENSE else 1) for name, n in scripts.items()}
    own.add(max(weight, key=weight.get))
    if 'Japanese' in scripts and 10 * scripts['Japanese'] >= scripts.get('Chinese', 0):
      own.add('Japanese') if 'Chinese' in own else None
  own = own.union(*(_TOGETHER.get(name, ()) for name in own))
  unquoted = None
  for name in scripts.keys() - own:
    unquoted = _MENTION.sub(' · ', prose) if unquoted is None else unquoted
    found = _find_run(unquoted, name)
    if found:
      return (f'{name} script in a text of {" and ".join(sorted(own))}: {found[:40]!r} '
              f'({scripts[name] / total:.1%} of the letters)')
  return None


@functools.cache
def _run_pattern(name):
  letters = _SCRIPTS[name]
  if name == 'Latin':
    return re.compile(r"[A-Za-z][A-Za-z'’-]*(?:[ ,;]+[A-Za-z][A-Za-z'’-]*){7,}")
  return re.compile(f'[{letters}](?:[ ]?[{letters}]){{{_DENSE.get(name, 4) - 1},}}')


def _find_run(text, name):
  for run in _run_pattern(name).finditer(text):
    words = run[0].split()
    if name != 'Latin' or 3 * sum(word[0].islower() for word in words) >= 2 * len(words):
      return run[0]
  return None


@functools.cache
def _identifier():
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as error:
    raise ImportError('language mixing needs py3langid: pip install py3langid') from error
  return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text):
  """(ISO 639 code, probability) of the language of `text`; 600 characters are looked at."""
  words = _LATIN_WORD.findall(text[:600].lower()) if text.isascii() else ()
  if len(words) >= 12 and 4 * sum(word in _ENGLISH for word in words) >= len(words):
    return 'en', 1.0
  return _identifier().classify(text[:600])


def _find_foreign_paragraph(prose, expected, wanted, letters, confidence, doubt, share):
  paragraphs = []
  for paragraph in re.split(r'\n\s*\n|\n(?=[^a-z\s])', prose):
    size = sum(map(len, re.findall(r'[^\W\d_]+', paragraph)))
    dense = sum(len(_LETTER[name].findall(paragraph)) for name in _DENSE) if (
      not paragraph.isascii()) else 0
    if size + 2 * dense >= letters:
      paragraphs.append((size + 2 * dense, ' '.join(paragraph.split())))
  if not paragraphs or (len(paragraphs) == 1 and not expected):
    return None
  languages = [identify(paragraph) for _, paragraph in paragraphs]
  if not expected:
    main = Counter()
    for (size, _), (language, probability) in zip(paragraphs, languages):
      main[language] += size * probability
    wanted = wanted | {main.most_common(1)[0][0]}
  close = wanted.union(*(family for family in _FAMILIES if family & wanted))
  foreign, example = 0, None
  for (size, paragraph), (language, probability) in zip(paragraphs, languages):
    if language in close or probability < confidence:
      continue
    if max(p for name, p in _identifier().rank(paragraph[:600]) if name in close) < doubt:
      foreign += size
      example = example or (language, probability, paragraph)
  total = sum(size for size, _ in paragraphs)
  if foreign < share * total or not foreign:
    return None
  language, probability, paragraph = example
  return (f'{foreign / total:.0%} of the text is in another language than '
          f'{", ".join(sorted(wanted))}: {paragraph[:60]!r} is {language} ({probability:.2f})')
