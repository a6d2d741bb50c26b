"""The report's part on reinforcement learning says what the metrics say."""
from qwen3_jax.evaluation.reinforcement import is_reinforcement, write_rewards

LINES = [dict(step=1, loss=0.0, reward=0.25, rollout_entropy=0.5, answer_tokens=30.0,
              entropy_low=0.4, entropy_high=0.6, parity_mean=1e-7, parity_max=1e-5,
              heldout_reward=0.3, heldout_reward_low=0.2,
              heldout_reward_high=0.4, heldout_reward_sums=0.1, heldout_reward_words=0.5),
         dict(step=2, loss=0.1),
         dict(step=3, loss=0.0, reward=0.75, rollout_entropy=0.45, answer_tokens=41.0,
              entropy_low=0.4, entropy_high=0.6),
         dict(step=4, loss=0.1, heldout_reward=0.7, heldout_reward_low=0.6, heldout_reward_high=0.8,
              heldout_reward_sums=0.6, heldout_reward_words=0.8)]


def test_rewards_before_and_after_entropy_and_length_are_told():
  page = write_rewards([dict(name='s1', metrics=[dict(step=1, loss=2.0)]),
                        dict(name='rl', metrics=LINES)], lambda stage: stage['name'].upper())
  assert '0.300 (0.20–0.40)' in page and '0.700 (0.60–0.80)' in page
  assert '<td>0.500</td><td>0.450</td>' in page and '<td>30</td><td>41</td>' in page
  assert page.count('class="small"') == 5
  assert 'RL: parity' in page and 'RL: held-out reward by source' in page
  assert 'sums' in page and 'words' in page and 'S1' not in page


def test_without_rewards_there_is_no_such_part():
  stage = dict(name='s1', metrics=[dict(step=1, loss=2.0)])
  assert write_rewards([stage], str) == '' and not is_reinforcement(stage)
  assert is_reinforcement(dict(metrics=LINES))
