"""New pretraining text from seeds: a model writes up what a passage or a topic is about."""
import re

from qwen3_jax.generation.respond import Failure, fill
from qwen3_jax.stages.records import Accept, Fail, Reject

FROM_TEXT = """\
Take your subject from this passage. Do not copy its sentences, and rely on what you know to be \
true where it is vague or wrong.

----
{seed}
----

"""
FROM_TOPIC = 'The subject is: {seed}\n\n'

TEMPLATES = dict(
  textbook="""\
Write a section of a textbook on it, for a student who meets it for the first time. Say what it \
is for, define each term before you use it, explain step by step with one worked example, name \
one common mistake, and end with a summary of two sentences. Write the section alone, in the \
language of the subject, without remarks about this task.""",
  qa="""\
Write four questions about it, from simple to demanding, each with a full answer that can be \
understood without anything else. Begin each question on a new line with "Question:" and each \
answer on a new line with "Answer:". Write nothing else.""",
  instruction="""\
Write one request that a person who works with it might send to a knowledgeable helper, with all \
details the helper needs, and then the best reply to it: correct, complete, and no longer than \
it has to be. Begin the request with "Instruction:" on a new line and the reply with "Response:" \
on a new line. Write nothing else.""",
  code="""\
Write a short program or function that has to do with it and that someone could learn from: in \
Python unless the subject asks for another language, complete, runnable, with clear names and a \
short example of its use. Before the code, say in a few sentences what it does and why it is \
written that way; put the code in one fenced block.""")

FORMS = dict(
  textbook=None, qa=re.compile(r'^Question:.+^Answer:.+', re.DOTALL | re.MULTILINE),
  instruction=re.compile(r'^Instruction:.+^Response:.+', re.DOTALL | re.MULTILINE),
  code=re.compile(r'^```.*\n[^`]+^```', re.MULTILINE))


def begin_writing(_, model, kinds=tuple(TEMPLATES), characters=3000, sampling=None,
                  enable_thinking=True):
  """{'text', 'form', ...} documents: for each seed ('text', 'topic' or a query) one of each kind.

  A seed of which the model failed to write a kind is tried again for the kinds that lack.
  """
  responder = model()

  def decide(records):
    decisions, wanted = [], []
    for record in records:
      if find_seed(record):
        wanted += [(record, kind) for kind in record.get('forms', kinds)]
      else:
        decisions.append(Reject(record, 'no seed', f'the record has {", ".join(record)}; wanted '
                                'text or topic'))
    answers = responder.respond(
      [[dict(role='user', content=ask_for(record, kind, characters))] for record, kind in wanted],
      1, sampling, enable_thinking) if wanted else []
    return decisions + [_judge(*each, answer) for each, answer in zip(wanted, answers)]
  return decide


def find_seed(record):
  """What a record gives to write about: its text, topic or question, or None."""
  seed = record.get('text') or record.get('topic') or record.get('question')
  return seed if isinstance(seed, str) and seed.strip() else None


def ask_for(record, kind, characters=3000):
  """The request for a document of `kind`; of a long seed the first `characters` are shown."""
  head = FROM_TOPIC if 'topic' in record and 'text' not in record else FROM_TEXT
  return fill(head, dict(seed=find_seed(record)[:characters])) + TEMPLATES[kind]


def _judge(record, kind, answer):
  if isinstance(answer, Failure):
    return Fail(record | dict(forms=[kind]), answer.reason)
  answer, = answer
  made = dict(text=answer.content.strip(), id=f'{record["id"]}/{kind}', form=kind,
              seed=record['id'], source='synthetic')
  if answer.finish_reason == 'length':
    return Reject(made, 'unfinished', 'the longest answer was reached')
  if not made['text']:
    return Reject(made, 'empty', 'nothing but reasoning')
  if FORMS[kind] and not FORMS[kind].search(made['text']):
    return Reject(made, 'wrong form', f'not written as asked of kind {kind}')
  return Accept(made)
