"""How far an evaluation is: counted while answers come, shown as one live line."""
import collections
import time

import rich.progress

from qwen3_jax.training.metrics import format_seconds


class Tally:
  """How far a part is, for `tell(dict)`: counts what is kept and what comes."""

  def __init__(self, ask, part, tell):
    self.ask, self.tell, self.start = ask, tell, time.perf_counter()
    self.left = collections.Counter({record['id']: 0 for record, _ in ask.jobs.values()})
    self.scored = self.score = self.drawn = self.tokens = 0
    for key, (record, _) in ask.jobs.items():
      if key in part.lines:
        self._add(part.lines[key])
      else:
        self.left[record['id']] += 1
    self.missing = sum(self.left.values())

  def _add(self, line):
    if line.get('score') is not None:
      self.scored, self.score = self.scored + 1, self.score + line['score']

  def take(self, lines):
    """Counts new lines."""
    for line in lines:
      self._add(line)
      self.left[line['id']] -= 1
      self.drawn, self.tokens = self.drawn + 1, self.tokens + line['tokens']

  def show(self, ended=False):
    """Says how far it is."""
    if not self.tell:
      return
    seconds = time.perf_counter() - self.start
    pace = seconds / self.drawn if self.drawn else None
    self.tell(dict(
      part=self.ask.name, ended=ended, done=sum(count == 0 for count in list(self.left.values())),
      total=len(self.left), rate=self.score / self.scored if self.scored else None,
      tokens_per_s=self.tokens / seconds if self.tokens else None,
      seconds_left=pace * (self.missing - self.drawn) if pace else None))


class Board:
  """One live line a part on a terminal; elsewhere a plain line every 10 s and at its end."""

  def __init__(self, console, seconds=10.0):
    self.console, self.seconds, self.said, self.task, self.part = console, seconds, 0.0, None, None
    column = rich.progress.TextColumn
    self.bar = rich.progress.Progress(
      column('[bold]{task.description}'), rich.progress.BarColumn(bar_width=16),
      column('{task.completed}/{task.total}  {task.fields[values]}'), console=console
    ) if console.is_terminal else None

  def __enter__(self):
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, *error):
    if self.bar:
      self.bar.stop()

  def __call__(self, state):
    values = describe(state)
    if self.bar:
      if state['part'] != self.part:
        self.task = self.bar.add_task(state['part'], total=state['total'], values='')
      self.bar.update(self.task, completed=state['done'], values=values)
    elif time.monotonic() - self.said > self.seconds or state['ended']:
      self.said = time.monotonic()
      self.console.print(f'{state["part"]}: {state["done"]}/{state["total"]}  {values}',
                         markup=False)
    self.part = state['part']


def describe(state):
  """The values of the live line."""
  left = state['seconds_left']
  parts = [('score so far', state['rate'], '{:.3f}'), ('tok/s', state['tokens_per_s'], '{:,.0f}'),
           ('ETA', format_seconds(left) if left else None, '{}')]
  return '  '.join(f'{name} {form.format(x)}' for name, x, form in parts if x is not None)
