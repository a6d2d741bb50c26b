"""Rules for questions and worked answers: what they reject and what they let pass."""

import gzip
import json

import pytest

from qwen3_jax.data.filters import (
  Similar,
  find_guess,
  find_inconsistency,
  find_similar,
  find_unverifiable,
  find_wrong_answer,
)

WORKED = ('The train covers 60 miles in the first hour and 45 in the second, so 60 + 45 = 105 '
          'miles in all. Because the trip is 150 miles long, 150 - 105 = 45 miles remain.')


def read(path):
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file.read().split('\n') if line]


@pytest.mark.parametrize('reasoning, answer, named', [
  ('', 'The answer is 45.', '0 words'),
  ('It is 45.', 'The answer is 45.', '3 words'),
  ('First look at the whole trip, then at its parts.', 'A ' + 'long explanation ' * 100, '201'),
  (f"{WORKED} Hmm, but is that right? I'm not sure, I'll just guess 42.", '42', 'guess'),
  ('This one is hard. I have no idea how to start with the equation. Let me pick one at random.',
   '7', 'pick one'),
  ('We are given a triangle with three sides and asked about its area, and this is a nice '
   'triangle. My best guess is 12.', '12', 'guess'),
  ('这道题很难，我想不出来怎么做，也没有思路，我只能猜一个答案。', '12', '猜'),
  ('Quite an interesting question about trains and their speeds over long distances in open '
   'country, where people like to look out of the window at hills and rivers and small villages '
   'on the way to the sea in summer. There are many more things one may say of such journeys.',
   'The answer is 45.', 'nowhere'),
])
def test_guesses_are_found(reasoning, answer, named):
  assert named in find_guess(reasoning, answer)


@pytest.mark.parametrize('reasoning', [
  WORKED,
  f'At first I would guess 50, but let me compute. {WORKED} So 150 - 60 - 45 = 45.',
  f'Suppose we guess that x = 3. {WORKED} Then 2 * 3 = 6, so 6 + 39 = 45, which means x = 45.',
  '火车第一小时走60公里，第二小时走45公里，所以一共走了60+45=105公里，因此还剩150-105=45公里。',
])
def test_reasoning_passes(reasoning):
  assert find_guess(reasoning, 'The answer is 45.') is None


def test_inconsistency():
  assert find_inconsistency(f'{WORKED} The answer is 45.', 'So it is \\boxed{45} miles.') is None
  assert find_inconsistency(WORKED, 'It is \\boxed{44}.') is None  # nothing is concluded
  assert find_inconsistency('So \\boxed{\\frac{1}{2}}.', 'The answer is 0.5.') is None
  reason = find_inconsistency(f'{WORKED} The answer is 45.', 'It is \\boxed{44} miles.')
  assert "'45'" in reason and "'44'" in reason


def test_wrong_answer():
  assert find_wrong_answer('So it is \\boxed{\\frac{2}{4}}.', '1/2') is None
  assert find_wrong_answer('So it is \\boxed{3}.', '1/2') == "answers '3', not '1/2'"
  assert find_wrong_answer('no idea', '7', verify=lambda content, reference: True) is None


def test_similar_to_validation_items():
  item = 'A train covers 60 miles in the first hour and 45 miles in the second hour of its trip.'
  index = Similar([('v1', item), ('v2', 'Tom has twelve red apples and gives three to his sister '
                                        'Ann, who eats one of them at once.')])
  assert 'v1' in find_similar(item.replace('60', '70'), index)
  page = ' '.join(f'Some other sentence about topic {i} and its place here.' for i in range(30))
  assert '100%' in find_similar(f'{page} {item} {page}', index)
  assert find_similar(page, index) is None
  assert find_similar('A train covers 60 miles in a day.', index) is None
  assert find_similar('', index) is None


@pytest.mark.parametrize('question, named', [
  ('Let f(x) = x^2. (a) Find f(2). (b) Find the minimum of f.', '2 labelled'),
  ('A car drives 30 miles. 1) How long does it take? 2) How much fuel does it need?', '2 labelled'),
  ('How many apples are there? And how much do they cost?', '2 questions'),
  ('Find the area of the square. Also, find its diagonal.', 'several'),
  ('Find the area and then also determine the volume of the box.', 'several'),
  ('Prove that the square root of 2 is irrational.', 'proof'),
  ('Let n be even. Show that n^2 is divisible by 4.', 'proof'),
  ('设 n 为偶数。证明 n 的平方被 4 整除。', 'proof'),
  ('Write a short poem about the sea.', 'free text'),
  ('Explain how a bill becomes a law.', 'free text'),
  ('Please design a logo for a bakery.', 'free text'),
  ('Give me some tips for a job interview.', 'free text'),
  ('请解释什么是量子力学。', 'free text'),
  ('Which of the following is a prime number?', 'options'),
  ('In the figure below, find the angle x.', 'figure'),
])
def test_unverifiable_questions(question, named):
  assert named in find_unverifiable(question)


@pytest.mark.parametrize('question', [
  'Find the area of a square of side 3.',
  'Which of the following is prime? (A) 4 (B) 5 (C) 6 (D) 8',
  'In the figure below, find x. [asy] draw((0,0)--(1,1)); label("?", (0,0)); [/asy]',
  'Tom has to write 3 reports and draw 4 pictures. How many things does he have to do?',
  'She asked him: "What is the matter? How are you?" If he answered in 12 words, how many letters '
  'of 60 were left for each word?',
  'What is the smallest number that leaves remainder 1 when divided by (a) 2, (b) 3 and (c) 5?',
  'Rewrite the expression $x^2 + 4x$ in the form $(x + a)^2 + b$. What is $a + b$?',
  'Write $0.\\overline{3}$ as a common fraction.',
  '小明有3个苹果，又买了5个，一共有几个？',
])
def test_verifiable_questions_pass(question):
  assert find_unverifiable(question) is None


def test_real_questions_and_solutions_pass(data_dir):
  rows = read(data_dir / 'gsm8k' / 'test_dev_first250.jsonl')
  assert sum(find_unverifiable(row['question']) is None for row in rows) > 0.97 * len(rows)
  for row in rows:
    reasoning, final = row['answer'].split('####')
    assert find_guess(reasoning, f'The answer is {final}') is None
    assert find_inconsistency(row['answer'], f'\\boxed{{{final}}}') is None
    assert find_wrong_answer(row['answer'], final.strip()) is None
  rows = read(data_dir / 'math' / 'math500_dev.jsonl')
  assert sum(find_unverifiable(row['problem']) is None for row in rows) > 0.97 * len(rows)
  assert sum(find_guess(row['solution'], row['answer']) is None for row in rows) > 0.97 * len(rows)
  open_ended = read(data_dir / 'sft' / 'self_instruct_user_oriented.jsonl')
  assert sum(find_unverifiable(row['instruction']) is not None for row in open_ended) > 60
