"""Trains a SentencePiece tokenizer on text, or shows how one splits a text.

Sources are files, folders or globs of text, JSON lines with a `text` field, Parquet or ArrayRecord,
or `stdlib`, the Python standard library of this machine, which is what it trains on without any.

Examples:
  python -m qwen3_jax tokenizer --train corpus.txt chats.jsonl.gz --size 32000 --to DIR
  python -m qwen3_jax tokenizer --show 'Hello world' --from DIR
"""
from qwen3_jax.text.tokenizer import LIMIT, Tokenizer, train


def add_arguments(parser):
  parser.add_argument('--train', nargs='*', metavar='SOURCE', help='train on these texts')
  parser.add_argument('--size', type=int, default=8192, help='ids in the vocabulary')
  parser.add_argument('--limit', type=int, default=LIMIT,
                      help='chunks of 2,000 characters sampled from larger texts')
  parser.add_argument('--to', metavar='DIR', help='folder for the trained tokenizer')
  parser.add_argument('--show', metavar='TEXT', help='print the ids and pieces of a text')
  parser.add_argument('--from', dest='source', metavar='DIR', help='tokenizer to show with')


def main(args):
  if args.train is None and args.show is None:
    raise ValueError('nothing to do: give --train [SOURCE ...] --to DIR, or --show TEXT --from DIR')
  if args.train is not None and not args.to:
    raise ValueError('--train needs --to DIR, the folder for the tokenizer')
  if args.show is not None and not (args.source or args.to):
    raise ValueError('--show needs --from DIR, a folder with a tokenizer')
  if args.train is not None:
    tokenizer = train(read_texts(args.train), args.size, args.to, args.limit)
    print(f'trained {tokenizer.size:,} ids: {tokenizer.file}')
  if args.show is not None:
    show(Tokenizer(args.source or args.to), args.show)


def read_texts(specs):
  """Streams the documents of the sources; without any, the standard library's training part."""
  from qwen3_jax.data import sources  # seconds to import: not for --show
  opened = [sources.open_source(spec) for spec in specs]
  for source in opened or [sources.open_source('stdlib', 'train')]:
    yield from source


def show(tokenizer, text):
  ids = tokenizer.encode(text)
  for id in ids:
    piece = tokenizer.decode([id])
    print(f'{id:8} {tokenizer.piece(id) if chr(0xfffd) in piece else piece!r}')
  print(f'{len(ids)} ids for {len(text.encode())} bytes')
