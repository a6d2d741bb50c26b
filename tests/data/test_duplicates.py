"""Exact and near duplicates against exact similarities, in one stream and resumed."""

import json
import random

import pytest

from qwen3_jax.data import duplicates
from qwen3_jax.data.duplicates import Deduplicator, jaccard, shingle


def words(n, draw):
  return ' '.join(f'{draw.choice("bcdfgklmnprst")}{draw.choice("aeiou")}{draw.randrange(1000)}'
                  for _ in range(n))


def change(text, share, draw):
  """The text with its last `share` of words replaced."""
  parts = text.split()
  count = round(share * len(parts))
  return ' '.join(parts[:len(parts) - count] + words(count, draw).split())


def test_exact_duplicates_differ_in_case_space_and_punctuation_only():
  keeper = Deduplicator()
  assert keeper.check('a', 'The cat, sat on the mat.') is None
  assert keeper.check('b', 'the  cat sat\non the MAT') == ('exact', 'a', 1.0)
  assert keeper.check('c', 'Is 3 + 4 = 7 or 3 - 4 = 7, he asked them?') is None
  assert keeper.check('d', 'Is 3 - 4 = 7 or 3 + 4 = 7, he asked them?') is None
  assert len(keeper) == 3


def test_text_without_words_passes():
  keeper = Deduplicator()
  assert keeper.check(1, '') is None and keeper.check(2, '...') is None and len(keeper) == 0


def test_similarity_of_sets():
  assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
  assert jaccard(set(), set()) == 1.0
  assert shingle('a b c d e f') == {'a b c d e', 'b c d e f'}
  assert shingle('One two') == {'one two'}
  assert shingle('今天天气很好') == {'今 天 天 气 很', '天 天 气 很 好'}


@pytest.mark.parametrize('language', ['words', 'characters'])
def test_near_duplicates_are_found_and_others_pass(language):
  draw = random.Random(1)
  keeper = Deduplicator(0.8)
  base = []
  for i in range(200):
    text = (words(100, draw) if language == 'words'
            else ''.join(chr(draw.randrange(0x4e00, 0x9f00)) for _ in range(100)))
    base.append(text)
    assert keeper.check(i, text) is None
  for i, text in enumerate(base):
    if language == 'words':
      near, far = change(text, 0.05, draw), change(text, 0.4, draw)
    else:
      near, far = text[:97], text[:60] + base[i - 1][:40]
    kind, name, similarity = keeper.check('near', near)
    exact = jaccard(shingle(text), shingle(near))
    assert (kind, name) == ('near', i)
    assert abs(similarity - exact) < 5 * (exact * (1 - exact) / 128) ** 0.5
    assert keeper.find(far) is None
  assert len(keeper) == 200


def test_resumed_stream_gives_the_same_verdicts(tmp_path):
  draw = random.Random(2)
  texts = []
  for _ in range(5000):
    old = texts[draw.randrange(len(texts))] if texts and draw.random() < 0.3 else None
    texts.append(change(old, draw.choice((0, 0.02, 0.1, 0.5)), draw) if old else words(20, draw))
  whole = Deduplicator()
  verdicts = [whole.check(f'id{i}', text) for i, text in enumerate(texts)]
  assert len({verdict[0] for verdict in verdicts if verdict}) == 2
  assert whole.runs  # some keys are in sorted arrays, some are not
  first = Deduplicator()
  resumed = [first.check(f'id{i}', text) for i, text in enumerate(texts[:3000])]
  first.save(tmp_path / 'seen.npz')
  second = Deduplicator.load(tmp_path / 'seen.npz')
  resumed += [second.check(f'id{i}', text) for i, text in enumerate(texts[3000:], 3000)]
  assert resumed == verdicts


def test_memory_a_text_is_bounded():
  draw = random.Random(3)
  keeper = Deduplicator()
  for i in range(4096):
    keeper.check(i, words(12, draw))
  held = sum(keys.nbytes + places.nbytes for keys, places in keeper.runs)
  assert not keeper.recent
  assert held + 2 * duplicates.SLOTS * len(keeper) <= 550 * len(keeper)


def test_threshold_out_of_range_is_refused():
  with pytest.raises(ValueError, match='got 80'):
    Deduplicator(80)


def test_real_questions_with_changed_words(data_dir):
  lines = (data_dir / 'gsm8k' / 'test_dev_first250.jsonl').read_text('utf-8').split('\n')
  questions = [json.loads(line)['question'] for line in lines if line]
  keeper = Deduplicator()
  assert [keeper.check(i, question) for i, question in enumerate(questions)] == [None] * 250
  hits = 0
  for i, question in enumerate(questions):
    parts = question.split()
    parts[-1] = 'now?'
    exact = jaccard(shingle(question), shingle(' '.join(parts)))
    found = keeper.find(' '.join(parts))
    hits += found is not None and found[1] == i
    assert found is not None or exact < 0.9
  assert hits > 240
