"""The parity gate: whether the engine that draws and the trainer that learns are one policy.

Both run the same weights, so their log-probabilities of the drawn tokens differ by rounding alone;
a wrong RoPE base, a filter of the sampler that the loss knows nothing of, or other experts show
here, before they are learnt from.
"""
import numpy as np

from qwen3_jax.training.fit import Stuck


class Mismatch(Stuck):
  """Engine and trainer disagree on the tokens that the engine drew."""


def measure(samples):
  """How far the trainer's log-probabilities of the trained tokens are from the engine's.

  `parity_mean`, `parity_max` of |difference| in nats; `parity_kl`, the estimate k3 of KL(engine ||
  trainer); `parity_ess`, the effective share of samples under the weights of their ratios, 1 where
  both agree; `ratio_mean` of the tokens, which is 1 unless the sampler drew from a part of the
  distribution only (trl#7269).
  """
  gaps = [(sample.old_logp - sample.rollout_logp)[sample.weight > 0] for sample in samples]
  gap = np.concatenate(gaps).astype(np.float64) if gaps else np.zeros(0)
  if not gap.size:
    return {}
  ratio = np.exp(np.clip(gap, -20, 20))
  return dict(parity_mean=float(np.abs(gap).mean()), parity_max=float(np.abs(gap).max()),
              parity_kl=float((ratio - 1 - gap).mean()), ratio_mean=float(ratio.mean()),
              parity_ess=float(ratio.sum() ** 2 / (len(ratio) * (ratio ** 2).sum())))


def check(measured, limits, step):
  """Raises Mismatch where `measured` passes a limit that is set (`mean`, `max`, `kl`, `ess`)."""
  wrong = []
  for name in ('mean', 'max', 'kl', 'ess'):
    limit, value = limits[name], measured.get(f'parity_{name}')
    if limit is not None and value is not None and not (
        value >= limit if name == 'ess' else value <= limit):
      wrong.append(f'{name} {value:.2g} (limit {limit:g})')
  if wrong:
    raise Mismatch(
      f'before update {step + 1}, engine and trainer disagree on the log-probabilities of the '
      f'drawn tokens: {", ".join(wrong)}; mean ratio {measured["ratio_mean"]:.3f}. Nothing was '
      'learnt from them. Look at the sampling (temperature, top_k, top_p), the RoPE base and the '
      'types; limits are config.parity')
