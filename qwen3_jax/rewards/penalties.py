"""What costs reward whatever the task: leaving the language, repeating, running overlong."""

from qwen3_jax.rewards.prose import find_words
from qwen3_jax.text.languages import find_languages, find_mixing, identify
from qwen3_jax.text.repetition import find_repetition
from qwen3_jax.text.template import FLAG

WINDOW, FREE, FULL = 12, 0.1, 0.5  # words; shares of words said before that cost nothing and all


def language(record, response):
  """1 where answer and reasoning keep to their language, 0.5 where the answer alone does, or 0.

  The answer's language is record['language'] (ISO 639-1), by default that of the last question
  where it is plain (30 letters or more of one language, probability 0.9). The reasoning may be in
  any one language. Languages that occur in the prompt may occur (a text to translate). See
  `find_mixing`.
  """
  asked = [m['content'] for m in record['messages'] if m['role'] in ('system', 'user')]
  allowed = set().union(*(find_languages(text) for text in asked))
  wanted = record.get('language') or _find_language(asked[-1] if asked else '')
  if find_mixing(response.content, expected=wanted, allowed=allowed):
    return 0.0
  return 0.5 if response.reasoning and find_mixing(response.reasoning, allowed=allowed) else 1.0


def _find_language(question):
  question = ' '.join(FLAG.sub(' ', question).split())
  dense = 3 if any('\u3040' <= letter <= '\ud7a3' for letter in question[:400]) else 1
  if dense * sum(map(str.isalpha, question[:400])) < 30 or find_mixing(question):
    return None
  found, probability = identify(question)
  return found if probability >= 0.9 and found != 'zxx' else None


def repetition(record, response):
  """1 where nothing is repeated, 0 where `find_repetition` finds the text substantially repetitive.

  Between them it falls with the share of words that lie in a run of 12 that was there before: 0.1
  of the text costs nothing, 0.5 all. The worse of reasoning and answer counts, each alone: an
  answer may well repeat what the reasoning found.
  """
  return min(_score_repetition(text) for text in (response.reasoning or '', response.content))


def _score_repetition(text):
  if find_repetition(text):
    return 0.0
  return min(1.0, max(0.0, 1 - (repeated_share(text) - FREE) / (FULL - FREE)))


def repeated_share(text, window=WINDOW):
  """The share of runs of `window` words that occurred before; 0 for shorter texts."""
  words = find_words(text)
  runs = [tuple(words[i:i + window]) for i in range(len(words) - window + 1)]
  return 1 - len(set(runs)) / len(runs) if runs else 0.0


def overlong(record, response):
  """1 plus DAPO's soft penalty for the tokens of the response.

  record['overlong'] is {'limit', 'buffer'}, by default DAPO's 20,480 and 4,096 tokens.
  """
  return 1 + penalise_length(response.tokens, **record.get('overlong', {}))


def penalise_length(tokens, limit=20480, buffer=4096):
  """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), from -1 to 0, in tokens.

  0 up to limit - buffer, -1 beyond `limit`, linear between them. Tokens, never characters.
  """
  if not 0 < buffer <= limit:
    raise ValueError(f'the buffer of {buffer} tokens must be positive and within the limit {limit}')
  return min(0.0, max(-1.0, (limit - buffer - tokens) / buffer))
