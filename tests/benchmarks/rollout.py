"""Rollout tokens a second on CPU beside Hugging Face transformers on the same work, as a ratio.

python tests/benchmarks/rollout.py [--hf PYTHON] [--model peer|tiny|moe] [--rows 256]
The work: 64 prompts of 16 to 128 random ids, 8 samples each, answers of 16 to 256 tokens (drawn
once, skewed to short ones as answers are), temperature 1, float32. Counted are the tokens of the
answers. Transformers runs left-padded batches to the end of the longest answer of each. Ours and
theirs take turns, best of all rounds each; trust an idle machine.
"""
import argparse
import json
import subprocess
import sys
import time

PEER = """
import json, sys, time, torch, transformers as t
work = json.loads(sys.stdin.read())
torch.manual_seed(0)
model = t.Qwen3ForCausalLM(t.Qwen3Config(
  hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
  vocab_size=4096, intermediate_size=768, tie_word_embeddings=False, rope_theta=1e6)).eval()
def run(rows, count):
  T = max(len(ids) for ids, _ in rows)
  ids = torch.tensor([[0] * (T - len(ids)) + ids for ids, _ in rows])
  mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids, _ in rows])
  with torch.no_grad():
    model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
                   do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
run(work['rows'][:work['batch']], 4)
start = time.perf_counter()
for first in range(0, len(work['rows']), work['batch']):
  rows = work['rows'][first:first + work['batch']]
  run(rows, max(count for _, count in rows))
print(sum(count for _, count in work['rows']) / (time.perf_counter() - start))
"""


class Ids:
  """Stands in for a tokenizer, so that generation alone is timed."""
  stop_ids = ()

  def __init__(self, size):
    self.size = size

  def stream(self):
    return self

  def push(self, id):
    return ''


def make_spec(name):
  from qwen3_jax.spec import Spec
  from qwen3_jax.stages.defaults import TINY
  return {'peer': Spec(4, 256, 4, 2, 768, 4096, 64), **TINY}[name]


def make_work(vocab, prompts, samples, seed=0):
  """Pairs (prompt, tokens to generate), the samples of a prompt side by side."""
  import numpy as np
  draw = np.random.default_rng(seed)
  texts = [draw.integers(0, vocab, draw.integers(16, 129)).tolist() for _ in range(prompts)]
  counts = 16 + (240 * draw.beta(1.2, 2.5, prompts * samples)).astype(int)
  return [(texts[i // samples], int(count)) for i, count in enumerate(counts)]


def measure(spec, work, rows, repeats, **options):
  """(best tokens/s, compilations after the first run, tokens prefilled)."""
  import jax

  from qwen3_jax.generation.engine import Engine, Request
  from qwen3_jax.generation.sampling import Sampling
  from qwen3_jax.model import transformer
  longest = max(len(ids) + count for ids, count in work)
  engine = Engine(transformer.init(spec), Ids(spec.vocab), rows=rows,
                  pages=rows * (longest // options['page'] + 1), **options)
  compiled, rates = [], []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(seconds) if 'backend_compile' in name else None)
  for turn in range(repeats + 1):
    if turn == 1:
      print(f'  {len(compiled)} compilations, {sum(compiled):.0f} s', flush=True)
      compiled.clear()
    engine.prefilled = 0
    start = time.perf_counter()
    requests = [Request(ids, Sampling(1.0, max_tokens=count), turn * len(work) + i)
                for i, (ids, count) in enumerate(work)]
    outputs = engine.run(requests)
    assert [len(out.tokens) for out in outputs] == [count for _, count in work]
    rates.append(sum(count for _, count in work) / (time.perf_counter() - start))
  jax.monitoring.clear_event_listeners()
  return max(rates[1:]), len(compiled), engine.prefilled


def measure_peer(python, work, batch):
  run = subprocess.run([python, '-c', PEER], capture_output=True, text=True,
                       input=json.dumps(dict(rows=work, batch=batch)))
  if run.returncode:
    sys.exit(run.stderr)
  return float(run.stdout)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--hf', metavar='PYTHON', help='interpreter with torch and transformers')
  parser.add_argument('--hf-batch', default='64,512')
  parser.add_argument('--model', default='peer')
  parser.add_argument('--prompts', type=int, default=64)
  parser.add_argument('--samples', type=int, default=8)
  parser.add_argument('--rows', default='256')
  parser.add_argument('--page', type=int, default=32)
  parser.add_argument('--chunk', type=int, default=32)
  parser.add_argument('--share', default='1,0', help='prefixes shared: 1, 0 or both')
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--repeats', type=int, default=2)
  args = parser.parse_args()
  spec = make_spec(args.model)
  work = make_work(spec.vocab, args.prompts, args.samples)
  ours, theirs = [], []
  for _ in range(args.rounds):
    for rows in map(int, args.rows.split(',')):
      for share in map(int, args.share.split(',')):
        rate, compiled, prefilled = measure(spec, work, rows, args.repeats, page=args.page,
                                            chunk=args.chunk, share=bool(share))
        ours.append(rate)
        print(f'{args.model}, {rows} rows, prefixes {"shared" if share else "not shared"}: '
              f'{rate:,.0f} tokens/s, {prefilled:,} prefilled, {compiled} compilations once warm',
              flush=True)
    for batch in map(int, args.hf_batch.split(',') if args.hf else ()):
      theirs.append(measure_peer(args.hf, work, batch))
      print(f'transformers, batches of {batch}: {theirs[-1]:,.0f} tokens/s', flush=True)
  if theirs:
    print(f'ratio {max(ours) / max(theirs):.2f}')


if __name__ == '__main__':
  main()
