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
# # Train a tiny Qwen3 through its stages
#
# The recipe of the report (pretraining in three stages, cold start, reinforcement learning, fusion,
# distillation) on a model of a million weights, on text of the Python standard library and
# generated problems: nothing is downloaded. About 20 minutes on two CPU cores for all of it, 3 for
# the first stage; an accelerator is not needed.
#
# The repository must be beside this notebook, or be the folder above it. On Colab, clone it or
# upload a zip of it first (`colab/README.md`).

# %%
import os
import sys
from pathlib import Path

SMOKE = os.environ.get('SMOKE') == '1'  # a few steps of two stages: a test of the notebook
places = (Path(), Path('..'), Path('qwen3_jax'))
REPO = next((p for p in places if (p / 'colab/install.py').exists()), None)
assert REPO, 'put the repository beside this notebook first, as the folder qwen3_jax'
sys.path.insert(0, str(REPO / 'colab'))
import install

install.prepare(REPO)  # before anything imports JAX

# %% [markdown]
# ## How far, and how long
#
# Edit this cell. `UNTIL` is the last stage to run (None: all); `SET` changes single fields, as in
# `s1.steps=300`. `python -m qwen3_jax recipe --help` says more.

# %%
WORKDIR = 'runs/smoke-tiny' if SMOKE else 'runs/tiny'
UNTIL = 's2' if SMOKE else 's3'
SET = []

if SMOKE:
  for stage in ('s1', 's2'):
    SET += [f'{stage}.steps=16', f'{stage}.save_every=16', f'{stage}.evaluate_every=8',
            f'{stage}.data.length=64', f'{stage}.data.heldout_batches=2',
            f'{stage}.optim.warmup=2', f'{stage}.model.layers=2', f'{stage}.model.width=64',
            f'{stage}.model.mlp=128', f'{stage}.model.vocab=512',
            f'{stage}.data.sources=(("tasks:size=2000",1.0),)',
            f'{stage}.data.heldout=("tasks:size=2000",)']
  SET += ['s1.data.tokenizer_size=500']

# %% [markdown]
# ## The plan
#
# What each stage will do and where its weights come from, and what the largest of them must hold.

# %%
from qwen3_jax.__main__ import main
from qwen3_jax.commands import config as configs
from qwen3_jax.scaling import memory
from qwen3_jax.stages import load

command = ['recipe', '--config=configs/recipe.py:tiny', f'--workdir={WORKDIR}']
command += [f'--until={UNTIL}'] * bool(UNTIL) + [f'--set={each}' for each in SET]
assert main([*command, '--dry-run']) == 0

s3 = configs.load_config('configs/s3.py:tiny')
parts = memory.training(load.spec_from(s3.model), s3.data.batch, s3.data.length, s3.dtype, s3.remat)
print(memory.describe(parts, *memory.available()))

# %% [markdown]
# ## Train
#
# Interrupt it whenever you like and run the cell again: it goes on from its last checkpoint.

# %%
assert main(command) == 0

# %% [markdown]
# ## Look at it
#
# The report is one page: curves, samples and figures of every stage so far.

# %%
if not SMOKE:
  from IPython.display import HTML, display
  display(HTML(Path(WORKDIR, 'report.html').read_text()))

# %% [markdown]
# ## Let it write
#
# After pretraining it continues text; from the stage `cold_start` on, ask it by a chat instead:
# `[dict(role='user', content='Calculate 3 + 8 - 7 + 2.')]`.

# %%
import jax.numpy as jnp

import qwen3_jax
from qwen3_jax.generation.sampling import Sampling

model, tokenizer = load.load_model(WORKDIR, dtype=jnp.float32)
[out] = qwen3_jax.generate(model, tokenizer, ['def add(a, b):'], Sampling(0.7, max_tokens=32))
print(out.text)

# %%
from qwen3_jax.training import metrics

for stage in ('s1', 's2'):
  losses = [line['heldout_loss'] for line in metrics.read(Path(WORKDIR, stage))
            if 'heldout_loss' in line]
  print(f'{stage}: held-out loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token')
  assert losses[-1] < losses[0], f'the held-out loss of {stage} did not fall'
