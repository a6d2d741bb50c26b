"""Models from where they lie: a Hugging Face folder, a run's workdir, a recipe's workdir."""
import functools
import json
import logging
import os

import jax
import jax.numpy as jnp
from etils import epath

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import hf, lora, reward, transformer
from qwen3_jax.spec import Spec, Yarn
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.training import checkpoint

log = logging.getLogger(__name__)

BASE = 'base.json'  # in the workdir of a LoRA run: the model that its adapters belong to


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
  config = _read_config(folder)
  how = {}
  if config.get('method') == 'reward':
    how = dict(make=reward.make,
               restore=functools.partial(load_below_reward, seed=config['seed']))
  return load_run(folder, spec_from(config['model']), mesh, dtype, **how)


def load_model(folder, mesh=None, dtype=jnp.bfloat16):
  """(model, tokenizer) of `folder`; see `load`."""
  kind, found = find(folder)
  tokenizer = Tokenizer(found if kind == 'hf' else found / 'tokenizer')
  return load(folder, mesh, dtype), tokenizer


def load_params(folder, spec, mesh, dtype=jnp.float32):
  """Weights of `folder` for training a model of `spec` (norms and routers in float32 always).

  Shapes must agree; what is not in the shapes (rope theta, YaRN, lengths) is that of `spec`: this
  is how the long-context stage changes the base frequency. A warning says so for a Hugging Face
  folder.
  ValueError names the first difference.
  """
  kind, folder = find(folder)
  if kind == 'run':
    return load_run(folder, spec, mesh, dtype)
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
  params = hf.load(folder, mesh, dtype)
  params.spec = spec
  return params


def load_below_reward(folder, spec, mesh, dtype=jnp.float32, seed=0):
  """The language model in `folder` below a new reward head; see `load_params`."""
  return reward.from_language_model(load_params(folder, spec, mesh, dtype), seed)


def load_run(folder, spec, mesh=None, dtype=jnp.float32, make=transformer.make,
             restore=load_params):
  """The model of a run's newest checkpoint; adapters are merged into the model they belong to.

  `make(spec)` builds the model, `restore` (as in `stages.run.train`) reads what was adapted.
  """
  mesh = mesh or alphabet.make_mesh(dict(fsdp=1), jax.local_devices()[:1])
  dtype = dtype or jnp.float32

  def read(build):
    shapes = jax.eval_shape(build)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                            shapes, alphabet.shardings(shapes, mesh))
    return checkpoint.restore_subtree(folder / 'checkpoints', 'params', abstract)
  if not base_folder(folder):
    return read(lambda: transformer.cast(make(spec), dtype))
  options = _read_config(folder)['lora']
  adapters = read(lambda: lora.make(spec, **options, extra=lora.extra(make(spec))))
  base = load_base(folder, spec, mesh, restore=restore)
  layout = jax.tree.map(lambda w: w.sharding, base)
  fold = jax.jit(lambda base, adapters: transformer.cast(lora.merge(base, adapters), dtype),
                 out_shardings=layout)
  return fold(base, adapters)


def base_folder(workdir):
  """Folder of the frozen model of a LoRA run that has a checkpoint; None of any other run."""
  note = epath.Path(workdir) / BASE
  if note.exists() and checkpoint.steps(note.parent / 'checkpoints'):
    return json.loads(note.read_text())['folder']
  return None


def load_base(workdir, spec, mesh, dtype=jnp.float32, restore=load_params):
  """The frozen model of the LoRA run in `workdir`, which must be the one that was adapted.

  Raises FileNotFoundError where its folder is gone, ValueError where other weights lie there.
  """
  note = epath.Path(workdir) / BASE
  known = json.loads(note.read_text())
  try:
    base = restore(known['folder'], spec, mesh, dtype)
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{workdir} holds LoRA adapters of {known["folder"]}: {e}. If that '
                            f'model was moved, put its new place into {note}') from e
  found = lora.fingerprint(base)
  if found != known['fingerprint']:
    raise ValueError(f'{workdir} holds LoRA adapters of a model with fingerprint '
                     f'{known["fingerprint"]}, {known["folder"]} now has another ({found}); put '
                     f'the folder of the model that was adapted into {note}')
  return base


def note_base(workdir, folder, base):
  """Writes down where the frozen model of a LoRA run lies, and its fingerprint."""
  found = str(find(folder)[1])
  place = found if '://' in found else os.path.abspath(found)
  known = json.dumps(dict(folder=place, fingerprint=lora.fingerprint(base)), indent=2)
  if jax.process_index() == 0:
    (epath.Path(workdir) / BASE).write_text(known + '\n')
