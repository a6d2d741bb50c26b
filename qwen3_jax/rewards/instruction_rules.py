"""The 25 rules of IFEval (Zhou et al. 2023, arXiv 2311.07911): is an instruction followed?

A rule is a function of the answer and of the arguments that its instruction has. What counts as
followed is what the paper's reference checks, its names of rules and arguments too (the spelling
`section_spliter` is theirs); it differs in how sentences and words in capitals are found (`prose`)
and in the identification of languages (py3langid, and no passage in another language). Answers may
be hostile: they are searched for plain strings and in single passes.
"""

import json
import re

from qwen3_jax.rewards.prose import find_words, split_sentences
from qwen3_jax.text.languages import find_mixing, identify

RELATIONS = ('less than', 'at least')
PHRASES = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')
_CAPITALS = re.compile(r"[^\W_]+(?:[.'’-][^\W_]+)*")
_HIGHLIGHTS = (re.compile(r'\*[^\n*]*\*'), re.compile(r'\*\*[^\n*]*\*\*'))
_POSTSCRIPTS = {'P.S.': re.compile(r'p\.\s?s\.'), 'P.P.S': re.compile(r'p\.\s?p\.\s?s')}
_FENCE = re.compile(r'```(?:json)?', re.IGNORECASE)


def _compare(count, relation, bound):
  return count < bound if relation == 'less than' else count >= bound


def has_keywords(text, keywords):
  lower = text.lower()
  return all(word.lower() in lower for word in keywords)


def has_keyword_often(text, keyword, frequency, relation):
  return _compare(text.lower().count(keyword.lower()), relation, frequency)


def lacks_words(text, forbidden_words):
  """Whole words; `sleep` does not forbid `asleep`."""
  return not any(re.search(rf'(?<!\w){re.escape(word)}(?!\w)', text, re.IGNORECASE)
                 for word in forbidden_words)


def has_letter_often(text, letter, let_frequency, let_relation):
  return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def is_in_language(text, language):
  """Whether `text` is in `language` (ISO 639-1), its first 400 characters and every passage."""
  language = language.split('-')[0].lower()
  text = text.lower() if text.isupper() else text
  return identify(text)[0] == language and find_mixing(text, expected=language) is None


def has_sentences(text, num_sentences, relation):
  return _compare(len(split_sentences(text)), relation, num_sentences)


def has_words(text, num_words, relation):
  return _compare(len(find_words(text)), relation, num_words)


def has_paragraphs(text, num_paragraphs):
  """Paragraphs between `***`; only the first and the last may be empty, and do not count then."""
  return _count_parts(text, '***') == num_paragraphs


def _count_parts(text, divider):
  parts = [part.strip() for part in text.split(divider)]
  return sum(map(bool, parts)) if all(parts[1:-1]) else -1


def begins_paragraph(text, num_paragraphs, nth_paragraph, first_word):
  """Paragraphs between blank lines; the first word without quotation marks before it."""
  parts = [part.strip() for part in text.split('\n\n') if part.strip()]
  if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
    return False
  word = parts[nth_paragraph - 1].split(None, 1)[0].lstrip('\'"').lower()
  return re.split(r'[.,?!\'"]', word, maxsplit=1)[0] == first_word.lower()


def has_placeholders(text, num_placeholders):
  return len(re.findall(r'\[[^\[\]\n]*\]', text)) >= num_placeholders


def has_postscript(text, postscript_marker):
  marker = postscript_marker.strip()
  if marker in _POSTSCRIPTS:
    return bool(_POSTSCRIPTS[marker].search(text.lower()))
  return marker.lower() in text.lower()


def has_bullets(text, num_bullets):
  """Lines that start with one * or with -."""
  lines = [line.strip() for line in text.split('\n')]
  return num_bullets == sum(line.startswith('-') or len(line) > 1 and line[0] == '*' != line[1]
                            for line in lines)


def has_phrase(text):
  return any(phrase in text for phrase in PHRASES)


def has_highlights(text, num_highlights):
  """Spans within a line between * or **."""
  found = [span for pattern in _HIGHLIGHTS for span in pattern.findall(text)]
  return sum(bool(span.strip('* \t')) for span in found) >= num_highlights


def has_sections(text, section_spliter, num_sections):
  return len(re.findall(rf'{re.escape(section_spliter.strip())}\s?\d+', text)) >= num_sections


def is_json(text):
  """One JSON value, which may stand in a code fence."""
  text = text.strip()
  if opening := _FENCE.match(text):
    text = text[opening.end():].removesuffix('```')
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def has_title(text):
  for line in text.split('\n'):
    start, end = line.find('<<'), line.rfind('>>')
    if 0 <= start < end and line[start:end].strip('<> \t'):
      return True
  return False


def has_two_responses(text):
  parts = [part.strip() for part in text.split('******')]
  given = [part for part in parts if part]
  return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeats_prompt(text, prompt_to_repeat):
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text, end_phrase):
  """Quotation marks round the answer aside."""
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text):
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


def has_capitals(text, capital_frequency, capital_relation):
  """Words whose letters are all capitals; I and A are such words."""
  return _compare(sum(word.isupper() for word in _CAPITALS.findall(text)), capital_relation,
                  capital_frequency)


def is_upper(text):
  return text.isupper() and is_in_language(text, 'en')


def is_lower(text):
  return text.islower() and is_in_language(text, 'en')


def lacks_commas(text):
  return ',' not in text


# id: (rule, {argument: type, or what it may be})
RULES = {
  'keywords:existence': (has_keywords, {'keywords': list}),
  'keywords:frequency': (has_keyword_often, {
    'keyword': str, 'frequency': int, 'relation': RELATIONS}),
  'keywords:forbidden_words': (lacks_words, {'forbidden_words': list}),
  'keywords:letter_frequency': (has_letter_often, {
    'letter': str, 'let_frequency': int, 'let_relation': RELATIONS}),
  'language:response_language': (is_in_language, {'language': str}),
  'length_constraints:number_sentences': (has_sentences, {
    'num_sentences': int, 'relation': RELATIONS}),
  'length_constraints:number_paragraphs': (has_paragraphs, {'num_paragraphs': int}),
  'length_constraints:number_words': (has_words, {'num_words': int, 'relation': RELATIONS}),
  'length_constraints:nth_paragraph_first_word': (begins_paragraph, {
    'num_paragraphs': int, 'nth_paragraph': int, 'first_word': str}),
  'detectable_content:number_placeholders': (has_placeholders, {'num_placeholders': int}),
  'detectable_content:postscript': (has_postscript, {'postscript_marker': str}),
  'detectable_format:number_bullet_lists': (has_bullets, {'num_bullets': int}),
  'detectable_format:constrained_response': (has_phrase, {}),
  'detectable_format:number_highlighted_sections': (has_highlights, {'num_highlights': int}),
  'detectable_format:multiple_sections': (has_sections, {
    'section_spliter': str, 'num_sections': int}),
  'detectable_format:json_format': (is_json, {}),
  'detectable_format:title': (has_title, {}),
  'combination:two_responses': (has_two_responses, {}),
  'combination:repeat_prompt': (repeats_prompt, {'prompt_to_repeat': str}),
  'startend:end_checker': (ends_with, {'end_phrase': str}),
  'startend:quotation': (is_quoted, {}),
  'change_case:capital_word_frequency': (has_capitals, {
    'capital_frequency': int, 'capital_relation': RELATIONS}),
  'change_case:english_capital': (is_upper, {}),
  'change_case:english_lowercase': (is_lower, {}),
  'punctuation:no_comma': (lacks_commas, {}),
}
