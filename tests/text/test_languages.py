"""Mixed languages are found by script and by paragraph; code, formulas and quotations pass."""

import gzip
import json

import pytest

from qwen3_jax.text.languages import find_languages, find_mixing, identify

ENGLISH = ('We are asked for the number of ways in which the guests can be seated at the table. '
           'Since nobody has a fixed place, we may turn the table until the first one sits north.')
FRENCH = ('Il faut maintenant trouver combien de façons il y a de placer les invités autour de la '
          'table, sans oublier que deux rotations de la même disposition ne comptent que une fois.')
CHINESE = '我们先计算所有客人入座的方法，然后除以圆桌的对称数，因为没有两位客人是相同的。'
RUSSIAN = ('Сначала найдём число способов рассадить гостей за столом, а затем разделим на число '
           'поворотов, потому что два поворота одной рассадки считаются одинаковыми.')


@pytest.mark.parametrize('text, named', [
  (f'{ENGLISH} 所以 the answer is 24.', 'Chinese'),
  (f'{ENGLISH}\n\n{CHINESE}\n\n{ENGLISH}', 'Chinese'),
  (f'{ENGLISH} Так как это верно, we are done.', 'Cyrillic'),
  (f'{CHINESE}\n\n{ENGLISH}', 'Latin'),
  (f'{ENGLISH}\n\n{FRENCH}\n\n{ENGLISH}', 'fr'),
  (f'{RUSSIAN}\n\n{RUSSIAN}\n\n{ENGLISH}', 'Latin'),
])
def test_mixing_is_found(text, named):
  assert named in find_mixing(text)


@pytest.mark.parametrize('text', [
  ENGLISH, FRENCH, CHINESE, RUSSIAN, '', '42', f'{ENGLISH}\n\n{ENGLISH}',
  f'{ENGLISH} The word "你好" means hello, and 孙 is a name (Sun, 孙子).',
  f'{CHINESE}这里的 Python 函数 sorted(list) 由 Guido van Rossum 编写，Transformer 模型也用它。',
  f'{CHINESE}\n```python\n# this line is about the guests who are at the table\nx = 1\n```',
  f'{ENGLISH} Let $\\text{{甲}} = \\alpha + \\beta$ and see https://例子.中国/页 for `变量`.',
  f'{CHINESE}\n\\begin{{align*}} a &= b \\text{{ which we know from the first of the lines}} '
  '\\end{align*}',
  'def f(x):\n    """Returns the largest of the numbers that are in x."""\n    return max(x)\n',
])
def test_one_language_with_names_code_and_formulas_passes(text):
  assert find_mixing(text) is None


def test_expected_language_is_demanded_and_further_ones_allowed():
  assert find_mixing(ENGLISH, expected='en') is None
  assert find_mixing(FRENCH, expected='fr') is None
  assert 'fr' in find_mixing(FRENCH, expected='en')
  assert 'Chinese' in find_mixing(CHINESE, expected='en')
  assert 'Japanese' in find_mixing(f'{CHINESE}それでは次に、これを計算します。', expected='zh')
  assert find_mixing(f'{ENGLISH}\n\n{CHINESE}', expected='en', allowed={'zh'}) is None
  assert find_mixing(f'{ENGLISH}\n\n{FRENCH}', expected={'en', 'fr'}) is None


def test_languages_of_a_question():
  assert find_languages(ENGLISH) == {'en'}
  asked = 'Please translate this into English: 我们先计算所有客人入座的方法，然后除以对称数。'
  assert find_languages(f'{asked}\n{ENGLISH}') == {'en', 'zh'}


def test_reason_carries_the_measure_and_the_place():
  reason = find_mixing(f'{ENGLISH}\n\n{FRENCH}\n\n{ENGLISH}\n\n{ENGLISH}')
  assert '%' in reason and 'Il faut maintenant' in reason
  assert '所以' in find_mixing(f'{ENGLISH} 所以 yes.')


def test_identify():
  assert identify(ENGLISH)[0] == 'en' and identify(FRENCH)[0] == 'fr'


def test_false_alarms_on_real_answers_are_below_one_percent(data_dir):
  path = data_dir / 'gsm8k' / 'test_dev_first250.jsonl'
  texts = [json.loads(line)['answer'] for line in path.read_text('utf-8').split('\n') if line]
  assert not [text for text in texts if find_mixing(text)]
  said = wrong = 0
  with gzip.open(data_dir / 'sft' / 'glaive_toolcall_zh.jsonl.gz', 'rt', encoding='utf-8') as file:
    for line in file.read().split('\n')[:100]:
      asked = ''
      for turn in json.loads(line)['conversations']:
        asked += turn['value'] + '\n' if turn['from'] == 'human' else ''
        if turn['from'] == 'gpt':
          said += 1
          wrong += find_mixing(turn['value'], allowed=find_languages(asked)) is not None
  assert said > 200 and wrong < 0.01 * said
