"""Exchange with Hugging Face: folders of config.json and safetensors, streamed both ways.

A linear layer there is [out, in]; here the input axes lead and the layers (and experts) of one
parameter are stacked. Tensors pass one at a time between the file and the device's own part of the
parameter, so the host never holds more than one of them beside the model.
"""
import dataclasses
import functools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from qwen3_jax import mesh as alphabet
from qwen3_jax.model import reward, tensorfile, transformer
from qwen3_jax.spec import Spec

CLASSIFIER = 'ForSequenceClassification'  # a reward model there, with one label
ROWS_BYTES = 1 << 26  # a large table (embedding, head) passes in parts of this size


@dataclasses.dataclass(frozen=True)
class Place:
  """One tensor there and its place here: `at` (layer, expert) in the parameter `leaf`."""
  name: str
  leaf: str
  at: tuple[int, ...]
  shape: tuple[int, ...]  # here, without the axes of `at`
  inputs: int  # so many leading axes here are the last there, flattened; 0: the same order
  shape_there: tuple[int, ...]


def places(spec, rewards=False):
  """The `Place` of every tensor of a model, or of a reward model, in the order of its layers."""
  D, V = spec.width, spec.vocab
  yield Place('model.embed_tokens.weight', 'embed_VD', (), (V, D), 0, (V, D))
  for stack, (first, count, sparse) in enumerate(spec.runs()):
    for i in range(count):
      for name, leaf, at, ins, outs in _layer(spec, sparse):
        there = (math.prod(outs), math.prod(ins)) if ins else (math.prod(outs),)
        yield Place(f'model.layers.{first + i}.{name}', f'stacks.{stack}.{leaf}', (i, *at),
                    ins + outs, len(ins), there)
  yield Place('model.norm.weight', 'norm_D', (), (D,), 0, (D,))
  if rewards:
    yield Place('score.weight', 'reward_D', (), (D,), 1, (1, D))
  elif not spec.tied:
    yield Place('lm_head.weight', 'head_VD', (), (V, D), 0, (V, D))


def _layer(spec, sparse):
  """Rows (name there, leaf here, expert, input axes, output axes) of one layer."""
  D, N, K, H = spec.width, spec.heads, spec.kv_heads, spec.head_width
  yield 'input_layernorm.weight', 'attention_norm_D', (), (), (D,)
  for letter, heads in (('q', (N, H)), ('k', (K, H)), ('v', (K, H))):
    names = 'NH' if letter == 'q' else 'KH'
    yield f'self_attn.{letter}_proj.weight', f'attention.{letter}_D{names}', (), (D,), heads
    if spec.qkv_bias:
      yield f'self_attn.{letter}_proj.bias', f'attention.{letter}_bias_{names}', (), (), heads
    if spec.qk_norm and letter != 'v':
      yield f'self_attn.{letter}_norm.weight', f'attention.{letter}_norm_H', (), (), (H,)
  yield 'self_attn.o_proj.weight', 'attention.o_NHD', (), (N, H), (D,)
  yield 'post_attention_layernorm.weight', 'mlp_norm_D', (), (), (D,)
  F, E = (spec.expert_mlp, 'E') if sparse else (spec.mlp, '')
  if sparse:
    yield 'mlp.gate.weight', 'mlp.router_DE', (), (D,), (spec.experts,)
  for e in range(spec.experts) if sparse else [None]:
    name, at = ('mlp.', ()) if e is None else (f'mlp.experts.{e}.', (e,))
    yield f'{name}gate_proj.weight', f'mlp.gate_{E}DF', at, (D,), (F,)
    yield f'{name}up_proj.weight', f'mlp.up_{E}DF', at, (D,), (F,)
    yield f'{name}down_proj.weight', f'mlp.down_{E}FD', at, (F,), (D,)


def load(folder, mesh=None, dtype=jnp.bfloat16):
  """The model of a Hugging Face folder, its arrays laid out on `mesh` (else on one device).

  `dtype` is that of the matrices; norms and routers are float32 (`transformer.cast`). None keeps
  every parameter as it is stored. Raises FileNotFoundError or ValueError naming the file or tensor
  that is missing, unknown, cut short, or of the wrong shape or type, before anything is allocated.
  """
  folder = epath.Path(folder)
  spec = Spec.from_hf(folder)
  stored = tensorfile.find_tensors(folder)
  architecture = (json.loads((folder / 'config.json').read_text()).get('architectures') or [''])[0]
  rewards = architecture.endswith(CLASSIFIER)
  wanted = {place.name: place for place in places(spec, rewards)}
  _check_match(folder, spec, stored, wanted)
  by_leaf = {}
  for place in wanted.values():
    by_leaf.setdefault(place.leaf, []).append(place)
  abstract = abstract_model(spec, mesh, reward.make if rewards else transformer.make)
  leaves = []
  with tensorfile.Reader() as reader:
    for leaf, wants in name_leaves(abstract).items():
      kinds = {stored[place.name].dtype for place in by_leaf[leaf]}
      kind = functools.reduce(jnp.promote_types, kinds) if dtype is None else (
          jnp.float32 if keeps_float32(leaf) else dtype)
      leaves.append(_read_leaf(reader, stored, by_leaf[leaf], wants.shape, kind, wants.sharding))
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def abstract_model(spec, mesh=None, make=transformer.make):
  """The model that `make(spec)` makes as float32 `jax.ShapeDtypeStruct`s with their shardings."""
  shapes = jax.eval_shape(lambda: make(spec))
  if mesh is None:
    layout = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
  else:
    layout = alphabet.shardings(shapes, mesh)
  return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      shapes, layout)


def name_leaves(tree):
  """A model's leaves by dotted path, e.g. 'stacks.0.attention.q_DNH'."""
  return {'.'.join(str(getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', ''))))
                   for key in path).removesuffix('.value'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def keeps_float32(leaf):
  """Whether `transformer.cast` leaves this parameter in float32."""
  name = leaf.rpartition('.')[2]
  return 'norm' in name or name in transformer.FLOAT32


def _check_match(folder, spec, stored, wanted):
  for name, place in wanted.items():
    if name not in stored:
      raise ValueError(f'{folder} has no tensor {name} {place.shape_there}, which its config.json '
                       'asks for; is the download complete?')
    if stored[name].shape != place.shape_there:
      raise ValueError(f'{stored[name].path}: {name} has shape {stored[name].shape}, config.json '
                       f'asks for {place.shape_there}')
  redundant = {'lm_head.weight'} if spec.tied else set()  # some tied folders hold it twice
  for name in stored.keys() - wanted.keys() - redundant:
    raise ValueError(f'{stored[name].path}: tensor {name} has no place in the model that '
                     'config.json describes')


def _read_leaf(reader, stored, here, shape, dtype, sharding):
  """One parameter, each local device's part of it filled tensor by tensor."""
  parts = {device: _bounds(index, shape)
           for device, index in sharding.addressable_devices_indices_map(shape).items()}
  buffers = {device: jnp.zeros([stop - start for start, stop in part], dtype, device=device)
             for device, part in parts.items()}
  for place in here:
    tensor = stored[place.name]
    for rows in _row_blocks(place, tensor.dtype):
      meetings = {device: _meet(part, place, rows) for device, part in parts.items()}
      meetings = {device: meeting for device, meeting in meetings.items() if meeting}
      if meetings:
        piece = reader.read(tensor, rows if _is_table(place) else slice(None))
        view = (piece.T if place.inputs else piece).reshape(-1, *place.shape[1:])
      for device, (start, window) in meetings.items():
        turn = _turn(place)  # as stored, whose long runs of bytes are quick to copy
        share = jax.device_put(view[window].transpose(turn), device)
        buffers[device] = _write(buffers[device], share, start, tuple(np.argsort(turn)))
  return jax.make_array_from_single_device_arrays(shape, sharding, list(buffers.values()))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(buffer, share, start, turn):
  share = share.transpose(turn).astype(buffer.dtype)
  share = share.reshape((1,) * (buffer.ndim - share.ndim) + share.shape)
  return jax.lax.dynamic_update_slice(buffer, share, start)


def _bounds(index, shape):
  """(first, stop) of each axis of a device's part."""
  return [axis.indices(size)[:2] for axis, size in zip(index, shape)]


def _is_table(place):
  return not place.inputs and len(place.shape_there) == 2


def _row_blocks(place, dtype):
  """Ranges of a piece's first axis in which it passes: only tables are cut."""
  rows = step = place.shape[0]
  if _is_table(place):
    step = max(1, ROWS_BYTES // (place.shape[1] * dtype.itemsize))
  return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _meet(part, place, rows):
  """Where `rows` of a piece meet a device's part: (start in it, window of the rows) or None."""
  lead = len(place.at)
  low, high = max(part[lead][0], rows.start), min(part[lead][1], rows.stop)
  if low >= high or not all(first <= i < stop for i, (first, stop) in zip(place.at, part)):
    return None
  start = [i - first for i, (first, _) in zip((*place.at, low), part)]
  start += [0] * (len(part) - len(start))
  window = (slice(low - rows.start, high - rows.start), *(slice(*w) for w in part[lead + 1:]))
  return tuple(start), window


def _turn(place):
  """The order of a piece's axes as stored there: outputs, then inputs."""
  axes = range(len(place.shape))
  return (*axes[place.inputs:], *axes[:place.inputs])


def save(model, folder, dtype=None, shard_bytes=5e9, tokenizer=None):
  """Writes `model` as a Hugging Face folder that transformers loads with equal logits.

  All tensors have one `dtype`, by default the embedding's. Files hold up to `shard_bytes`;
  `tokenizer` (a `Tokenizer`) adds its own files. Everything is written to `<folder>.tmp-<pid>` and
  then renamed. Raises ValueError if `folder` exists and is not empty, or if the model's arrays lie
  partly on other hosts.
  """
  folder = epath.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f'{folder} exists and is not an empty folder; name a new one')
  leaves = name_leaves(model)
  if not all(leaf.is_fully_addressable for leaf in leaves.values()):
    raise ValueError('some arrays of the model lie on other hosts; save a checkpoint and convert '
                     'it on one host')
  dtype = np.dtype(dtype or leaves['embed_VD'].dtype)
  if dtype not in tensorfile.CODES:
    raise ValueError(f'dtype {dtype} cannot be saved; want float32, bfloat16 or float16')
  scratch = folder.parent / f'{folder.name}.tmp-{os.getpid()}'
  scratch.mkdir(parents=True)
  try:
    _write_files(scratch, model.spec, leaves, dtype, shard_bytes)
    if tokenizer is not None:
      tokenizer.save(scratch)
    if folder.exists():
      folder.rmdir()
    scratch.rename(folder)
  except BaseException:
    scratch.rmtree(missing_ok=True)
    raise


def _write_files(folder, spec, leaves, dtype, shard_bytes):
  config, rewards = spec.to_hf(dtype.name), 'reward_D' in leaves
  if rewards:  # transformers reads the reward at the last token that is not pad_token_id
    config |= dict(architectures=[config['architectures'][0].replace('ForCausalLM', CLASSIFIER)],
                   id2label={'0': 'reward'}, label2id={'reward': 0},
                   pad_token_id=spec.stop_ids[-1] if spec.stop_ids else None)
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  (folder / 'generation_config.json').write_text(
      json.dumps({'eos_token_id': config['eos_token_id']}, indent=2) + '\n')
  files, home = _share_out(places(spec, rewards), dtype, shard_bytes), {}
  for number, group in enumerate(files, 1):
    name = 'model.safetensors' if len(files) == 1 else (
        f'model-{number:05d}-of-{len(files):05d}.safetensors')
    tensorfile.write(folder / name, {place.name: (dtype, place.shape_there) for place in group},
                     (_read_back(leaves[place.leaf], place, dtype) for place in group))
    home |= {place.name: name for place in group}
  if len(files) > 1:
    size = sum(math.prod(place.shape_there) for group in files for place in group)
    index = dict(metadata=dict(total_size=size * dtype.itemsize), weight_map=home)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')


def _share_out(all_places, dtype, limit):
  """Groups of consecutive tensors of up to `limit` bytes."""
  files, size = [[]], 0
  for place in all_places:
    bytes_ = math.prod(place.shape_there) * dtype.itemsize
    if files[-1] and size + bytes_ > limit:
      files.append([])
      size = 0
    files[-1].append(place)
    size += bytes_
  return files


def _read_back(leaf, place, dtype):
  """One tensor as stored there, in parts, put together from the devices' shares."""
  turn = _turn(place)
  for rows in _row_blocks(place, dtype):
    shape = (rows.stop - rows.start, *place.shape[1:])
    out = np.empty([shape[axis] for axis in turn], dtype)
    for shard in leaf.addressable_shards:
      meeting = _meet(_bounds(shard.index, leaf.shape), place, rows)
      if meeting and shard.replica_id == 0:
        start, window = meeting
        size = [s.stop - s.start for s in window]
        share = _cut(shard.data, start, tuple(size), turn, dtype)
        out[tuple(window[axis] for axis in turn)] = np.asarray(share)
    yield out


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _cut(part, start, size, turn, dtype):
  share = jax.lax.dynamic_slice(part, start, (1,) * (part.ndim - len(size)) + size)
  return share.reshape(size).astype(dtype).transpose(turn)
