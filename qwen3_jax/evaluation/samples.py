"""What a stage's model writes: continuations of held-out text and of generated tasks."""
import json

import jax.numpy as jnp

from qwen3_jax.data import sources
from qwen3_jax.generation import engine
from qwen3_jax.generation.sampling import Sampling
from qwen3_jax.stages import load

CHATS = 'tasks:kinds=chain+coin+compass,difficulty=1,size=100'
CHARACTERS = 160  # of a held-out document, as the prompt


def prompts():
  """[(heading, prompt)]: two held-out documents' beginnings and two held-out tasks' questions."""
  library = sources.open_source('stdlib', 'heldout')
  tasks = sources.open_source('tasks:difficulty=1,size=100', 'heldout')
  cut = len(library) // 3
  found = [('Standard library', library[i][:CHARACTERS]) for i in (cut, 2 * cut)]
  for i in (0, 1):
    problem = tasks.task(i)
    found.append((f'Task: {problem.kind}', f'Question: {problem.question}\n'))
  return found


def write_chats(folder, max_tokens=200):
  """Writes `folder`/samples.json: answers to two held-out tasks, each in both modes."""
  tasks = sources.open_source(CHATS, 'heldout')
  asked = [(f'Task: {tasks.task(i).kind}', f'{tasks.task(i).question}{flag}')
           for i in range(3) for flag in ('', ' /no_think')]
  _write(folder, asked, [[dict(role='user', content=text)] for _, text in asked], max_tokens)


def write(folder, max_tokens=120):
  """Writes `folder`/samples.json: one continuation of each prompt, sampled at temperature 0.6."""
  asked = prompts()
  _write(folder, asked, [prompt for _, prompt in asked], max_tokens)


def _write(folder, asked, inputs, max_tokens):
  model, tokenizer = load.load_model(folder, dtype=jnp.float32)
  sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=max_tokens, seed=0)
  outputs = engine.generate(model, tokenizer, inputs, sampling)
  (folder / 'samples.json').write_text(json.dumps(
      [dict(heading=heading, prompt=prompt, completion=out.text)
       for (heading, prompt), out in zip(asked, outputs)], indent=2))
