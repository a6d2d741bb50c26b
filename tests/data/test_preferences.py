"""Pairs of answers: their forms, their tokens, packing whole, and those that are generated."""

import json

import numpy as np
import pytest

from qwen3_jax.data import mixture, packing, preferences, tasks
from qwen3_jax.text import tokenizer as text

USER = {'role': 'user', 'content': 'Name a river.'}
SYSTEM = {'role': 'system', 'content': 'Be short.'}


def said(content, **more):
  return {'role': 'assistant', 'content': content, **more}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  source = preferences.read('pairs:size=60')
  texts = [m['content'] for i in range(60) for m in source[i]['chosen']['messages']]
  return text.train(texts + ['Name a river. Be short. The Nile Rhine system user assistant'] * 9,
                    400, tmp_path_factory.mktemp('tokenizer'))


@pytest.mark.parametrize('record', [
  {'prompt': 'Name a river.', 'chosen': 'Nile', 'rejected': 'Fish'},
  {'messages': [USER], 'chosen': said('Nile'), 'rejected': [said('Fish')]},
  {'prompt': [USER], 'chosen': [said('Nile')], 'rejected': 'Fish', 'margin': 0},
  {'chosen': [USER, said('Nile')], 'rejected': [USER, said('Fish')], 'margin': None}])
def test_forms_of_one_pair(record, tokenizer):
  pair = preferences.normalise_pair(record)
  tokens = preferences.encode_pair(tokenizer, pair)
  for rejected, answer in ((0, 'Nile'), (1, 'Fish')):
    side = tokens[tokens['rejected'] == rejected]
    assert tokenizer.decode(side['id'].tolist()) == (
      '<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'
      f'{answer}<|im_end|>')
    trained = tokenizer.decode(side['id'][side['weight'] > 0].tolist())
    assert trained == f'{answer}<|im_end|>'  # the closed think block belongs to the prompt


def test_only_the_last_answer_is_compared(tokenizer):
  history = [SYSTEM, USER, said('The Nile'), {'role': 'user', 'content': 'And now?'}]
  pair = preferences.normalise_pair({'chosen': [*history, said('Rhine')], 'margin': 2,
                                     'rejected': [*history, said('Be', reasoning_content='user')]})
  tokens = preferences.encode_pair(tokenizer, pair)
  trained = [tokenizer.decode(tokens['id'][(tokens['rejected'] == side) & (tokens['weight'] > 0)]
                              .tolist()) for side in (0, 1)]
  # One answer reasons, so both answer the same prompt, which leaves the think block to the model.
  assert trained == ['<think>\n\n</think>\n\nRhine<|im_end|>',
                     '<think>\nuser\n</think>\n\nBe<|im_end|>']
  assert set(tokens['margin']) == {2}


@pytest.mark.parametrize('record, reason', [
  ({'prompt': 'a', 'chosen': 'b'}, 'no pair: the record has no rejected'),
  ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, 'equal answers'),
  ({'prompt': 'a', 'messages': [USER], 'chosen': 'b', 'rejected': 'c'}, 'prompt given twice'),
  ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 'much'}, "bad margin: 'much'"),
  ({'prompt': 3, 'chosen': 'b', 'rejected': 'c'}, 'bad prompt: 3'),
  ({'chosen': 'b', 'rejected': 'c'}, 'no prompt'),
  ({'chosen': [USER, said('b')], 'rejected': [SYSTEM, USER, said('c')]}, 'no prompt'),
  ({'prompt': 'a', 'chosen': [USER], 'rejected': 'c'}, 'different prompts'),
  ({'prompt': [{'role': 'judge', 'content': 'a'}], 'chosen': 'b', 'rejected': 'c'}, 'unknown role'),
  ([1], 'not an object')])
def test_what_is_no_pair_is_refused_with_its_line(record, reason, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  good = json.dumps({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'})
  path.write_text(f'{good}\n\n{json.dumps(record)}\n')
  with pytest.raises(ValueError, match=f'pairs.jsonl, line 3: {reason}'):
    preferences.read(str(path))


def test_a_file_that_is_not_json(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text('{"prompt": "a"\n')
  with pytest.raises(ValueError, match='pairs.jsonl, line 1: not JSON'):
    preferences.read(str(path))
  path.write_text('\n')
  with pytest.raises(ValueError, match='there is no pair in it'):
    preferences.read(str(path))


def test_split_of_a_file_goes_by_the_question(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'q{i % 100}', 'chosen': f'{i}', 'rejected': 'c'})
                          + '\n' for i in range(300)))
  both = [preferences.read(str(path), split, heldout=0.2) for split in ('train', 'heldout')]
  asked = [{source[i]['chosen']['messages'][0]['content'] for i in range(len(source))}
           for source in both]
  assert sum(map(len, both)) == 300 and asked[0] & asked[1] == set() and len(asked[1]) > 5


def test_no_pair_is_split_and_too_long_ones_are_counted(tokenizer):
  """Every pair once an epoch, its two answers neighbours in a row, positions from 0 in each."""
  source = preferences.read('pairs:size=40,difficulty=1-2,kinds=add+sort')
  everything = preferences.Pairs(source, tokenizer, 10_000)
  length = int(np.median(everything.sizes)) * 2
  pairs = preferences.Pairs(source, tokenizer, int(np.quantile(everything.sizes, 0.9)))
  assert pairs.report['too_long'] == 40 - len(pairs) > 0
  pairs.reference = np.arange(pairs.report['trained_tokens'], dtype=np.float32)
  seen, references = [], []
  for batch in packing.fixed_batches(pairs, None, 2, length, 99, 0, keep_whole=4, whole=True,
                                     assemble=preferences.make_batch):
    for b, count in enumerate(batch['pair_BC'].sum(1).astype(int)):
      segment = batch['segment_BT'][b]
      assert set(segment) - {0} == set(range(1, 2 * count + 1))
      for k in range(1, count + 1):
        here = [segment == 2 * k - 1, segment == 2 * k]
        sides = [batch['tokens_BT'][b][where].tolist() for where in here]
        seen.append(sides)
        for where, side in zip(here, sides):
          assert batch['position_BT'][b][where].tolist() == list(range(len(side)))
      references += batch['reference_BT'][b][batch['weight_BT'][b] > 0].tolist()
  want = [[x['id'][x['rejected'] == side].tolist() for side in (0, 1)] for x in map(
    pairs.__getitem__, range(len(pairs)))]
  assert sorted(seen) == sorted(want)
  assert sorted(references) == list(range(pairs.report['trained_tokens']))


def test_loader_continues_exactly(tokenizer):
  pairs = preferences.Pairs(preferences.read('pairs:size=30,difficulty=1'), tokenizer, 600)

  def open_loader():
    return packing.Loader(mixture.mixture([(pairs, 1.0)], 0), None, 2, 600, 0, keep_whole=4,
                          whole=True, assemble=preferences.make_batch)
  loader = open_loader()
  for _ in range(3):
    next(loader)
  state, want = loader.state(), [next(loader) for _ in range(3)]
  loader.close()
  loader = open_loader()
  loader.restore(json.loads(json.dumps(state)))
  for batch in want:
    for name, array in next(loader).items():
      np.testing.assert_array_equal(array, batch[name])
  loader.close()


def test_generated_pairs_are_right_and_wrong_and_of_one_length(tokenizer):
  source = preferences.read('pairs:size=400', 'train')
  lengths = []
  for i in range(len(source)):
    answers = [source[i][side]['messages'][-1] for side in ('chosen', 'rejected')]
    texts = [f'{a["reasoning_content"]}\n{a["content"]}' for a in answers]
    assert [tasks.check(source.tasks.task(i), t) for t in texts] == [True, False]
    lengths.append(len(texts[0]) - len(texts[1]))
  assert not any(lengths)
  heldout = preferences.read('pairs:size=100', 'heldout')
  asked = [{s[i]['chosen']['messages'][0]['content'] for i in range(len(s))}
           for s in (source, heldout)]
  assert asked[0] & asked[1] == set()


def test_generated_pairs_with_a_bias_towards_length(tokenizer):
  pairs = preferences.Pairs(preferences.read('pairs:size=300,longer=0.8'), tokenizer, 10_000)
  longer = [np.sum(x['weight'] * np.where(x['rejected'], -1, 1)) > 0 for x in map(
    pairs.__getitem__, range(len(pairs)))]
  assert 0.7 < np.mean(longer) < 0.9
  for wrong in ('longer=2', 'longer=x', 'size=none'):
    with pytest.raises(ValueError, match='wanted'):
      preferences.read(f'pairs:{wrong}')
