"""Answers against labelled pairs, hostile ones included."""

import json
import os
import random
import signal
import time
from fractions import Fraction

import pytest

from qwen3_jax.rewards import answers, exact, math, worker
from qwen3_jax.rewards.math import agree, compare, extract


@pytest.fixture(scope='module')
def pairs(golden):
  lines = (golden / 'verify' / 'math_verify_goldens.jsonl').read_text('utf-8').split('\n')
  return [json.loads(line) for line in lines if line]


def test_every_pair_on_which_library_and_label_agree(pairs):
  chosen = [row for row in pairs if row['agree']]
  wrong = [(row['gold'], row['prediction'][:80], row['expected']) for row in chosen
           if agree(row['prediction'], row['gold'], deadline=30.0) != row['expected']]
  assert len(chosen) > 200 and not wrong


def test_hostile_pairs_are_answered_without_the_library(pairs, monkeypatch):
  monkeypatch.setattr(worker, 'compare', lambda *given: pytest.fail(f'asked the library: {given}'))
  for row in pairs:
    if row['cat'] in ('hang', 'injection', 'precision'):
      assert agree(row['prediction'], row['gold']) == row['expected'], row


def test_without_the_library_exact_comparison_decides_most(pairs, monkeypatch):
  monkeypatch.setattr(worker, 'available', lambda: False)
  chosen = [row for row in pairs if row['agree']]
  right = [agree(row['prediction'], row['gold']) == row['expected'] for row in chosen]
  assert sum(right) > 0.95 * len(chosen)
  assert not any(agree(row['prediction'], row['gold']) for row in chosen if not row['expected'])


@pytest.mark.parametrize('text, answer', [
  ('So $x = \\boxed{\\frac{1}{\\sqrt{2}}}$, done.', '\\frac{1}{\\sqrt{2}}'),
  ('\\boxed{1} or rather \\boxed{\\text{two}}', '\\text{two}'),
  ('\\boxed{\\boxed{3}}', '3'), ('\\boxed 5', '5'), ('\\fbox{6}', '6'), ('\\boxed{7', None),
  ('She pays 3 * 4 = 12.\n#### 12', '12'), ('The answer is 3.5. Check: 1 + 2.5', '3.5'),
  ('**Answer:** $x+1$', 'x+1'), ('最后答案是42。', '42'), ('So there are **9** of them.', '9'),
  ('Hence $a = 3$ and finally $b = 4$.', 'b = 4'), ('<think>\\boxed{1}</think>\n\\boxed{2}', '2'),
  ('', None)])
def test_extract(text, answer):
  assert extract(text) == answer or answer is None and not agree(text, '8')


def test_strict_extraction_wants_a_stated_conclusion():
  assert extract('We get 3 + 4 = 7.', strict=True) is None
  assert extract('We get 3 + 4 = 7. So the answer is 7.', strict=True) == '7'


@pytest.mark.parametrize('one, other, equal', [
  ('1,234,567', '1234567', True), ('10,\\!080', '10080', True), ('1{,}000', '1000', True),
  ('-221_3', '-221_{3}', True), ('25_8', '25_9', False), ('2\\sqrt{3}', '\\sqrt{12}', True),
  ('\\frac{3}{\\sqrt{3}+1}', '\\frac{3\\sqrt3-3}{2}', True), ('(2+i)^2', '3+4i', True),
  ('\\pm 3', '3, -3', True), ('x \\in [1, 2)', '[1,2)', True), ('(1,2)', '(2,1)', False),
  ('\\{1,2\\}', '\\{2, 1\\}', True), ('[1,2]', '(1,2)', False), ('3\\frac12', '3.5', True),
  ('12\\%', '0.12', True), ('12\\%', '1.2', False), ('0.333', '\\frac13', False),
  ('10^{400}', '10^{401}', False), ('x^2-1', '(x-1)(x+1)', True), ('2^{1/2}', '\\sqrt 2', True),
  ('\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}', '\\begin{pmatrix} 1 \\\\ \\frac42 \\end{pmatrix}',
   True),
  ('\\begin{pmatrix} 1 & 2 \\end{pmatrix}', '\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}', False),
])
def test_exact_comparison(one, other, equal):
  assert compare(one, other) is equal and compare(other, one) is equal


def test_numbers_against_fractions():
  draw = random.Random(0)
  for _ in range(300):
    a, b, c = (draw.randrange(-50, 50) for _ in range(3))
    d = draw.randrange(1, 50)
    text = f'\\frac{{{a}}}{{{d}}} - {b} \\cdot ({c} + {d})^2'
    assert exact.number(exact.parse(text)) == Fraction(a, d) - b * (c + d) ** 2


@pytest.mark.parametrize('text', [
  '9' * 5000, '9^{9^{9^9}}', '10^{10^{10}}', '(' * 900, '\\sqrt' * 190 + '2', '(x+y+z+w)^{99}',
  '\\frac{1}{' * 80, '1000000!', '\\binom{10^9}{5}', '__import__("os").system("true")', '1/0',
  '(1+x)^{12}(1+y)^{12}(1+z)^{12}', '\\sqrt{' + '7' * 300 + '}', '2^{-10^9}',
  '{' * 500 + '}' * 500])
def test_hostile_text_is_refused_at_once(text):
  start = time.process_time()
  assert compare(text, '7') in (None, False)
  assert agree(f'\\boxed{{{text}}}', '\\boxed{7}', deadline=1.0) is False
  assert time.process_time() - start < 1


def test_no_text_upsets_the_parser():
  """An answer that raises would count as unscored, which is not the model's due."""
  pieces = [*'0123456789.,+-*/^()[]{}=<>|!%$ \\abxπ∞', '\\frac', '\\sqrt', '\\binom', '\\boxed',
            '\\pi', '\\infty', '\\text', '\\left', '\\right', '\\cup', '\\pm', ' . ']
  draw = random.Random(0)
  for _ in range(20_000):
    text = ''.join(draw.choice(pieces) for _ in range(draw.randint(1, 14)))
    assert compare(text, '18') in (None, True, False), text


def test_choices_and_text():
  assert agree('I think (B) is right. The answer is (B).', 'B')
  assert agree('\\boxed{\\textbf{(C)}\\ 12}', 'C', kind='choice')
  assert not agree('The answer is A.', 'B')
  assert agree('The answer is **Monday**.', '\\text{Monday}')
  assert agree('\\boxed{Not Defined}', 'not defined', kind='text')
  assert not agree('\\boxed{1/2}', '0.5', kind='text')
  with pytest.raises(ValueError, match="got 'number'"):
    agree('1', '1', kind='number')


def test_child_is_killed_at_the_deadline_and_replaced():
  if not worker.available():
    pytest.skip('math-verify is not installed')
  assert worker.compare('$\\sin^2 x$', '$1-\\cos^2 x$', 60.0) is True
  child = worker._child['process']
  os.kill(child.pid, signal.SIGSTOP)  # as good as a computation without end
  start = time.monotonic()
  assert worker.compare('$1$', '$1$', 0.3) is None
  assert time.monotonic() - start < 20
  assert child.poll() is not None
  assert worker.compare('$\\ln 8$', '$3\\ln 2$', 60.0) is True
  assert worker._child['process'].pid != child.pid
  worker.stop()


def test_clean_spells_answers_one_way():
  assert answers.clean(' $\\left(1{,}000,\\; x\\right)$. ') == '(1000, x )'
  assert math.same('\\dfrac{1}{2}', '\\frac12')
