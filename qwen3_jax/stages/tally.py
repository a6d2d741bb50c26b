"""What is logged of rollouts: rewards and their parts, entropy, lengths, a few answers to read."""
import json
import math

import numpy as np


def note(groups, tried, seconds):
  """Values of one rollout: of all groups that were `tried`, `groups` being those that count.

  A group is a dict of `record`, `episodes`, `scored` (`router.Scored` or None) and `rewards` (NaN
  where missing), the last three by sample.
  """
  scored = [each for group in tried for each in group['scored'] if each is not None]
  rewards = [x for group in tried for x in group['rewards']]
  notes = note_answers(tried, seconds) | dict(
    reward=mean(rewards), kept_groups=len(groups) / max(1, len(tried)),
    missing=sum(not math.isfinite(x) for x in rewards))
  for name in sorted({name for each in scored for name in each.components}):
    notes[f'reward_{name}'] = mean([each.components[name] for each in scored
                                    if each.components.get(name) is not None])
  return notes


def note_answers(tried, seconds):
  """Values of one rollout that need no reward: entropy and length of its answers, and its speed."""
  episodes = [episode for group in tried for episode in group['episodes']]
  answered = [episode for episode in episodes if episode.response is not None]
  logp = np.concatenate([episode.logp[episode.drawn] for episode in answered] or [np.zeros(1)])
  tokens = sum(len(episode.tokens) for episode in answered)
  return dict(
    rollout_entropy=-float(logp.mean()), prompts=len(tried),
    answer_tokens=mean([len(episode.tokens) for episode in answered]),
    cut_off=mean([episode.response.finish_reason == 'length' for episode in answered]),
    rollout_seconds=seconds, rollout_tokens_per_s=tokens / seconds)


def measure(records, rewards, episodes):
  """Values of a measurement: `rewards` (prompts, samples), NaN where missing, of `records`."""
  values, by_source = interval(rewards), {}
  for record, each in zip(records, rewards, strict=True):
    by_source.setdefault(record.get('source', 'prompts'), []).append(each)
  if len(by_source) > 1:
    values |= {f'heldout_reward_{name}': interval(np.array(each))['heldout_reward']
               for name, each in sorted(by_source.items())}
  values['heldout_tokens'] = mean([len(episode.tokens) for episode in episodes
                                   if episode.response is not None])
  return values


def interval(rewards):
  """Mean and 95 % interval of (prompts, samples) rewards; the prompts are the independent draws."""
  means = [np.nanmean(each) for each in rewards if np.isfinite(each).any()]
  if not means:
    return dict(heldout_reward=math.nan)
  half = 1.96 * np.std(means, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
  return dict(heldout_reward=float(np.mean(means)), heldout_reward_low=float(np.mean(means) - half),
              heldout_reward_high=float(np.mean(means) + half))


def mean(values):
  """Mean of what is known; 0 where nothing is."""
  known = [x for x in values if math.isfinite(x)]
  return float(np.mean(known)) if known else 0.0


def write(path, groups, step, shown=4):
  """Writes a few groups as JSON lines where a person can read them."""
  lines = []
  for group in groups[:shown]:
    answers = [dict(text=episode.response.text if episode.response else None,
                    failure=episode.failure, reward=None if math.isnan(reward) else reward,
                    components=each.components if each else {},
                    missing=each.missing if each else {})
               for episode, each, reward in zip(group['episodes'], group['scored'],
                                                group['rewards'])]
    lines.append(json.dumps(dict(step=step, messages=group['record']['messages'],
                                 source=group['record'].get('source'), answers=answers),
                            ensure_ascii=False))
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{line}\n' for line in lines))
