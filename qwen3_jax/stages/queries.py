"""Which questions to keep: verifiable, not solvable without thinking, balanced over domains."""
import collections
import hashlib
import heapq
import json

from qwen3_jax.data import tasks
from qwen3_jax.generation.respond import Failure, find_object, judge
from qwen3_jax.rewards import math
from qwen3_jax.stages.records import Accept, Fail, Reject, Rows, load_line

VERIFIABLE = """\
Below is a question from a collection. It can be used only if an answer to it can be checked by \
comparing with one short reference answer. It cannot be used if it asks several things at once, \
asks for a proof, an essay, an opinion or other open writing, lacks information that it refers \
to, or has many right answers.

Question:
{question}

Reference answer: {answer}

Reply with one JSON object and nothing else: {"verifiable": true or false, "reason": "a few words"}
"""


def is_right(record, content):
  """Whether `content`, an answer without its reasoning, ends in the query's reference answer.

  Generated tasks are judged by `tasks.check`, all others by `rewards.math`.
  """
  if record.get('kind') in tasks.KINDS:
    return tasks.check(tasks.Task(record['kind'], record.get('seed', 0), record.get(
      'difficulty', 1), record['question'], (), record['answer']), content)
  kind = record.get('kind')
  return math.agree(content, record['answer'], kind if kind in ('choice', 'text') else None)


def ask(record, prompt):
  """The conversation that puts a query to a model; `prompt` is a text with {question} in it."""
  return [dict(role='user', content=prompt.replace('{question}', record['question']))]


def read_verifiable(text):
  verdict = find_object(text)
  if not isinstance(verdict.get('verifiable'), bool):
    raise ValueError(f'no "verifiable" of true or false in {text[:120]!r}')
  return verdict['verifiable'], str(verdict.get('reason', ''))[:300]


def settle(records, said, decide):
  """A decision on each record: `decide(record, answer)`, or Fail where there was no answer."""
  return [Fail(record, answer.reason) if isinstance(answer, Failure) else decide(record, answer)
          for record, answer in zip(records, said, strict=True)]


def begin_judging(_, model, tries=3):
  """Rejects what the judge that `model()` opens calls not verifiable."""
  responder = model()

  def decide(record, verdict):
    good, reason = verdict
    return Accept(record) if good else Reject(record, 'not verifiable', f'the judge says: {reason}')
  return lambda records: settle(
    records, judge(responder, VERIFIABLE, records, read_verifiable, tries), decide)


def begin_solving(_, model, tries=4, right=1, prompt='{question}', sampling=None):
  """Rejects what a model solves without thinking, `right` times or more in `tries`."""
  responder = model()

  def decide(record, answers):
    good = sum(is_right(record, answer.content) for answer in answers)
    if good >= right:
      return Reject(record, 'solved without thinking', f'{good} right of {tries}')
    return Accept(record | dict(right_without_thinking=good))
  return lambda records: settle(records, responder.respond(
    [ask(record, prompt) for record in records], tries, sampling, enable_thinking=False), decide)


def domain_of(record, field):
  """The label `field` of a record: under 'labels', or its own; 'unknown' where it has none."""
  return str((record.get('labels') or {}).get(field) or record.get(field) or 'unknown')


def _rank(record, seed):
  """A seeded place of a record among all others, by what it is and not by where it stands."""
  key = f'{seed} {record.get("id")} {record.get("question")}'
  return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())


def survey_domains(rows, cap, seed=0, field='domain'):
  """The rank up to which records of each domain are kept: `cap` of each, chosen by the seed."""
  lowest, counts = collections.defaultdict(list), collections.Counter()
  for *_, data in rows.read((0, 0, 0)):
    record = load_line(data)
    domain = domain_of(record, field)
    counts[domain] += 1
    heap = lowest[domain]
    heapq.heappush(heap, -_rank(record, seed))
    if len(heap) > cap:
      heapq.heappop(heap)
  return {domain: [-heap[0], counts[domain]] for domain, heap in sorted(lowest.items())}


def begin_balancing(folder, cap, seed=0, field='domain'):
  """Keeps at most `cap` records of a domain, by `survey_domains` of the whole input."""
  survey = json.loads((folder / 'survey.json').read_text())
  kept = collections.Counter(domain_of(load_line(row[3]), field)
                             for row in Rows([folder / 'accepted.jsonl']).read((0, 0, 0)))

  def decide(records):
    decisions = []
    for record in records:
      domain = domain_of(record, field)
      limit, count = survey.get(domain, (float('inf'), 0))
      if kept[domain] < cap and _rank(record, seed) <= limit:
        kept[domain] += 1
        decisions.append(Accept(record))
      else:
        decisions.append(Reject(record, 'domain is full', f'{domain} has {count} records, the cap '
                                f'is {cap}'))
    return decisions
  return decide
