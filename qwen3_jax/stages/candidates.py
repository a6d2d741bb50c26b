"""Answers to queries: drawn from a model, judged, and made conversations to train on."""
import math

from qwen3_jax.generation.respond import Failure
from qwen3_jax.stages.queries import ask, is_right, settle
from qwen3_jax.stages.records import Accept, Fail, Reject, Rows, load_line


def begin_candidates(_, model=None, n=4, prompt='{question}', sampling=None, enable_thinking=True):
  """`n` answers of a model to each query, which of them are right, and the pass rate.

  A query without one right answer is rejected: a person should look at it. Queries that bring
  'candidates' of their own are only judged, and `model` may then be None.
  """
  responder = model and model()

  def decide(records):
    asked = [record for record in records if 'candidates' not in record]
    answers = iter(responder.respond([ask(record, prompt) for record in asked], n, sampling,
                                     enable_thinking) if asked else ())
    return [judge_candidates(record, record['candidates']) if 'candidates' in record
            else judge_candidates(record, next(answers), prompt) for record in records]
  return decide


def judge_candidates(record, candidates, prompt='{question}'):
  """A decision on one query: each candidate gets 'right', the record 'pass_rate'."""
  if isinstance(candidates, Failure):
    return Fail(record, candidates.reason)
  candidates = [each if isinstance(each, dict) else dict(
    reasoning=each.reasoning, content=each.content, finish_reason=each.finish_reason)
    for each in candidates]
  candidates = [each | dict(right=is_right(record, each['content'])) for each in candidates]
  good = sum(each['right'] for each in candidates)
  record = record | dict(candidates=candidates, pass_rate=good / max(len(candidates), 1))
  asked, = ask(record, prompt)
  if asked['content'] != record['question']:
    record['asked'] = asked['content']
  if not good:
    return Reject(record, 'no right answer', f'no right answer in {len(candidates)}')
  return Accept(record)


def begin_responses(_, find_fault, keep=None):
  """A conversation for each candidate in which `find_fault(record, candidate)` finds nothing.

  It returns (rule, reason), or None. `keep`: at most so many a query, the shortest reasoning first
  (None: all).
  """
  def decide(records):
    return [decision for record in records for decision in choose(record, find_fault, keep)]
  return decide


def choose(record, find_fault, keep=None):
  """Decisions on the candidates of one query, in their order."""
  query = {key: value for key, value in record.items() if key not in ('candidates', 'asked')}
  decisions, fine = {}, []
  for k, candidate in enumerate(record['candidates']):
    made = query | dict(id=f'{record["id"]}/{k}', query=record['id'])
    fault = find_fault(record, candidate)
    if fault:
      decisions[k] = Reject(made | dict(candidate=candidate), *fault)
    else:
      fine.append((len(candidate['reasoning']) + len(candidate['content']), k))
      decisions[k] = Accept(_converse(record, candidate, made))
  for place, (size, k) in enumerate(sorted(fine)):
    if keep is not None and place >= keep:
      made = query | dict(id=f'{record["id"]}/{k}', query=record['id'],
                          candidate=record['candidates'][k])
      decisions[k] = Reject(made, 'not needed',
                            f'{place} shorter ones are kept (this has {size} characters)')
  return [decisions[k] for k in sorted(decisions)]


def _converse(record, candidate, made):
  answer = dict(role='assistant', content=candidate['content'])
  if candidate['reasoning']:
    answer['reasoning_content'] = candidate['reasoning']
  asked = dict(role='user', content=record.get('asked', record['question']))
  made = {key: value for key, value in made.items() if key != 'question'}
  return dict(messages=[asked, answer]) | made


def wilson(right, tries, z=1.96):
  """The interval of a rate of which `right` of `tries` were seen (Wilson's, 95 % for z 1.96)."""
  rate, spread = right / tries, z * z / tries
  middle = (rate + spread / 2) / (1 + spread)
  half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
  return max(0.0, middle - half), min(1.0, middle + half)


def begin_pass_rate(_, model, n=8, prompt='{question}', sampling=None, enable_thinking=True):
  """How often a model is right: 'right', 'tries', 'pass_rate' and its 95 % 'interval'."""
  responder = model()

  def decide(record, answers):
    good = sum(is_right(record, answer.content) for answer in answers)
    interval = [round(end, 4) for end in wilson(good, n)]
    cut = sum(answer.finish_reason == 'length' for answer in answers)
    return Accept(record | dict(right=good, tries=n, pass_rate=good / n, interval=interval,
                                unfinished=cut))
  return lambda records: settle(records, responder.respond(
    [ask(record, prompt) for record in records], n, sampling, enable_thinking), decide)


def begin_band(_, low=0.0, high=1.0, used=()):
  """Keeps queries with low < pass rate < high that the conversations in files `used` do not ask.

  0 and 1 teach nothing where advantages are relative to a group; a lower `high` keeps harder ones.
  """
  known = set()
  for row in Rows(used).read((0, 0, 0)):
    record = load_line(row[3])
    asked = [m['content'] for m in record.get('messages', ()) if m.get('role') == 'user']
    known |= {str(record[key]) for key in ('query', 'id', 'question') if key in record} | set(asked)

  def decide(records):
    return [judge_rate(record, low, high, known) for record in records]
  return decide


def judge_rate(record, low, high, known=frozenset()):
  """A decision on one query by its pass rate, and by whether `known` has its id or question."""
  rate = record['pass_rate']
  told = f'{record.get("right", "?")} right of {record.get("tries", "?")}'
  if str(record['id']) in known or record['question'] in known:
    return Reject(record, 'used before', 'it is among the conversations trained on')
  if rate <= low:
    return Reject(record, 'too hard', f'{told}: pass rate {rate:.3g}, want above {low}')
  if rate >= high:
    return Reject(record, 'too easy', f'{told}: pass rate {rate:.3g}, want below {high}')
  return Accept(record)
