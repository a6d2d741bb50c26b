"""Planted test items are found however they are written; unrelated questions pass."""

import importlib.util
import random
from pathlib import Path

import pytest

from qwen3_jax.data import decontaminate
from qwen3_jax.data.decontaminate import Index, find_contamination, tokenise


@pytest.fixture(scope='module')
def benchmark(data_dir):
  path = Path(__file__).parents[1] / 'benchmarks' / 'filters.py'
  spec = importlib.util.spec_from_file_location('filters_benchmark', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def words(n, start=0):
  return ' '.join(f'word{chr(97 + i // 26)}{chr(97 + i % 26)}' for i in range(start, start + n))


@pytest.mark.parametrize('one, other', [
  (r'Find $\dfrac{1}{2} + \tfrac34$.', r'find $ \frac 1 2+\frac{3}{4} $'),
  (r'Let $x \leq 1{,}000$, and $y \cdot z \neq 2$', r'let $x\le 1,000$ and $y\times z\ne 2$'),
  (r'\left( x,\, y \right) = \text{the answer}', '(x, y) = the answer'),
  ('An angle of $45^\\circ$, x ≤ 3 − y', 'an angle of 45°; x \\le 3-y'),
  ('A right-angled TRIANGLE', 'a right angled\n\n triangle'),
  ('Draw it. [asy] draw((0,0)--(1,1)); [/asy] Find x.', 'Draw it. Find x.'),
])
def test_spellings_of_one_text_are_the_same_tokens(one, other):
  assert tokenise(one) == tokenise(other)


def test_numbers_operators_and_chinese_characters_are_tokens():
  assert tokenise('3.14 + 2 = 5.14') == ['3.14', '+', '2', '=', '5.14']
  assert tokenise('他有12个苹果') == ['他', '有', '12', '个', '苹', '果']


def test_thresholds_are_13_tokens_and_60_percent_of_the_shorter():
  item = words(20)
  index = Index.build([item])
  other = words(60, 300)
  assert index.check(f'{other} {words(12)} {other}') is None
  assert index.check(f'{other} {words(13)} {words(60, 400)}').length == 13
  long = Index.build([words(30)])
  assert long.check(f'{other} {words(17)} {other}') is None
  match = long.check(f'{other} {words(18)} {other}')
  assert (match.length, match.share) == (18, 0.6)
  # The shorter one may be the training text.
  assert Index.build([words(200)]).check(f'{words(13, 40)} {words(8, 500)}').length == 13
  assert Index.build([words(200)]).check(f'{words(13, 40)} {words(9, 500)}') is None


def test_longest_common_run_is_exact():
  draw = random.Random(0)
  alphabet = words(40).split()
  item = [draw.choice(alphabet) for _ in range(80)]
  index = Index.build([' '.join(item)], share=0.0)
  for _ in range(20):
    start, size = draw.randrange(40), draw.randrange(13, 40)
    text = ([draw.choice(alphabet) for _ in range(30)] + item[start:start + size]
            + [draw.choice(alphabet) for _ in range(30)])
    best = max(length for i in range(len(text)) for j in range(len(item))
               for length in [common(text[i:], item[j:])])
    assert index.check(' '.join(text)).length == best


def common(one, other):
  return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def test_short_items_count_whole():
  index = Index.build({'sine': 'Compute $\\sin 30^\\circ$.', 'plain': 'What is the true name?',
                       'eight': words(8)})
  page = words(60, 300)
  assert index.check('compute $ \\sin30 ^\\circ $').item == 'sine'
  assert index.check(f'{page} Compute sin 30°. {page}').item == 'sine'
  assert index.check('What is the true name').item == 'plain'
  assert Index.build(['Evaluate $\\log_21$']).check('evaluate log_2 1') is not None
  assert index.check(f'{page} What is the true name? {page}') is None  # too common without a number
  assert index.check(f'{page} {words(8)} {page}').item == 'eight'
  assert index.check(f'{page} {words(7)} {page}') is None


def test_boilerplate_counts_neither_in_the_run_nor_in_the_lengths():
  tail = 'can be written as a fraction in which both parts are relatively prime find their sum'
  items = [f'{words(20, 30 * i)} {tail}' for i in range(3)]
  text = f'{words(10, 400)} {tail}'
  assert Index.build(items, boilerplate=(), shared=99).check(text) is not None
  assert Index.build(items, boilerplate=()).check(text) is None  # learnt from three items
  assert Index.build(items[:1], boilerplate=(tail,)).check(text) is None  # told
  for item in items:
    assert Index.build(items).check(f'{words(50, 500)} {item}').length == 20 + len(tail.split())


def test_copies_of_one_item_make_no_boilerplate():
  item = words(25)
  index = Index.build([item, item + ' more', 'so ' + item, item], boilerplate=())
  assert not len(index.phrases)
  assert index.check(item) is not None


def test_known_boilerplate_phrases_are_long_enough_to_be_seen():
  assert all(len(tokenise(phrase)) >= 6 for phrase in decontaminate.PHRASES)


def test_reason_names_the_item_and_the_words():
  reason = find_contamination(f'Please do: {words(20)}', Index.build({'set/7': words(20)}))
  assert 'set/7' in reason and '20 tokens' in reason and 'wordaa wordab' in reason
  assert find_contamination(words(30, 300), Index.build({'set/7': words(20)})) is None
  assert find_contamination('', Index.build({'set/7': words(20)})) is None


def test_items_without_tokens_are_refused():
  with pytest.raises(ValueError, match='two words'):
    Index.build(['', 'x'])


def test_planted_items_are_found_in_every_form_and_unrelated_questions_pass(benchmark):
  items, train, subjects = benchmark.plant(100, seed=5)
  index = Index.build(items)
  draw = random.Random(5)
  page = ' '.join(row['answer'] for row in benchmark.read('gsm8k/test_dev_first250.jsonl')[:8])
  for name, text in items.items():
    for form, variant in benchmark.disguise(text, draw, page).items():
      assert index.check(variant), (name, form, text)
  unrelated = [row['problem'] for row in train if row['type'] in subjects][::4]
  hits = [text for text in unrelated if index.check(text)]
  assert len(hits) < 0.01 * len(unrelated), hits
