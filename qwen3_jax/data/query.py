"""A question that can be scored: what is asked, by which verifiers, and answers of known worth."""
import dataclasses


def by(name, **others):
  """The `verifiers` of a query: `name`, and the mode of thinking as a gate that earns nothing."""
  return {name: 1.0, **others, 'mode': 0.0}


@dataclasses.dataclass(frozen=True)
class Query:
  """What a generator makes. `right` earns all that `verifiers` give, `wrong` loses it.

  `fields` are what the verifiers read (answer, tests, schema ...); `right` and `wrong` are contents
  of an answer, `calls` tool calls beside the right one, `wrong_calls` beside the wrong; `steps` are
  reasoning that leads there. `before` are messages that come before the question.
  """
  question: str
  verifiers: dict[str, float]
  fields: dict
  right: str
  wrong: str
  steps: tuple[str, ...] = ()
  before: tuple[dict, ...] = ()
  tools: tuple[dict, ...] = ()
  calls: tuple[dict, ...] = ()
  wrong_calls: tuple[dict, ...] = ()
  enable_thinking: bool | None = None  # None: as the source's option says
  thinks: bool | None = None  # whether the right answer thinks; None: as above
  wrong_thinks: bool | None = None  # whether the wrong one does; None: as the right one


def exact(question, answer, steps=(), wrong=None, said='The answer is {}.', **fields):
  """A Query whose final answer is compared exactly; `wrong` is another answer."""
  answer = str(answer)
  wrong = f'{answer}1' if wrong is None else str(wrong)
  return Query(question, by('math'), {'answer': answer, 'kind': 'exact'}
               | fields, said.format(answer), said.format(wrong), tuple(steps))


def as_record(query, name, number, thinking=True):
  """The record of a query, a fresh dict: what the rollout and the verifiers read."""
  wanted = thinking if query.enable_thinking is None else query.enable_thinking
  record = {'id': number, 'source': name, 'verifiers': dict(query.verifiers), **query.fields,
            'messages': [*map(dict, query.before), {'role': 'user', 'content': query.question}],
            'enable_thinking': wanted}
  if query.tools:
    record['tools'] = [dict(tool) for tool in query.tools]
  return record


def answers(query, thinking=True):
  """The right and the wrong answer as assistant messages, in the mode that is asked for."""
  thinks = thinking if query.thinks is None else query.thinks
  modes = thinks, thinks if query.wrong_thinks is None else query.wrong_thinks
  steps = '\n'.join(query.steps) or 'I know what to say.'
  return tuple({'role': 'assistant', 'reasoning_content': steps if mode else '',
                'content': content, 'tool_calls': list(calls)} for mode, content, calls in zip(
                  modes, (query.right, query.wrong), (query.calls, query.wrong_calls)))
