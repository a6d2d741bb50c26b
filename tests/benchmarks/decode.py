"""Decoded tokens a second on CPU beside Hugging Face transformers on the same work, as a ratio.

python tests/benchmarks/decode.py [--hf PYTHON]    PYTHON: an interpreter with torch, transformers
The model: width 256, 4 layers, 4/2 heads of 64, mlp 768, vocabulary 4,096; the mixture has 32
experts of 96, 4 chosen. 16 prompts of 64 random ids, 128 new tokens each, greedy, float32, prefill
included. Ours and theirs take turns, best of all rounds each, so that a busy machine hits both; on
a busy machine the ratio flatters whoever waits less for the other cores: trust an idle one.
"""
import argparse
import subprocess
import sys
import time

ROWS, PROMPT, NEW, VOCAB = 16, 64, 128, 4096
PEER = """
import sys, time, torch, transformers as t
kind, repeats = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
size = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, vocab_size=4096, intermediate_size=768, tie_word_embeddings=False,
            rope_theta=1e6)
if kind == 'dense':
  model = t.Qwen3ForCausalLM(t.Qwen3Config(**size))
else:
  model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**size, moe_intermediate_size=96, num_experts=32,
                                                 num_experts_per_tok=4, norm_topk_prob=True))
model.eval()
prompts = torch.randint(0, 4096, (16, 64))
def run(count):
  with torch.no_grad():
    model.generate(prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                   pad_token_id=0)
run(8)
for _ in range(repeats):
  start = time.perf_counter()
  run(128)
  print(16 * 128 / (time.perf_counter() - start))
"""


class Ids:
  """Stands in for a tokenizer, so that decoding alone is timed."""
  size, stop_ids = VOCAB, ()

  def stream(self):
    return self

  def push(self, id):
    return ''


def make_ours(kind, chunk):
  """A function that decodes once and returns tokens a second, compiled and warm."""
  import numpy as np

  from qwen3_jax.generation import engine
  from qwen3_jax.generation.sampling import Sampling
  from qwen3_jax.model import transformer
  from qwen3_jax.spec import Spec
  moe = dict(experts=32, chosen=4, expert_mlp=96) if kind == 'moe' else {}
  decoder = engine.prepare(transformer.init(Spec(4, 256, 4, 2, 768, VOCAB, 64, **moe)), ROWS)
  prompts = np.random.default_rng(0).integers(0, VOCAB, (ROWS, PROMPT)).tolist()
  greedy = Sampling(0, max_tokens=NEW)

  def measure():
    start = time.perf_counter()
    outputs = engine.generate(decoder, Ids(), prompts, greedy, chunk=chunk)
    seconds = time.perf_counter() - start
    assert all(len(out.tokens) == NEW for out in outputs)
    return ROWS * NEW / seconds
  measure()
  return measure


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--hf', metavar='PYTHON', help='interpreter with torch and transformers')
  parser.add_argument('--kinds', default='dense,moe')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--repeats', type=int, default=3, help='runs of each a round')
  parser.add_argument('--chunk', type=int, default=64, help='tokens between two looks at the texts')
  args = parser.parse_args()
  for kind in args.kinds.split(','):
    measure, ours, theirs = make_ours(kind, args.chunk), [], []
    for _ in range(args.rounds):
      ours += [measure() for _ in range(args.repeats)]
      if args.hf:
        run = subprocess.run([args.hf, '-c', PEER, kind, str(args.repeats)], capture_output=True,
                             text=True)
        if run.returncode:
          sys.exit(run.stderr)
        theirs += map(float, run.stdout.split())
    line = f'{kind} decoding: {max(ours):,.0f} tokens/s'
    if theirs:
      line += f', transformers {max(theirs):,.0f}, ratio {max(ours) / max(theirs):.2f}'
    print(line, flush=True)


if __name__ == '__main__':
  main()
