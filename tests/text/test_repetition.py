"""Planted repetition is found; what repeats by nature passes."""

import gzip
import inspect
import json
import random
import textwrap

import pytest

from qwen3_jax.text import repetition
from qwen3_jax.text.repetition import find_repetition

PROSE = ('We first count the ways to seat the guests, and then divide by the symmetries of the '
         'table. Since no two guests are alike, each seating is counted once for every rotation. ')
CHINESE = ('我们先计算所有客人入座的方法，然后除以圆桌的对称数。因为没有两位客人相同，'
           '所以每一种入座方式在每次旋转时都会被计算一次。')


def numbered(n):
  return ' '.join(f'Then the {i}th part holds {i * 17 % 101} of {i * 31 % 97} items in box {i * 7}.'
                  for i in range(n))


@pytest.mark.parametrize('kind, text', [
  ('sentence eight times', numbered(4) + ' So the answer should be twelve after all.' * 8),
  ('paragraph three times', numbered(3) + ('\n\n' + PROSE * 2) * 3),
  ('Chinese paragraph three times', '\n'.join([CHINESE] * 3)),
  ('token loop cut off', numbered(3) + ' wait, no, that' * 40 + ' wait, n'),
  ('one word', numbered(3) + ' the' * 150),
  ('letters without spaces', 'The primes are: ' + 'NF' * 200),
  ('Chinese characters', CHINESE + '好的' * 80),
  ('symbols', numbered(2) + ' \\\\ &= 2 + 3 + 5 + x' * 12),
  ('lines with a counter', numbered(2) + ''.join(
    f'\nStep {i}: Let me check the result once more.' for i in range(20))),
  ('one sentence between others', ' '.join(
    f'{PROSE[:82]} {sentence}.' for sentence in numbered(9).split('.')[:9])),
])
def test_planted_repetition_is_found(kind, text):
  assert find_repetition(text), kind


def draw_poem():
  draw = random.Random(0)
  words = 'sea wind night hill road star river bird home rain light stone field song'.split()
  verse = lambda: '\n'.join(' '.join(draw.choices(words, k=6)) for _ in range(6))
  return '\n\n'.join(f'{verse()}\n\nO sing to the river,\nand sing to the sea,' for _ in range(6))


@pytest.mark.parametrize('kind, text', [
  ('prose', PROSE + numbered(1)),
  ('table', '| name | price | stock |\n| --- | --- | --- |\n' + ''.join(
    f'| item{i} | {i * 7 % 13}.00 | {i % 3} |\n' for i in range(40))),
  ('refrain', draw_poem()),
  ('digits', '1/7 = 0.' + '142857' * 40),
  ('division', '\n'.join(f'{i} * 17 = {i * 17}, {i * 17} - {i} = {i * 16}' for i in range(40))),
  ('matrix', '\\begin{pmatrix}' + ' \\\\ '.join(' & '.join('0' * 8) for _ in range(8))),
  ('list', '\n'.join(f'{i}. {word}' for i, word in enumerate(sorted(set(PROSE.split()))))),
  ('ruler', PROSE + '\n' + '-' * 200),
  ('code', textwrap.dedent(inspect.getsource(repetition))),
  ('empty', ''),
])
def test_what_repeats_by_nature_passes(kind, text):
  assert find_repetition(text) is None, kind


def test_reason_carries_the_measure():
  reason = find_repetition(numbered(3) + (' ' + PROSE) * 5 + numbered(1))
  assert 'passage 5 times' in reason and '%' in reason
  assert '20 lines' in find_repetition('\n'.join(f'Now let me look at {i}' for i in range(20)))


def test_compression_alone_finds_what_has_no_common_run():
  draw = random.Random(1)
  text = ' '.join(draw.choice(('the cat', 'the dog', 'the cow')) for _ in range(1500))
  assert 'compresses to' in find_repetition(text, share=2)
  assert find_repetition(text, share=2, ratio=0.01) is None


def read(path, field):
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
    return [field(json.loads(line)) for line in file.read().split('\n') if line]


@pytest.mark.parametrize('name, field', [
  ('gsm8k/test_dev_first250.jsonl', lambda row: row['answer']),
  ('math/math500_dev.jsonl', lambda row: row['solution']),
  ('mbpp/test_dev.jsonl', lambda row: row['code']),
  ('sft/glaive_toolcall_zh.jsonl.gz', lambda row: row['conversations'][-1]['value'])])
def test_false_alarms_on_real_text_are_below_one_percent(data_dir, name, field):
  texts = read(data_dir / name, field)
  hits = [reason for text in texts if (reason := find_repetition(text))]
  assert len(hits) < 0.01 * len(texts), hits
  looped = [f'{text}\n' * 9 for text in texts if len(text.split()) > 20]
  assert sum(find_repetition(text) is not None for text in looped) >= 0.98 * len(looped)
