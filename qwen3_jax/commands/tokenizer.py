"""Trains a SentencePiece tokenizer on text, or shows how one splits a text.

Files are UTF-8 text or JSON lines with a `text` field (.jsonl), either gzipped (.gz). With no file
it trains on the embedded corpus, the Python standard library of this machine.

Examples:
  python -m qwen3_jax tokenizer --train corpus.txt chats.jsonl.gz --size 32000 --to DIR
  python -m qwen3_jax tokenizer --show 'Hello world' --from DIR
"""
import gzip
import json
from pathlib import Path

from qwen3_jax.text.tokenizer import Tokenizer, train

BLOCK = 1 << 20  # characters read at a time


def add_arguments(parser):
  parser.add_argument('--train', nargs='*', metavar='FILE', help='train on these files')
  parser.add_argument('--size', type=int, default=8192, help='ids in the vocabulary (%(default)s)')
  parser.add_argument('--to', metavar='DIR', help='folder for the trained tokenizer')
  parser.add_argument('--show', metavar='TEXT', help='print the ids and pieces of a text')
  parser.add_argument('--from', dest='source', metavar='DIR', help='tokenizer to show with')


def main(args):
  if args.train is None and args.show is None:
    raise ValueError('nothing to do: give --train [FILE ...] --to DIR, or --show TEXT --from DIR')
  if args.train is not None and not args.to:
    raise ValueError('--train needs --to DIR, the folder for the tokenizer')
  if args.show is not None and not (args.source or args.to):
    raise ValueError('--show needs --from DIR, a folder with a tokenizer')
  if args.train is not None:
    tokenizer = train(read_texts(args.train), args.size, args.to)
    print(f'trained {tokenizer.size:,} ids: {tokenizer.file}')
  if args.show is not None:
    tokenizer = Tokenizer(args.source or args.to)
    ids = tokenizer.encode(args.show)
    for id in ids:
      piece = tokenizer.piece(id)
      print(f'{id:8} {piece.decode("utf-8", "backslashreplace")!r}')
    print(f'{len(ids)} ids for {len(args.show.encode())} bytes')


def read_texts(files):
  """Streams the texts of `files`; without any, of the embedded corpus.

  Raises ValueError, naming file and line, on text that is not UTF-8 or a record without `text`.
  """
  if not files:
    from qwen3_jax.data import sources
    yield from (record['text'] for record in sources.open_source('stdlib'))
  for file in map(Path, files):
    suffixes = file.suffixes
    opened = gzip.open if suffixes[-1:] == ['.gz'] else open
    with opened(file, 'rt', encoding='utf-8', newline='') as lines:
      try:
        yield from _read_records(lines, file) if '.jsonl' in suffixes[-2:] else iter(
          lambda lines=lines: lines.read(BLOCK), '')
      except UnicodeDecodeError as error:
        raise ValueError(f'{file} is not UTF-8 text: {error}') from error
      except EOFError as error:
        raise ValueError(f'{file} is cut short: {error}') from error


def _read_records(lines, file):
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        text = json.loads(line)['text']
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}:{number} is not a JSON object with `text`: {error!r}') from error
      if not isinstance(text, str):
        raise ValueError(f'{file}:{number} has text {text!r:.60}: wanted a string')
      yield text
