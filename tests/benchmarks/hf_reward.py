"""Rewards of an exported model beside transformers' Qwen3ForSequenceClassification.

  python tests/benchmarks/hf_reward.py PYTHON   # a Python that has torch and transformers
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.model import hf, reward
from qwen3_jax.spec import Spec

COMMON = dict(layers=3, width=64, heads=4, kv_heads=2, mlp=96, vocab=320, head_width=16,
              stop_ids=(2, 0))
SPECS = {'dense': Spec(**COMMON),
         'moe': Spec(**COMMON, experts=8, chosen=2, expert_mlp=32)}
THEIRS = """
import sys, numpy as np, torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
model = model.float().eval()
rows = np.load(sys.argv[2])
with torch.no_grad():
  out = [model(torch.tensor(rows[side]), attention_mask=torch.tensor(rows[side]) != 0).logits[:, 0]
         for side in ('right',)]
np.save(sys.argv[3], torch.stack(out).numpy())
print(type(model).__name__)
"""


def main(python):
  rng = np.random.default_rng(0)
  for name, spec in SPECS.items():
    model = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.array(rng.normal('norm' in str(path), 0.1, x.shape), x.dtype),
      jax.eval_shape(lambda spec=spec: reward.make(spec)))
    rows = np.zeros((4, 40), np.int64)
    for b, size in enumerate((40, 31, 12, 2)):
      rows[b, :size] = rng.integers(3, spec.vocab, size)
    ours = jax.jit(reward.last_reward)(model, jnp.array(rows, jnp.int32), jnp.int32(rows > 0))
    with tempfile.TemporaryDirectory() as folder:
      folder = Path(folder)
      hf.save(model, folder / 'hf')
      np.savez(folder / 'rows.npz', right=rows)
      done = subprocess.run([python, '-c', THEIRS, folder / 'hf', folder / 'rows.npz',
                             folder / 'out.npy'], capture_output=True, text=True)
      if done.returncode:
        raise SystemExit(done.stderr[-3000:])
      theirs = np.load(folder / 'out.npy')[0]
    print(f'{name}: {done.stdout.strip()}, rewards {np.round(theirs, 3).tolist()}, '
          f'largest difference {np.abs(theirs - ours).max():.1e}')


if __name__ == '__main__':
  main(sys.argv[1])
