"""Rows by cursor, and the records that files of many forms become."""
import gzip
import json

import pytest

from qwen3_jax.data import tasks
from qwen3_jax.stages import records
from qwen3_jax.stages.records import Accept, Rows


@pytest.fixture
def files(tmp_path, monkeypatch):
  monkeypatch.setenv('QWEN3_JAX_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in/a.jsonl').write_bytes('{"n": 1}\n\n{"n": "é\u2028"}\r\n{"n": 3}'.encode())
  with gzip.open(tmp_path / 'in/b.jsonl.gz', 'wt') as file:
    file.write('{"n": 4}\n{"n": 5}\n')
  return tmp_path / 'in'


def test_each_cursor_goes_on_where_it_stands(files):
  rows = Rows([files, 'tasks:size=3,kinds=add,difficulty=1'])
  all_of_it = list(rows.read(records.START))
  assert [row[1:3] for row in all_of_it] == [
    ('a', 1), ('a', 3), ('a', 4), ('b', 1), ('b', 2), *(
      ('tasks:size=3,kinds=add,difficulty=1', k) for k in (1, 2, 3))]
  assert json.loads(all_of_it[1][3])['n'] == 'é\u2028'
  for k, row in enumerate(all_of_it):
    assert list(rows.read(json.loads(json.dumps(row[0])))) == all_of_it[k + 1:]
  assert rows.left(records.START) > rows.left(all_of_it[4][0]) > 0
  made = json.loads(all_of_it[-1][3])
  problem = tasks.open_tasks('size=3,kinds=add,difficulty=1').task(2)
  assert (made['question'], made['answer']) == (problem.question, problem.answer)


def test_absent_files_and_bad_tasks_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='none.jsonl'):
    Rows([tmp_path / 'none.jsonl'])
  with pytest.raises(ValueError, match='tasks option'):
    Rows(['tasks:sise=3'])


def decide(rows, **options):
  return records.begin_reading(None, **options)(
    [('f', k, row if isinstance(row, bytes) else json.dumps(row).encode())
     for k, row in enumerate(rows, 1)])


def only(rows, **options):
  found = decide(rows, **options)
  assert all(isinstance(each, Accept) for each in found), found
  return [each.record for each in found]


def test_questions_of_each_form():
  plain, gsm, math, boxed = only([
    dict(question='2+2?', answer=4, domain='sums'),
    dict(question='Eggs?', answer='She has 3.\n#### 1,003'),
    dict(problem='Roots?', answer='\\frac12', level=3),
    dict(problem='Area?', solution='So it is $\\boxed{\\frac{1}{2}}$.', id='m7')], kind='query')
  assert plain == dict(id='f:1', source='f', question='2+2?', answer='4', domain='sums')
  assert (gsm['question'], gsm['answer']) == ('Eggs?', '1,003') and 'solution' not in gsm
  assert math == dict(id='f:3', source='f', question='Roots?', answer='\\frac12', level=3)
  assert boxed == dict(id='m7', source='f', question='Area?', answer='\\frac{1}{2}')


def test_a_given_solution_becomes_the_candidate():
  gsm, math = only([dict(question='Eggs?', answer='She has 1+2=<<1+2=3>>3.\n#### 3'),
                    dict(problem='Area?', solution='It is $\\boxed{5}$.')],
                   kind='query', solutions=True)
  assert gsm['candidates'] == [
    dict(reasoning='', content='She has 1+2=3.\nThe answer is 3.', finish_reason='stop')]
  assert math['candidates'][0]['content'] == 'It is $\\boxed{5}$.'
  refused, = decide([dict(problem='Area?', answer='5')], kind='query', solutions=True)
  assert refused.rule == 'no solution'


@pytest.mark.parametrize('row, kind, rule, reason', [
  (b'{"question": ', 'query', 'unreadable line', 'not JSON'),
  (b'[1]', 'query', 'unreadable line', 'list on a line'),
  (b'{"text": "\xff\xfe"}', 'text', 'unreadable line', 'invalid UTF-8 at byte 10'),
  (b'{"text": "\\ud800"}', 'text', 'unreadable line', 'half a surrogate pair'),
  (b'{"text": NaN}', 'text', 'unreadable line', 'NaN is not JSON'),
  (b'[' * 100_000, 'text', 'unreadable line', 'nested too deeply'),
  (dict(answer='4'), 'query', 'no question', 'the record has answer'),
  (dict(text=' '), 'text', 'no text', 'the record has text'),
  (dict(messages=[dict(role='robot', content='x')]), 'chat', 'unknown role', "'robot'"),
  (dict(messages=[dict(role='user', content='x'), dict(role='assistant', content='<think>\nhm')]),
   'chat', 'unclosed <think>', 'never ends')])
def test_bad_rows_are_rejected_with_the_reason(row, kind, rule, reason):
  refused, = decide([row], kind=kind)
  assert refused.rule == rule and reason in refused.reason
  assert refused.record['id'] == 'f:1'
  assert json.loads(records.dump_line(refused.record))


def test_a_line_too_long_is_not_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(records, 'LINE_BYTES', 1000)
  (tmp_path / 'a.jsonl').write_text(json.dumps(dict(text='x' * 5000)) + '\n{"text": "y"}\n')
  rows = [row[1:] for row in Rows([tmp_path / 'a.jsonl']).read(records.START)]
  assert [len(row[2]) for row in rows] == [1001, 13]
  long, short = records.begin_reading(None, kind='text')(rows)
  assert (long.rule, long.reason) == ('unreadable line', 'a line of more than 1,000 bytes')
  assert len(long.record['line']) == 500 and short.record['text'] == 'y'


def test_chats_and_self_instruct_become_conversations():
  chat, one, two = only([
    dict(conversations=[{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'hello'}]),
    dict(id='s', instruction='Add', instances=[dict(input='1 1', output='2'),
                                               dict(input='2 2', output='4')])], kind='chat')
  assert [m['content'] for m in chat['messages']] == ['hi', 'hello'] and chat['id'] == 'f:1'
  assert (one['id'], two['id']) == ('s.0', 's.1')
  assert records.text_of(one) == '2' and records.words_of(two) == 'Add\n\n2 2\n\n4'


def test_item_of_a_test_item():
  assert records.item_of(dict(problem='p', answer='a')) == 'p'
  assert records.item_of(dict(messages=[dict(role='user', content='u'),
                                         dict(role='assistant', content='v')])) == 'u'
  with pytest.raises(ValueError, match='the record has n'):
    records.item_of(dict(n=1))


def test_words_of_a_chat_are_all_of_them():
  calls = [dict(name='find', arguments=dict(city='Oslo'))]
  record = dict(messages=[
    dict(role='user', content='Where?'),
    dict(role='assistant', content='', reasoning_content='I look.', tool_calls=calls),
    dict(role='tool', content='North'), dict(role='assistant', content='In the north.')])
  words = records.words_of(record)
  assert all(part in words for part in ('Where?', 'I look.', 'Oslo', 'North', 'In the north.'))
  assert records.text_of(record) == 'I look.\n\nIn the north.'


def test_generated_tasks_bring_their_steps_where_asked_for():
  (*_, data), = Rows(['tasks:size=1,kinds=sum,difficulty=1']).read(records.START)
  made = json.loads(data)
  query, = only([made], kind='query')
  assert query['answer'] == made['answer'] and not {'steps', 'candidates'} & set(query)
  query, = only([made], kind='query', solutions=True)
  assert query['candidates'] == [dict(reasoning=made['steps'], finish_reason='stop',
                                      content=f'The answer is {made["answer"]}.')]
  chat, = only([made], kind='chat')
  assert chat['messages'][1] == dict(role='assistant', reasoning_content=made['steps'],
                                     content=f'The answer is {made["answer"]}.')
  other, = only([dict(question='2+2?', answer='4', steps=['2', '4'])], kind='query')
  assert other['answer'] == '4'
