"""Policy losses: TRL's values and gradients, packed and unpacked, through the model and the head."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import transformer
from qwen3_jax.training import advantage, mismatch, policy
from qwen3_jax.training import step as training

TRL_KINDS = {'grpo': 'grpo', 'bnpo': 'dapo', 'dapo': 'dapo', 'dr_grpo': 'dr_grpo',
             'cispo': 'cispo', 'sapo': 'sapo'}
TRL = ('grpo', 'grpo_onpolicy_old_none', 'grpo_kl_k3_beta0.04', 'grpo_clip_higher',
       'grpo_delta1.5_two_sided', 'grpo_kl_biascorrected', 'bnpo', 'dapo_clip_higher',
       'dapo_kl_beta0.02', 'dr_grpo', 'dr_grpo_kl', 'gspo_eps3e-4_4e-4', 'gspo_wide', 'gspo_kl',
       'cispo_hi2', 'sapo')


@struct.dataclass
class Table:
  """A model whose logits are its weights (samples, T, V): one prompt token, then T drawn ones.

  `packed` samples lie in each row.
  """
  logits: jax.Array
  packed: int = struct.field(pytree_node=False, default=1)

  def __call__(self, tokens_BT, segment_BT, position_BT, routes=None, remat='none', dtype=None):
    hidden = jnp.pad(self.logits, ((0, 0), (0, 1), (0, 0)))
    return transformer.Output(hidden.reshape(*tokens_BT.shape, hidden.shape[-1]))

  def head(self):
    return jnp.eye(self.logits.shape[-1])


def lay_out(packed, tokens, **each):
  """The batch of samples (N, T), `packed` in a row, behind one prompt token each."""
  def place(x):
    return np.pad(np.asarray(x), ((0, 0), (1, 0))).reshape(len(x) // packed, -1)
  samples, length = np.asarray(tokens).shape
  segment = np.broadcast_to(1 + np.arange(samples)[:, None] % packed, (samples, length + 1))
  position = np.broadcast_to(np.arange(length + 1), segment.shape)
  return dict(tokens_BT=place(tokens), segment_BT=segment.reshape(samples // packed, -1),
              position_BT=position.reshape(samples // packed, -1),
              **{f'{name}_BT': place(x).astype(np.float32) for name, x in each.items()})


def settings_of(row):
  """`Policy` as a variant of the golden file was made."""
  kind = 'gspo' if row['level'] == 'sequence' else TRL_KINDS[row['loss_type']]
  clip = dict(clip_low=row['lo'], clip_high=row['hi'])
  clip = {'sapo': {}, 'cispo': dict(clip_low=1.0, clip_high=row['hi'] - 1)}.get(kind, clip)
  return policy.Policy(kind, **clip, beta=row['beta'], dual_clip=row.get('delta'),
                       kl='unbiased' if row.get('bias_kl') else 'k3')


@pytest.mark.parametrize('variant, packed', [(name, 1) for name in TRL] + [
  ('grpo', 2), ('gspo_kl', 2), ('gspo_eps3e-4_4e-4', 4)])
def test_values_and_gradients_are_trls(golden, variant, packed):
  numbers = np.load(golden / 'loss' / 'grpo.npz')
  row = json.loads((golden / 'loss' / 'grpo_variants.json').read_text())[variant]
  settings, mask = settings_of(row), numbers['mask']
  scale = advantage.aggregate(mask.sum(1), settings.aggregation, longest=row['max_len'])
  old = dict(old_logp=numbers['old_logp']) if row['use_old'] else {}
  batch = lay_out(packed, numbers['token_ids'], weight=mask, scale=scale[:, None] + 0 * mask,
                  advantage=numbers['advantages'][:, None] * mask,
                  reference_logp=numbers['ref_logp'], **old)
  run = jax.jit(jax.value_and_grad(policy.loss, has_aux=True), static_argnums=2)
  (value, sums), gradient = run(Table(jnp.array(numbers['cur_logits']), packed), batch, settings)
  np.testing.assert_allclose(value, numbers[f'{variant}/loss'], atol=1e-6)
  np.testing.assert_allclose(gradient.logits, numbers[f'{variant}/grad_logits'], atol=1e-6)
  values = policy.report(sums)
  tokens, ratio = mask.sum(), numbers[f'{variant}/ratio']
  trained = mask > 0
  np.testing.assert_allclose(values['loss'], value)
  np.testing.assert_allclose(values['entropy'], (numbers['entropy'] * mask).sum() / tokens,
                             rtol=1e-5)
  np.testing.assert_allclose(values['ratio'], (ratio * mask).sum() / tokens, rtol=1e-5)
  np.testing.assert_allclose([values['ratio_max'], values['ratio_min']],
                             [ratio[trained].max(), ratio[trained].min()], rtol=1e-5)
  want = numbers['grpo_kl_k3_beta0.04/kl_k3']
  np.testing.assert_allclose(values['kl_reference_k3'], (want * mask).sum() / tokens, rtol=1e-4)
  if 'clip_low' in values and variant != 'cispo_hi2':
    clipped = (values['clip_low'] + values['clip_high']) * tokens
    assert clipped == pytest.approx(row['clipped_tokens'])
