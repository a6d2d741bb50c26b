"""Benchmarks: every file is read, its gold answers are right, and what is spoilt is refused."""
import dataclasses
import gzip
import json

import pytest

from qwen3_jax.data import query_files
from qwen3_jax.evaluation import benchmark_made, benchmark_rows, benchmarks
from qwen3_jax.generation.sampling import NON_THINKING, THINKING
from qwen3_jax.rewards import code
from qwen3_jax.rewards.response import Response

FILES = (  # name, file or folder, questions
  ('gsm8k', 'gsm8k', 250), ('gsm8k', 'gsm8k/train.jsonl.gz', 7473), ('math', 'math', 4498),
  ('math', 'math/train_answers.jsonl.gz', 7468), ('math500', 'math', 99),
  ('svamp', 'svamp_cmath_mmlu/svamp_train700.jsonl', 700),
  ('cmath', 'svamp_cmath_mmlu/cmath_dev.jsonl', 300), ('mgsm', 'mgsm', 1500),
  ('mmlu', 'svamp_cmath_mmlu/mmlu_stem_dev.jsonl', 717), ('arc_agi', 'arc_agi1', 400))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('QWEN3_JAX_CACHE', str(tmp_path / 'cache'))


@pytest.fixture(scope='module')
def router():
  """All that the benchmarks here ask for, with a judge that likes references."""
  from qwen3_jax.rewards.router import Router
  from qwen3_jax.stages.scorers import score_code
  def judge(pairs):
    return [float(record['reference'] in response.content) for record, response in pairs]
  router = Router({'code': lambda pairs: score_code(code.SANDBOX, pairs), 'judge': judge})
  yield router
  router.close()


def say(content, **more):
  return Response(content, '', content, (), 9, 'stop', **more)


def grade(benchmark, responses, router):
  scores = benchmarks.score(benchmark, benchmark.records, responses, router)
  return benchmarks.summarise(scores, benchmark.records)


@pytest.mark.parametrize('name, file, count', FILES, ids=lambda x: str(x))
def test_gold_answers_score_all(data_dir, router, name, file, count):
  """All rows of GSM8K and MATH among them; four of MATH's training rows have no answer."""
  benchmark = benchmarks.open_benchmark(name, data_dir / file, skip_bad='train_answers' in file)
  assert len(benchmark.records) == len({r['id'] for r in benchmark.records}) == count
  assert benchmark.rejected == ({'no answer': 4} if 'train_answers' in file else {})
  gold = list(map(benchmark_rows.solve, benchmark.records))
  result = grade(benchmark, gold, router)
  assert result['value'] == 1 and result['missing'] == 0
  few = dataclasses.replace(benchmark, records=benchmark.records[:45])
  assert grade(few, gold[45:90], router)['value'] < 0.4  # a letter fits a quarter


def run_solutions(benchmark, router):
  if not code.SANDBOX.available():
    pytest.skip('no sandbox on this machine')
  scores = benchmarks.score(benchmark, benchmark.records,
                            list(map(benchmark_rows.solve, benchmark.records)), router)
  return [record['id'] for record, each in zip(benchmark.records, scores) if each.value != 1]


@pytest.mark.parametrize('name', ['humaneval', 'mbpp'])
def test_reference_solutions_score_all(data_dir, router, name):
  benchmark = benchmarks.open_benchmark(name, data_dir, limit=20)
  assert len(benchmark.records) == 20 and not run_solutions(benchmark, router)
  empty = [say('```python\npass\n```')] * 4
  few = dataclasses.replace(benchmark, records=benchmark.records[:4])
  assert grade(few, empty, router) == {'value': 0.0, 'missing': 0, 'groups': {}}


@pytest.mark.slow
@pytest.mark.parametrize('name, file', [('humaneval', 'humaneval'), ('mbpp', 'mbpp'),
                                        ('mbpp', 'mbpp/train_val_prompt.jsonl')])
def test_all_reference_solutions_score_all(data_dir, router, name, file):
  benchmark = benchmarks.open_benchmark(name, data_dir / file)
  assert not run_solutions(benchmark, router)


def test_function_calls(data_dir, router):
  benchmark = benchmarks.open_benchmark('bfcl', data_dir)
  assert len(benchmark.records) == 620 and len(benchmark.files) == 5
  result = grade(benchmark, list(map(benchmark_rows.solve, benchmark.records)), router)
  assert result['intent'] == result['format'] == result['value'] == 1
  assert set(result['groups']) == {'irrelevance', 'multiple', 'parallel', 'parallel_multiple',
                                   'simple_python'}
  none = grade(benchmark, [say('Hm.')] * 620, router)
  assert none['value'] == none['intent'] == 120 / 620
  spoilt = say('<tool_call>\n{"name": ', )
  assert benchmarks.score(benchmark, benchmark.records[:1], [spoilt], router)[0].details == {
    'intent': 1.0, 'format': 0.0}


def test_answers_to_be_found_beside_the_questions(data_dir, tmp_path):
  """BFCL keeps what is right in a folder of its own, and lines under the name .json."""
  lines = (data_dir / 'bfcl' / 'multiple.dev.jsonl').read_text().splitlines()[:5]
  rows = list(map(json.loads, lines))
  truth = [{'id': row['id'], 'ground_truth': row.pop('ground_truth')} for row in rows]
  folder = tmp_path / 'bfcl'
  (folder / 'possible_answer').mkdir(parents=True)
  for path, written in ((folder, rows), (folder / 'possible_answer', truth)):
    (path / 'BFCL_v4_multiple.json').write_text('\n'.join(map(json.dumps, written)))
  (folder / 'BFCL_v4_multi_turn_base.json').write_text('{}')
  found = benchmarks.open_benchmark('bfcl', tmp_path)
  whole = benchmarks.open_benchmark('bfcl', data_dir / 'bfcl' / 'multiple.dev.jsonl')
  assert [r['expected_calls'] for r in found.records] == [
    r['expected_calls'] for r in whole.records[:5]]
  (folder / 'possible_answer' / 'BFCL_v4_multiple.json').write_text('')
  benchmark_rows._possible_answers.cache_clear()
  with pytest.raises(ValueError, match='multiple.json, line 1: multiple with 0 calls as ground'):
    benchmarks.open_benchmark('bfcl', tmp_path)


def test_instructions_strict_and_loose(data_dir, router):
  benchmark = benchmarks.open_benchmark('ifeval', data_dir)
  assert len(benchmark.records) == 271
  chosen = [{'id': 'x', 'kwargs': {}, 'messages': [{'role': 'user', 'content': 'a'}],
             'verifiers': {'instructions': 1.0}, 'instructions': rules} for rules in (
    [{'id': 'punctuation:no_comma', 'kwargs': {}}],
    [{'id': 'punctuation:no_comma', 'kwargs': {}},
     {'id': 'change_case:english_lowercase', 'kwargs': {}}])]
  said = [say('Sure, here it is:\nall is well'), say('all is Well')]
  scores = benchmarks.score(benchmark, chosen, said, router)
  assert [each.value for each in scores] == [0, 0]
  assert scores[0].details == {'strict_instructions': [0], 'loose': 1, 'loose_instructions': [1]}
  assert scores[1].details == {
    'strict_instructions': [1, 0], 'loose': 0, 'loose_instructions': [1, 0]}
  result = benchmarks.summarise(scores)
  assert result['strict_instructions'] == 1 / 3 and result['loose_instructions'] == 2 / 3
  kept = benchmarks.score(benchmark, benchmark.records[:40], [say('')] * 40, router)
  assert {each.value for each in kept} == {0.0}


def test_what_the_machinery_fails_to_judge_is_missing(router):
  record = {'id': 'x', 'messages': [{'role': 'user', 'content': 'a'}], 'verifiers': {'code': 1.0},
            'tests': {'kind': 'unheard of'}}
  benchmark = benchmarks.open_benchmark('tasks:size=1')
  score, = benchmarks.score(benchmark, [record], [say('x')], router)
  assert score.value is None and 'unheard of' in score.missing
  assert benchmarks.summarise([score]) == {'value': None, 'missing': 1, 'groups': {}}
  good = benchmarks.Score(1.0)
  assert benchmarks.summarise([score, good])['value'] == 1.0


# What is generated.

@pytest.mark.parametrize('name', ['tasks', 'thinkfollow', 'lengthctrl', 'counterfact', 'tooluse'])
def test_generated_benchmarks_are_the_same_for_everybody(name):
  made = [benchmarks.open_benchmark(name, limit=12) for _ in range(2)]
  assert made[0] == made[1] and made[0].files == ('generated',)
  records = made[0].records
  assert len(records) == len({json.dumps(r['messages']) for r in records}) == 12
  other = benchmarks.open_benchmark(f'{name}:seed=5,size=12')
  assert other.records != records and len(other.records) == 12
  if name != 'thinkfollow':
    assert not any('enable_thinking' in r or 'mode' in r['verifiers'] for r in records)


def test_flags_are_obeyed_or_not(router):
  benchmark = benchmarks.open_benchmark('thinkfollow:difficulty=1-2', limit=40)
  assert benchmark.modes == (True,)
  def answer(thinks):
    block = '<think>\nSo.\n</think>\n\n' if thinks else '<think>\n\n</think>\n\n'
    return Response.read(f'{block}Yes.', 9)
  wanted = [record['group'].startswith('/think') for record in benchmark.records]
  assert sum(wanted) == 20
  assert grade(benchmark, list(map(answer, wanted)), router)['value'] == 1
  always = grade(benchmark, [answer(True)] * 40, router)
  assert always['value'] == 0.5
  assert {mean for group, mean in always['groups'].items() if '/no_think' in group} == {0.0}


def test_lengths_and_premises(router):
  lengths = benchmarks.open_benchmark('lengthctrl', limit=30)
  def write(record, factor):
    unit, target = record['limit']['unit'], record['limit']['max']
    return say(('well ' if unit == 'words' else 'It is so. ') * round(factor * target))
  assert grade(lengths, [write(r, 1) for r in lengths.records], router)['value'] == 1
  half = grade(lengths, [write(r, 0.5) for r in lengths.records], router)['value']
  assert abs(half - 0.5) < 0.05
  assert grade(lengths, [write(r, 2) for r in lengths.records], router)['value'] == 0
  premises = benchmarks.open_benchmark('counterfact')
  assert len(premises.records) == 72
  always = grade(premises, [say('\\boxed{false}')] * 72, router)
  assert always['groups'] == {'false premise': 1.0, 'true premise': 0.0}
  asked = [record['messages'][0]['content'] for record in premises.records]
  assert len(set(asked)) == 72
  known = {question.format(*pair) for question, pairs in benchmark_made.ASKED for pair in pairs}
  for record, text in zip(premises.records, asked):
    assert (text.split('\n\n')[1] in known) == (record['answer'] == 'true')


def test_tools_that_are_generated(router):
  benchmark = benchmarks.open_benchmark('tooluse', limit=30)
  result = grade(benchmark, list(map(benchmark_rows.solve, benchmark.records)), router)
  assert result['value'] == 1
  assert set(result['groups']) == {'tools', 'tools_many', 'tools_none'}


# Files.

AIME = {'id': 60, 'problem': 'Find $x$.', 'answer': '033', 'url': 'x', 'year': '2024'}
ARC = {'id': 'a', 'question': 'Why?', 'choices': {'text': ['x', 'y'], 'label': ['1', '2']},
       'answerKey': '2'}
STEM = {'id': 'a', 'question': {'stem': 'Why?', 'choices': [
  {'text': 'x', 'label': 'A'}, {'text': 'y', 'label': 'B'}]}, 'answerKey': 'B'}


def test_shapes_of_rows(tmp_path):
  def read(shape, row, name='x.jsonl'):
    return benchmark_rows.finish(shape(row, tmp_path / name), row, 'b')
  assert read(benchmark_rows.aime, AIME)['answer'] == '33'
  assert read(benchmark_rows.aime, {'Problem': 'a', 'Answer': 204})['answer'] == '204'
  for row in (ARC, STEM, {'question': 'Why?', 'choices': ['x', 'y'], 'answer': 'B'},
              {'question': 'Why?', 'A': 'x', 'B': 'y', 'C': 'z', 'D': 'w', 'answer': 'B'},
              {'question': 'Why?', 'options': ['x', 'y'], 'answer': 'B', 'answer_index': 1},
              ['Why?', 'x', 'y', 'B']):
    record = read(benchmark_rows.choice, row, 'high_school_physics_test.csv')
    assert (record['gold'], record['answer'], record['asked']) == (1, 'B', 'Why?')
    assert record['choices'][:2] == ['x', 'y'] and '(B) y' in record['messages'][0]['content']
  assert record['group'] == 'high_school_physics'
  row = {'Question': 'Why? ', 'Correct Answer': 'so\n', 'Incorrect Answer 1': 'p',
         'Incorrect Answer 2': 'q', 'Incorrect Answer 3': 'r'}
  record = read(benchmark_rows.gpqa, row)
  assert record['choices'][record['gold']] == 'so' and sorted(record['choices']) == list('pqr') + [
    'so']
  assert record == read(benchmark_rows.gpqa, row)
  assert benchmark_rows.mbpp({'task_id': 601, 'text': 'a', 'test_list': ['assert f() == 1']},
                             tmp_path / 'mbpp.jsonl') is None  # a training row of the whole file
  record = read(benchmark_rows.mgsm, ['¿Cuántos?', '1,000'], 'mgsm_es.tsv')
  assert (record['group'], record['answer']) == ('es', '1000')
  record = read(benchmark_made.counterfact, {'question': 'Why?', 'reference': 'It is not.'})
  assert record['verifiers'] == {'judge': 1.0}


def test_every_kind_of_file(tmp_path):
  rows = [{'question': f'{k} + 1?', 'answer': f'so\n#### {k + 1}'} for k in range(3)]
  (tmp_path / 'a.json').write_text(json.dumps(rows))
  (tmp_path / 'b.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'b.jsonl').read_bytes()))
  (tmp_path / 'd.json').write_text((tmp_path / 'b.jsonl').read_text())
  (tmp_path / 'e.csv').write_text('question,answer\n' + ''.join(
    f'{row["question"]},"{row["answer"]}"\n' for row in rows))
  names = ['a.json', 'b.jsonl', 'c.jsonl.gz', 'd.json', 'e.csv']
  arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / 'f.parquet')
  found = [benchmarks.open_benchmark('gsm8k', tmp_path / name).records
           for name in [*names, 'f.parquet']]
  assert all(each == found[0] for each in found)
  assert [record['answer'] for record in found[0]] == ['1', '2', '3']
  question = found[0][0]['messages'][0]['content']
  assert question == f'0 + 1?\n{benchmark_rows.STEPS}'


@pytest.mark.parametrize('name, row, complaint', [
  ('gsm8k', {'question': '', 'answer': '1'}, "'' where a text should be"),
  ('gsm8k', {'question': 'a'}, 'no answer'), ('math', [], 'not an object'),
  ('aime24', AIME | {'answer': '1000'}, "the answer is '1000'; wanted problem"),
  ('aime25', AIME | {'problem': '\frac{1}{2}'}, 'control character .* a backslash was lost'),
  ('svamp', {'Body': 'a', 'Question': 'b'}, "no field 'answer'"),
  ('mgsm', {'question': 'a', 'answer': 'nan'}, "the answer is 'nan'"),
  ('mmlu', {'question': 'a', 'choices': ['x', 'y'], 'answer': 2}, 'the answer 2 is none of 2'),
  ('arc', ARC | {'answerKey': 'E'}, "the answer 'E' is none"),
  ('gpqa', {'Question': 'a', 'Correct Answer': 'b'}, "no field 'incorrect answer 1'"),
  ('arc_agi', {'train': [], 'test': [{'input': [[1]], 'output': [[1, 2], [3]]}]}, 'no grid'),
  ('humaneval', {'prompt': 'def f', 'entry_point': 'g', 'test': 'check'}, 'does not name the entr'),
  ('mbpp', {'task_id': 11, 'text': 'a', 'test_list': []}, r'test_list is \[\]'),
  ('ifeval', {'prompt': 'a', 'instruction_id_list': ['x:y'], 'kwargs': [{}]}, "no rule 'x:y'"),
  ('bfcl', {'id': 'simple_1', 'question': [[]], 'function': []}, 'simple with 0 calls'),
  ('thinkfollow', {'messages': [{'role': 'user', 'content': 'a'}]}, 'no flag in the messages'),
  ('lengthctrl', {'prompt': 'a', 'target': 3, 'unit': 'pages'}, "target 3 'pages'"),
  ('counterfact', {'question': 'a'}, "no field 'reference'"),
  ('tooluse', {'tools': [], 'expected_calls': [{'f': {}}]}, r"calls of \['f'\]")])
def test_spoilt_rows_are_refused_by_file_and_line(tmp_path, name, row, complaint):
  path = tmp_path / 'rows.jsonl'
  path.write_text(f'\n{json.dumps(row)}\n')
  with pytest.raises(ValueError, match=f'rows.jsonl, line 2: .*{complaint}'):
    benchmarks.open_benchmark(name, path)
  with pytest.raises(ValueError, match='there is no question of'):
    benchmarks.open_benchmark(name, path, skip_bad=True)


def test_spoilt_files(tmp_path):
  for name, content, complaint in (
      ('a.jsonl', '{"question"', 'a.jsonl, line 1: not JSON'),
      ('b.csv', 'question,answer\na,1\nb\n', 'b.csv, line 3: 1 cells under 2 names'),
      ('c.parquet', 'PAR', 'not a Parquet file|pip install pyarrow'),
      ('d.json', '{"a": ', 'd.json, line 1: not JSON')):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
      benchmarks.open_benchmark('gsm8k', tmp_path / name)
  (tmp_path / 'e.jsonl').write_text('{"question": "a", "answer": "1"}\n{"question": \n')
  found = benchmarks.open_benchmark('gsm8k', tmp_path / 'e.jsonl', skip_bad=True)
  assert len(found.records) == 1 and found.rejected == {'not JSON': 1}


# Choosing.

def test_names_and_folders(tmp_path):
  with pytest.raises(ValueError, match="no benchmark 'gsm9k'; did you mean 'gsm8k'"):
    benchmarks.open_benchmark('gsm9k')
  with pytest.raises(ValueError, match='there are: gsm8k, math, '):
    benchmarks.open_benchmark('zzzz')
  with pytest.raises(ValueError, match='gsm8k is scored by generate'):
    benchmarks.open_benchmark('gsm8k:choices', tmp_path)
  with pytest.raises(FileNotFoundError, match='aime24: no file aime24/.* get them from https://'):
    benchmarks.open_benchmark('aime24', tmp_path)
  with pytest.raises(FileNotFoundError, match='which folder holds its data'):
    benchmarks.open_benchmark('aime24')
  with pytest.raises(ValueError, match='lengthctrl has no option .*difficulty.* it has size, seed'):
    benchmarks.open_benchmark('lengthctrl:difficulty=3')
  folder = tmp_path / 'aime24'
  folder.mkdir()
  (folder / 'README.md').write_text('Not a question.')
  (folder / 'test.jsonl').write_text(json.dumps(AIME))
  for where in (tmp_path, folder, folder / 'test.jsonl'):
    assert len(benchmarks.open_benchmark('aime24', where).records) == 1


def test_settings_are_those_of_the_report(tmp_path):
  (tmp_path / 'aime24.jsonl').write_text(json.dumps(AIME))
  aime = benchmarks.open_benchmark('aime24', tmp_path)
  assert (aime.samples, aime.max_tokens) == (64, 38_912)
  assert aime.sampling(True) == dataclasses.replace(THINKING, max_tokens=38_912)
  plain = aime.sampling(False)
  assert plain == dataclasses.replace(NON_THINKING, max_tokens=38_912)
  assert (plain.presence_penalty, aime.sampling(True).presence_penalty) == (1.5, None)
  assert benchmarks.find('gpqa').samples == 10 and benchmarks.find('gsm8k').max_tokens == 32_768
  told = benchmarks.describe()
  assert all(f'{name}: ' in told for name in benchmarks.NAMES) and '64 answers' in told


def test_a_limit_takes_from_everywhere(data_dir):
  file = data_dir / 'svamp_cmath_mmlu' / 'mmlu_stem_dev.jsonl'
  few = benchmarks.open_benchmark('mmlu', file, limit=20)
  whole = benchmarks.open_benchmark('mmlu', file)
  assert len(few.records) == 20 and all(record in whole.records for record in few.records)
  assert len({record['group'] for record in few.records}) > 8
  with pytest.raises(ValueError, match='the limit of questions is 0'):
    benchmarks.open_benchmark('mmlu', file, limit=0)


def test_both_likelihoods_of_choices(data_dir):
  file = data_dir / 'svamp_cmath_mmlu' / 'mmlu_stem_dev.jsonl'
  letters, texts = (benchmarks.open_benchmark(f'mmlu:{kind}', file, limit=3)
                    for kind in ('choices', 'texts'))
  assert letters.scoring == texts.scoring == 'choices' and letters.name == 'mmlu:choices'
  one, other = letters.records[0], texts.records[0]
  assert one['continuations'] == [' A', ' B', ' C', ' D']
  assert one['prompt'].endswith(f'\nD. {one["choices"][3]}\nAnswer:')
  assert other['continuations'] == [f' {text}' for text in other['choices']]
  assert other['prompt'] == f'Question: {other["asked"]}\nAnswer:'
  assert query_files.normalise({'question': 'a', 'answer': 1}, 'x')['verifiers']['mode'] == 0.0


def test_texts(data_dir, tmp_path):
  benchmark = benchmarks.open_benchmark('perplexity', data_dir / 'lm_text/tinyshakespeare.txt.gz')
  assert benchmark.scoring == 'perplexity' and benchmark.modes == (False,)
  assert sum(len(record['text']) for record in benchmark.records) > 1_000_000
  assert len(benchmarks.open_benchmark('perplexity', 'stdlib:prose', limit=3).records) == 3
  with pytest.raises(FileNotFoundError):
    benchmarks.open_benchmark('perplexity', tmp_path / 'nothing.txt')
