"""The shape of a model: one frozen `Spec`, and the released sizes as one table."""
import dataclasses
import difflib
import json

from etils import epath


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Static YaRN context extension (Peng et al. 2023, 2309.00071), as a config.json states it."""
  factor: float
  original: int  # positions the model was trained on
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
  truncate: bool = True  # whole-number ramp ends, as every released config has it


@dataclasses.dataclass(frozen=True)
class Spec:
  """Everything that decides a Qwen3 model's arrays and arithmetic. Letters: see `mesh`."""
  layers: int
  width: int  # D
  heads: int  # N
  kv_heads: int  # K
  mlp: int  # F of dense layers
  vocab: int = 151_936  # V, embedding rows; the tokenizer may have fewer ids
  head_width: int = 128  # H
  tied: bool = False  # the head is the embedding
  rope_theta: float = 1e6
  max_position: int = 40_960
  yarn: Yarn | None = None
  norm_eps: float = 1e-6
  qk_norm: bool = True  # RMSNorm over each head before RoPE; Qwen3 yes, Qwen2 no
  qkv_bias: bool = False  # Qwen2 yes, Qwen3 no
  experts: int = 0  # E; 0: dense
  chosen: int = 0  # X, experts per token
  expert_mlp: int = 0  # F of one expert
  sparse_step: int = 1  # layer i is sparse where (i + 1) % sparse_step == 0 ...
  mlp_only: tuple[int, ...] = ()  # ... and i is not listed here
  renormalise: bool = True  # chosen weights sum to 1 (norm_topk_prob)
  stop_ids: tuple[int, ...] = (151_645, 151_643)

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f'{self.heads} query heads cannot share {self.kv_heads} kv heads: '
                       'heads must be a multiple of kv_heads')
    if self.experts and not 0 < self.chosen <= self.experts:
      raise ValueError(f'chosen={self.chosen} of experts={self.experts}: want 1 to {self.experts}')
    if self.head_width % 2:
      raise ValueError(f'head_width={self.head_width} is odd; RoPE rotates pairs')

  def sparse(self, layer):
    """Whether layer `layer` (from 0) is a mixture of experts."""
    return bool(self.experts) and layer not in self.mlp_only and (layer + 1) % self.sparse_step == 0

  def runs(self):
    """Consecutive layers of one kind, as [(first layer, count, sparse)]: each is one scan."""
    runs = []
    for layer in range(self.layers):
      if runs and runs[-1][2] == self.sparse(layer):
        runs[-1][1] += 1
      else:
        runs.append([layer, 1, self.sparse(layer)])
    return [tuple(run) for run in runs]

  def parameters(self, active=False):
    """Number of weights; with `active`, of those one token uses (embedding and head whole)."""
    attention = self.width * self.head_width * 2 * (self.heads + self.kv_heads)
    attention += 2 * self.head_width if self.qk_norm else 0
    attention += self.head_width * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
    total = self.vocab * self.width * (1 if self.tied else 2) + self.width
    for layer in range(self.layers):
      total += attention + 2 * self.width
      if self.sparse(layer):
        experts = self.chosen if active else self.experts
        total += self.width * (self.experts + 3 * self.expert_mlp * experts)
      else:
        total += 3 * self.width * self.mlp
    return total

  def flops_per_token(self, length, frozen=False):
    """Useful training FLOPs (forward and backward) of one token in causal rows of `length`.

    6 for every weight that multiplies the token (the embedding is a look-up, the head is not), and
    6 * length * N * H a layer for the lower triangle of QK' and PV. With `frozen` weights (LoRA,
    whose own few are not counted) 4 for every weight: no gradient of it is made.
    """
    matmul = self.parameters(active=True) - (0 if self.tied else self.vocab * self.width)
    return (4 if frozen else 6) * matmul + 6 * self.layers * length * self.heads * self.head_width

  @classmethod
  def named(cls, name):
    """The released model `name`, e.g. '8b', '30b-a3b-base', '4b-thinking-2507', 'qwen2.5-7b'."""
    if name not in RELEASED:
      near = difflib.get_close_matches(name.lower(), RELEASED, 1, 0.3)
      raise ValueError(f"no released size {name!r}{f'; did you mean {near[0]!r}' if near else ''}. "
                       f"Known: {', '.join(RELEASED)}")
    return RELEASED[name]

  @classmethod
  def from_hf(cls, folder):
    """Reads `folder`/config.json (a folder of Hugging Face's layout, or the file itself).

    Both layouts are read: the published one (`rope_theta`, `rope_scaling`, `num_experts`) and that
    of transformers 5 (`rope_parameters`, `num_local_experts`). Stop ids come from the folder's
    generation_config.json where it names some: the published config.json has only the first.
    Raises ValueError naming the field for an architecture, rope type or activation this model does
    not have.
    """
    path = epath.Path(folder)
    path = path / 'config.json' if path.is_dir() else path
    if not path.exists():
      raise FileNotFoundError(f'{path} does not exist; want a Hugging Face model folder')
    config = _read_json(path)
    beside = path.parent / 'generation_config.json'
    stop = _read_json(beside).get('eos_token_id') if beside.exists() else None
    config |= {} if stop is None else {'eos_token_id': stop}
    try:
      return _from_json(config)
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from e

  def to_hf(self, dtype='float32'):
    """config.json of this model, in the layout of the published repositories, as a dict.

    Raises ValueError for a combination that no architecture of Hugging Face's has.
    """
    return _to_json(self, dtype)


ARCHITECTURES = {'qwen3': 'Qwen3ForCausalLM', 'qwen3_moe': 'Qwen3MoeForCausalLM',
                 'qwen2': 'Qwen2ForCausalLM'}
FIELDS = dict(layers='num_hidden_layers', width='hidden_size', heads='num_attention_heads',
              kv_heads='num_key_value_heads', mlp='intermediate_size', vocab='vocab_size',
              max_position='max_position_embeddings', norm_eps='rms_norm_eps')


def _read_json(path):
  try:
    found = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(f'{path} is not JSON ({e}); is the download complete?') from e
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds a {type(found).__name__}; want a JSON object')
  return found


def _from_json(config):
  kind = config.get('model_type')
  if kind not in ARCHITECTURES:
    raise ValueError(f'model_type {kind!r} is not supported; want one of '
                     f'{", ".join(ARCHITECTURES)}')
  _refuse(config, kind)
  theta, yarn = _rope_from_json(config)
  stop = config.get('eos_token_id')
  fields = {ours: _field(config, theirs) for ours, theirs in FIELDS.items()}
  if kind == 'qwen3_moe':
    fields |= dict(
        experts=_field(config, 'num_experts', 'num_local_experts'),
        chosen=_field(config, 'num_experts_per_tok'),
        expert_mlp=_field(config, 'moe_intermediate_size'),
        sparse_step=config.get('decoder_sparse_step', 1),
        mlp_only=tuple(config.get('mlp_only_layers') or ()),
        renormalise=config.get('norm_topk_prob', False))
  return Spec(
      **fields, head_width=config.get('head_dim') or fields['width'] // fields['heads'],
      tied=config.get('tie_word_embeddings', False), rope_theta=theta, yarn=yarn,
      qk_norm=kind != 'qwen2', qkv_bias=kind == 'qwen2',
      stop_ids=() if stop is None else tuple(stop) if isinstance(stop, list) else (stop,))


def _field(config, *names):
  found = next((config[name] for name in names if config.get(name) is not None), None)
  if found is None:
    raise ValueError(f'field {names[0]!r} is missing')
  return found


def _refuse(config, kind):
  """Raises ValueError for what this model does not compute."""
  if config.get('hidden_act', 'silu') != 'silu':
    raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; want 'silu'")
  if config.get('use_sliding_window') and config.get('sliding_window'):
    raise ValueError(f"sliding_window {config['sliding_window']} is not supported; "
                     'want use_sliding_window false')
  if config.get('attention_bias') and kind != 'qwen2':
    raise ValueError(f'attention_bias true is not supported in {kind}; want false')
  if config.get('quantization_config'):
    raise ValueError('quantization_config is not supported; want the unquantised release')


def _rope_from_json(config):
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  theta = rope.get('rope_theta', config.get('rope_theta'))
  if theta is None:
    raise ValueError("neither 'rope_theta' nor 'rope_parameters.rope_theta' is given")
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return float(theta), None
  if kind != 'yarn':
    raise ValueError(f"rope type {kind!r} is not supported; want 'default' or 'yarn'")
  if rope.get('original_max_position_embeddings') is None:
    raise ValueError("yarn without 'original_max_position_embeddings'; without it the extension "
                     'is ambiguous')
  for name in ('mscale', 'mscale_all_dim'):
    if rope.get(name):
      raise ValueError(f'yarn with {name!r} is not supported; no Qwen model has it')
  return float(theta), Yarn(
      float(_field(rope, 'factor')), rope['original_max_position_embeddings'],
      float(rope.get('beta_fast') or 32), float(rope.get('beta_slow') or 1),
      rope.get('attention_factor'), rope.get('truncate', True))


def _to_json(spec, dtype):
  kind = {(True, False): 'qwen3_moe' if spec.experts else 'qwen3',
          (False, True): None if spec.experts else 'qwen2'}.get((spec.qk_norm, spec.qkv_bias))
  if kind is None:
    raise ValueError(f'no Hugging Face architecture has qk_norm={spec.qk_norm}, '
                     f'qkv_bias={spec.qkv_bias}, experts={spec.experts}; want QK-Norm without bias '
                     '(Qwen3) or, dense, bias without QK-Norm (Qwen2)')
  stop = spec.stop_ids[0] if len(spec.stop_ids) == 1 else list(spec.stop_ids) or None
  config = {theirs: getattr(spec, ours) for ours, theirs in FIELDS.items()} | dict(
      architectures=[ARCHITECTURES[kind]], attention_bias=spec.qkv_bias, attention_dropout=0.0,
      eos_token_id=stop, head_dim=spec.head_width, hidden_act='silu', initializer_range=0.02,
      max_window_layers=spec.layers, model_type=kind, rope_scaling=_rope_to_json(spec.yarn),
      rope_theta=spec.rope_theta, sliding_window=None, tie_word_embeddings=spec.tied,
      torch_dtype=dtype, use_cache=True, use_sliding_window=False)
  if spec.experts:
    config |= dict(
        decoder_sparse_step=spec.sparse_step, mlp_only_layers=list(spec.mlp_only),
        moe_intermediate_size=spec.expert_mlp, norm_topk_prob=spec.renormalise,
        num_experts=spec.experts, num_experts_per_tok=spec.chosen, output_router_logits=False,
        router_aux_loss_coef=0.001)
  return dict(sorted(config.items()))


def _rope_to_json(yarn):
  if yarn is None:
    return None
  scaling = dict(rope_type='yarn', factor=yarn.factor, beta_fast=yarn.beta_fast,
                 beta_slow=yarn.beta_slow, original_max_position_embeddings=yarn.original)
  scaling |= {} if yarn.attention_factor is None else dict(attention_factor=yarn.attention_factor)
  return scaling if yarn.truncate else scaling | dict(truncate=False)


def _dense(layers, width, heads, mlp, tied):
  return Spec(layers, width, heads, 8, mlp, tied=tied)


def _moe(layers, width, heads, mlp, expert_mlp):
  return Spec(layers, width, heads, 4, mlp, experts=128, chosen=8, expert_mlp=expert_mlp)


def _released():
  """Qwen3 of April 2025 (post-trained), its Base and 2507 variants, and Qwen2 / Qwen2.5 dense."""
  table = {
      '0.6b': _dense(28, 1024, 16, 3072, True), '1.7b': _dense(28, 2048, 16, 6144, True),
      '4b': _dense(36, 2560, 32, 9728, True), '8b': _dense(36, 4096, 32, 12288, False),
      '14b': _dense(40, 5120, 40, 17408, False), '32b': _dense(64, 5120, 64, 25600, False),
      '30b-a3b': _moe(48, 2048, 32, 6144, 768), '235b-a22b': _moe(94, 4096, 64, 12288, 1536)}
  for size, spec in list(table.items()):
    # Base of 32b and 235b-a22b was never published; training starts from its shape.
    table[f'{size}-base'] = dataclasses.replace(spec, max_position=32_768, stop_ids=(151_643,))
  for size, theta in (('4b', 5e6), ('30b-a3b', 1e7), ('235b-a22b', 5e6)):
    for mode in ('instruct', 'thinking'):
      table[f'{size}-{mode}-2507'] = dataclasses.replace(
          table[size], rope_theta=theta, max_position=262_144)
  for size, (layers, width, heads, kv, mlp, vocab, tied) in {
      '0.5b': (24, 896, 14, 2, 4864, 151_936, True),
      '1.5b': (28, 1536, 12, 2, 8960, 151_936, True),
      '3b': (36, 2048, 16, 2, 11008, 151_936, True),
      '7b': (28, 3584, 28, 4, 18944, 152_064, False),
      '14b': (48, 5120, 40, 8, 13824, 152_064, False),
      '32b': (64, 5120, 40, 8, 27648, 152_064, False),
      '72b': (80, 8192, 64, 8, 29568, 152_064, False)}.items():
    spec = Spec(layers, width, heads, kv, mlp, vocab, width // heads, tied, max_position=32_768,
                qk_norm=False, qkv_bias=True)
    table[f'qwen2.5-{size}'] = spec
    if size in ('0.5b', '1.5b', '7b', '72b'):
      table[f'qwen2-{size}'] = spec
  return table


RELEASED = _released()
