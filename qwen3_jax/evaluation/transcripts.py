"""The report's transcripts: what every stage's model wrote to one prompt, side by side."""
import re

from qwen3_jax.evaluation.chart import escape


def write_samples(stages, title):
  """An article a prompt, a column a stage, thinking folded; '' where no stage has samples.

  `samples` of a stage are dicts of `prompt`, `completion`, perhaps `thinking` and `heading`.
  """
  prompts = {}
  for stage in stages:
    for sample in stage.get('samples') or ():
      heading, answers = prompts.setdefault(
        sample.get('prompt', ''), (sample.get('heading') or title(stage), []))
      answers.append((title(stage), sample))
  articles = [
    f'<article><h3>{escape(heading)}</h3><pre class="prompt">{escape(prompt)}</pre>'
    '<div class="answers">' + ''.join(
      f'<div><h4>{escape(name)}</h4>{_write_answer(sample)}</div>' for name, sample in answers)
    + '</div></article>' for prompt, (heading, answers) in prompts.items()]
  return '\n'.join(['<section>', '<h2>Transcripts</h2>', '<p class="soft">Drawn from the model at '
                    'the end of each stage. Thinking is folded; a click opens it.</p>', *articles,
                    '</section>']) if articles else ''


def _write_answer(sample):
  """A completion as HTML, its thinking folded."""
  thinking, text = split_thinking(sample)
  if thinking is None:
    return f'<pre>{escape(text)}</pre>'
  words = len(thinking.split())
  if not words:
    return f'<p class="thinking">no thinking</p><pre>{escape(text.strip())}</pre>'
  return (f'<details class="thinking"><summary>thinking, {words} word{"s" * (words > 1)}</summary>'
          f'<pre>{escape(thinking.strip())}</pre></details><pre>{escape(text.strip())}</pre>')


def split_thinking(sample):
  """(thinking, the rest) of a sample; None for the first where it has no think block."""
  thinking, text = sample.get('thinking'), str(sample.get('completion', ''))
  block = re.match(r'\s*<think>(.*?)(</think>|\Z)', text, re.DOTALL)
  if block:
    thinking, text = (thinking or '') + block[1], text[block.end():]
  return thinking, text
