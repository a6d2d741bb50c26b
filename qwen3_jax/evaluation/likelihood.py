"""Likelihoods instead of answers: which choice a model holds likeliest, perplexity of documents.

Texts are read as they are, without a chat template, and control tokens in them as plain text. The
first token of a text has nothing before it and is not measured. Log-probabilities are over all rows
of the head, as other programs have them.
"""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.evaluation.benchmarks import Score
from qwen3_jax.kernels import head

SHORTEST = 32  # rows are padded to a power of two from here on: one compilation for each


@functools.partial(jax.jit, static_argnames='dtype')
def _logp(params, tokens_BT, segment_BT, dtype=None):
  hidden_BTD = params(tokens_BT, segment_BT, dtype=dtype).hidden_BTD
  return head.token_logp(hidden_BTD, params.head(), jnp.roll(tokens_BT, -1, axis=1))


def token_logp(model, rows, tokens=16_384, dtype=None):
  """log p(row[t + 1] | row[:t + 1]) of rows of ids: for each row an array of one number less.

  Rows run sorted by length, about `tokens` of them with their padding at once. Raises ValueError
  for a row longer than the model's positions.
  """
  longest = model.spec.max_position
  order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: len(rows[i]))
  if order and len(rows[order[-1]]) > longest:
    raise ValueError(f'a text of {len(rows[order[-1]])} tokens; the model reads {longest}')
  found, place = [np.zeros(0, np.float32)] * len(rows), 0
  while place < len(order):
    T = min(longest, max(SHORTEST, 1 << (len(rows[order[place]]) - 1).bit_length()))
    B = min(max(1, tokens // T), 1 << (len(order) - place - 1).bit_length())
    here = [i for i in order[place:place + B] if len(rows[i]) <= T]
    tokens_BT, segment_BT = np.zeros((2, B, T), np.int32)
    for b, i in enumerate(here):
      tokens_BT[b, :len(rows[i])], segment_BT[b, :len(rows[i])] = rows[i], 1
    logp_BT = np.asarray(_logp(model, tokens_BT, segment_BT, dtype))
    for b, i in enumerate(here):
      found[i] = logp_BT[b, :len(rows[i]) - 1]
    place += len(here)
  return found


def choose(model, tokenizer, records, tokens=16_384, dtype=None):
  """A Score for each record of a benchmark scored by 'choices': is the right choice the likeliest.

  `value` compares sums of log-probabilities of the 'continuations' after the 'prompt'; of
  `details`, 'normalised' compares sums per byte of the continuation, which longer texts do not
  lose, and 'probability' is that of the right choice among the choices. Where the last token of the
  prompt would merge with a continuation, what they all have in common is the prompt. One too long
  for the model is missing.
  """
  asked = [_encode(tokenizer, record) for record in records]
  longest = model.spec.max_position
  fits = [all(len(row) <= longest for row in rows) for rows, _ in asked]
  logp = iter(token_logp(model, [row for (rows, _), fit in zip(asked, fits) if fit
                                 for row in rows], tokens, dtype))
  scores = []
  for record, (rows, common), fit in zip(records, asked, fits):
    if not fit:
      scores.append(Score(None, missing=f'longer than the {longest} tokens that the model reads'))
      continue
    sums = np.array([next(logp)[common - 1:].sum(dtype=np.float64) for _ in rows])
    scores.append(_compare(sums, record))
  return scores


def _encode(tokenizer, record):
  """(rows of ids, how many of them are common): each continuation after the prompt."""
  first = tokenizer.encode(record['prompt'], special=False)
  rows = [tokenizer.encode(record['prompt'] + text, special=False)
          for text in record['continuations']]
  common = min(_shared(first, row) for row in rows)
  if not common:
    first = [tokenizer.eod_id]
    rows, common = [first + row for row in rows], 1
  return rows, common


def _shared(one, other):
  """The length of the common beginning of two lists, of which the second keeps one item beyond."""
  count = next((k for k, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
  return min(count, len(other) - 1)


def _compare(sums, record):
  sizes = np.array([max(1, len(text.encode())) for text in record['continuations']])
  gold, share = record['gold'], np.exp(sums - sums.max())
  return Score(float(np.argmax(sums) == gold), {
    'normalised': float(np.argmax(sums / sizes) == gold),
    'probability': float(share[gold] / share.sum())})


def perplexity(model, tokenizer, texts, window=None, stride=None, tokens=16_384, dtype=None):
  """How likely documents are: {'nll', 'tokens', 'bytes', 'perplexity', 'byte_perplexity',
  'bits_per_byte', 'documents': [{'nll', 'tokens', 'bytes'}, ...]}.

  `nll` is in nats. A document longer than `window` tokens (default the model's positions, at most
  4,096) is read in windows that begin `stride` (default half a window) apart; each token is
  measured once, in the first window that has it; from the second window on it has at least
  window - stride tokens before it. Bytes are those of the tokens measured. Where there are none,
  the rates are None.
  """
  window = window or min(4096, model.spec.max_position)
  stride = stride or max(1, window // 2)
  if not 0 < stride < window <= model.spec.max_position:
    raise ValueError(f'window {window} and stride {stride}: want 0 < stride < window <= '
                     f'{model.spec.max_position}, the positions of the model')
  rows = [tokenizer.encode(text, special=False) for text in texts]
  spans = [(i, *span) for i, row in enumerate(rows) for span in cut(len(row), window, stride)]
  logp = token_logp(model, [rows[i][begin:end] for i, begin, _, end in spans], tokens, dtype)
  documents = [dict(nll=0.0, tokens=0, bytes=0) for _ in rows]
  for (i, begin, first, end), values in zip(spans, logp):
    documents[i]['nll'] -= float(values[first - begin - 1:].sum(dtype=np.float64))
    documents[i]['tokens'] += end - first
    documents[i]['bytes'] += sum(len(tokenizer.piece(id)) for id in rows[i][first:end])
  total = {key: sum(each[key] for each in documents) for key in ('nll', 'tokens', 'bytes')}
  return total | rates(**total) | {'documents': documents}


def rates(nll, tokens, bytes):
  """Perplexity per token and per byte, and bits per byte; None where nothing was measured."""
  def power(count):
    return math.exp(min(700.0, nll / count)) if count else None
  return {'perplexity': power(tokens), 'byte_perplexity': power(bytes),
          'bits_per_byte': nll / bytes / math.log(2) if bytes else None}


def cut(size, window, stride):
  """Windows of a document of `size` tokens: (begin, first measured, end).

  Every token but the first is measured once.
  """
  spans, begin, first = [], 0, 1
  while first < size:
    end = min(begin + window, size)
    spans.append((begin, first, end))
    first, begin = end, begin + stride
  return spans
