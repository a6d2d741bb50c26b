"""Held-out reward of the tiny reasoning RL under several settings, from one cold-start model.

python tests/benchmarks/rl_sweep.py --init runs/tiny/cold_start --workdir /tmp/sweep \\
  [--each 'optim.peak_lr=6e-4 lora.rank=None' --each 'optim.peak_lr=5e-3 lora.rank=16' ...]
Each setting is one run of `train` (about 4 minutes on 2 cores), one after the other; finished runs
are not done again. Printed are the held-out reward before and after with 95 % intervals, the
entropy of the first and last rollout, and the seconds of all updates.
"""
import argparse
import json
import pathlib
import subprocess
import sys

DEFAULT = ('optim.peak_lr=6e-4 optim.schedule=constant lora.rank=None',
           'optim.peak_lr=1e-3 optim.schedule=constant lora.rank=None',
           'optim.peak_lr=5e-3 lora.rank=16', 'optim.peak_lr=1.2e-2 lora.rank=8')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--init', required=True)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--config', default='configs/reasoning_rl.py:tiny')
  parser.add_argument('--each', action='append')
  args = parser.parse_args()
  for setting in args.each or DEFAULT:
    folder = pathlib.Path(args.workdir) / setting.replace(' ', '_').replace('=', '-')
    subprocess.run([sys.executable, '-m', 'qwen3_jax', 'train', '--config', args.config, '--init',
                    args.init, '--workdir', str(folder),
                    *(f'--config.{each}' for each in setting.split())], check=False)
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').open()]
    measured = [line for line in lines if line.get('heldout_reward') is not None]
    entropy = [line['rollout_entropy'] for line in lines if 'rollout_entropy' in line]
    rewards = ' -> '.join(
      '{heldout_reward:.3f} ({heldout_reward_low:.3f} to {heldout_reward_high:.3f})'.format(**line)
      for line in (measured[0], measured[-1]))
    print(f'{setting}: {rewards} at update {measured[-1]["step"]}, entropy {entropy[0]:.3f} -> '
          f'{entropy[-1]:.3f}, {sum(line["seconds"] for line in lines):.0f} s', flush=True)


if __name__ == '__main__':
  main()
