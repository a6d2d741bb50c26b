# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Quickstart: load a Qwen3, talk with it, bound its thinking
#
# Needs a TPU v5e-1 for Qwen3-0.6B to 4B (on Colab: Runtime > Change runtime type), and about 1.5 GB
# of download for the 0.6B. It runs on a CPU too, slowly.
#
# The repository must be beside this notebook, or be the folder above it. On Colab, clone it or
# upload a zip of it first (`colab/README.md`).

# %%
import os
import sys
from pathlib import Path

SMOKE = os.environ.get('SMOKE') == '1'  # a random model of two layers: a test of the notebook
places = (Path(), Path('..'), Path('qwen3_jax'))
REPO = next((p for p in places if (p / 'colab/install.py').exists()), None)
assert REPO, 'put the repository beside this notebook first, as the folder qwen3_jax'
sys.path.insert(0, str(REPO / 'colab'))
import install

install.prepare(REPO)  # before anything imports JAX

# %% [markdown]
# ## What to load
#
# Edit this cell. The estimate is made before anything is allocated.

# %%
MODEL = 'Qwen/Qwen3-0.6B'  # or Qwen/Qwen3-1.7B, Qwen/Qwen3-4B
QUESTION = 'What is 17 * 23? Think it through, then answer in one sentence.'
TOKENS, BUDGET = (128, 8) if SMOKE else (2048, 128)

if SMOKE:
  import smoke
  folder = smoke.make_model('runs/smoke-quickstart')
else:
  from huggingface_hub import snapshot_download
  folder = snapshot_download(MODEL, allow_patterns=['*.json', '*.safetensors', '*.txt'])

# %%
import jax
import jax.numpy as jnp

import qwen3_jax
from qwen3_jax.scaling import memory

spec = qwen3_jax.Spec.from_hf(folder)
print(f'{spec.layers} layers, width {spec.width}, {spec.parameters():,} parameters')
dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
print(memory.describe(memory.generation(spec, 2, 512 + TOKENS, dtype), *memory.available()))

# %% [markdown]
# ## Load and ask
#
# Thinking comes in its own field; `enable_thinking=False`, or `/no_think` in the question, leaves
# it out.

# %%
from dataclasses import replace

from qwen3_jax.generation.sampling import NON_THINKING, THINKING

model = qwen3_jax.load(folder, dtype=dtype)
tokenizer = qwen3_jax.Tokenizer(folder)
chat = [dict(role='user', content=QUESTION)]

[plain] = qwen3_jax.generate(model, tokenizer, [chat], replace(NON_THINKING, max_tokens=TOKENS),
                             enable_thinking=False)
print(qwen3_jax.parse(plain.text)['content'])

# %% [markdown]
# ## A thinking budget
#
# After `BUDGET` thinking tokens the engine writes that time is short, closes the think block, and
# the model answers from what it has.

# %%
opened = qwen3_jax.render(chat, add_generation_prompt=True) + '<think>\n'
[bounded] = qwen3_jax.generate(model, tokenizer, [opened], replace(THINKING, max_tokens=TOKENS),
                               thinking_budget=BUDGET)
message = qwen3_jax.parse(bounded.text)
print('thinking:', message['reasoning_content'])
print('answer:', message['content'])

# %% [markdown]
# ## More turns
#
# A chat is a list of messages; the thinking of earlier turns is left out by the template.

# %%
chat += [message, dict(role='user', content='And half of that?')]
[more] = qwen3_jax.generate(model, tokenizer, [chat], replace(NON_THINKING, max_tokens=TOKENS),
                            enable_thinking=False)
print(qwen3_jax.parse(more.text)['content'])

# %%
thought = bounded.tokens.index(tokenizer.id('</think>'))
drawn = [not forced for forced in bounded.forced[:thought]]
assert sum(drawn) <= BUDGET, 'the thinking was longer than its budget'
assert message['reasoning_content'] and message['content'], 'the answer was not parsed'
assert '<think>' not in qwen3_jax.render(chat, add_generation_prompt=True), 'old thinking was kept'
print(f'thinking took {sum(drawn)} of {BUDGET} tokens')
