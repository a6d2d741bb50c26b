"""Likelihoods against the logits and losses of Hugging Face transformers in the goldens."""
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.evaluation import likelihood
from qwen3_jax.model import hf

FIXTURE = Path(__file__).resolve().parents[1] / 'fixtures' / 'd_moe_mixed'
TOLERANCE = 1e-4  # of a log-probability in float32
TOKENS = 64  # at once: few shapes to compile


class Letters:
  """A tokenizer whose ids are code points, but for pairs that merge as those of BPE do."""
  eod_id = 0

  def __init__(self, pairs=()):
    self.pairs = {pair: 200 + k for k, pair in enumerate(pairs)}
    self.back = {id: pair for pair, id in self.pairs.items()}

  def encode(self, text, special=True):
    assert not special
    ids, place = [], 0
    while place < len(text):
      pair = text[place:place + 2]
      ids.append(self.pairs.get(pair, ord(text[place])))
      place += 2 if pair in self.pairs else 1
    return ids

  def piece(self, id):
    return self.back.get(id, chr(id)).encode()


@pytest.fixture(scope='module', params=['a_dense_untied', 'd_moe_mixed'])
def case(request):
  """(model, numbers of another implementation)."""
  folder = FIXTURE
  if request.param != FIXTURE.name or (FIXTURE.parents[3] / 'shared' / 'golden').is_dir():
    folder = request.getfixturevalue('golden') / 'models' / request.param
  return hf.load(folder, dtype=jnp.float32), np.load(folder / 'golden.npz')


@pytest.fixture(scope='module')
def model():
  return hf.load(FIXTURE, dtype=jnp.float32)


@jax.jit
def read_logits(model, tokens_BT):
  return model.logits(model(tokens_BT).hidden_BTD)


def plain_logp(model, rows):
  """For each row of ids, log p of row[1:], from all logits at once; what is behind is padding."""
  tokens_BT = np.zeros((40, 64), int)  # one compilation for all tests
  for b, row in enumerate(rows):
    tokens_BT[b, :len(row)] = row
  logp = np.asarray(jax.nn.log_softmax(np.asarray(read_logits(model, tokens_BT), np.float64)))
  return [logp[b, np.arange(len(row) - 1), row[1:]] for b, row in enumerate(rows)]


def test_log_probabilities_of_tokens(case):
  """Rows of all lengths at once, in batches that a row leaves and a row fills."""
  model, numbers = case
  rows, wanted = [], []
  for name in ('single', 'right'):
    for ids, mask, loss in zip(numbers[f'{name}_input_ids'], numbers[f'{name}_attention_mask'],
                               numbers[f'{name}_token_loss']):
      size = int(mask.sum())
      rows.append(ids[:size].tolist())
      wanted.append(-loss[:size - 1])
  found = likelihood.token_logp(model, [[5], *rows, []], TOKENS)
  assert len(found[0]) == len(found[-1]) == 0
  for one, other in zip(found[1:], wanted):
    assert np.abs(one - other).max() < TOLERANCE


def test_choices_against_logits(case):
  """One character each: the log-probability is that of the golden logits after the prompt."""
  model, numbers = case
  ids, logits = numbers['single_input_ids'][0], numbers['single_logits'][0].astype(np.float64)
  logp = np.asarray(jax.nn.log_softmax(logits))
  records, wanted = [], []
  for k in range(3, 15):
    letters = [65, 66, 67, 68] if k % 2 else [*ids[k:k + 1].tolist(), 70, 71]
    records.append({'prompt': ''.join(map(chr, ids[:k])), 'gold': k % 3,
                    'continuations': list(map(chr, letters))})
    chosen = logp[k - 1, letters]
    wanted.append((float(chosen.argmax() == k % 3),
                   float(np.exp(chosen)[k % 3] / np.exp(chosen).sum())))
  scores = likelihood.choose(model, Letters(), records, TOKENS)
  assert [each.value for each in scores] == [right for right, _ in wanted]
  assert 0 < sum(right for right, _ in wanted) < 12
  for score, (_, probability) in zip(scores, wanted):
    assert abs(score.details['probability'] - probability) < TOLERANCE


def test_long_choices_per_byte_and_merging_prompts(model):
  """`b ` merges: what is common to all continuations ends before it, for each of them."""
  tokenizer = Letters(pairs=('b ',))
  record = {'prompt': 'aab', 'continuations': [' cat', 'éàüöéà', ' ok'], 'gold': 1}
  score, = likelihood.choose(model, tokenizer, [record], TOKENS)
  rows = [tokenizer.encode(record['prompt'] + text, special=False)
          for text in record['continuations']]
  assert rows[0][2] == 200 and rows[1][2] == ord('b')
  sums = np.array([logp[1:].sum() for logp in plain_logp(model, rows)])
  assert score.value == float(sums.argmax() == 1)
  mean = sums / [len(text.encode()) for text in record['continuations']]
  assert score.details['normalised'] == float(mean.argmax() == 1)
  share = np.exp(sums - sums.max())
  assert abs(score.details['probability'] - share[1] / share.sum()) < TOLERANCE
  assert score.value == 0 and score.details['normalised'] == 1  # a long one loses its sum alone


def test_choices_without_a_prompt_and_too_long_ones(model):
  records = [{'prompt': '', 'continuations': ['a', 'b'], 'gold': 0},
             {'prompt': 'x' * 2000, 'continuations': ['a', 'b'], 'gold': 0}]
  first, second = likelihood.choose(model, Letters(), records, TOKENS)
  (a,), (b,), _ = plain_logp(model, [[0, 97], [0, 98], [0]])
  assert first.value == float(a > b)
  assert second.value is None and 'longer than the' in second.missing
  with pytest.raises(ValueError, match='a text of 2000 tokens; the model reads'):
    likelihood.token_logp(model, [[1] * 2000])


def test_perplexity_is_that_of_the_goldens(case):
  model, numbers = case
  ids, loss = numbers['single_input_ids'][0], numbers['single_token_loss'][0]
  text = ''.join(map(chr, ids))
  found = likelihood.perplexity(model, Letters(), [text, '', 'x'], tokens=TOKENS)
  assert found['tokens'] == len(ids) - 1
  assert found['bytes'] == len(''.join(map(chr, ids[1:])).encode())
  assert math.isclose(found['perplexity'], math.exp(loss.mean()), rel_tol=TOLERANCE)
  assert math.isclose(found['bits_per_byte'], loss.sum() / found['bytes'] / math.log(2),
                      rel_tol=TOLERANCE)
  assert math.isclose(found['byte_perplexity'], 2 ** found['bits_per_byte'], rel_tol=1e-9)
  assert [each['tokens'] for each in found['documents']] == [len(ids) - 1, 0, 0]
  empty = likelihood.perplexity(model, Letters(), ['', 'x'])
  assert empty['perplexity'] is empty['bits_per_byte'] is empty['byte_perplexity'] is None


def test_sliding_windows_measure_each_token_once(model):
  text = ''.join(chr(97 + k * k % 23) for k in range(40))
  found = likelihood.perplexity(model, Letters(), [text], window=12, stride=8, tokens=TOKENS)
  ids = Letters().encode(text, special=False)
  begins = [max(0, -(-(t - 11) // 8)) * 8 for t in range(1, 40)]  # the first window with token t
  *logp, whole = plain_logp(model, [*(ids[begin:t + 1] for t, begin in enumerate(begins, 1)), ids])
  assert found['tokens'] == 39 and abs(found['nll'] + sum(x[-1] for x in logp)) < 39 * TOLERANCE
  unbroken = likelihood.perplexity(model, Letters(), [text], tokens=TOKENS)
  assert abs(unbroken['nll'] + whole.sum()) < 39 * TOLERANCE
  assert abs(unbroken['nll'] - found['nll']) > 100 * TOLERANCE  # what is cut off does matter


@pytest.mark.parametrize('size', [0, 1, 2, 19, 20, 21, 35, 36, 100])
def test_windows_cover_a_document(size):
  spans = likelihood.cut(size, 20, 15)
  measured = [t for _, first, end in spans for t in range(first, end)]
  assert measured == list(range(1, size))
  assert all(end - begin <= 20 for begin, _, end in spans)
  assert all(first - begin >= 5 for begin, first, _ in spans[1:])


def test_windows_that_mean_nothing(model):
  for window, stride in ((20, 20), (20, 0), (5000, 10)):
    with pytest.raises(ValueError, match='want 0 < stride < window'):
      if stride == 0:
        likelihood.perplexity(model, Letters(), ['abc'], window, -1)
      likelihood.perplexity(model, Letters(), ['abc'], window, stride)
