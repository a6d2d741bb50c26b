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
# # Distil a larger Qwen3 into the 0.6B
#
# On-policy: the student answers, the teacher reads along, and the student's distribution is pulled
# towards the teacher's at every token it drew, over the whole vocabulary. Needs a TPU v5e-1 for the
# 0.6B with adapters (LoRA) and the 1.7B as its teacher, a v6e-1 for the 4B; about 5 GB of download
# (10 for the 4B).
#
# The repository must be beside this notebook, or be the folder above it. On Colab, clone it or
# upload a zip of it first (`colab/README.md`).

# %%
import os
import sys
from pathlib import Path

SMOKE = os.environ.get('SMOKE') == '1'  # random models of two layers: a test of the notebook
places = (Path(), Path('..'), Path('qwen3_jax'))
REPO = next((p for p in places if (p / 'colab/install.py').exists()), None)
assert REPO, 'put the repository beside this notebook first, as the folder qwen3_jax'
sys.path.insert(0, str(REPO / 'colab'))
import install

install.prepare(REPO)  # before anything imports JAX

# %% [markdown]
# ## Student, teacher, prompts
#
# Edit this cell. Both must have the same tokenizer, as all Qwen3 have. Prompts are JSON lines with
# `messages` (give a file's path as the source), or generated problems as here. No answers are
# needed to learn; those of held-out prompts say what it did for the student.
#
# `KIND` is `reverse_kl` (the student keeps to what the teacher would say), `forward_kl` (it covers
# all that the teacher might say) or `jsd`.

# %%
STUDENT, TEACHER = 'Qwen/Qwen3-0.6B', 'Qwen/Qwen3-1.7B'
PROMPTS = 'tasks:kinds=chain,difficulty=2-3,thinking=mixed'
KIND = 'reverse_kl'
SETTINGS = dict(steps=60, evaluate_every=20, save_every=20, prompts=32, updates=2,
                answer_tokens=384, rank=16, peak_lr=5e-5)

if SMOKE:
  import smoke
  student = smoke.make_model('runs/smoke-model')
  teacher = smoke.make_model('runs/smoke-teacher', width=96, seed=1)
  SETTINGS |= dict(steps=12, evaluate_every=12, save_every=12, prompts=16, answer_tokens=24,
                   peak_lr=1e-2)
else:
  from huggingface_hub import snapshot_download
  student, teacher = (snapshot_download(name, allow_patterns=['*.json', '*.safetensors', '*.txt'])
                      for name in (STUDENT, TEACHER))

# %%
import jax
import jax.numpy as jnp

import qwen3_jax
from qwen3_jax.scaling import memory

s, spec = SETTINGS, qwen3_jax.Spec.from_hf(student)
dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
length = 192 if SMOKE else 512  # of prompt and answer
parts = memory.training(spec, 8, length, dtype, rank=s['rank'])
parts |= memory.generation(spec, s['prompts'], length, dtype)
parts |= {'teacher': memory.weights(qwen3_jax.Spec.from_hf(teacher), dtype)}
print(memory.describe(parts, *memory.available()))

# %% [markdown]
# ## Train
#
# The config is `configs/distill_on.py`, with the sizes of this machine. Run the cell again after an
# interruption, and it goes on from the last checkpoint.

# %%
import dataclasses

from etils import epath

from qwen3_jax.commands import config as configs
from qwen3_jax.commands import train

workdir = Path('runs/smoke-distil' if SMOKE else 'runs/distil')
config = configs.load_config('configs/distill_on.py:0.6b')
with config.unlocked():
  config.model.update(dataclasses.asdict(spec))
  config.init, config.teacher = str(student), str(teacher)
  config.dtype, config.lora.rank = jnp.dtype(dtype).name, s['rank']
  config.distillation.kind = KIND
  config.rewards.gates, config.rewards.workers = (), 2
  config.rollout.update(prompts=s['prompts'], updates=s['updates'], max_tokens=s['answer_tokens'])
  config.data.update(sources=((PROMPTS, 1.0),), heldout=(PROMPTS,), batch=8, length=length)
  config.measure_reward.update(prompts=32, samples=2)
  config.engine.rows = s['prompts']
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
# The divergence from the teacher, in nats a token, and the reward of held-out answers.

# %%
from qwen3_jax.commands import report
from qwen3_jax.training import metrics

lines = metrics.read(workdir)
kl = [line['kl'] for line in lines]
print('divergence a token: ' + ', '.join(f'{each:.3f}' for each in kl))
for line in lines:
  if 'heldout_reward' in line:
    print('step {step}: held-out reward {heldout_reward:.3f} ({heldout_reward_low:.3f} to '
          '{heldout_reward_high:.3f})'.format(**line))
print('report:', report.write(workdir))

# %% [markdown]
# ## Keep the student
#
# Adapters are merged; the folder is one that transformers loads too.

# %%
from qwen3_jax.generation.sampling import Sampling

model, tokenizer = qwen3_jax.load(workdir, dtype=dtype), qwen3_jax.Tokenizer(student)
if not SMOKE:
  qwen3_jax.save(model, 'runs/distilled', tokenizer=tokenizer)
chat = [dict(role='user', content='Calculate 3 + 8 - 7.')]
[out] = qwen3_jax.generate(model, tokenizer, [chat], Sampling(0.6, max_tokens=s['answer_tokens']))
print(out.text)

# %%
third = max(1, len(kl) // 3)
first, last = sum(kl[:third]) / third, sum(kl[-third:]) / third
assert last < first, f'the divergence did not fall: {first:.3f} -> {last:.3f}'
