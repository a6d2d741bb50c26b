"""From rewards to advantages, and what each sample's tokens weigh in the loss. Host side, numpy.

A reward that is missing (NaN or None: the verifier's infrastructure failed) is in no mean, has
advantage 0, and its sample is not to be trained: that is no fault of the model's.
"""
import numpy as np

KINDS = ('group', 'dr', 'batch', 'group_mean_batch_std', 'rloo', 'decoupled')
AGGREGATIONS = ('token', 'sequence', 'dr', 'prompt')


def advantages(groups, kind='group', eps=1e-4, weights=None):
  """(advantages, valid): for each group of rewards of one prompt's samples an array of either.

  'group' (R - mean) / (std + eps) in the group (GRPO, 2402.03300); 'dr' R - mean (Dr. GRPO,
  2503.20783); 'batch' (R - mean) / (std + eps) over all samples; 'group_mean_batch_std' the group's
  mean and the deviation of all samples (2508.08221); 'rloo' R less the mean of the others (RLOO,
  2402.14740); 'decoupled' with rewards (samples, components): each component as 'group', their sum
  by the group's `weights` (all 1), that as 'group_mean_batch_std' (GDPO, 2601.05242).
  Deviations are sample deviations (n - 1).
  A group of equal rewards, or of one, has advantage 0; so has a missing reward, and `valid` False.
  Raises ValueError for a kind that does not exist, or rewards of another shape.
  """
  if kind not in KINDS:
    raise ValueError(f'there are no advantages {kind!r}; want one of {", ".join(KINDS)}')
  groups = [np.asarray(group, np.float64) for group in groups]
  wanted = 2 if kind == 'decoupled' else 1
  for group in groups:
    if group.ndim != wanted:
      raise ValueError(f'rewards of a group have shape {group.shape}; {kind!r} wants '
                       f'{"(samples, components)" if wanted == 2 else "(samples,)"}')
  if kind == 'decoupled':
    groups = [_decoupled(group, each, eps) for group, each in zip(
      groups, weights or [np.ones(group.shape[1]) for group in groups], strict=True)]
  valid = [np.isfinite(group) for group in groups]
  every = np.concatenate([group[good] for group, good in zip(groups, valid)] or [np.zeros(0)])
  spread = _std(every) + eps
  out = []
  for group, good in zip(groups, valid):
    values, A = group[good], np.zeros(len(group))
    if kind == 'batch':
      A[good] = (values - every.mean()) / spread if np.ptp(every) > 0 else 0
    elif len(values) > 1 and np.ptp(values) > 0:
      centred = values - values.mean()
      A[good] = centred * (len(values) / (len(values) - 1) if kind == 'rloo' else
                           1 / (_std(values) + eps) if kind == 'group' else
                           1 if kind == 'dr' else 1 / spread)
    out.append(A)
  return out, valid


def _decoupled(group, weights, eps):
  """One group's (samples, components) as a weighted sum of normalised components, NaN if none.

  A component that is missing for a sample adds 0 to it: its mean.
  """
  columns = [advantages([column], 'group', eps)[0][0] for column in group.T]
  total = sum(w * x for w, x in zip(weights, columns, strict=True))
  return np.where(np.isfinite(group).any(1), total, np.nan)


def _std(values):
  return values.std(ddof=1) if len(values) > 1 else 0.0


def aggregate(lengths, mode='token', groups=None, longest=None):
  """What each sample's tokens are multiplied by, (samples,): the loss is then a plain sum of them.

  `lengths` counts the trained tokens of each sample of one update (all its micro-batches), 0 where
  none is. 'token' 1 / tokens (DAPO); 'sequence' 1 / (samples * own tokens) (GRPO, GSPO); 'dr'
  1 / (samples * longest), `longest` the largest number of tokens that a sample may have (Dr. GRPO);
  'prompt' 1 / (prompts * tokens of the prompt's samples), `groups` the prompt of each sample
  (2510.13786). Samples of length 0 count as samples. Raises ValueError.
  """
  lengths = np.asarray(lengths, np.float64)
  ones, n = np.ones_like(lengths), max(1, len(lengths))
  if mode == 'token':
    return ones / max(1.0, lengths.sum())
  if mode == 'sequence':
    return 1 / (n * np.maximum(lengths, 1))
  if mode == 'dr':
    if not longest or longest < lengths.max(initial=0):
      raise ValueError(f"aggregation 'dr' divides by the largest length that a sample may have; "
                       f'got {longest}, and a sample of {int(lengths.max(initial=0))} tokens')
    return ones / (n * longest)
  if mode != 'prompt':
    raise ValueError(f'there is no aggregation {mode!r}; want one of {", ".join(AGGREGATIONS)}')
  if groups is None or len(groups) != len(lengths):
    raise ValueError("aggregation 'prompt' needs the prompt of each sample (`groups`)")
  _, prompt = np.unique(np.asarray(groups), return_inverse=True)
  tokens = np.bincount(prompt, lengths)
  return 1 / (len(tokens) * np.maximum(tokens, 1))[prompt] if len(lengths) else ones
