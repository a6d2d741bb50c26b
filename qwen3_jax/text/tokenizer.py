"""Text to ids and back: a checkpoint's `tokenizer.json`, or a SentencePiece model of one's own."""
import codecs
import io
import os
import random
import re
import shutil
from pathlib import Path

import sentencepiece
import tokenizers

# Qwen3's added tokens in the order of their ids (151643 and up in the released vocabulary).
CONTROL = (
  '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>', '<|object_ref_end|>',
  '<|box_start|>', '<|box_end|>', '<|quad_start|>', '<|quad_end|>', '<|vision_start|>',
  '<|vision_end|>', '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>', '<tool_call>',
  '</tool_call>', '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>', '<|fim_pad|>',
  '<|repo_name|>', '<|file_sep|>', '<tool_response>', '</tool_response>', '<think>', '</think>',
)
# Only the first 14 are flagged `special`: `<think>` and the tool tags survive skip_special.
SPECIAL = frozenset(CONTROL[:14])
COMPANIONS = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
              'vocab.json', 'merges.txt', 'chat_template.jinja')
SPACE = '\u2581'  # SentencePiece's stand-in for a space
LIMIT = 25_000  # chunks to train on: 50 million characters, about 1 GiB while training


class Tokenizer:
  """A vocabulary opened from a folder or file: `tokenizer.json` or a SentencePiece `*.model`.

  `size` counts the ids that may be sampled (151,669 for Qwen3; the embedding is padded beyond it),
  `eod_id` is `<|endoftext|>`, `stop_ids` are `(<|im_end|>, <|endoftext|>)`.
  Raises FileNotFoundError where there is no tokenizer, ValueError where it is not a usable one.
  """

  def __init__(self, path):
    self.file = _find(Path(path))
    try:
      kind = _ByteLevel if self.file.suffix == '.json' else _SentencePiece
      self._vocabulary = kind(self.file)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError
      raise ValueError(f'{self.file} is not a usable tokenizer: {error}') from error
    self._bytes = self._vocabulary.bytes
    self.size = max(self._bytes) + 1
    self.eod_id = self.id('<|endoftext|>')
    self.stop_ids = (self.id('<|im_end|>'), self.eod_id)

  def encode(self, text, special=True):
    """The ids of `text`; with special=False control-token text is plain text (hostile input)."""
    try:
      return self._vocabulary.encode(text, special)
    except (TypeError, UnicodeError) as error:  # another type, or a lone surrogate
      raise ValueError(f'cannot encode {text!r:.60}: wanted a string of Unicode') from error

  def decode(self, ids, skip_special=False):
    """The text of `ids`; U+FFFD for bytes that are not UTF-8. ValueError on an unknown id."""
    if skip_special:
      ids = (id for id in ids if id not in self._vocabulary.special)
    return b''.join(map(self.piece, ids)).decode('utf-8', 'replace')

  def piece(self, id):
    """The bytes of one id, which may be a part of a character."""
    try:
      return self._bytes[id]
    except KeyError:
      raise ValueError(f'id {id} is outside the {self.size} ids of {self.file}: '
                       'mask the padded rows of the embedding when sampling') from None

  def id(self, token):
    """The id of a token by its name in the vocabulary."""
    id = self._vocabulary.id(token)
    if id is None:
      raise ValueError(f'{self.file} has no token {token!r}: use a Qwen tokenizer, '
                       'or train one with `python -m qwen3_jax tokenizer --train`')
    return id

  def stream(self):
    """A new incremental decoder: the pushes and the flush concatenate to `decode(ids)`."""
    return Stream(self)

  def save(self, folder):
    """Copies the tokenizer's own files into `folder`, so that it opens there too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = (self.file.name, *(COMPANIONS if self.file.suffix == '.json' else ()))
    for source in map(self.file.with_name, names):
      target = folder / source.name
      if source.is_file() and source.resolve() != target.resolve():
        shutil.copyfile(source, target)


class Stream:
  """Incremental decoding that holds an unfinished UTF-8 character back; O(1) a token."""

  def __init__(self, tokenizer):
    self._piece = tokenizer.piece
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

  def push(self, id):
    return self._decoder.decode(self._piece(id))

  def flush(self):
    return self._decoder.decode(b'', final=True)


class _ByteLevel:
  """Byte-level BPE of a `tokenizer.json`."""

  def __init__(self, file):
    self._coder = tokenizers.Tokenizer.from_file(str(file))
    if not isinstance(self._coder.decoder, tokenizers.decoders.ByteLevel):
      raise ValueError(f'wanted a ByteLevel decoder as Qwen has, got {self._coder.decoder}')
    added = self._coder.get_added_tokens_decoder()
    self.special = frozenset(id for id, token in added.items() if token.special)
    alphabet = _byte_alphabet()
    self.bytes = {id: _unmap(token, alphabet)
                  for token, id in self._coder.get_vocab(with_added_tokens=True).items()}
    # `encode_special_tokens` spares only tokens flagged special, which <think> is not: so a
    # second coder without any added token reads hostile text.
    self._plain = tokenizers.Tokenizer(self._coder.model)
    self._plain.normalizer = self._coder.normalizer
    self._plain.pre_tokenizer = self._coder.pre_tokenizer

  def encode(self, text, special):
    coder = self._coder if special else self._plain
    return coder.encode(text, add_special_tokens=False).ids

  def id(self, token):
    return self._coder.token_to_id(token)


class _SentencePiece:
  """A SentencePiece model as `train` makes them: byte fallback, whitespace kept as it is."""

  def __init__(self, file):
    self._coder = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [self._coder.id_to_piece(id) for id in range(self._coder.piece_size())]
    self._ids = {piece: id for id, piece in enumerate(pieces)}
    self.special = frozenset(self._ids[token] for token in SPECIAL if token in self._ids)
    self.bytes = {id: self._text(id, piece) for id, piece in enumerate(pieces)
                  if not self._coder.is_unknown(id)}
    try:
      self._space = [self._ids[f'<0x{byte:02X}>'] for byte in SPACE.encode()]
    except KeyError:
      raise ValueError('it has no byte pieces: train it with byte fallback') from None
    probe = ' a  b\n'
    if b''.join(self.bytes[id] for id in self.encode(probe, True)) != probe.encode():
      raise ValueError('it does not keep whitespace (dummy prefix or normalisation): train it '
                       'with `python -m qwen3_jax tokenizer --train`')

  def encode(self, text, special):
    ids = []
    for part in (_EXACT if special else _HOSTILE).split(text):
      ids += self._space if part == SPACE else self._coder.encode(part.encode()) if part else []
    return ids

  def id(self, token):
    return self._ids.get(token)

  def _text(self, id, piece):
    if self._coder.is_byte(id):
      return bytes([int(piece[3:5], 16)])
    return b'' if self._coder.is_control(id) else piece.replace(SPACE, ' ').encode()


# A literal U+2581 would come back as a space: it is cut out and spelled in bytes. Hostile text is
# also cut after the `<` of each control token, which SentencePiece then cannot recognise.
_EXACT = re.compile(f'({SPACE})')
_HOSTILE = re.compile(f'({SPACE})|(?<=<)(?={"|".join(re.escape(name[1:]) for name in CONTROL)})')


def train(texts, size, folder, limit=LIMIT):
  """Trains a SentencePiece BPE vocabulary of `size` ids on `texts` and saves it in `folder`.

  The 26 Qwen3 control tokens are ids 0-25 in Qwen3's order, then come 256 bytes, then pieces;
  digits stand alone and `decode(encode(x)) == x` for any text. `texts` is any iterable of strings,
  read once: at most `limit` chunks of up to 2,000 characters are kept (a uniform sample with a
  fixed seed), so memory is bounded and the same texts give the same file.
  Raises ValueError where `size` does not suit the texts.
  """
  if isinstance(texts, str):
    raise ValueError('texts is one string: pass an iterable of strings, such as [text]')
  chunks = _sample(texts, limit)
  if not chunks:
    raise ValueError('no text to train a tokenizer on: every text was empty')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(chunks), model_writer=model, model_type='bpe', num_threads=2,
      # <unk> is required but, with byte fallback, never used: it goes beyond the last id.
      vocab_size=size + 1, unk_id=size, bos_id=-1, eos_id=-1, pad_id=-1,
      user_defined_symbols=list(CONTROL), byte_fallback=True, split_digits=True,
      character_coverage=0.9995, normalization_rule_name='identity', add_dummy_prefix=False,
      remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
      max_sentence_length=16384, minloglevel=2)
  except RuntimeError as error:
    raise ValueError(_explain(error, size, chunks)) from error
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  partial = folder / f'.tokenizer.model.{os.getpid()}'
  partial.write_bytes(model.getvalue())
  partial.replace(folder / 'tokenizer.model')
  return Tokenizer(folder / 'tokenizer.model')


def _sample(texts, limit):
  """At most `limit` chunks of `texts`, each as likely as the others (reservoir sampling).

  Chunks end after a run of newlines where they can, so that pieces such as `:\\n` are learned.
  """
  draw, kept, seen = random.Random(0), [], 0
  for text in texts:
    for chunk in re.finditer(r'.{1,2000}(?:(?<=\n)(?!\n)|\Z)|.{1,2000}', text, re.DOTALL):
      seen += 1
      if len(kept) < limit:
        kept.append(chunk[0])
      elif (place := draw.randrange(seen)) < limit:
        kept[place] = chunk[0]
  return kept


def _explain(error, size, chunks):
  characters = sum(map(len, chunks))
  if 'smaller than required_chars' in str(error):
    needed = int(re.search(r' vs ([0-9]+)', str(error))[1]) - 1
    return (f'a vocabulary of {size} is too small: {len(CONTROL)} control tokens, 256 bytes and '
            f'the characters of the text need {needed}')
  if 'pieces_size()' in str(error):
    return (f'a vocabulary of {size} is too large for this text ({characters:,} characters do not '
            'hold that many different pieces): ask for a smaller size or give more text')
  return f'SentencePiece could not train {size} ids on {characters:,} characters: {error}'


def _find(path):
  """The tokenizer file at `path`, which is that file or a folder with one."""
  if path.is_file():
    if path.suffix in ('.json', '.model'):
      return path
    raise ValueError(f'{path} is not a tokenizer: wanted tokenizer.json or SentencePiece *.model')
  models = list(path.glob('*.model'))
  only = models if len(models) == 1 else ()
  for file in (path / 'tokenizer.json', path / 'tokenizer.model', *only):
    if file.is_file():
      return file
  wanted = 'put a tokenizer.json or a SentencePiece tokenizer.model there'
  if not path.is_dir():
    raise FileNotFoundError(f'no tokenizer at {path}, which does not exist: {wanted}')
  if (path / 'vocab.json').exists():
    wanted = ('vocab.json and merges.txt alone lack the control tokens; take tokenizer.json from '
              'the same checkpoint')
  names = ', '.join(sorted(entry.name for entry in path.iterdir())[:8]) or 'nothing'
  raise FileNotFoundError(f'no tokenizer in {path} (it holds {names}): {wanted}')


def _byte_alphabet():
  """The character that stands for each byte in byte-level BPE (GPT-2): character -> byte."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = sorted(set(range(256)) - set(printable))
  return {chr(byte): byte for byte in printable} | {
    chr(256 + place): byte for place, byte in enumerate(others)}


def _unmap(token, alphabet):
  try:
    return bytes(alphabet[character] for character in token)
  except KeyError:  # an added token outside the alphabet stands for itself
    return token.encode()
