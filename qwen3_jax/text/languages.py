"""Inappropriate language mixing, by paragraph and by script."""

import functools
import re
from collections import Counter

CHARACTERS = 400  # of a paragraph, that the classifier sees
_NOT_PROSE = re.compile(  # every repetition is bounded or ends in one pass: texts may be hostile
  r'```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|<tool_call>.*?(?:</tool_call>|\Z)'
  r'|<<[^<>\n]{0,400}>>|\\begin\{((?:equation|align|gather|multline|cases|array|tabular'
  r'|[bpv]?matrix|verbatim|lstlisting|tikzpicture)\*?)\}.{0,4000}?\\end\{\1\}|\$\$.*?\$\$'
  r'|\$[^$\n]{1,400}\$|\\\((?:(?!\\\().){0,1000}?\\\)|\\\[(?:(?!\\\[).){0,4000}?\\\]|\\[A-Za-z]+'
  r'|\[asy\].*?(?:\[/asy\]|\Z)|https?://\S+|(?<![^\s@])[^\s@]{1,64}@[^\s@.]{1,64}(?:\.\w+)+'
  r'|</?\w[^<>\n]{0,400}>|^[ \t]*[\[{]+[ \t]*(?:["\'\[{][^\n]*)?$|^(?:\t| {4,})[^\n]*$',
  re.DOTALL | re.MULTILINE)
_MENTION = re.compile(  # what is named or quoted is no mixing
  r'"[^"\n]{1,80}"|“[^”\n]{1,80}”|«[^»\n]{1,80}»|‘[^’\n]{1,80}’|「[^」\n]{1,80}」|『[^』\n]{1,80}』'
  r'|《[^》\n]{1,80}》|\([^()\n]{1,80}\)|（[^（）\n]{1,80}）|_[^_\n]{1,80}_|\*[^*\n]{1,80}\*')
_SCRIPTS = {
  'Latin': r'A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff',
  'Chinese': r'\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff', 'Japanese': r'\u3041-\u3096\u30a1-\u30fa',
  'Korean': r'\uac00-\ud7a3\u1100-\u11ff', 'Cyrillic': r'\u0400-\u052f',
  'Arabic': r'\u0620-\u064a\u066e-\u06d3\u0750-\u077f', 'Hebrew': r'\u05d0-\u05ea',
  'Thai': r'\u0e01-\u0e46', 'Devanagari': r'\u0900-\u0963', 'Bengali': r'\u0980-\u09e3',
  'Gujarati': r'\u0a81-\u0ae3', 'Gurmukhi': r'\u0a01-\u0a5e', 'Tamil': r'\u0b82-\u0bd7',
  'Telugu': r'\u0c00-\u0c63', 'Kannada': r'\u0c80-\u0ce3', 'Malayalam': r'\u0d00-\u0d63',
  'Sinhala': r'\u0d81-\u0ddf', 'Georgian': r'\u10a0-\u10ff', 'Armenian': r'\u0531-\u0587',
  'Ethiopic': r'\u1200-\u137c', 'Khmer': r'\u1780-\u17d3', 'Burmese': r'\u1000-\u109f',
  'Lao': r'\u0e81-\u0eff'}
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
                share=0.05, sure=0.6):
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
    relative `doubt`, and all such paragraphs are the share `share` of the letters. Without
    `expected` the main language must be plain: `sure` of the text times its probability.
  """
  prose = _NOT_PROSE.sub(' ', text)
  if isinstance(expected, str):
    expected = (expected,)
  wanted = {*(expected or ()), *allowed}
  scripts = {'Latin': len(_LATIN_WORD.findall(prose))} if prose.isascii() else (
    _count(_MENTION.sub(' ', prose)) or _count(prose))
  total = sum(scripts.values())
  if not total:
    return None
  return (_find_foreign_script(prose, scripts, total, expected, wanted)
          or _find_foreign_paragraph(prose, expected, wanted, letters, confidence, doubt, share,
                                     sure))


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
  for name in sorted(scripts.keys() - own):
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
    return re.compile(r"(?<![A-Za-z'’-])[A-Za-z][A-Za-z'’-]*(?:[ ,;]+[A-Za-z][A-Za-z'’-]*){7,}")
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
  """(ISO 639 code, probability) of the language of the first 400 characters of `text`."""
  words = _LATIN_WORD.findall(text[:CHARACTERS].lower()) if text.isascii() else ()
  if len(words) >= 12 and 4 * sum(word in _ENGLISH for word in words) >= len(words):
    return 'en', 1.0
  return _identifier().classify(text[:CHARACTERS])


def find_languages(text, letters=40, confidence=0.9):
  """Languages of the paragraphs of `text`: what an answer to it may be in, for `allowed`.

  A sentence of English in a Chinese question counts as one of English.
  """
  prose = _NOT_PROSE.sub(' ', text)
  parts = re.split(r'\n+', prose) + [run[0] for run in _run_pattern('Latin').finditer(prose)]
  for name in sorted(_count(prose).keys() - {'Latin'}) if not prose.isascii() else ():
    parts += [run[0] * (8 if name in _DENSE else 1) for run in _run_pattern(name).finditer(prose)]
  found = (identify(part) for part in parts if len(part) >= letters)
  return {language for language, probability in found if probability >= confidence}


def _split(prose, letters):
  """(letters, text) of paragraphs; short lines of a block are joined. Of more than 30, every nth.

  Unspaced characters count for three letters.
  """
  paragraphs = []
  for block in re.split(r'\n\s*\n', prose):
    size, lines = 0, []
    for line in re.split(r'\n(?=[^a-z\s])', block):
      size += len(re.findall(r'[^\W\d_]', line))
      if not line.isascii():
        size += 2 * sum(len(_LETTER[name].findall(line)) for name in _DENSE)
      lines.append(' '.join(line.split()))
      if size >= letters:
        paragraphs.append((size, ' '.join(lines)))
        size, lines = 0, []
  return paragraphs[::len(paragraphs) // 31 + 1]


def _find_foreign_paragraph(prose, expected, wanted, letters, confidence, doubt,
                            share, sure):
  paragraphs = _split(prose, letters)
  if not paragraphs or (len(paragraphs) == 1 and not expected):
    return None
  languages = [identify(paragraph) for _, paragraph in paragraphs]
  total = sum(size for size, _ in paragraphs)
  if not expected:
    main = Counter()
    for (size, _), (language, probability) in zip(paragraphs, languages):
      main[language] += size * probability * (language != 'zxx')
    (language, weight), = main.most_common(1)
    if weight < sure * total:  # a language that the classifier does not know
      return None
    wanted = wanted | {language}
  close = wanted.union(*(family for family in _FAMILIES if family & wanted))
  foreign, example = 0, None
  for (size, paragraph), (language, probability) in zip(paragraphs, languages):
    if language in close or language == 'zxx' or probability < confidence:
      continue
    if max(p for name, p in _identifier().rank(paragraph[:CHARACTERS]) if name in close) < doubt:
      foreign += size
      example = example or (language, probability, paragraph)
  if foreign < share * total or not foreign:
    return None
  language, probability, paragraph = example
  return (f'{foreign / total:.0%} of the text is in another language than '
          f'{", ".join(sorted(wanted))}: {paragraph[:60]!r} is {language} ({probability:.2f})')
