"""Training on CPU beside Hugging Face transformers on the same work, as ratios.

python tests/benchmarks/cpu.py [--hf PYTHON]    PYTHON: an interpreter with torch and transformers.
The model: width 256, 4 layers, 4/2 heads of 64, mlp 768, vocabulary 4,096; the mixture has 32
experts of 96, 4 chosen. Rows 4 x 512, float32, AdamW. Ours and theirs take turns, best of three
rounds each, so that a busy machine hits both.
"""
import argparse
import subprocess
import sys
import time

PEER = """
import sys, time, torch, transformers as t
kind, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
common = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
              head_dim=64, vocab_size=4096, intermediate_size=768, tie_word_embeddings=False,
              rope_theta=1e6)
if kind == 'dense':
  model = t.Qwen3ForCausalLM(t.Qwen3Config(**common))
else:
  model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**common, moe_intermediate_size=96, num_experts=32,
                                                 num_experts_per_tok=4, norm_topk_prob=True))
adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = torch.randint(0, 4096, (4, 512))
def step():
  model(input_ids=rows, labels=rows).loss.backward()
  adam.step()
  adam.zero_grad(set_to_none=True)
step(); step()
start = time.perf_counter()
for _ in range(steps):
  step()
print(2048 * steps / (time.perf_counter() - start))
"""


def our_training(kind, steps):
  """Tokens a second of our training step on random rows, warm."""
  import jax
  import jax.numpy as jnp

  from qwen3_jax.model import transformer
  from qwen3_jax.spec import Spec
  from qwen3_jax.training import losses, optim
  from qwen3_jax.training import step as training
  moe = dict(experts=32, chosen=4, expert_mlp=96) if kind == 'moe' else {}
  spec = Spec(4, 256, 4, 2, 768, 4096, 64, **moe)
  optimizer = optim.adamw()
  state = training.initial_state(lambda: transformer.make(spec), optimizer)
  step = training.make_step(losses.next_token, optimizer, lambda step: 1e-3)
  run = jax.jit(step, donate_argnums=0)
  tokens = jax.random.randint(jax.random.key(0), (4, 512), 0, 4096)
  batch = dict(tokens_BT=tokens, segment_BT=jnp.ones((4, 512), jnp.int32),
               position_BT=jnp.tile(jnp.arange(512), (4, 1)), weight_BT=jnp.ones((4, 512)))
  for _ in range(2):
    state, metrics = run(state, batch)
  jax.block_until_ready(metrics)
  def measure():
    nonlocal state
    start = time.perf_counter()
    for _ in range(steps):
      state, metrics = run(state, batch)
    jax.block_until_ready(metrics)
    return 2048 * steps / (time.perf_counter() - start)
  return measure


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--hf', metavar='PYTHON', help='interpreter with torch and transformers')
  parser.add_argument('--steps', type=int, default=8)
  parser.add_argument('--kinds', default='dense,moe')
  args = parser.parse_args()
  for kind in args.kinds.split(','):
    measure = our_training(kind, args.steps)
    ours, theirs = [], []
    for _ in range(3):
      ours.append(measure())
      if args.hf:
        run = subprocess.run([args.hf, '-c', PEER, kind, str(args.steps)], capture_output=True,
                             text=True)
        if run.returncode:
          sys.exit(run.stderr)
        theirs.append(float(run.stdout.split()[-1]))
    line = f'{kind} training: {max(ours):,.0f} tokens/s'
    if theirs:
      line += f', transformers {max(theirs):,.0f}, ratio {max(ours) / max(theirs):.2f}'
    print(line, flush=True)


if __name__ == '__main__':
  main()
