"""Evaluations of a random model: what is kept, what a kill costs, what scores say of texts."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from qwen3_jax import mesh
from qwen3_jax.evaluation import benchmarks, run, store, summary
from qwen3_jax.generation import engine
from qwen3_jax.model import transformer
from qwen3_jax.rewards import code
from qwen3_jax.rewards.router import Router
from qwen3_jax.rewards.sandbox import Sandbox
from tests.generation.conftest import model, tokenizer  # noqa: F401 (fixtures)

SPEC = 'tasks:kinds=chain+coin,difficulty=1,size=40'
pytestmark = pytest.mark.usefixtures('quick_compilation')


def ask(limit=6, samples=2, budgets=(), modes=('thinking',), **options):
  return run.make_asks([benchmarks.open_benchmark(SPEC, limit=limit)], modes, samples, budgets,
                       **dict(max_tokens=8) | options)


@pytest.fixture
def drawn(monkeypatch):
  """The requests that engines are given from now on."""
  found, steps = [], engine.Engine.steps
  def spy(self, requests, *more, **options):
    found.extend(requests)
    return steps(self, requests, *more, **options)
  monkeypatch.setattr(engine.Engine, 'steps', spy)
  return found


@pytest.fixture(scope='module')
def router():
  found = Router()
  yield found
  found.close()


@pytest.fixture
def play(model, tokenizer, router):  # noqa: F811
  return lambda asks, to, **options: run.evaluate(
    (model, tokenizer), asks, to, 'random', **dict(rows=1, router=router) | options)


def read(to):
  """{(mode and budget, key): line} of all that is kept."""
  found = {}
  for path in to.glob('generations/*/*.jsonl'):
    for line in map(json.loads, path.read_text().splitlines()):
      found.setdefault((path.parent.name, line['key']), {}).update(line)
  return found


def test_all_is_kept_and_nothing_is_drawn_twice(play, tmp_path, drawn):
  asks, told = ask(3, budgets=(0, 3), modes=('thinking', 'plain')), []
  first = play(asks, tmp_path, progress=told.append)
  assert [(part['mode'], part['budget']) for part in first['parts']] == [
    ('thinking', None), ('thinking', 0), ('thinking', 3), ('plain', None)]
  assert len(drawn) == len(read(tmp_path)) == 4 * 6
  assert all(part['count'] == 3 and part['samples'] == 2 and not part['missing']
             for part in first['parts'])
  assert first['parts'][1]['forced'] == 1.0 and first['parts'][0]['forced'] == 0.0
  ended = [state for state in told if state['ended']]
  assert len(ended) == 4 and all(state['done'] == state['total'] == 3 for state in ended)
  drawn.clear()
  before = {path: path.read_bytes() for path in tmp_path.glob('generations/*/*.jsonl')}
  assert play(asks, tmp_path)['parts'] == first['parts'] and not drawn
  assert {path: path.read_bytes() for path in before} == before


def test_more_samples_or_questions_draw_only_what_is_new(play, tmp_path, drawn):
  play(ask(3, 1), tmp_path)
  kept = read(tmp_path)
  drawn.clear()
  play(ask(3, 3), tmp_path)
  assert len(drawn) == 6 and kept.items() <= read(tmp_path).items()
  other = play(ask(3, 3, seed=1), tmp_path)
  assert len(drawn) == 15 and len(other['parts']) == 1


class Interrupted(Exception):
  pass


def test_interrupted_anywhere_it_ends_in_the_same_table(play, tmp_path, drawn):
  """Between problems and within one: what was kept is not drawn again, the table is the same."""
  asks = ask(6, 3)
  whole = play(asks, tmp_path / 'whole')
  drawn.clear()
  for least in (4, 9):  # a problem has three samples
    def cut(state, least=least):
      if len(read(tmp_path / 'cut')) >= least:
        raise Interrupted
    with pytest.raises(Interrupted):
      play(asks, tmp_path / 'cut', progress=cut)
    kept = len(read(tmp_path / 'cut'))
    assert kept == least
  drawn.clear()
  parts = play(asks, tmp_path / 'cut')['parts']
  assert parts == whole['parts'] and len(drawn) == 18 - kept
  assert read(tmp_path / 'cut') == read(tmp_path / 'whole')


def test_what_a_sample_draws_depends_on_nothing_else(play, tmp_path):
  asks, = ask(6, 2)
  turned = dataclasses.replace(asks, benchmark=dataclasses.replace(
    asks.benchmark, records=asks.benchmark.records[:1:-1]))
  play([turned], tmp_path / 'turned')
  play([asks], tmp_path / 'all', rows=2)
  few, all = read(tmp_path / 'turned'), read(tmp_path / 'all')
  assert len(few) == 8 and few.items() <= all.items()
  assert len({line['text'] for line in all.values()}) == 12


@pytest.mark.slow
def test_under_a_mesh_the_same_is_drawn(play, tmp_path):
  asks = ask(4, 1)
  play(asks, tmp_path / 'one')
  play(asks, tmp_path / 'two', mesh=mesh.make_mesh(devices=jax.devices()[:2]))
  assert read(tmp_path / 'one') == read(tmp_path / 'two')


def texts(record, right):
  """A line as the engine's output would make it."""
  answer = record['answer'] if right else f'{record["answer"]}1'
  text = f'<think>\nhm, {record["answer"]}\n</think>\n\nThe answer is {answer}.'
  return dict(id=record['id'], text=text, tokens=9, finish='stop')


def fill(part, asks, right, router):
  """Keeps made answers; `right(problem, sample)` says which are right."""
  places = {record['id']: i for i, record in enumerate(asks.benchmark.records)}
  part.add([dict(key=key, sample=sample, **texts(record, right(places[record['id']], sample)))
            for key, (record, sample) in asks.jobs.items()])
  assert run._score(asks, part, router, list(part.lines)) == len(part.lines)


@pytest.fixture
def made(tmp_path, router):
  """A part of 6 problems x 4 samples of known worth, and its results."""
  asks, = ask(6, 4)
  with asks.open(tmp_path, 'abc') as part:
    fill(part, asks, lambda problem, sample: sample < problem - 1, router)  # 0 0 1 2 3 4 of 4
    result = summary.keep(dict(model='played', fingerprint='abc', parts=[
      summary.summarise(asks, part)]), tmp_path)
  return asks, result['parts'][0]


def test_rates_are_those_of_the_answers(made):
  _, part = made
  assert part['rate'] == pytest.approx(10 / 24) and part['count'] == 6
  assert part['low'] < 10 / 24 < part['high']
  assert part['pass']['1']['rate'] == pytest.approx(10 / 24)
  assert part['pass']['4']['rate'] == pytest.approx(4 / 6)
  assert part['pass']['2']['rate'] == pytest.approx((3 / 6 + 5 / 6 + 1 + 1) / 6)
  # The wrong answers of a problem agree: 1 of 4 is voted down, 2 of 4 tie.
  assert part['maj']['4']['rate'] == pytest.approx((0 + 0.5 + 1 + 1) / 6)
  assert set(part['groups']) == {'tasks:chain', 'tasks:coin'}


def test_scores_computed_anew_equal_those_kept(made, router, tmp_path):
  asks, before = made
  found, = run.rescore([asks.benchmark], tmp_path, router)
  assert (found['count'], found['changed']) == (24, 0)
  with asks.open(tmp_path, 'abc') as part:
    key = next(key for key, line in part.lines.items() if line['score'] == 1)
    part.add([dict(key=key, score=0.0)])
    worse = summary.summarise(asks, part)
  assert worse['rate'] < before['rate']
  found, = run.rescore([asks.benchmark], tmp_path, router)
  assert (found['count'], found['changed']) == (24, 1)
  (_, result), = summary.read_results(tmp_path)
  assert result['parts'] == [before]
  with pytest.raises(FileNotFoundError, match='evaluate a model with --to='):
    list(run.rescore([asks.benchmark], tmp_path / 'none', router))


def test_a_missing_score_is_no_zero_and_is_asked_for_again(play, tmp_path, drawn):
  asks, = ask(4, 1)
  before = play([asks], tmp_path)
  drawn.clear()
  with asks.open(tmp_path, before['fingerprint']) as part:
    key = next(iter(part.lines))
    part.add([dict(key=key, score=None, missing='the machine burned')])
    found = summary.summarise(asks, part)
    assert found['missing'] == 1 and found['count'] == 3
  assert play([asks], tmp_path)['parts'] == before['parts'] and not drawn


def test_texts_that_were_kept_before_their_scores_are_scored(made, play, tmp_path, drawn):
  """A kill between the two costs no generation."""
  asks, = ask(4, 1)
  before = play([asks], tmp_path)
  path, = tmp_path.glob(f'generations/{before["parts"][0]["folder"]}/*.jsonl')
  path.write_bytes(b''.join(line for line in path.read_bytes().splitlines(True)
                            if b'"text"' in line))
  drawn.clear()
  assert play([asks], tmp_path)['parts'] == before['parts'] and not drawn


def test_a_prompt_too_long_is_missing(play, tmp_path, drawn):
  asks, = ask(3, 1)
  long = asks.benchmark.records[0] | dict(messages=[dict(role='user', content='x y ' * 600)])
  asks = dataclasses.replace(asks, benchmark=dataclasses.replace(
    asks.benchmark, records=(long, *asks.benchmark.records[1:])))
  part, = play([asks], tmp_path)['parts']
  assert (part['count'], part['missing'], len(drawn)) == (2, 1, 2)
  assert play([asks], tmp_path)['parts'] == [part] and len(drawn) == 2


def test_code_is_refused_where_no_sandbox_is(play, tmp_path, monkeypatch, drawn):
  monkeypatch.setattr(code, 'SANDBOX', Sandbox(python='/nowhere/python'))
  asks, = ask(2, 1)
  record = dict(id='c', messages=[dict(role='user', content='?')], verifiers={'code': 1.0},
                tests=dict(kind='stdio', cases=[dict(input='', output='')]))
  asks = dataclasses.replace(asks, benchmark=dataclasses.replace(asks.benchmark, records=(record,)))
  with pytest.raises(RuntimeError, match='no sandbox'):
    play([asks], tmp_path, router=None)
  assert not drawn and not list(tmp_path.iterdir())


def test_likelihoods_are_kept_too(play, tmp_path):
  data = tmp_path / 'data'
  (data / 'mmlu').mkdir(parents=True)
  (data / 'mmlu/test.jsonl').write_text(''.join(json.dumps(dict(
    question=f'Which fox is number {i}?', choices=['quick', 'brown', 'lazy', 'dog'], answer=i % 4,
    subject='foxes' if i % 2 else 'dogs')) + '\n' for i in range(8)))
  (data / 'texts.jsonl').write_text(''.join(json.dumps(dict(
    text=f'the quick brown fox number {i} jumps over a lazy dog')) + '\n' for i in range(5)))
  asks = run.make_asks([benchmarks.open_benchmark('mmlu:choices', data),
                        benchmarks.open_benchmark('perplexity', data / 'texts.jsonl')])
  result = play(asks, tmp_path / 'to')
  choices, texts = result['parts']
  assert choices['count'] == 8 and set(choices['groups']) == {'foxes', 'dogs'}
  assert 0 <= choices['rate'] <= 1 and 'normalised' in choices['details']
  assert texts['low'] < texts['rate'] < texts['high']
  assert texts['rate'] == pytest.approx(texts['details']['bits_per_byte'])
  kept = read(tmp_path / 'to')
  assert len(kept) == 13 and play(asks, tmp_path / 'to')['parts'] == result['parts']
  assert read(tmp_path / 'to') == kept


def test_a_fingerprint_tells_models_apart(model, tokenizer):  # noqa: F811
  known = run.fingerprint(model, tokenizer)
  split = jax.device_put(model, jax.tree.map(lambda w: jax.sharding.NamedSharding(
    mesh.make_mesh(devices=jax.devices()[:2]), jax.P()), model))
  assert run.fingerprint(split, tokenizer) == known
  changed = jax.tree.map(lambda w: w, model)
  w = np.array(changed.embed_VD[...])
  w[7, 3] = np.nextafter(w[7, 3], np.float32(9))
  changed.embed_VD[...] = w
  swapped = jax.tree.map(lambda w: w, model)
  swapped.embed_VD[...] = np.array(model.embed_VD[...])[::-1]
  narrow = transformer.cast(model, jax.numpy.bfloat16)
  marks = {run.fingerprint(each, tokenizer) for each in (changed, swapped, narrow)} | {known}
  assert len(marks) == 4


def test_what_cannot_be_asked_is_refused():
  with pytest.raises(ValueError, match="no mode 'loud'"):
    ask(modes=('loud',))
  followed = benchmarks.open_benchmark(SPEC, limit=2)
  followed = dataclasses.replace(followed, modes=(True,))
  with pytest.raises(ValueError, match='is asked in the mode plain'):
    run.make_asks([followed], ('plain',))


def test_settings_are_those_of_the_report():
  thinking, plain = run.make_asks([benchmarks.open_benchmark(SPEC, limit=2)])
  assert dataclasses.astuple(thinking.sampling)[:4] == (0.6, 20, 0.95, None)
  assert (plain.sampling.temperature, plain.sampling.top_p) == (0.7, 0.8)
  assert (thinking.sampling.presence_penalty, plain.sampling.presence_penalty) == (None, 1.5)
  assert thinking.sampling.max_tokens == 32_768 and store.digest(1) != store.digest('1')
