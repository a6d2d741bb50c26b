"""Weights of documents from their labels, tuned on proxies: 'proxy' for an accelerator, or 'tiny'.

Trials, sizes and budgets are ours (RegMix: 512 proxies of 1 M weights on 1 B tokens each; Qwen3's
were not published).
"""
import dataclasses

from ml_collections import ConfigDict

from qwen3_jax.spec import Spec

SPECS = dict(
  tiny=Spec(layers=2, width=64, heads=2, kv_heads=1, mlp=192, vocab=512, head_width=32, tied=True,
            max_position=1024, rope_theta=1e4, stop_ids=()),
  proxy=Spec(layers=4, width=256, heads=4, kv_heads=2, mlp=768, vocab=8192, head_width=64,
             tied=True, max_position=4096, rope_theta=1e4, stop_ids=()))


def get_config(arg):
  size = arg or 'tiny'
  if size not in SPECS:
    raise ValueError(f'config argument {arg!r}: want tiny or proxy')
  small = size == 'tiny'
  spec = dataclasses.asdict(SPECS[size])
  return ConfigDict(dict(
    seed=0, model=spec, tokenizer=None, tokenizer_size=SPECS[size].vocab,
    levels=('domain', 'instance'),  # and 'crossed': see data.weighting.columns
    trials=16 if small else 256,  # of each level
    seeds=5,  # final proxies of each level
    parallel=1 if small else 16,  # proxies in one compiled step
    spread=dict(domain=1.5, education=2.0),  # theta is tried within plus and minus these
    targets=None,  # ((domain, weight), ...) of the held-out loss; None: all domains alike
    share=1.0,  # of the input that proxies see; weights are given to all of it
    heldout=dict(files=(), share=0.1, least_education=3, batches=4 if small else 16),
    steps=150 if small else 4000, final_steps=150 if small else 4000,
    batch=8 if small else 64, length=128 if small else 1024,
    optim=dict(schedule='cosine', peak_lr=4e-3 if small else 3e-3, warmup=10 if small else 100,
               final=0.1, decay=0.2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)),
    type_safe=False)
