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
# # GRPO on a reward of your own
#
# Write a Python function that says what an answer is worth, and a list of prompts; the model is
# trained on its own answers to be worth more. Needs a TPU v5e-1 for Qwen3-0.6B with adapters
# (LoRA), a v6e-1 for the 1.7B; about 1.5 GB of download.
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
# ## The reward and the prompts
#
# Edit these two cells. A reward is a function of the prompt's record and the answer (`text`,
# `reasoning`, `content`, `tool_calls`, `tokens`) that gives a number from 0 to 1. The record holds
# whatever you put beside its prompt. What the model wrote is text of a stranger: read it, never run
# or evaluate it.

# %%
def brief(record, response):
  """1 for an answer of `most` letters or fewer; at three times as many, 0."""
  letters = len(response.content.strip())
  return min(1.0, max(0.0, 1.5 - 0.5 * letters / record['most'])) if letters else 0.0


# %%
import random

draw = random.Random(0)
PROMPTS = []
for _ in range(400):
  a, b = draw.randint(2, 99), draw.randint(2, 99)
  PROMPTS.append(dict(messages=[dict(role='user', content=f'What is {a} + {b}?')],
                      enable_thinking=False, answer=str(a + b), most=40,
                      verifiers=dict(math=1.0, brief=0.5)))  # `math` compares with the answer

# %% [markdown]
# `verifiers` are names and weights: yours, and those of the package
# (`qwen3_jax/rewards/verifiers.py`). The function is tried on two answers before a model is loaded.

# %%
import json

from qwen3_jax.rewards.response import Response

for text in ('42.', 'The answer to your question is, after much thought, the number 42.' * 2):
  print(f'{brief(PROMPTS[0], Response.read(text, 20)):.2f}  {text}')

workdir = Path('runs/smoke-grpo' if SMOKE else 'runs/grpo')
workdir.mkdir(parents=True, exist_ok=True)
for name, part in (('train', PROMPTS[40:]), ('heldout', PROMPTS[:40])):
  lines = ''.join(json.dumps(record) + '\n' for record in part)
  (workdir / f'{name}.jsonl').write_text(lines)

# %% [markdown]
# ## What to train

# %%
MODEL = 'Qwen/Qwen3-0.6B'
SETTINGS = dict(steps=60, evaluate_every=20, save_every=20, prompts=16, samples=8, updates=2,
                answer_tokens=256, rank=16, peak_lr=2e-5)

if SMOKE:
  import smoke
  folder = smoke.make_model('runs/smoke-model')
  SETTINGS |= dict(steps=16, evaluate_every=16, save_every=16, prompts=8, answer_tokens=32,
                   peak_lr=1e-2)
else:
  from huggingface_hub import snapshot_download
  folder = snapshot_download(MODEL, allow_patterns=['*.json', '*.safetensors', '*.txt'])

# %%
import jax
import jax.numpy as jnp

import qwen3_jax
from qwen3_jax.scaling import memory

s, spec = SETTINGS, qwen3_jax.Spec.from_hf(folder)
dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
length = 128 if SMOKE else 512  # of prompt and answer
parts = memory.training(spec, 8, length, dtype, rank=s['rank'])
parts |= memory.generation(spec, s['prompts'] * s['samples'], length, dtype)
print(memory.describe(parts, *memory.available()))

# %% [markdown]
# ## Train
#
# The config is `configs/reasoning_rl.py`, with the sizes of this machine. Run the cell again after
# an interruption, and it goes on from the last checkpoint.

# %%
import dataclasses

from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train

config = configs.load_config('configs/reasoning_rl.py:0.6b')
with config.unlocked():
  config.model.update(dataclasses.asdict(spec))
  config.init, config.dtype, config.lora.rank = str(folder), jnp.dtype(dtype).name, s['rank']
  config.rewards.functions = (('brief', '__main__:brief'),)
  config.rewards.gates, config.rewards.workers = (), 2
  config.rollout.update(prompts=s['prompts'], samples=s['samples'], updates=s['updates'],
                        max_tokens=s['answer_tokens'], rounds=1, overlong=None)
  config.data.update(sources=((str(workdir / 'train.jsonl'), 1.0),), batch=8, length=length,
                     heldout=(str(workdir / 'heldout.jsonl'),))
  config.measure_reward.update(prompts=40, samples=4)
  config.engine.rows = s['prompts'] * s['samples']
  config.optim.update(peak_lr=s['peak_lr'], warmup=2)
  config.micro_rows = 8
  config.steps, config.save_every, config.evaluate_every = (
    s['steps'], s['save_every'], s['evaluate_every'])
  if SMOKE:
    config.remat = 'none'

assert train.train(config, epath.Path(workdir)) == 0

# %% [markdown]
# ## What it learnt
#
# The held-out reward, each part of it in training, and the report with curves and samples.

# %%
from qwen3_jax.commands import report
from qwen3_jax.training import metrics

lines = metrics.read(workdir)
for line in lines:
  if 'heldout_reward' in line:
    print('step {step}: held-out reward {heldout_reward:.3f} ({heldout_reward_low:.3f} to '
          '{heldout_reward_high:.3f})'.format(**line))
print('brief in training: ' + ', '.join(f'{line["reward_brief"]:.2f}' for line in lines
                                        if 'reward_brief' in line))
print('report:', report.write(workdir))

# %%
rewards = [line for line in lines if 'heldout_reward' in line]
assert rewards[-1]['heldout_reward'] > rewards[0]['heldout_reward'], 'the reward did not rise'
