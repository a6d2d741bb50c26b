"""The plain meaning of every kernel, in short whole-array jnp that the fast paths are tested on."""
import jax
import jax.numpy as jnp


def attention(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, start=0):
  """Causal grouped-query attention within segments; (B, T, N, H).

  Query t sits in slot `start` + t and sees the slots up to its own that carry its segment number.
  Segment 0 is padding: such a query sees nothing, its output is 0. Scale H^-1/2, softmax float32.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
  s_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH.astype(jnp.float32)) * H ** -0.5
  causal_TS = jnp.arange(S) <= start + jnp.arange(T)[:, None]
  segment_BT1 = segment_BT[:, :, None]
  seen_BTS = causal_TS & (segment_BT1 == segment_BS[:, None]) & (segment_BT1 > 0)
  s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, -jnp.inf)
  p_BKGTS = jnp.nan_to_num(jax.nn.softmax(s_BKGTS, axis=-1))
  o_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH.astype(jnp.float32))
  return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def cross_entropy(hidden_BTD, head_VD, target_BT, weight_BT):
  """sum over tokens of weight * -log softmax(head hidden)[target], float32 scalar."""
  return -jnp.sum(weight_BT * token_logp(hidden_BTD, head_VD, target_BT))


def token_logp(hidden_BTD, head_VD, target_BT, temperature=1.0, size=None):
  """log softmax(head hidden / temperature)[target] of every token, over the first `size` ids."""
  return token_entropy(hidden_BTD, head_VD, target_BT, temperature, size)[0]


def token_entropy(hidden_BTD, head_VD, target_BT, temperature=1.0, size=None):
  """`token_logp`, and the entropy -sum p log p of the same distribution, float32 (B, T) both."""
  logits_BTV = jnp.einsum('BTD,VD->BTV', hidden_BTD, head_VD[:size],
                          preferred_element_type=jnp.float32)
  logp_BTV = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
  entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
  return jnp.take_along_axis(logp_BTV, target_BT[..., None], -1)[..., 0], entropy_BT


def divergence(hidden_BTD, head_VD, teacher_BTD, teacher_head_VD, weight_BT, kind, mix=0.5,
               temperature=1.0, size=None):
  """(sum of weight * divergence, divergences (B, T)) of a student and a teacher held fixed.

  p is the student's softmax(logits / temperature) over the first `size` ids, q the teacher's:
  'reverse_kl' KL(p || q), 'forward_kl' KL(q || p), 'jsd' mix KL(q || m) + (1 - mix) KL(p || m) with
  m = mix q + (1 - mix) p.
  """
  def log_softmax(hidden_BTD, head_VD):
    logits_BTV = jnp.einsum('BTD,VD->BTV', hidden_BTD, head_VD[:size],
                            preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits_BTV / temperature, axis=-1)

  def kl(a_BTV, b_BTV):
    return jnp.sum(jnp.exp(a_BTV) * (a_BTV - b_BTV), axis=-1)
  p_BTV = log_softmax(hidden_BTD, head_VD)
  q_BTV = jax.lax.stop_gradient(log_softmax(teacher_BTD, teacher_head_VD))
  m_BTV = jnp.logaddexp(jnp.log(mix) + q_BTV, jnp.log(1 - mix) + p_BTV)
  value_BT = {'reverse_kl': lambda: kl(p_BTV, q_BTV), 'forward_kl': lambda: kl(q_BTV, p_BTV),
              'jsd': lambda: mix * kl(q_BTV, m_BTV) + (1 - mix) * kl(p_BTV, m_BTV)}[kind]()
  return jnp.sum(weight_BT * value_BT), jax.lax.stop_gradient(value_BT)


def experts(x_MD, chosen_MX, gate_MX, gate_EDF, up_EDF, down_EFD):
  """sum over the chosen experts of gate * SwiGLU expert(x), (M, D): every expert on every token."""
  h_MEF = jax.nn.silu(jnp.einsum('MD,EDF->MEF', x_MD, gate_EDF))
  y_MED = jnp.einsum('MEF,EFD->MED', h_MEF * jnp.einsum('MD,EDF->MEF', x_MD, up_EDF), down_EFD)
  y_MXD = jnp.take_along_axis(y_MED, chosen_MX[..., None], axis=1)
  return jnp.sum(gate_MX[..., None] * y_MXD, axis=1)


def paged_attention(q_BQKGH, k_BKHS, v_BKSH, table_BC, length_B):
  """Attention of each row's last Q tokens over the first `length_B` of its pages; as q_BQKGH.

  Column c of `table_BC` is the page, of the first axis of `k_BKHS` and `v_BKSH`, of positions c * S
  .. c * S + S - 1. Query i sees those < length - (Q - 1 - i); if that is none, its output is 0.
  """
  Q, H = q_BQKGH.shape[1], q_BQKGH.shape[-1]
  C, S = table_BC.shape[1], v_BKSH.shape[2]
  k_BCKHS, v_BCKSH = (x[table_BC].astype(jnp.float32) for x in (k_BKHS, v_BKSH))
  s_BQKGCS = jnp.einsum('BQKGH,BCKHS->BQKGCS', q_BQKGH.astype(jnp.float32), k_BCKHS) * H ** -0.5
  end_BQ = length_B[:, None] - jnp.arange(Q - 1, -1, -1)
  seen_BQCS = jnp.arange(C * S).reshape(C, S) < end_BQ[:, :, None, None]
  s_BQKGCS = jnp.where(seen_BQCS[:, :, None, None], s_BQKGCS, -1e30)
  p_BQKGCS = jax.nn.softmax(s_BQKGCS, axis=(-2, -1)) * seen_BQCS[:, :, None, None]
  return jnp.einsum('BQKGCS,BCKSH->BQKGH', p_BQKGCS, v_BCKSH).astype(q_BQKGH.dtype)


def partial_attention(q_BTNH, k_BSKH, v_BSKH, q_segment_BT, k_segment_BS, q_start_X, k_start_Y,
                      window=None):
  """(output, log-sum-exp (B, N, T) float32) of queries over some of the keys, by slots.

  The T queries are X equal stretches of consecutive slots from `q_start_X`, the keys Y from
  `k_start_Y`. Query t sees key s if slot(s) <= slot(t), both are of one segment above 0 and, with a
  `window`, slot(t) - slot(s) < window. A query that sees nothing: output 0, log-sum-exp -1e30.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]

  def slots(start_X, length):
    return (start_X[:, None] + jnp.arange(length // start_X.shape[0])).reshape(-1)
  behind_TS = slots(q_start_X, T)[:, None] - slots(k_start_Y, S)
  seen_TS = (behind_TS >= 0) & (behind_TS < (window or jnp.iinfo(jnp.int32).max))
  segment_BT1 = q_segment_BT[:, :, None]
  seen_BTS = seen_TS & (segment_BT1 == k_segment_BS[:, None]) & (segment_BT1 > 0)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
  s_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH.astype(jnp.float32)) * H ** -0.5
  s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, -jnp.inf)
  lse_BKGT = jnp.maximum(jax.nn.logsumexp(s_BKGTS, axis=-1), -1e30)
  p_BKGTS = jnp.exp(s_BKGTS - lse_BKGT[..., None])
  o_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH.astype(jnp.float32))
  return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BKGT.reshape(B, N, T)


def route(logits_ME, real_M, chosen, renormalise):
  """A router: ids of the `chosen` largest logits (the lower id of equal ones first) and their gates
  (M, X), then sums over real tokens: assignments and softmax probabilities (E) and logsumexp^2.
  """
  logits_ME = logits_ME.astype(jnp.float32)
  probability_ME = jax.nn.softmax(logits_ME, -1)
  # top_k puts 0 before -0, whose probabilities are equal.
  chosen_MX = jax.lax.top_k(jnp.where(logits_ME == 0, 0, logits_ME), chosen)[1]
  gate_MX = jnp.take_along_axis(probability_ME, chosen_MX, -1)
  if renormalise:
    gate_MX = gate_MX / gate_MX.sum(-1, keepdims=True)
  hit_ME = (chosen_MX[..., None] == jnp.arange(logits_ME.shape[-1])).any(1)
  return (chosen_MX, gate_MX, real_M @ hit_ME.astype(jnp.float32), real_M @ probability_ME,
          real_M @ jax.nn.logsumexp(logits_ME, -1) ** 2)


def norm_rope(x_BTNH, scale_H, cos_BT1I, sin_BT1I, eps):
  """x / rms(x) * scale over H, then each pair (x_i, x_{i + H/2}) turned by its angle; x's type."""
  x = x_BTNH.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale_H
  a, b = jnp.split(x, 2, axis=-1)
  turned = a * cos_BT1I - b * sin_BT1I, b * cos_BT1I + a * sin_BT1I
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
