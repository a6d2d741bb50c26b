"""Whether transformers computes bit-equal logits from a model and from our export of it.

Needs two environments, since torch is not among the project's dependencies:
  python tests/benchmarks/hf_roundtrip.py export FOLDER ... --to DIR     (with qwen3_jax)
  python tests/benchmarks/hf_roundtrip.py compare FOLDER ... --to DIR    (with torch, transformers)
"""
import argparse
import sys
from pathlib import Path


def export(folder, out):
  from qwen3_jax.model import hf
  hf.save(hf.load(folder, dtype=None), out)
  hf.save(hf.load(folder, dtype=None), f'{out}-sharded', shard_bytes=200_000)
  print(f'{folder.name}: exported')


def compare(folder, out):
  """Prints and returns whether all logits are equal in every bit."""
  import torch
  from transformers import AutoModelForCausalLM
  tokens = torch.arange(2 * 40).reshape(2, 40) * 7 % 90
  mask = torch.ones_like(tokens)
  mask[1, :9] = 0
  logits = []
  for path in (folder, out, Path(f'{out}-sharded')):
    model = AutoModelForCausalLM.from_pretrained(path, dtype='auto').eval()
    with torch.no_grad():
      logits.append(model(tokens, attention_mask=mask).logits)
  same = all(x.dtype == logits[0].dtype and torch.equal(x, logits[0]) for x in logits)
  print(f'{folder.name}: {tuple(logits[0].shape)} {logits[0].dtype}, largest |logit| '
        f'{logits[0].abs().max():.3f}: {"bit-equal" if same else "DIFFERENT"}')
  return same


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=('export', 'compare'))
  parser.add_argument('folders', nargs='+', type=Path)
  parser.add_argument('--to', type=Path, required=True)
  args = parser.parse_args()
  each = export if args.what == 'export' else compare
  results = [each(folder, args.to / folder.name) for folder in args.folders]
  sys.exit(args.what == 'compare' and not all(results))


if __name__ == '__main__':
  main()
