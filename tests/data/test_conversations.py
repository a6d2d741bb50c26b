"""Masks equal those that transformers' template gives; nothing bad is trained on silently.

`fixtures/masks.jsonl` was made with transformers 5.23 alone. A turn there is [message, thinking,
start and end of the answer in characters, crc32 of the text up to its end, start and end in tokens,
crc32 of the ids as JSON]; the ids of the whole text and of its two parts were checked to be equal.
"""

import collections
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.data import conversations, mixture, packing
from qwen3_jax.data.chat_formats import normalise
from qwen3_jax.text import tokenizer as tokenizers
from qwen3_jax.text.template import last_flag, parse

MASKS = [json.loads(line) for line in (
  Path(__file__).resolve().parents[1] / 'fixtures' / 'masks.jsonl').read_text().splitlines()]
REFUSED = {  # goldens with assistant turns that mean two things at once
  'system_second': 'late system turn', 'special_tokens_in_user': 'control token',
  'random_09': 'reasoning missing', 'random_29': 'reasoning missing',
  'random_15': 'reasoning not wanted', 'random_19': 'reasoning not wanted',
  'random_23': 'stray </think>', 'random_25': 'stray </think>', 'random_33': 'stray </think>'}


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content='', reasoning=None, calls=()):
  calls = [{'name': name, 'arguments': arguments} for name, arguments in calls]
  return {'role': 'assistant', 'content': content} | (
    {'reasoning_content': reasoning} if reasoning else {}) | (
    {'tool_calls': calls} if calls else {})


def tool(content):
  return {'role': 'tool', 'content': content}


@pytest.fixture(scope='module')
def small_tokenizer(tmp_path_factory):
  """A SentencePiece tokenizer trained on a few words."""
  words = ['say hello to the answer of one question, then call the tool'] * 20
  return tokenizers.train(words, 310, tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def goldens(golden):
  rows = (golden / 'chat' / 'chat_goldens.jsonl').read_text(encoding='utf-8').split('\n')
  return {row['name']: row for row in map(json.loads, filter(None, rows))}


# Masks against transformers.

def trained_turns(tokens):
  """[start, end, crc32 of the ids up to the end] of each trained run."""
  edges = np.flatnonzero(np.diff(tokens['weight'] > 0, prepend=False, append=False))
  return [[start, end, zlib.crc32(json.dumps(tokens['id'][:end].tolist()).encode())]
          for start, end in edges.reshape(-1, 2).tolist()]


def assert_masks(arrays, row):
  assert [turn for tokens in arrays for turn in trained_turns(tokens)] == [
    turn[5:] for turn in row['turns']]


def record_of(row, goldens):
  return row.get('record') or {key: goldens[row['name']][key] for key in ('messages', 'tools')}


def test_every_golden_has_the_masks_of_transformers(golden, goldens):
  coder = tokenizers.Tokenizer(golden / 'tokenizer')
  trained = 0
  for row in MASKS:
    record = record_of(row, goldens)
    if row['name'] in REFUSED or not row['turns']:
      with pytest.raises(ValueError, match=REFUSED.get(row['name'], 'no assistant turn')):
        conversations.examples(normalise(record))
      continue
    arrays = [conversations.encode_example(coder, spans)
              for spans in conversations.examples(normalise(record))]
    assert_masks(arrays, row)
    trained += len(row['turns'])
    gold = goldens.get(row['name'])
    if gold and record['messages'][-1]['role'] == 'assistant' and not gold['kwargs'].get(
        'add_generation_prompt'):
      assert arrays[-1]['id'].tolist() + coder.encode('\n') == gold['ids'], row['name']
  assert set(goldens) <= {row['name'] for row in MASKS} and trained > 60


@pytest.mark.parametrize('row', [r for r in MASKS if 'record' in r], ids=lambda row: row['name'])
def test_spans_have_the_text_of_transformers(row):
  got = []
  for spans in conversations.examples(normalise(row['record'])):
    text = ''
    for part, trained in spans:
      got += [[len(text), len(text + part), zlib.crc32((text + part).encode())]] if trained else []
      text += part
  assert got == [turn[2:5] for turn in row['turns']]


def spoil_by_shifting(tokens):
  tokens['weight'] = np.roll(tokens['weight'], 1)


def spoil_by_training_the_prompt(tokens):
  tokens['weight'] = 1


def spoil_by_training_a_tool_response(tokens):
  ids = tokens['id'].tolist()
  tokens['weight'][ids.index(151665):ids.index(151666) + 1] = 1  # <tool_response> and its end


@pytest.mark.parametrize('spoil', [spoil_by_shifting, spoil_by_training_the_prompt,
                                   spoil_by_training_a_tool_response])
def test_wrong_masks_are_caught(spoil, golden):
  coder = tokenizers.Tokenizer(golden / 'tokenizer')
  row = next(row for row in MASKS if row['name'] == 'chain_with_reasoning')
  tokens, = (conversations.encode_example(coder, spans)
             for spans in conversations.examples(normalise(row['record'])))
  assert_masks([tokens], row)
  spoil(tokens)
  with pytest.raises(AssertionError):
    assert_masks([tokens], row)


PIECES = ('say', ' hello', '\n', '\n\n', ' ', '\t', 'é你好😀', '"', '{"a": 1}', '<tool_response>',
          '/thinking', '\\n')
TEXT = st.lists(st.sampled_from(PIECES), max_size=5).map(''.join)
SAID = TEXT.map(lambda text: f'{text} so'.lstrip('\n'))


@st.composite
def chats(draw):
  """A conversation whose reasoning agrees with its flags."""
  messages, thinks = [], None
  for _ in range(draw(st.integers(1, 3))):
    flag = draw(st.sampled_from(['', ' /think', ' /no_think']))
    thinks = {'': thinks, ' /think': True, ' /no_think': False}[flag]
    messages.append(user(draw(TEXT) + flag))
    for last in [*[False] * draw(st.integers(0, 2)), True]:
      reasons = draw(st.booleans()) if thinks is None else thinks
      calls = draw(st.lists(st.tuples(st.sampled_from('fg'), st.dictionaries(TEXT, TEXT)),
                            min_size=not last, max_size=2 * (not last)))
      messages.append(assistant(draw(SAID), draw(SAID) if reasons else None, calls))
      messages += [tool(draw(TEXT)) for _ in calls]
  return {'messages': messages}


@given(chats())
@settings(max_examples=150, deadline=None)
def test_masked_in_text_is_what_parse_says_the_assistant_wrote(small_tokenizer, record):
  written = ''
  for spans in conversations.examples(normalise(record)):
    tokens = conversations.encode_example(small_tokenizer, spans)
    assert small_tokenizer.decode(tokens['id'].tolist()) == ''.join(text for text, _ in spans)
    written += small_tokenizer.decode(tokens['id'][tokens['weight'] > 0].tolist())
  wanted = [{'reasoning_content': '', 'tool_calls': []} | m | {'content': m['content']}
            for m in record['messages'] if m['role'] == 'assistant']
  assert [parse(turn) for turn in written.split('<|im_end|>')[:-1]] == [
    m | {'reasoning_content': m['reasoning_content'].strip('\n')} for m in wanted]


# Which text is trained.

def trained(record):
  return [[text for text, on in spans if on]
          for spans in conversations.examples(normalise(record))]


EMPTY = '<think>\n\n</think>\n\n'


def test_forced_empty_block_is_not_trained_and_the_one_for_a_flag_is():
  chat = [user('q /no_think'), assistant('a')]
  assert trained({'messages': chat}) == [[f'{EMPTY}a<|im_end|>']]
  assert trained({'messages': chat, 'enable_thinking': False}) == [['a<|im_end|>']]
  chat = [user('q'), assistant('a')]
  assert trained({'messages': chat}) == [['a<|im_end|>']]
  assert trained({'messages': chat, 'enable_thinking': True}) == [[f'{EMPTY}a<|im_end|>']]


def test_history_has_no_reasoning_so_each_answer_is_an_example():
  chat = [user('q'), assistant('a', 'why'), user('p'), assistant('b', 's')]
  first, second = conversations.examples(normalise({'messages': chat}))
  assert first == [('<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n', False),
                   ('<think>\nwhy\n</think>\n\na<|im_end|>', True)]
  assert 'why' not in second[0][0] and len(second) == 2


def test_tool_chain_with_reasoning_is_one_example():
  chat = [user('q'), assistant('', 'r', [('f', {})]), tool('1'), assistant('a', 's')]
  spans, = conversations.examples(normalise({'messages': chat}))
  assert [on for _, on in spans] == [False, True, False, True]
  assert spans[2][0] == ('\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n'
                         '<|im_start|>assistant\n')


def test_turns_marked_so_and_greetings_are_context_only():
  chat = [assistant('hi'), user('q'), assistant('a') | {'train': False}, user('p'), assistant('b')]
  assert trained({'messages': chat}) == [['b<|im_end|>']]
  with pytest.raises(ValueError, match='nothing to train'):
    trained({'messages': chat[:3]})


@pytest.mark.parametrize('record, reason', [
  ({'messages': [user('q /no_think'), assistant('a', 'r')]}, 'reasoning not wanted: message 1'),
  ({'messages': [user('q /think'), assistant('a')]}, 'reasoning missing: message 1'),
  ({'messages': [user('q'), assistant('a', 'r')], 'enable_thinking': False}, 'reasoning not want'),
  ({'messages': [user('q'), assistant('a'), assistant('b')]}, 'turn without a prompt: message 2'),
])
def test_contradictions_are_refused(record, reason):
  with pytest.raises(ValueError, match=reason):
    conversations.examples(normalise(record))


@pytest.mark.parametrize('texts, flag', [
  (['q'], None), (['q /think'], True), (['/no_think'], False), (['/think /no_think x'], False),
  (['/no_think', 'q', '/think\nq'], True), (['q /no_think.'], False), (['/thinking'], None),
  (['a/think'], None), (['cd /think/it'], None), (['/think.py'], None), (['//think'], None),
  (['"/think"'], None), (['/no_think', '/thinking'], False)])
def test_last_flag_that_is_a_word_wins(texts, flag):
  messages = [m for text in texts for m in (user(text), assistant('/think', '/no_think'))]
  assert last_flag(messages) is flag
  system = [{'role': 'system', 'content': texts[0]}, *messages[2:]]
  assert last_flag(system) is flag


# Files.

def lines(records):
  return '\n'.join(json.dumps(record) for record in records).encode() + b'\n'


def chat(question, answer='a'):
  return {'messages': [user(question), assistant(answer)]}


def test_files_of_any_form_are_read_in_order(tmp_path):
  rows = [chat('one\u2028still one'), {'instruction': 'two', 'instances': [
    {'input': 'x', 'output': '1'}, {'input': 'y', 'output': '2'}]}, chat('three')]
  (tmp_path / 'a.jsonl').write_bytes(lines(rows[:2]) + b'\n')
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(lines(rows[2:])))
  source = conversations.read(str(tmp_path / '*.jsonl*'), cache=tmp_path / 'cache')
  assert [source[i] for i in range(len(source))] == [rows[0], *normalise(rows[1]), rows[2]]
  assert not source.rejected
  again = conversations.read(str(tmp_path / 'a.jsonl'))
  (tmp_path / 'a.jsonl').write_bytes(lines(rows[:2]).replace(b'"1"', b'"0"'))
  changed = conversations.read(str(tmp_path / 'a.jsonl'))
  assert len(changed) == len(again) and changed.fingerprint != again.fingerprint


BAD = [b'{"messages": [', b'[1]', b'{"a": "caf\xe9"}', b'x' * 5000, b'[' * 4000,
       lines([{'messages': [user('q')]}])[:-1]]


@pytest.mark.parametrize('line, complaint', list(zip(BAD, [
  'not JSON', 'not an object', 'not UTF-8: byte 0xe9', 'longer than', 'not JSON',
  'no assistant turn'])))
def test_bad_line_is_an_error_or_counted(tmp_path, monkeypatch, line, complaint):
  monkeypatch.setattr(conversations, 'LINE_BYTES', 4096)
  path = tmp_path / 'a.jsonl'
  path.write_bytes(lines([chat('one')]) + line + b'\n' + lines([chat('two')]) + line)
  with pytest.raises(ValueError, match=f'a.jsonl, line 2: {complaint}'):
    conversations.read(str(path))
  source = conversations.read(str(path), skip_bad=True)
  assert [source[i] for i in range(len(source))] == [chat('one'), chat('two')]
  (reason, count), = source.rejected.items()
  assert count == 2 and complaint.startswith(reason[:9])
  path.write_bytes(line)
  with pytest.raises(ValueError, match='no conversation in it'):
    conversations.read(str(path), skip_bad=True)


def test_answers_to_one_question_are_on_one_side(tmp_path):
  rows = [chat(f'question {i}{flag}', f'answer {k}') for i in range(200)
          for k, flag in enumerate(['', ' /no_think', '\n'])]
  (tmp_path / 'a.jsonl').write_bytes(lines(rows))
  sides = [conversations.read(str(tmp_path / 'a.jsonl'), split, heldout=0.2)
           for split in ('train', 'heldout')]
  asked = [collections.Counter(source[i]['messages'][0]['content'].split()[1]
                               for i in range(len(source))) for source in sides]
  assert asked[0].keys().isdisjoint(asked[1]) and set((asked[0] | asked[1]).values()) == {3}
  assert len(asked[0]) + len(asked[1]) == 200 and 20 < len(asked[1]) < 60
  with pytest.raises(ValueError, match="split must be 'train'"):
    conversations.read(str(tmp_path / 'a.jsonl'), 'test')


def test_generated_problems_are_thinking_conversations():
  source = conversations.read('tasks:size=50,seed=3', 'train')
  for i in range(len(source)):
    record, problem = source[i], source.tasks.task(i)
    assert normalise(record) == record
    (_, answer), = conversations.examples(record)
    assert parse(answer[0]) == {
      'role': 'assistant', 'reasoning_content': '\n'.join(problem.steps),
      'content': f'The answer is {record["answer"]}.', 'tool_calls': []}


def test_real_conversations(data_dir, tmp_path):
  read = lambda name: conversations.read(str(data_dir / 'sft' / name), None, None, tmp_path, True)
  english, chinese = read('glaive_toolcall_en.jsonl.gz'), read('glaive_toolcall_zh.jsonl.gz')
  assert len(english) == 300 and not english.rejected
  assert len(chinese) == 298 and chinese.rejected == {'tool response without a call': 2}
  assert len(read('self_instruct_*.jsonl')) == 175 + 252
  with pytest.raises(ValueError, match='zh.jsonl.gz, line 198: tool response without a call'):
    conversations.read(str(data_dir / 'sft' / '*zh.jsonl.gz'), cache=tmp_path)
  for source in (english, chinese):
    for i in range(0, len(source), 10):
      record = source[i]
      answers = [parse(text) for spans in conversations.examples(record)
                 for text, on in spans if on]
      assert [a['content'] for a in answers] == [
        m['content'].lstrip('\n') for m in record['messages'] if m['role'] == 'assistant']


# Examples.

@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  """60 conversations from short to long, one contradiction among them."""
  path = tmp_path_factory.mktemp('mixed') / 'a.jsonl'
  rows = [{'messages': [user('say ' * (i % 7)), assistant('one ' * (1 + i * i // 9), 'hm'),
                        user('then'), assistant('two')]} for i in range(60)]
  rows[5] = {'messages': [user('q /think'), assistant('a')]}
  path.write_bytes(lines(rows))
  return conversations.read(str(path))


@pytest.mark.parametrize('too_long', ['drop', 'truncate'])
def test_examples_fit_and_every_loss_is_counted(mixed, small_tokenizer, too_long):
  whole = conversations.Examples(mixed, small_tokenizer, 10_000)
  source = conversations.Examples(mixed, small_tokenizer, 200, too_long)
  report, key = source.report, f'too_long_{"dropped" if too_long == "drop" else "truncated"}'
  assert whole.report['examples'] == len(whole) == 59 * 2
  assert report['conversations'] == 60 and report['refused: reasoning missing'] == 1
  arrays = [source[i] for i in range(len(source))]
  assert [len(x) for x in arrays] == source.sizes.tolist() and source.sizes.max() <= 200
  assert report['tokens'] == sum(map(len, arrays))
  assert report['trained_tokens'] == sum(int(x['weight'].sum()) for x in arrays)
  assert report[key] > 10 and report['too_long_dropped'] + report['examples'] == 118
  assert source.fingerprint not in (whole.fingerprint, conversations.Examples(
    mixed, small_tokenizer, 201, too_long).fingerprint)
  end = small_tokenizer.id('<|im_end|>')
  cut = [x for x in arrays if x['id'][-1] != end]
  assert len(cut) == (0 if too_long == 'drop' else report['too_long_truncated'])
  for x in cut:
    assert x['weight'][-1] == 1 and len(x) == 200
  with pytest.raises(IndexError):
    source[len(source)]


def test_what_took_long_to_measure_is_kept(tmp_path, small_tokenizer, monkeypatch):
  monkeypatch.setattr(conversations, 'SLOW', 0)
  rows = [chat('q'), chat('q /think'), chat('q', 'say ' * 99)]
  path = tmp_path / 'a.jsonl'

  def measure(coder=small_tokenizer, **options):
    path.write_bytes(lines(rows))
    made = conversations.Examples(conversations.read(str(path)), coder,
                                  **({'length': 40, 'cache': tmp_path / 'cache'} | options))
    return made, len(list((tmp_path / 'cache').rglob('places.npz')))

  first, kept = measure()
  again, still = measure()
  assert kept == still == 1 and again.report == first.report and len(first) == 1
  assert again.report['too_long_dropped'] == again.report['refused: reasoning missing'] == 1
  assert again[0].tobytes() == first[0].tobytes() and again.fingerprint == first.fingerprint
  other = tokenizers.train(['what else could be said'] * 9, 300, tmp_path / 'other')
  assert measure(other)[1] == 2 and measure(length=41)[1] == 3
  assert measure(too_long='truncate')[0].report['too_long_truncated'] == 1
  rows[0] = chat('q, but longer')
  assert measure()[0].sizes.tolist() != first.sizes.tolist()


def test_truncation_spares_the_prompt(small_tokenizer):
  spans = [('<|im_start|>user\nq<|im_end|>\n', False), ('say hello<|im_end|>', True),
           ('\nsay one more thing', False), ('hello<|im_end|>', True)]
  tokens = conversations.encode_example(small_tokenizer, spans)
  sizes = np.cumsum([len(small_tokenizer.encode(text)) for text, _ in spans])
  kept = [len(conversations._fit(tokens, n, 'truncate')) for n in range(sizes[-1] + 1)]
  assert kept[:sizes[0] + 1] == [0] * (sizes[0] + 1)  # no room for an answer: dropped
  assert kept[sizes[0] + 1:sizes[1] + 1] == list(range(sizes[0] + 1, sizes[1] + 1))
  assert set(kept[sizes[1]:sizes[2] + 1]) == {sizes[1]}  # the first answer whole, no prompt left
  assert kept[sizes[2] + 1:] == list(range(sizes[2] + 1, sizes[3] + 1))
  assert not len(conversations._fit(tokens, sizes[3] - 1, 'drop'))


def test_nothing_left_is_an_error(mixed, small_tokenizer):
  with pytest.raises(ValueError, match="no example is left.*'too_long_dropped': 118"):
    conversations.Examples(mixed, small_tokenizer, 5)
  with pytest.raises(ValueError, match='too_long must be'):
    conversations.Examples(mixed, small_tokenizer, 5, 'cut')


def test_long_and_short_are_mixed_by_tokens_and_packed_whole(mixed, small_tokenizer):
  source = conversations.Examples(mixed, small_tokenizer, 1000)
  short, long = source.by_tokens(1, 100), source.by_tokens(101, 1000)
  assert len(short) + len(long) == len(source) and short.sizes.max() <= 100 < long.sizes.min()
  assert mixture.mean_length(long) == pytest.approx(np.mean([len(long[i]) for i in
                                                             range(len(long))]))
  documents = mixture.mixture([(short, 0.7), (long, 0.3)], 0)
  tokens = collections.Counter()
  for i in range(mixture.BLOCK):
    name, x = documents[i]
    tokens[name] += len(x)
  assert tokens[short.name] / tokens.total() == pytest.approx(0.7, abs=0.02)
  known = {source[i].tobytes() for i in range(len(source))}
  loader = packing.Loader(documents, None, 2, 1000, 0, keep_whole=8, whole=True)
  for _ in range(5):
    batch = next(loader)
    for tokens, segments, weights in zip(*(batch[key] for key in (
        'tokens_BT', 'segment_BT', 'weight_BT'))):
      for s in range(1, segments.max() + 1):
        x = np.empty((segments == s).sum(), conversations.TOKEN)
        x['id'], x['weight'] = tokens[segments == s], weights[segments == s]
        assert x.tobytes() in known
  loader.close()


def test_history_remembered_while_measuring_changes_no_token(mixed, small_tokenizer):
  for spans in conversations.examples(mixed[40]):
    ids = [id for text, _ in spans for id in small_tokenizer.encode(text)]
    assert conversations.encode_example(small_tokenizer, spans)['id'].tolist() == ids
