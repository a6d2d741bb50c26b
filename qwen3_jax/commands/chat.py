"""Talks with a model in the terminal; its thinking is shown dimmed.

DIR is a Hugging Face folder, the workdir of a training run, or that of a recipe. In a message
/think and /no_think switch the thinking of the answer; /reset forgets the conversation, /exit
leaves. Ctrl-C stops an answer, a second one at the prompt leaves.

Examples:
  python -m qwen3_jax chat --model DIR
  python -m qwen3_jax chat --model DIR --prompt 'What is 17 * 23?' --thinking-budget 200
  python -m qwen3_jax chat --model DIR --raw --prompt 'def add(a, b):'
"""
import dataclasses
import re
import sys
import unicodedata

ANSWER = re.compile(r'</?think>')


def add_arguments(parser):
  parser.add_argument('--model', required=True, metavar='DIR', help='folder of the model')
  parser.add_argument('--prompt', metavar='TEXT', help='answer this and leave')
  parser.add_argument('--raw', action='store_true',
                      help='continue plain text, for models without chat habits')
  parser.add_argument('--no-think', action='store_true', help='answer without thinking')
  parser.add_argument('--thinking-budget', type=int, metavar='N',
                      help='thinking tokens after which the model must answer')
  parser.add_argument('--system', metavar='TEXT', help='system message')
  parser.add_argument('--temperature', type=float, metavar='T',
                      help='0 is greedy (default: 0.6 thinking, 0.7 not)')
  parser.add_argument('--max-tokens', type=int, default=2048, metavar='N', help='longest answer')
  parser.add_argument('--seed', type=int, default=0, help='of the draws')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'),
                      help='of weights and arithmetic (default: float32 on CPU, else bfloat16)')


def main(args):
  if args.raw and (args.no_think or args.thinking_budget is not None or args.system):
    raise ValueError('--raw continues plain text: no --no-think, --thinking-budget or --system')
  from rich.console import Console
  chat = Chat(args, Console(soft_wrap=True))
  if args.prompt is not None:
    chat.answer(args.prompt)
    return 0
  chat.console.print('[dim]/reset forgets, /exit leaves, Ctrl-C stops an answer[/dim]')
  while True:
    try:
      line = chat.console.input('[bold]> [/bold]').strip()
    except (EOFError, KeyboardInterrupt):
      chat.console.print()
      return 0
    if line == '/exit':
      return 0
    if line == '/reset':
      chat.forget()
    elif line:
      chat.answer(line)


class Chat:
  """A conversation: the model, the messages so far, and where they are shown."""

  def __init__(self, args, console):
    import jax

    from qwen3_jax.generation import engine, sampling
    from qwen3_jax.stages.load import load_model
    self.args, self.console = args, console
    dtype = args.dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    model, self.tokenizer = load_model(args.model, dtype=dtype)
    self.decoder = engine.prepare(model)
    self.sampling = sampling.NON_THINKING if args.no_think else sampling.THINKING
    if args.temperature is not None:
      self.sampling = dataclasses.replace(self.sampling, temperature=args.temperature)
    self.sampling = dataclasses.replace(self.sampling, max_tokens=args.max_tokens, seed=args.seed)
    self.forget()

  def forget(self):
    system = self.args.system
    self.messages = [dict(role='system', content=system)] if system else []

  def answer(self, text):
    """Shows the answer to `text` as it comes and keeps both; what Ctrl-C cuts off is kept too."""
    from qwen3_jax.generation import engine
    from qwen3_jax.text.template import parse
    messages = [*self.messages, dict(role='user', content=text)]
    deltas = engine.stream(
      self.decoder, self.tokenizer, [text if self.args.raw else messages], self.sampling,
      self.args.thinking_budget, [len(messages)], enable_thinking=not self.args.no_think, chunk=8)
    said = []
    try:
      self._show(deltas, said)
    except KeyboardInterrupt:
      self.console.print('\n[dim](stopped)[/dim]', end='')
    self.console.print()
    if not self.args.raw:
      self.messages = [*messages, parse(''.join(said))]

  def _show(self, deltas, said):
    thinking = False
    for _, delta in deltas:
      said.append(delta)
      for part in re.split(f'({ANSWER.pattern})', delta):
        closes = part == '</think>'
        thinking = thinking or part == '<think>'
        self.console.print(printable(part), style='dim' if thinking else None, end='', markup=False,
                           highlight=False, emoji=False)
        thinking = thinking and not closes
      sys.stdout.flush()


def printable(text):
  """`text` without what a terminal would obey: control characters other than newline and tab.

  Unicode's format characters go too (they can reorder or hide text), except the joiners that
  emoji and some scripts need.
  """
  def keep(character):
    kind = unicodedata.category(character)
    return character in '\n\t\u200c\u200d' or kind not in ('Cc', 'Cf', 'Cs', 'Co')
  return ''.join(character if keep(character) else '\ufffd' for character in text)
