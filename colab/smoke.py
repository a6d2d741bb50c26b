"""Stand-ins for downloaded models in SMOKE mode: random weights, and a tokenizer trained here."""
from pathlib import Path

import jax

import qwen3_jax
from qwen3_jax.generation.thinking import STOP
from qwen3_jax.model import transformer
from qwen3_jax.spec import Spec
from qwen3_jax.text.tokenizer import train

TEXT = ('one cat sat on 12 mats and ran far over green hills while birds sang of 345 seas; '
        'What is 17 times 23? Calculate the sum and say it in a few short words. ')


def make_model(folder, width=64, seed=0):
  """Writes a Qwen3 of two layers of `width` as a Hugging Face folder, unless it is there."""
  folder = Path(folder)
  if not folder.exists():
    tokenizer = train([TEXT * 20, STOP * 20], 400, folder.with_suffix('.tokenizer'))
    spec = Spec(layers=2, width=width, heads=4, kv_heads=2, mlp=3 * width, vocab=512,
                head_width=width // 4, tied=True, max_position=1024, stop_ids=tokenizer.stop_ids)
    sharp = jax.tree.map(lambda w: 3 * w, transformer.init(spec, seed))  # has preferences to change
    qwen3_jax.save(sharp, folder, tokenizer=tokenizer)
  return folder
