"""What a model does in each mode: accuracy, obedience to the last flag, accuracy against budget."""
import collections

from qwen3_jax.data import fusion, tasks
from qwen3_jax.generation import engine
from qwen3_jax.stages.candidates import wilson
from qwen3_jax.text.template import last_flag, parse


def rate(marks):
  """{'rate', 'low', 'high', 'count'} of a list of truth values; the interval is that of 95 %."""
  low, high = wilson(sum(marks), len(marks)) if marks else (0.0, 1.0)
  return dict(rate=sum(marks) / max(1, len(marks)), low=low, high=high, count=len(marks))


def distinct(source, count):
  """The first `count` tasks of `source` with questions of their own; fewer where it repeats itself.

  An interval takes its problems for independent draws, which the same one twice is not.
  """
  found = {}
  for i in range(min(len(source), 20 * count)):
    problem = source.task(i)
    found.setdefault(problem.question, problem)
    if len(found) == count:
      break
  return list(found.values())


def measure(model, tokenizer, source, count, sampling, budgets=(), flags=0, rows=64, progress=None):
  """Measures a model on `count` distinct tasks of `source` (a held-out `tasks.TaskSource`).

  `sampling` maps True (thinking) and False to a `Sampling`. `budgets` are thinking tokens, each
  tried on all tasks; `flags` conversations with flags are tried for `following`. `progress(text)`
  is called as parts end. Returns a dict that JSON can hold: `thinking` and `plain` (rates with
  their 95 % intervals, mean tokens, share that stopped by themselves, rates by kind of task),
  `following`, `budgets`.
  """
  problems = distinct(source, count)
  prompts = [[dict(role='user', content=problem.question)] for problem in problems]
  decoder = engine.prepare(model, min(rows, len(problems)))
  tell = progress or (lambda text: None)

  def answer(think, **options):
    return engine.generate(decoder, tokenizer, prompts, sampling[think], rows=rows,
                           enable_thinking=think, **options)
  result = {}
  for name, think in (('thinking', True), ('plain', False)):
    result[name] = grade(problems, answer(think))
    tell(f'{name}: {describe(result[name])} right')
  if flags:
    result['following'] = follow(decoder, tokenizer, source, flags, sampling[True], rows)
    tell(f'last flag obeyed: {describe(result["following"])}')
  result['budgets'] = []
  for budget in budgets:
    graded = grade(problems, outputs := answer(True, thinking_budget=budget))
    forced = sum(bool(output.forced.any()) for output in outputs) / len(problems)
    result['budgets'].append(dict(budget=budget, forced=forced, **graded))
    tell(f'budget {budget}: {describe(graded)} right, {forced:.0%} cut short')
  return result


def describe(graded):
  return (f'{graded["rate"]:.1%} ({graded["low"]:.1%} to {graded["high"]:.1%}) of '
          f'{graded["count"]}')


def grade(problems, outputs):
  """Rates of right final answers: what stands behind the thinking is judged, nothing else."""
  marks = [output.finish_reason == 'stop' and tasks.check(problem, parse(output.text)['content'])
           for problem, output in zip(problems, outputs)]
  kinds = collections.defaultdict(list)
  for problem, mark in zip(problems, marks):
    kinds[problem.kind].append(mark)
  return rate(marks) | dict(
    tokens=sum(len(output.tokens) for output in outputs) / max(1, len(outputs)),
    finished=sum(output.finish_reason == 'stop' for output in outputs) / max(1, len(outputs)),
    kinds={kind: rate(each) for kind, each in sorted(kinds.items())})


def flag_prompts(source, count, seed=0):
  """`count` prompts [(messages, whether to think, where the flag stands)] from tasks of `source`.

  Single turns, flags in the system turn, contradicting flags and histories of several turns, half
  of them ending in each mode; what is expected is read off the prompt (`last_flag`).
  """
  def record(i):
    problem = source.task(i)
    return dict(messages=[dict(role='user', content=problem.question),
                          dict(role='assistant', content=f'The answer is {problem.answer}.')])
  pool = [record(i) for i in range(min(len(source), 2 * count))]
  prompts, wanted = [], {True: count - count // 2, False: count // 2}
  for fused in fusion.fuse(pool, pool, size=40 * count, seed=seed, hard_rate=0.0, flag_rate=1.0,
                           turns_rate=0.5, system_rate=0.3, extra_rate=0.3):
    messages = fused['messages'][:-1]
    think = last_flag(messages)
    if think is None or not wanted[think]:
      continue
    wanted[think] -= 1
    flagged = last_flag(messages[-1:]) is not None
    place = ('system' if len(messages) == 2 else 'last user turn' if flagged else 'earlier turn')
    prompts.append((messages, think, place))
  return prompts


def follow(decoder, tokenizer, source, count, sampling, rows=64):
  """Whether the think block obeys the last flag: something in it after /think, empty otherwise."""
  prompts = flag_prompts(source, count)
  outputs = engine.generate(decoder, tokenizer, [messages for messages, _, _ in prompts], sampling,
                            rows=rows)
  marks, parts = [], collections.defaultdict(list)
  for (_, think, place), output in zip(prompts, outputs):
    closed = output.text.startswith('<think>') and '</think>' in output.text
    mark = closed and bool(parse(output.text)['reasoning_content'].strip()) == think
    marks.append(mark)
    parts['/think' if think else '/no_think'].append(mark)
    parts[place].append(mark)
  return rate(marks) | dict(parts={name: rate(each) for name, each in sorted(parts.items())})
