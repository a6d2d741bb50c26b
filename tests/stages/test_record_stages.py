"""What each record stage decides, with a model whose answers the test writes."""
import json
import random

import pytest

from qwen3_jax.data import tasks
from qwen3_jax.generation.respond import Answer, Failure
from qwen3_jax.stages import annotate, candidates, queries, rules, synthesis
from qwen3_jax.stages.records import Accept, Fail, Rows


class Scripted:
  """A responder: `said(question, k, enable_thinking)` gives an Answer, its content or a Failure."""

  def __init__(self, said):
    self.said, self.asked = said, []

  def respond(self, conversations, n=1, sampling=None, enable_thinking=True, first=0):
    found = []
    for conversation in conversations:
      question = conversation[-1]['content']
      self.asked.append(question)
      each = [self.said(question, k, enable_thinking) for k in range(first, first + n)]
      failure = next((a for a in each if isinstance(a, Failure)), None)
      found.append(failure or [a if isinstance(a, Answer) else Answer(a, '', a, 'stop')
                               for a in each])
    return found


def begin(begin_stage, said, **options):
  responder = Scripted(said)
  return begin_stage(None, model=lambda: responder, **options), responder


def query(k, **fields):
  return dict(id=f'q{k}', question=f'What is {k} + {k}?', answer=str(2 * k)) | fields


def told(decisions):
  """[(kind, id, rule)] of decisions."""
  return [(type(d).__name__, d.record['id'], getattr(d, 'rule', None)) for d in decisions]


def test_right_answers_of_all_kinds():
  assert queries.is_right(query(2), 'So it is \\boxed{4}.')
  assert not queries.is_right(query(2), 'So it is 5.') and not queries.is_right(query(2), '')
  assert queries.is_right(dict(question='?', answer='B', kind='choice'), 'The answer is (B).')
  made = tasks.task('sort', 3, 2)
  record = dict(question=made.question, answer=made.answer, kind='sort', seed=3, difficulty=2)
  assert queries.is_right(record, f'Answer: [{made.answer}]')
  assert not queries.is_right(record, 'Answer: ' + ', '.join(reversed(made.answer.split(', '))))


def test_judge_of_verifiability():
  said = {'q0': '{"verifiable": true}', 'q1': '{"verifiable": false, "reason": "an essay"}',
          'q2': '{"verifiable": "maybe"}', 'q3': Failure('down')}
  decide, responder = begin(queries.begin_judging,
                            lambda q, k, _: next(v for n, v in said.items() if f'<{n}>' in q))
  found = decide([query(k, question=f'<q{k}> {{braces}}') for k in range(4)])
  assert told(found) == [('Accept', 'q0', None), ('Reject', 'q1', 'not verifiable'),
                         ('Fail', 'q2', None), ('Fail', 'q3', None)]
  assert found[1].reason == 'the judge says: an essay' and found[3].reason == 'down'
  assert found[2].reason.startswith('no verdict in 3 answers')
  assert 'Reference answer: 0' in responder.asked[0] and '{braces}' in responder.asked[0]


def test_what_is_solved_without_thinking_goes():
  """q1 is right in 1 of 4, q2 in 2; the model must not think, and is asked in the given words."""
  def said(question, k, thinking):
    assert not thinking and question.endswith('Box it.')
    if 'is 3' in question:
      return Failure('down')
    n = int(question.split()[2])
    return f'\\boxed{{{2 * n if k < n else 0}}}'
  decide, _ = begin(queries.begin_solving, said, tries=4, right=2, prompt='{question} Box it.')
  found = decide([query(k) for k in (1, 2, 3)])
  assert told(found) == [('Accept', 'q1', None), ('Reject', 'q2', 'solved without thinking'),
                         ('Fail', 'q3', None)]
  assert found[0].record['right_without_thinking'] == 1 and found[1].reason == '2 right of 4'


def test_domains_are_capped_by_the_seed(tmp_path):
  """The cap is exact, the choice depends on neither the order nor the batches, but on the seed."""
  records = [query(k, labels=dict(domain='ab'[k % 3 == 0])) for k in range(60)]

  def keep(records, seed, size=7):
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    options = dict(cap=15, seed=seed)
    survey = queries.survey_domains(Rows([tmp_path / 'in.jsonl']), **options)
    (tmp_path / 'survey.json').write_text(json.dumps(survey))
    kept = []
    for start in range(0, 60, size):  # begun anew each time, as after a kill
      (tmp_path / 'accepted.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in kept))
      decide = queries.begin_balancing(tmp_path, **options)
      kept += [d.record for d in decide(records[start:start + size]) if isinstance(d, Accept)]
    return {r['id'] for r in kept}
  kept = keep(records, 0)
  domains = [('b' if int(name[1:]) % 3 == 0 else 'a') for name in kept]
  assert (domains.count('a'), domains.count('b')) == (15, 15)
  assert keep(random.Random(0).sample(records, 60), 0, 11) == kept != keep(records, 1)
  assert queries.domain_of(dict(type='Algebra'), 'type') == 'Algebra'
  assert queries.domain_of({}, 'type') == 'unknown'


def test_candidates_and_the_pass_rate():
  """q1 has 1 right of 4, q0 none: a person should look at it."""
  def said(question, k, thinking):
    assert thinking
    n = int(question.split()[2])
    if n == 2:
      return Failure('down')
    return Answer('?', f'thought {k}', f'It is {2 * n if k < n else -1}.', 'stop')
  decide, _ = begin(candidates.begin_candidates, said, n=4, prompt='{question} Go.')
  none, one, down = decide([query(0), query(1), query(2)])
  assert isinstance(down, Fail) and down.reason == 'down' and down.record == query(2)
  assert (none.rule, none.reason) == ('no right answer', 'no right answer in 4')
  assert len(none.record['candidates']) == 4
  assert one.record['pass_rate'] == 0.25 and one.record['asked'] == 'What is 1 + 1? Go.'
  assert [c['right'] for c in one.record['candidates']] == [True, False, False, False]
  assert one.record['candidates'][1]['reasoning'] == 'thought 1'


def test_given_candidates_need_no_model():
  given = query(3, candidates=[dict(reasoning='', content='The answer is 6.',
                                    finish_reason='stop')])
  kept, = candidates.begin_candidates(None)([given])
  assert kept.record['pass_rate'] == 1.0 and 'asked' not in kept.record


GOOD = ('First I take the number 3 and add it to itself, because that is what is asked. '
        'So 3 + 3 = 6, and therefore the result is 6.')


def test_each_fault_of_a_response_is_named(tmp_path):
  test = ('A train leaves the old harbour at nine and travels ninety miles through the hills to '
          'reach the mill before noon; how fast did it go on average?')
  (tmp_path / 'val.jsonl').write_text(json.dumps(dict(question=test, answer='30')) + '\n')
  faults = rules.Faults(True, {}, {}, {}, (tmp_path / 'val.jsonl',), dict(similarity=0.5, width=3))
  russian = 'Теперь мы сложим эти два числа и получим нужный нам ответ, который очень прост.'
  cases = [
    (GOOD, 'The answer is 6.', True, 'stop', None),
    (GOOD, 'The answer is 6.', True, 'length', 'unfinished'),
    (GOOD, '', False, 'stop', 'unfinished'),
    (GOOD, 'The answer is 7.', False, 'stop', 'wrong answer'),
    (GOOD + ' Wait, let me check this again.' * 40, 'The answer is 6.', True, 'stop',
     'repetition'),
    ('Six?', 'The answer is 6.', True, 'stop', 'guess'),
    ('', 'The answer is 6.', True, 'stop', 'guess'),
    (GOOD + '\nThe answer is 8.', 'The answer is 6.', True, 'stop', 'inconsistent'),
    (GOOD + '\n\n' + russian, 'The answer is 6.', True, 'stop', 'language mixing'),
    (GOOD + '\n\nThis is like: ' + test, 'The answer is 6.', True, 'stop', 'close to validation')]
  record = query(3, source='s', candidates=[
    dict(reasoning=r, content=c, right=right, finish_reason=end) for r, c, right, end, _ in cases])
  decisions = candidates.begin_responses(None, faults)([record])
  assert [getattr(d, 'rule', None) for d in decisions] == [case[-1] for case in cases]
  assert [d.record['id'] for d in decisions] == [f'q3/{k}' for k in range(len(cases))]
  assert decisions[0].record == dict(
    messages=[dict(role='user', content='What is 3 + 3?'),
              dict(role='assistant', content='The answer is 6.', reasoning_content=GOOD)],
    id='q3/0', query='q3', source='s', answer='6')
  assert decisions[3].reason == "answers '7', not '6'"
  assert all(d.record['candidate'] and d.record['question'] for d in decisions[1:])


def test_a_worked_solution_is_its_own_reasoning():
  faults = rules.Faults(False, {}, {}, {})
  fine = dict(reasoning='', content=GOOD, right=True, finish_reason='stop')
  assert faults(query(3), fine) is None
  assert faults(query(3), fine | dict(content='It is 6.'))[0] == 'guess'


def test_only_the_shortest_responses_are_kept():
  record = query(3, asked='What is 3 + 3? Box it.', candidates=[
    dict(reasoning=GOOD + ' Good.' * k, content='6', right=True, finish_reason='stop')
    for k in (2, 0, 1)])
  decisions = candidates.begin_responses(None, lambda *_: None, keep=1)([record])
  assert told(decisions) == [('Reject', 'q3/0', 'not needed'), ('Accept', 'q3/1', None),
                             ('Reject', 'q3/2', 'not needed')]
  assert decisions[1].record['messages'][0]['content'] == 'What is 3 + 3? Box it.'


def test_wilson_interval():
  """Values from the textbook formula (Brown, Cai and DasGupta 2001), computed by hand for 8."""
  assert candidates.wilson(0, 8) == pytest.approx((0.0, 0.32441), abs=1e-4)
  assert candidates.wilson(4, 8) == pytest.approx((0.21521, 0.78479), abs=1e-4)
  assert candidates.wilson(8, 8) == pytest.approx((0.67559, 1.0), abs=1e-4)


def test_pass_rate_and_band(tmp_path):
  def said(question, k, thinking):
    n = int(question.split()[2])
    return Failure('down') if n == 9 else Answer(
      '', '', str(2 * n if k < n else -1), 'stop' if k else 'length')
  decide, _ = begin(candidates.begin_pass_rate, said, n=8)
  *rated, down = decide([query(k) for k in (0, 3, 5, 7, 8, 9)])
  assert isinstance(down, Fail)
  rated = [d.record for d in rated]
  assert [r['pass_rate'] for r in rated] == [0, 0.375, 0.625, 0.875, 1]
  assert rated[1] | dict(right=3, tries=8, unfinished=1, interval=[0.1368, 0.6943]) == rated[1]
  used = [dict(messages=[dict(role='user', content='Asked in other words')], id='q3/1',
               query='q3'), dict(messages=[dict(role='user', content='What is 5 + 5?')])]
  (tmp_path / 'cold.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in used))
  def band(**options):
    return told(candidates.begin_band(None, **options)(rated))
  assert [rule for *_, rule in band()] == ['too hard', None, None, None, 'too easy']
  assert [rule for *_, rule in band(high=0.8, used=[tmp_path / 'cold.jsonl'])] == [
    'too hard', 'used before', 'used before', 'too easy', 'too easy']


def test_questions_without_a_check_are_rejected():
  kept, proof, none = rules.begin_verifying(None)([
    query(1), query(2, question='Prove that the sum of two odd numbers is even.'),
    dict(id='q3', question='What is 3?')])
  assert isinstance(kept, Accept)
  assert (proof.rule, none.rule) == ('asks for a proof', 'no reference answer')
  made = tasks.task('divide', 1, 2)  # asks for two numbers, but tasks.check can judge that
  assert rules.judge_question(dict(question=made.question, answer=made.answer, kind='divide')
                              ) is None


def test_texts_are_cleaned():
  decide = rules.begin_cleaning(None, dict(share=0.3), {})
  fine, loop = decide([dict(id='a', text=GOOD), dict(id='b', messages=[
    dict(role='user', content='Say it again and again. ' * 50),
    dict(role='assistant', content='I will not stop saying this. ' * 50)])])
  assert isinstance(fine, Accept) and loop.rule == 'repetition'


def test_the_language_of_the_request_may_occur():
  english = 'The answer is that the two words mean the same thing, but one of them is older.'
  russian = 'Объясни мне по-английски, почему эти два слова сегодня значат одно и то же.'
  text = f'{english}\n\nYou wrote: {russian}\n\n{english}'
  chat = [dict(role='user', content=russian), dict(role='assistant', content=text)]
  decide = rules.begin_cleaning(None, {}, {})
  asked, unasked = decide([dict(id='a', messages=chat), dict(id='b', text=text)])
  assert isinstance(asked, Accept) and unasked.rule == 'language mixing'


def test_duplicates_are_found_after_a_restart_too(tmp_path):
  (tmp_path / 'accepted.jsonl').write_text(json.dumps(dict(id='old', text=GOOD)) + '\n')
  decide = rules.begin_deduplicating(tmp_path, threshold=0.8)
  exact, new, near = decide([dict(id='a', text=GOOD.upper()), dict(id='b', text='Other words.'),
                             dict(id='c', text=GOOD + ' Done.')])
  assert (exact.rule, exact.reason) == ('exact duplicate', 'similarity 1.00 to old')
  assert isinstance(new, Accept) and near.rule == 'near duplicate'


def test_test_items_are_found(tmp_path):
  test = 'Ada has 12 red marbles, 7 blue marbles and 31 green marbles. How many has she in all?'
  (tmp_path / 'test.jsonl').write_text(json.dumps(dict(problem=test)) + '\n')
  decide = rules.begin_decontaminating(None, tests=[tmp_path / 'test.jsonl'])
  found, fine = decide([dict(id='a', question=test.lower(), answer='50'), query(1)])
  assert found.rule == 'contaminated' and 'test item test:1' in found.reason
  assert isinstance(fine, Accept)
  (tmp_path / 'test.jsonl').write_text('{"n": 1}\n')
  with pytest.raises(ValueError, match='test, line 1: the record has n; a test item has question'):
    rules.begin_decontaminating(None, tests=[tmp_path / 'test.jsonl'])


LABELS = '{"education": 4, "domain": "Science", "safety": "safe"}'


def test_labels_are_stored_and_garbage_fails():
  said = dict(a=LABELS, b='Sure! {"education": 9, "domain": "science", "safety": "safe"}',
              c='{"education": 1, "domain": "gossip", "safety": "safe"}', d='no', e=Failure('down'),
              f='{"education": 1, "domain": "law", "safety": "UNSAFE"}')
  decide, responder = begin(annotate.begin_annotating,
                            lambda q, *_: said[q.split('<')[1][0]], safe_only=True, characters=20)
  found = decide([dict(id=name, text=f'<{name}> ' + 'x' * 99, labels=dict(mine=1))
                  for name in said])
  assert told(found) == [('Accept', 'a', None), ('Fail', 'b', None), ('Fail', 'c', None),
                         ('Fail', 'd', None), ('Fail', 'e', None), ('Reject', 'f', 'unsafe')]
  assert found[0].record['labels'] == dict(mine=1, education=4, domain='science', safety='safe')
  assert 'education 9: wanted a whole number' in found[1].reason
  assert "domain 'gossip': wanted one of mathematics" in found[2].reason
  assert 'x' * 16 + ' [...]' in responder.asked[0] and 'x' * 17 not in responder.asked[0]
  assert 'mathematics, science' in responder.asked[0] and '{"education"' in responder.asked[0]


def test_little_to_learn_is_rejected():
  decide, _ = begin(annotate.begin_annotating, lambda *_: LABELS, least_education=5)
  found, = decide([query(1)])
  assert (found.rule, found.reason) == ('little to learn', 'education value 4, want 5 or more')


def test_synthetic_texts_have_the_form_asked_for():
  """A seed of which one kind fails is tried again for that kind alone."""
  good = dict(textbook='A section on tides.', qa='Question: Why?\nAnswer: The moon.',
              instruction='Instruction: Explain.\nResponse: Gladly.',
              code='It adds.\n\n```python\nprint(1 + 1)\n```')
  broken = {'qa'}

  def said(question, k, _):
    kind = next(name for name, template in synthesis.TEMPLATES.items() if template in question)
    if kind in broken:
      return Failure('down')
    return good[kind] if 'moon' in question else Answer('', 'hm', 'half of', 'length')
  decide, responder = begin(synthesis.begin_writing, said)
  found = decide([dict(id='s', text='The moon moves {water}.'), dict(id='t', topic='weather')])
  assert [(type(d).__name__, getattr(d, 'rule', None)) for d in found] == [
    ('Accept', None), ('Fail', None), ('Accept', None), ('Accept', None), ('Reject', 'unfinished'),
    ('Fail', None), ('Reject', 'unfinished'), ('Reject', 'unfinished')]
  assert found[0].record == dict(text='A section on tides.', id='s/textbook', form='textbook',
                                 seed='s', source='synthetic')
  assert 'The moon moves {water}.' in responder.asked[0]
  assert 'The subject is: weather' in responder.asked[4]
  assert found[1].record == dict(id='s', text='The moon moves {water}.', forms=['qa'])
  broken.clear()
  again, = decide([found[1].record])
  assert again.record['id'] == 's/qa'
  good['qa'] = 'What is it? It is so.'
  assert decide([found[1].record])[0].rule == 'wrong form'
  assert told(decide([dict(id='x', n=1)])) == [('Reject', 'x', 'no seed')]

