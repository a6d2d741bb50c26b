"""Models from where they lie: a Hugging Face folder, a run's workdir, a recipe's workdir."""
import json
import logging

import jax
import jax.numpy as jnp
from etils import epath

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import hf, transformer
from qwen3_jax.spec import Spec, Yarn
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.training import checkpoint

log = logging.getLogger(__name__)


def spec_from(fields):
  """Spec from the `model` section of a config (a ConfigDict, or what config.json holds)."""
  fields = dict(fields)
  yarn = fields.get('yarn')
  return Spec(**fields | dict(
    mlp_only=tuple(fields['mlp_only']), stop_ids=tuple(fields['stop_ids']),
    yarn=None if yarn is None else Yarn(**dict(yarn))))


def find(folder):
  """('hf' or 'run', the folder); of a recipe's workdir, its last stage that has a checkpoint.

  Raises FileNotFoundError saying what was looked for.
  """
  folder = epath.Path(folder)
  config = _read_config(folder)
  if config and 'model_type' in config:
    return 'hf', folder
  if config and 'model' in config:
    return 'run', folder
  recipe = folder / 'recipe.json'
  for stage in reversed(json.loads(recipe.read_text()) if recipe.exists() else []):
    if _read_config(folder / stage) and checkpoint.steps(folder / stage / 'checkpoints'):
      return 'run', folder / stage
  raise FileNotFoundError(
      f'no model in {folder}: want a Hugging Face folder (config.json, *.safetensors), the workdir '
      'of a training run, or that of a recipe')


def _read_config(folder):
  path = folder / 'config.json'
  return json.loads(path.read_text()) if path.exists() else None


def load(folder, mesh=None, dtype=jnp.bfloat16):
  """The model in `folder` (see `find`), its matrices cast to `dtype`, sharded on `mesh`."""
  kind, folder = find(folder)
  if kind == 'hf':
    return hf.load(folder, mesh, dtype)
  return _load_run(folder, spec_from(_read_config(folder)['model']), mesh, dtype)


def load_model(folder, mesh=None, dtype=jnp.bfloat16):
  """(model, tokenizer) of `folder`; see `load`."""
  kind, found = find(folder)
  tokenizer = Tokenizer(found if kind == 'hf' else found / 'tokenizer')
  return load(folder, mesh, dtype), tokenizer


def load_params(folder, spec, mesh):
  """float32 weights of `folder` for training a model of `spec`.

  Shapes must agree; what is not in the shapes (rope theta, YaRN, lengths) is that of `spec`: this
  is how the long-context stage changes the base frequency. A warning says so for a Hugging Face
  folder.
  ValueError names the first difference.
  """
  kind, folder = find(folder)
  if kind == 'run':
    return _load_run(folder, spec, mesh, jnp.float32)
  theirs = Spec.from_hf(folder)
  if theirs.rope_theta != spec.rope_theta:
    log.warning('%s has a RoPE base of %s, this run trains with %s (config.model.rope_theta)',
                folder, f'{theirs.rope_theta:,.0f}', f'{spec.rope_theta:,.0f}')
  for field in ('layers', 'width', 'heads', 'kv_heads', 'head_width', 'mlp', 'vocab', 'tied',
                'experts', 'chosen', 'expert_mlp', 'sparse_step', 'mlp_only', 'renormalise',
                'qk_norm', 'qkv_bias', 'norm_eps'):
    if getattr(theirs, field) != getattr(spec, field):
      raise ValueError(f'{folder} has {field} {getattr(theirs, field)}, config.model.{field} is '
                       f'{getattr(spec, field)}; choose the config of that size')
  params = hf.load(folder, mesh, jnp.float32)
  params.spec = spec
  return params


def _load_run(folder, spec, mesh, dtype):
  shapes = jax.eval_shape(lambda: transformer.cast(transformer.make(spec), dtype or jnp.float32))
  mesh = mesh or alphabet.make_mesh(dict(fsdp=1), jax.local_devices()[:1])
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                          shapes, alphabet.shardings(shapes, mesh))
  return checkpoint.restore_subtree(folder / 'checkpoints', 'params', abstract)
