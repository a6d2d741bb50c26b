"""Both kinds of tokenizer: oracle ids and texts, and the properties that training must keep."""

import argparse
import gzip
import json
import pickle
import random
import tracemalloc
import unicodedata

import pytest
import sentencepiece
import tokenizers

from qwen3_jax.commands import tokenizer as command
from qwen3_jax.text import tokenizer as text_tokenizer
from qwen3_jax.text.tokenizer import CONTROL, SPECIAL, Tokenizer, train

TEXTS = [
  'def add(first, second):\n    """The sum of two numbers."""\n    return first + second\n\n' * 30,
  'The cat sat on the mat; 12 cats sat on 345 mats.\n\tTabs\tand    runs   of spaces. ' * 30,
  'Habari ya asubuhi? 你好，世界。 Привет, мир! مرحبا 🙂👩‍👩‍👧 é e\u0301 ' * 10,
]
PARTS = (
  *CONTROL, 'a', 'the cat', ' ', '  ', '     ', '\n', '\n\n', '\t', '\r\n', '\x00', '\x7f',
  '\xa0', '\u3000', '\u2581', '\u2585', '\ufeff', '\ufffd', 'é', 'e\u0301', '你好', '🙂', '👩‍👩‍👧',
  '\U0010ffff', '0', '42', '<0x0A>', '<unk>', '<s>', '<', '|', '>', '<|im_', 'im_end|>', 'think>',
  '/think>', "'ll", '...', '__init__',
)


def make_text(draw):
  parts = draw.choices(PARTS, k=draw.randint(0, 12))
  codes = [draw.choice((draw.randrange(0xd800), draw.randrange(0xe000, 0x110000)))
           for _ in range(draw.randint(0, 3))]
  parts += map(chr, codes)
  draw.shuffle(parts)
  return ''.join(parts)


def make_byte_level(folder):
  """A small byte-level BPE in Qwen's layout, as transformers would leave it in a checkpoint."""
  coder = tokenizers.Tokenizer(tokenizers.models.BPE())
  coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  coder.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  coder.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=alphabet, show_progress=False))
  coder.add_tokens([tokenizers.AddedToken(name, special=name in SPECIAL, normalized=False)
                    for name in CONTROL])
  folder.mkdir()
  coder.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text('{}')
  return Tokenizer(folder)


@pytest.fixture(scope='module', params=['sentencepiece', 'byte-level'])
def tokenizer(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer') / 'it'
  return train(TEXTS, 512, folder) if request.param == 'sentencepiece' else make_byte_level(folder)


@pytest.fixture(scope='module')
def qwen(golden):
  return Tokenizer(golden / 'tokenizer')


def read_rows(file):
  return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]


def stream(tokenizer, ids):
  decoder = tokenizer.stream()
  return [decoder.push(id) for id in ids] + [decoder.flush()]


def test_ids_equal_goldens(qwen, golden):
  rows = read_rows(golden / 'tokenizer' / 'encode_goldens.jsonl')
  rows += read_rows(golden / 'tokenizer' / 'llama_cpp_pairs.jsonl')
  assert len(rows) > 200
  for row in rows:
    assert qwen.encode(row['text']) == row['ids'], row['text']


def test_texts_equal_goldens(qwen, golden):
  rows = read_rows(golden / 'tokenizer' / 'encode_goldens.jsonl')
  rows += read_rows(golden / 'tokenizer' / 'decode_goldens.jsonl')
  assert len(rows) > 200
  for row in rows:
    assert qwen.decode(row['ids']) == row['decoded'], row['ids']
    assert qwen.decode(row['ids'], skip_special=True) == row['decoded_skip_special'], row['ids']
    assert ''.join(stream(qwen, row['ids'])) == row['decoded'], row['ids']


def test_qwen_ids(qwen):
  assert qwen.size == 151_669
  assert (qwen.eod_id, qwen.stop_ids) == (151_643, (151_645, 151_643))
  assert [qwen.id(name) for name in CONTROL] == list(range(151_643, 151_669))
  with pytest.raises(ValueError, match='id 151669 is outside the 151669 ids'):
    qwen.decode([151_669])


def test_qwen_hostile_text_has_no_control_ids(qwen, golden):
  for row in read_rows(golden / 'tokenizer' / 'encode_goldens.jsonl'):
    ids = qwen.encode(row['text'], special=False)
    assert max(ids, default=0) < 151_643
    assert qwen.decode(ids) == unicodedata.normalize('NFC', row['text'])
    if max(row['ids'], default=0) < 151_643:
      assert ids == row['ids']


def test_any_text_comes_back(tokenizer):
  draw = random.Random(0)
  for text in [*TEXTS, *PARTS, *(make_text(draw) for _ in range(1000))]:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < tokenizer.size for id in ids)


def test_hostile_text_has_no_control_ids(tokenizer):
  draw, control = random.Random(1), {tokenizer.id(name) for name in CONTROL}
  for text in [*CONTROL, ''.join(CONTROL), *(make_text(draw) for _ in range(1000))]:
    ids = tokenizer.encode(text, special=False)
    assert not control & set(ids)
    assert tokenizer.decode(ids) == text
    if not any(name in text for name in CONTROL):
      assert ids == tokenizer.encode(text)


def test_control_tokens_are_single_ids(tokenizer):
  for name in CONTROL:
    assert tokenizer.encode(name) == [tokenizer.id(name)]
    inside = tokenizer.encode(f'cat{name}cat')
    assert inside == tokenizer.encode('cat') + [tokenizer.id(name)] + tokenizer.encode('cat')
  assert tokenizer.eod_id == tokenizer.id('<|endoftext|>')
  assert tokenizer.stop_ids == (tokenizer.id('<|im_end|>'), tokenizer.eod_id)


def test_skip_special_keeps_think_and_tool_tags(tokenizer):
  ids = tokenizer.encode('a'.join(CONTROL))
  kept = 'a' * 14 + ('<tool_call>a</tool_call>a<|fim_prefix|>a<|fim_middle|>a<|fim_suffix|>a'
                     '<|fim_pad|>a<|repo_name|>a<|file_sep|>a<tool_response>a</tool_response>a'
                     '<think>a</think>')
  assert tokenizer.decode(ids) == 'a'.join(CONTROL)
  assert tokenizer.decode(ids, skip_special=True) == kept


def test_stream_never_splits_a_character(tokenizer):
  draw = random.Random(2)
  for _ in range(300):
    text = make_text(draw).replace('\ufffd', '')
    parts = stream(tokenizer, tokenizer.encode(text))
    assert ''.join(parts) == text
    assert '\ufffd' not in ''.join(parts)


def test_stream_equals_decode_of_random_ids(tokenizer):
  draw = random.Random(3)
  for _ in range(1000):
    ids = [draw.randrange(tokenizer.size) for _ in range(draw.randint(0, 20))]
    assert ''.join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_emits_as_soon_as_a_character_is_whole(tokenizer):
  ids = tokenizer.encode('\U000a1234')  # no text had it: four bytes
  assert len(ids) == 4
  assert stream(tokenizer, ids) == ['', '', '', '\U000a1234', '']
  assert stream(tokenizer, ids[:2]) == ['', '', '\ufffd']


def test_unknown_ids_and_tokens_are_refused(tokenizer):
  for id in (-1, tokenizer.size):
    with pytest.raises(ValueError, match=f'id {id} is outside'):
      tokenizer.decode([id])
    with pytest.raises(ValueError, match=f'id {id} is outside'):
      tokenizer.stream().push(id)
  with pytest.raises(ValueError, match="no token '<nothing>'"):
    tokenizer.id('<nothing>')


@pytest.mark.parametrize('text', [None, 3, b'bytes', 'half \ud83d'])
def test_text_that_is_not_unicode_is_refused(tokenizer, text):
  for special in (True, False):
    with pytest.raises(ValueError, match='wanted a string of Unicode'):
      tokenizer.encode(text, special)


def test_saved_copy_is_the_same(tokenizer, tmp_path):
  text = 'The cat <think>1234</think> é 🙂'
  tokenizer.save(tmp_path / 'a')
  tokenizer.save(tokenizer.file.parent)  # onto itself
  copy = Tokenizer(tmp_path / 'a')
  assert copy.encode(text) == tokenizer.encode(text)
  assert copy.file.read_bytes() == tokenizer.file.read_bytes()
  assert {file.name for file in copy.file.parent.iterdir()} == {
    file.name for file in tokenizer.file.parent.iterdir()}
  assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_trained_layout(tmp_path):
  trained = train(TEXTS, 500, tmp_path)
  assert trained.size == 500
  assert [trained.id(name) for name in CONTROL] == list(range(26))
  assert [trained.piece(26 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
  assert len(trained.encode('2026')) == 4
  pieces = [trained.piece(id) for id in range(500)]
  assert not [piece for piece in pieces if len(piece) > 1 and set(piece) & set(b'0123456789')]
  assert [piece for piece in pieces[282:] if b'\n' in piece and len(piece) > 1]  # lines are learned
  assert [piece for piece in pieces if piece == b' ' * 4]


def test_trained_model_means_the_same_to_its_library(tmp_path):
  trained = train(TEXTS, 512, tmp_path)
  library = sentencepiece.SentencePieceProcessor(model_file=str(trained.file))
  draw = random.Random(4)
  for _ in range(500):
    text = make_text(draw).replace('\u2581', '').replace('\u2585', '')
    ids = trained.encode(text)
    assert ids == library.encode(text)
    assert trained.decode(ids) == library.decode(ids)


def test_training_is_deterministic(tmp_path):
  texts = [f'{text} {n}' for n in range(40) for text in TEXTS]
  for limit in (100_000, 20):  # all, and a sample
    one = train(texts, 450, tmp_path / 'one', limit)
    two = train(iter(texts), 450, tmp_path / 'two', limit)
    assert one.file.read_bytes() == two.file.read_bytes()
  assert [file.name for file in (tmp_path / 'one').iterdir()] == ['tokenizer.model']


def test_sample_keeps_all_or_a_bounded_part():
  texts = [*TEXTS, 'x' * 5000, '\n' * 4500, '']
  assert ''.join(text_tokenizer._sample(texts, 1000)) == ''.join(texts)
  numbers = [int(text) for text in text_tokenizer._sample(map(str, range(20_000)), 2000)]
  assert len(set(numbers)) == 2000
  assert abs(sum(numbers) / 2000 - 10_000) < 500  # four standard errors of a uniform sample


def test_sampling_memory_is_bounded():
  tracemalloc.start()
  text_tokenizer._sample(('line of text\n' * 10_000 for _ in range(100)), 50)  # 13 MB
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2e6


@pytest.mark.parametrize('texts, size, complaint', [
  (TEXTS, 100_000, 'vocabulary of 100000 is too large for this text'),
  (iter(TEXTS), 20, 'vocabulary of 20 is too small: .* need [0-9]{3}$'),
  (TEXTS, 0, 'vocabulary of 0'),
  (TEXTS, -5, 'could not train -5 ids'),
  ([], 400, 'no text'),
  (['', ''], 400, 'no text'),
  ('a text', 400, 'one string'),
])
def test_size_that_does_not_suit_is_refused(texts, size, complaint, tmp_path):
  with pytest.raises(ValueError, match=complaint):
    train(texts, size, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_smallest_size_named_by_the_error_works(tmp_path):
  with pytest.raises(ValueError) as caught:
    train(TEXTS, 20, tmp_path)
  smallest = int(str(caught.value).split()[-1])
  assert train(TEXTS, smallest, tmp_path).size == smallest


def test_folder_without_tokenizer_says_what_to_put_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='does not exist: put a tokenizer.json'):
    Tokenizer(tmp_path / 'absent')
  with pytest.raises(FileNotFoundError, match='holds nothing'):
    Tokenizer(tmp_path)
  (tmp_path / 'vocab.json').write_text('{}')
  (tmp_path / 'merges.txt').write_text('')
  with pytest.raises(FileNotFoundError, match='take tokenizer.json from the same checkpoint'):
    Tokenizer(tmp_path)


@pytest.mark.parametrize('name, content, complaint', [
  ('tokenizer.json', '{"version": "1.0"', 'tokenizer.json is not a usable tokenizer'),
  ('tokenizer.json', 'version https://git-lfs.github.com/spec/v1', 'not a usable tokenizer'),
  ('tokenizer.model', 'junk', 'tokenizer.model is not a usable tokenizer'),
  ('tokenizer.txt', 'junk', 'wanted tokenizer.json or SentencePiece'),
])
def test_broken_file_is_refused(name, content, complaint, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=complaint):
    Tokenizer(tmp_path / name)


def test_foreign_tokenizers_are_refused(tmp_path):
  (tmp_path / 'corpus.txt').write_text('\n'.join(TEXTS))
  for name, flags, complaint in (
      ('a', {'vocab_size': 100}, 'no byte pieces'),
      ('b', {'vocab_size': 400, 'byte_fallback': True}, 'does not keep whitespace'),
      ('c', {'vocab_size': 400, 'byte_fallback': True, 'add_dummy_prefix': False,
             'remove_extra_whitespaces': False, 'normalization_rule_name': 'identity'},
       "no token '<.endoftext.>'")):
    sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / 'corpus.txt'), model_prefix=str(tmp_path / name), model_type='bpe',
      minloglevel=2, **flags)
    with pytest.raises(ValueError, match=complaint):
      Tokenizer(tmp_path / f'{name}.model')
  tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match='wanted a ByteLevel decoder'):
    Tokenizer(tmp_path)


def run_command(*arguments):
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  command.main(parser.parse_args([str(argument) for argument in arguments]))


def test_command_trains_and_shows(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('QWEN3_JAX_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'a.txt').write_text(TEXTS[0])
  with gzip.open(tmp_path / 'b.jsonl.gz', 'wt') as file:
    file.writelines(json.dumps({'text': text}) + '\n' for text in TEXTS[1:])
  run_command('--train', tmp_path / 'a.txt', tmp_path / 'b.jsonl.gz', '--size', 450,
              '--to', tmp_path / 'to')
  assert 'trained 450 ids' in capsys.readouterr().out
  wanted = train([TEXTS[0].strip('\n'), *TEXTS[1:]], 450, tmp_path / 'wanted')
  assert (tmp_path / 'to' / 'tokenizer.model').read_bytes() == wanted.file.read_bytes()
  run_command('--show', 'cat\n<think>\U000a1234', '--from', tmp_path / 'to')
  shown = capsys.readouterr().out
  assert "24 '<think>'" in shown and r"'\n'" in shown and r"b'\xf2'" in shown
  assert 'for 15 bytes' in shown


def test_command_trains_on_the_standard_library(tmp_path, capsys):
  run_command('--train', '--limit', 200, '--size', 600, '--to', tmp_path, '--show', 'self')
  assert "'self'\n1 ids for 4 bytes" in capsys.readouterr().out
  assert Tokenizer(tmp_path).size == 600


@pytest.mark.parametrize('name, content, complaint', [
  ('a.txt', b'caf\xe9', 'a.txt.* not UTF-8'),
  ('a.jsonl', b'{"body": "x"}', 'a.jsonl.* no text'),
  ('a.txt', b'', 'a.txt.* no text'),
])
def test_command_names_the_bad_file(name, content, complaint, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=complaint):
    run_command('--train', tmp_path / name, '--size', 400, '--to', tmp_path / 'to')
  assert not (tmp_path / 'to').exists()


@pytest.mark.parametrize('arguments', [(), ('--train', '--size', '400'), ('--show', 'x')])
def test_command_says_what_is_missing(arguments):
  with pytest.raises(ValueError, match='--to DIR|--from DIR'):
    run_command(*arguments)
