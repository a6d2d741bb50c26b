"""The final answer of a worked solution, as text, and that text without what does not matter."""

import re

_BOXED = re.compile(r'\\(?:boxed|fbox)(?![a-zA-Z])\s*')
_STATED = re.compile(
  r'(?:\b(?:the|final|our|my|correct|your|so|,) (?:final |correct )?answers? (?:is|are|was|'
  r'would be|to be|=|:)|(?:^|[*#]\s*|\bfinal )answer(?:\*\*)?(?: is|:|\s*=|\s*\n)'
  r'|答案(?:是|为|為|：|:)|####|最终结果(?:是|为))\s*:?\s*', re.IGNORECASE | re.MULTILINE)
_MATHS = re.compile(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]', re.DOTALL)
_BOLD = re.compile(r'\*\*([^*\n]{1,80})\*\*')
_NUMBER = re.compile(
  r'(?<![\w.])[-+−]?\s?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+−]?\s?\d+(?:\.\d+)?(?:/\d+)?|[-+−]?\.\d+')
_CHOICE = re.compile(r'\(?([A-J])(?:\)|\.|:|\b)')
TAIL = 20000  # characters of the end of a solution that are searched


def extract(text, strict=False):
  """The final answer in `text`, or None.

  The first of these that is there: the last `\\boxed{...}`; what follows the last `####` or
  `answer is`; the last bold or mathematical span in the last paragraph that has a number; the last
  number. `strict` stops after the first two, which are explicit conclusions. Only what follows
  `</think>`, and the last 20,000 characters, are searched.
  """
  text = text.rpartition('</think>')[2][-TAIL:]
  boxed = find_boxed(text)
  if boxed is not None:
    return boxed
  stated = [match for match in _STATED.finditer(text)]
  if stated:
    rest = text[stated[-1].end():].strip()
    line = rest.split('\n\n')[0] if rest.startswith(('$$', '\\[')) else rest.split('\n')[0]
    answer = _first_span(line)
    if answer:
      return answer
  if strict:
    return None
  return _last_span(text)


def find_boxed(text):
  """What is in the last `\\boxed{...}`, `\\fbox{...}` or after `\\boxed `; innermost if nested."""
  for match in reversed(list(_BOXED.finditer(text))):
    rest = text[match.end():]
    if not rest.startswith('{'):
      word = re.match(r'[^\s$.,]+', rest)
      if word:
        return word[0]
      continue
    depth = 0
    for i, character in enumerate(rest):
      depth += (character == '{') - (character == '}')
      if character == '}' and depth == 0:
        return rest[1:i].strip()
  return None


def _first_span(line):
  """The answer at the start of what follows `the answer is`."""
  line = line.strip(' :*')
  maths = _MATHS.match(line)
  if maths and not line[maths.end():].strip(' .*'):
    return next(filter(None, maths.groups())).strip()
  sentence = re.split(r'(?<=[^\d])\.\s|\.\s|\.$|。|；', line)[0]
  return sentence.strip(' *') or None


def _last_span(text):
  paragraph = text.rstrip().rpartition('\n\n')[2]
  spans = [next(filter(None, match.groups())) for match in _MATHS.finditer(paragraph)]
  bold = _BOLD.findall(paragraph)
  last_line = text.strip().rpartition('\n')[2]
  if 0 < len(last_line) <= 60 and not spans and not bold:
    return last_line
  if bold and (not spans or paragraph.rfind(bold[-1]) > paragraph.rfind(spans[-1])):
    return bold[-1].strip()
  if spans:
    return spans[-1].strip()
  numbers = _NUMBER.findall(text)
  return numbers[-1].strip() if numbers else last_line[-200:] or None


def last_number(text):
  """The last number in prose, or None."""
  numbers = _NUMBER.findall(text)
  return numbers[-1].replace(' ', '') if numbers else None


def find_choice(text):
  """The letter A to J that an answer to a multiple-choice question names, or None."""
  text = re.sub(r'\\(?:text|textbf|mathrm|mathbf|textit)\b|[{}$*\\]', '', text).strip()
  match = _CHOICE.match(text)
  if match and (len(text) <= 3 or text[0] == '(' or text[1:2] in '.):'):
    return match[1]
  found = re.findall(r'\b(?:answer|option|choice)(?: is)?:?\s*\(?([A-J])\b', text, re.IGNORECASE)
  return found[-1].upper() if found else None


_SIGNS = str.maketrans({
  '−': '-', '–': '-', '，': ',', '（': '(', '）': ')', '：': ':', '％': '%', '≤': '\\le ',
  '≥': '\\ge ', '≠': '\\ne ', '\u00a0': ' ', '\u2009': ' ', '\u202f': ' ', '½': '\\frac12',
  '¼': '\\frac14', '¾': '\\frac34', '°': ' ', '$': ' ', '€': ' ', '£': ' ', '¥': ' ', '￥': ' ',
  '²': '^2', '³': '^3'})
_LAYOUT = re.compile(
  r'\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits|quad|qquad|hfill)(?![a-zA-Z])'
  r'|(?<!\\)\\[,;:! ]|\\(?=\$)|~|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|\\\(|\\\)|\\\[|\\\]')
_SAME = (
  (re.compile(r'\\[dtc]frac(?![a-zA-Z])'), r'\\frac'), (re.compile(r'\\leq(?:slant)?\b'), r'\\le'),
  (re.compile(r'\\geq(?:slant)?\b'), r'\\ge'), (re.compile(r'\\neq\b'), r'\\ne'),
  (re.compile(r'\\dbinom|\\tbinom'), r'\\binom'), (re.compile(r'\\[lr]brace\b'), lambda m: (
    '\\{' if m[0] == '\\lbrace' else '\\}')), (re.compile(r'\\%'), '%'),
  (re.compile(r'\\lvert|\\rvert|\\vert'), '|'), (re.compile(r'\bsqrt\s*(?=\()'), r'\\sqrt'),
  (re.compile(r'(?<![\\a-zA-Z])infinity|(?<![\\a-zA-Z])inf\b'), r'\\infty'),
  (re.compile(r'(?<![\\a-zA-Z])pi\b'), r'\\pi'))
_THOUSANDS = re.compile(r'(?<![\d.])\d{1,3}(?:(?:,\\!|,\s\\!|\{,\}|,)\d{3})+(?!\d)')
TEXT = re.compile(r'\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm|operatorname)\s*'
                   r'\{([^{}]*)\}(?:\^\{?-?\d\}?)?')
_UNIT = re.compile(
  r'(?<![\\a-zA-Z{])(?:[a-zA-Z]{4,}|(?:cm|mm|km|kg|mg|ml|lb|lbs|oz|ft|mi|in|sec|min|hr|hrs|mph|kph'
  r'|am|pm|day|cup|box|men|per|sq|cu|hz|ways|deg|rad|of|the|an|is|are|to|on|each|USD|RMB|TZS)'
  r'(?![a-zA-Z]))(?:\s*/\s*[a-zA-Z]+)?(?:\^\{?\d\}?)?'
  r'|(?<=\d)\s(?:m|g|s|h|L|l|J|N|W|V|A)(?:/[a-zA-Z]+)?(?:\^\{?[23]\}?)?(?=\s*$)'
  r'|(?<=\d)\s?(?:km|m|mi)/(?:h|s|hr)(?:\^\{?2\}?)?(?=\s*$)')


def clean(answer):
  """One spelling of an answer: no layout, currency, degrees, final stop or thousands separators."""
  answer = answer.translate(_SIGNS)
  answer = _THOUSANDS.sub(lambda m: re.sub(r'[^\d]', '', m[0]), answer)
  answer = _LAYOUT.sub(' ', answer)
  for pattern, replacement in _SAME:
    answer = pattern.sub(replacement, answer)
  answer = ' '.join(answer.split())
  return answer.rstrip('.').strip(' *`"')


def strip_units(answer):
  """A cleaned answer without text and words of units, and joined by commas for and, or."""
  answer = TEXT.sub(lambda m: ',' if m[1].strip() in ('and', 'or') else ' ', answer)
  answer = re.sub(r'(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])', ',', answer)
  answer = _UNIT.sub(' ', answer)
  return re.sub(r'[^\x00-\x7fπ∞∪∅√×·÷±∈]+', ' ', answer).strip()


def plain(answer):
  """The words of an answer in lower case, for answers that are text."""
  answer = re.sub(r'\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm)(?![a-zA-Z])', '', answer)
  return re.sub(r'[\s{}$*.,"\'`()]|\\[,;! ]', '', answer).casefold()
