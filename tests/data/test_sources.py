"""Documents come back exactly; bad data stops with its file, line and remedy."""

import gzip
import json
import os

import numpy as np
import pytest

from qwen3_jax.data import sources

TEXTS = ['one', 'two\u2028still two\u0085\x0b', 'drei ä 三 🙂', '{"text": 4}\n', ' 5\n\nparts '] * 3


@pytest.fixture
def open_in(tmp_path):
  return lambda spec, *args, **options: sources.open_source(
    os.fspath(spec), *args, cache=tmp_path / 'cache', **options)


def jsonl(texts=TEXTS):
  lines = [json.dumps({'id': i, 'text': t}, ensure_ascii=i % 2) for i, t in enumerate(texts)]
  return '\n'.join(lines).encode() + b'\n\n'


def everything(source):
  return [source[i] for i in range(len(source))]


def test_jsonl_and_its_archives_are_the_same_documents(tmp_path, open_in):
  zstandard = pytest.importorskip('zstandard')
  (tmp_path / 'a.jsonl').write_bytes(jsonl())
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(jsonl()[:50]) + gzip.compress(jsonl()[50:]))
  pack = zstandard.ZstdCompressor().compress
  (tmp_path / 'c.jsonl.zst').write_bytes(pack(jsonl()[:50]) + pack(jsonl()[50:]))
  for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst'):
    for _ in range(2):  # the second time from the cache
      source = open_in(tmp_path / name)
      assert everything(source) == TEXTS
      assert source.sizes.tolist() == [len(t.encode()) for t in TEXTS]
  both = open_in(tmp_path / '[ab].json*')
  assert everything(both) == TEXTS + TEXTS
  with pytest.raises(IndexError):
    both[len(both)]


def test_index_is_kept_and_a_changed_file_read_again(tmp_path, open_in, monkeypatch):
  monkeypatch.setattr(sources, 'INDEX_BYTES', 0)
  path = tmp_path / 'a.jsonl'
  path.write_bytes(jsonl())
  assert everything(open_in(path)) == TEXTS
  assert len(list((tmp_path / 'cache').rglob('index.npz'))) == 1
  assert everything(open_in(path)) == TEXTS
  path.write_bytes(jsonl(TEXTS[::-1]))
  assert everything(open_in(path)) == TEXTS[::-1]
  assert not list((tmp_path / 'cache').rglob('*.tmp'))


def test_array_record(tmp_path, open_in):
  module = pytest.importorskip('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(os.fspath(tmp_path / 'a.array_record'), 'group_size:1')
  for text in TEXTS:
    writer.write(text.encode())
  writer.close()
  assert everything(open_in(tmp_path / 'a.array_record')) == TEXTS
  (tmp_path / 'b.array_record').write_bytes(b'not records' * 1000)
  with pytest.raises(ValueError, match='b.array_record: not an ArrayRecord file'):
    open_in(tmp_path / 'b.array_record')


def test_parquet(tmp_path, open_in):
  arrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  parquet.write_table(arrow.table({'id': range(len(TEXTS)), 'text': TEXTS}), tmp_path / 'a.parquet')
  assert everything(open_in(tmp_path / 'a.parquet')) == TEXTS
  parquet.write_table(arrow.table({'body': TEXTS}), tmp_path / 'b.parquet')
  with pytest.raises(ValueError, match="b.parquet: no column 'text'.*body"):
    open_in(tmp_path / 'b.parquet')
  parquet.write_table(arrow.table({'text': ['a', None]}), tmp_path / 'c.parquet')
  with pytest.raises(ValueError, match='c.parquet, row 2: no text'):
    open_in(tmp_path / 'c.parquet')
  (tmp_path / 'd.parquet').write_bytes(b'PAR1')
  with pytest.raises(ValueError, match='d.parquet: not a Parquet file'):
    open_in(tmp_path / 'd.parquet')
  assert not list((tmp_path / 'cache').rglob('*.tmp'))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, open_in, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
  (tmp_path / 'a.parquet').write_bytes(b'PAR1')
  with pytest.raises(ValueError, match='pip install pyarrow'):
    open_in(tmp_path / 'a.parquet')


def test_text_files(tmp_path, open_in):
  (tmp_path / 'sub').mkdir()
  (tmp_path / '.git').mkdir()
  for name, text in (('b.txt', 'second ü'), ('sub/a.md', 'third'), ('a.txt', '\ufefffirst\n'),
                     ('empty.txt', ''), ('.git/x', 'hidden'), ('.hidden', 'hidden')):
    (tmp_path / name).write_text(text, encoding='utf-8')
  (tmp_path / 'c.txt.gz').write_bytes(gzip.compress(b'packed'))
  source = open_in(tmp_path)
  assert everything(source) == ['first', 'second ü', 'packed', 'third']
  assert source.groups[0] == source.groups[1] != source.groups[3]
  assert everything(open_in(tmp_path / '**/*.md')) == ['third']


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, open_in):
  text = '\n\n'.join(f'paragraph {i} ä ' * 40 for i in range(2000)) + '\n' + 'no blank\n' * 60_000
  (tmp_path / 'book.txt').write_text(text, encoding='utf-8')
  source = open_in(tmp_path / 'book.txt')
  assert len(source) > 8 and source.sizes.max() <= 2.1 * sources.TEXT_BYTES
  assert ''.join(everything(source)).replace('\n', '') == text.replace('\n', '')
  assert all(source[i].startswith('paragraph') for i in range(3))


@pytest.mark.parametrize('name, data, message', [
  ('a.jsonl', b'{"text": "fine"}\n{"text": "caf\xe9"}\n', 'a.jsonl, line 2: not UTF-8.*0xe9'),
  ('a.jsonl', b'{"text": "fine"}\n\n{"text": \n', 'a.jsonl, line 3: not JSON'),
  ('a.jsonl', b'{"text": "fine"}\n{"body": "x"}\n', 'a.jsonl, line 2: the record has no text'),
  ('a.jsonl', b'{"text": 3}\n', 'a.jsonl, line 1: the record has no text'),
  ('a.jsonl', b'{"text": "  "}\n', 'a.jsonl, line 1: the record has no text'),
  ('a.jsonl', b'["text"]\n', 'a.jsonl, line 1: the record has no text'),
  ('a.jsonl', b'{"text": "\\ud800"}\n', 'a.jsonl, line 1: the text has a lone surrogate'),
  ('a.jsonl', b'', 'a.jsonl: the file is empty'),
  ('a.jsonl', b'\n \n', 'a.jsonl: the file is empty'),
  ('a.txt', b'fine\ncaf\xe9\n', 'a.txt, line 2: not UTF-8.*column 4.*convert'),
  ('a.txt', b' \n', 'a.txt: there is no text'),
  ('a.jsonl.gz', gzip.compress(jsonl())[:-20], 'a.jsonl.gz: damaged or incomplete'),
  ('a.jsonl.gz', jsonl(), 'a.jsonl.gz: damaged or incomplete'),
])
def test_bad_data(tmp_path, open_in, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message):
    open_in(tmp_path / name)
  assert not list((tmp_path / 'cache').rglob('*.tmp'))


def test_truncated_zst(tmp_path, open_in):
  zstandard = pytest.importorskip('zstandard')
  whole = zstandard.ZstdCompressor().compress(jsonl() * 1000)
  for data in (whole[:-5], whole[:3], jsonl()):
    (tmp_path / 'a.jsonl.zst').write_bytes(data)
    with pytest.raises(ValueError, match='a.jsonl.zst: damaged or incomplete'):
      open_in(tmp_path / 'a.jsonl.zst')


def test_missing_and_misspelt(tmp_path, open_in):
  with pytest.raises(FileNotFoundError, match='none.jsonl'):
    open_in(tmp_path / 'none.jsonl')
  with pytest.raises(FileNotFoundError, match='pattern'):
    open_in(tmp_path / '*.jsonl')
  with pytest.raises(ValueError, match='stdlib:prose'):
    open_in('stdlib:poetry')
  with pytest.raises(ValueError, match='test'):
    open_in('stdlib', 'test')


def test_full_disk_names_the_cache(tmp_path):
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(jsonl()))
  (tmp_path / 'cache').write_text('a file where the folder should be')
  with pytest.raises(OSError, match='QWEN3_JAX_CACHE'):
    sources.open_source(os.fspath(tmp_path / 'a.jsonl.gz'), cache=tmp_path / 'cache')


def test_split_by_content_does_not_depend_on_order(tmp_path, open_in):
  texts = [f'document {i}' for i in range(3000)]
  (tmp_path / 'a.jsonl').write_bytes(jsonl(texts))
  (tmp_path / 'b.jsonl').write_bytes(jsonl(texts[::-1] + ['more']))
  train, held = (everything(open_in(tmp_path / 'a.jsonl', s)) for s in ('train', 'heldout'))
  assert sorted(train + held) == sorted(texts) and 15 < len(held) < 50
  assert set(everything(open_in(tmp_path / 'b.jsonl', 'heldout'))) - {'more'} == set(held)
  assert len(open_in(tmp_path / 'a.jsonl', 'heldout', heldout=0.5)) > 1000
  with pytest.raises(ValueError, match='3000 documents falls into the heldout part'):
    open_in(tmp_path / 'a.jsonl', 'heldout', heldout=0.0)


def test_standard_library():
  whole, code, prose = (sources.open_source(s) for s in ('stdlib', 'stdlib:code', 'stdlib:prose'))
  assert len(whole) == len(code) + len(prose) and len(code) > 300 and len(prose) > 200
  assert len(set(code.hashes.tolist())) == len(code)
  assert len(set(everything(prose))) == len(prose)
  assert any('def dedent(text)' in text for text in everything(code))
  english = next(t for t in everything(prose) if 'Remove any common leading whitespace' in t)
  assert 'def dedent' not in english and len(english.split()) > 100
  train, held = (sources.open_source('stdlib', s) for s in ('train', 'heldout'))
  assert not set(train.hashes.tolist()) & set(held.hashes.tolist())
  assert len(train) + len(held) == len(whole) and 0.005 < len(held) / len(whole) < 0.04
  np.testing.assert_array_equal(sources.open_source('stdlib', 'heldout').hashes, held.hashes)
