import io

import pytest
from rich.console import Console

from qwen3_jax.__main__ import main
from qwen3_jax.commands.chat import Chat, printable
from qwen3_jax.model import hf


@pytest.fixture(scope='module')
def folder(model, tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat') / 'model'
  hf.save(model, folder)
  tokenizer.save(folder)
  return folder


def test_one_answer_is_printed_and_repeats_with_its_seed(folder, capsys):
  command = ['chat', '--model', str(folder), '--prompt', 'the fox', '--max-tokens', '24']
  answers = []
  for more in ([], [], ['--seed', '1'], ['--raw', '--temperature', '0']):
    assert main([*command, *more]) == 0
    answers.append(capsys.readouterr().out)
  assert answers[0] == answers[1] != answers[2] and all(answer.strip() for answer in answers)
  assert main([*command, '--raw', '--no-think']) == 2
  assert '--raw continues plain text' in capsys.readouterr().err


def test_a_conversation_keeps_answers_and_dims_thinking(folder):
  """The model is random: a budget of 0 makes it think a known text and then go on."""
  class Arguments:
    model, system, raw, no_think = str(folder), 'be brief', False, False
    thinking_budget, temperature, max_tokens, seed, dtype = 0, 1.0, 40, 0, None
  screen = io.StringIO()
  chat = Chat(Arguments, Console(file=screen, force_terminal=True, width=10_000))
  chat.answer('the fox /think')
  shown = screen.getvalue()
  assert '\x1b[2m<think>' in shown and '\x1b[2m</think>' in shown
  roles = [message['role'] for message in chat.messages]
  assert roles == ['system', 'user', 'assistant']
  assert chat.messages[2]['reasoning_content'].startswith('Considering the limited time')
  chat.answer('and the dog?')
  assert len(chat.messages) == 5
  chat.forget()
  assert chat.messages == [dict(role='system', content='be brief')]


@pytest.mark.parametrize('hostile, shown', [
  ('\x1b[2J\x1b]0;title\x07', '\ufffd[2J\ufffd]0;title\ufffd'),
  ('a\rb\x08\x7f', 'a\ufffdb\ufffd\ufffd'),
  ('\x9b31m', '\ufffd31m'), ('safe\u202etxt', 'safe\ufffdtxt'), ('[red]x[/red]', '[red]x[/red]'),
  ('tab\tand\nnewline é 日本 🙂 👩\u200d💻', 'tab\tand\nnewline é 日本 🙂 👩\u200d💻')])
def test_nothing_a_terminal_obeys_is_printed(hostile, shown):
  assert printable(hostile) == shown
