"""Teachers of distillation: frozen models that read what the student wrote."""
import json

import jax
import jax.numpy as jnp

from qwen3_jax import mesh as alphabet
from qwen3_jax.kernels import divergence
from qwen3_jax.stages import load
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.training import distillation

HOST = 'pinned_host'  # JAX's name for memory of the host that a device copies from
READ = 'tokens_BT', 'segment_BT', 'position_BT', 'weight_BT', 'top_ids_BTX'


class Teacher:
  """A model in `folder` (see `load.find`) on a mesh of its own over the devices of `train_mesh`.

  `shape` are the sizes of that mesh (None: those of `train_mesh`), `dtype` the type of its weights
  and activations. With `offload` the weights lie in the host's memory and come to the devices only
  while it scores; the head, which the loss needs, stays there. `parts` rows are scored at once. For
  'teacher_top' it tells its `top` likeliest ids.
  """

  def __init__(self, folder, train_mesh, *, shape=None, dtype=jnp.bfloat16, offload=False,
               parts=None, top=64):
    self.train_mesh, self.parts, self.top = train_mesh, parts, top
    self.mesh = train_mesh if shape is None else alphabet.make_mesh(
      {axis: size for axis, size in dict(shape).items() if size}, list(train_mesh.devices.flat))
    with jax.set_mesh(self.mesh):
      self.params = load.load(folder, self.mesh, dtype)
    self.spec, self.dtype, self.folder = self.params.spec, dtype, folder
    self.head_VD = jax.device_put(self.params.head(), alphabet.shardings(
      dict(head_VD=self.params.head()), train_mesh)['head_VD'])
    self.device = jax.tree.map(lambda w: w.sharding, self.params)
    if offload:
      self.params = jax.device_put(self.params, jax.tree.map(
        lambda place: place.with_memory_kind(HOST), self.device))
    self.read = jax.jit(self._read, static_argnames=('settings', 'size'))

  def score(self, batches, settings, size):
    """What the loss of `settings` wants of the teacher, for each of the host's `batches`.

    Global arrays of the train mesh, by their names in a batch (see `distillation.loss`): of the
    whole vocabulary the final hidden states, else log-probabilities at the few ids, which are those
    of `batch['top_ids_BTX']` where it has them, or of the drawn tokens. `size`: how many ids the
    tokenizer has.
    """
    params = jax.device_put(self.params, self.device)  # the same buffers, if they are there
    with jax.set_mesh(self.mesh):
      return [self._score(params, batch, settings, size) for batch in batches]

  def _score(self, params, batch, settings, size):
    rows, found = len(batch['tokens_BT']), []
    step = self.parts or rows
    for first in range(0, rows, step):
      part = {name: batch[name][first:first + step] for name in READ if name in batch}
      part = alphabet.to_global(part, range(step), step, self.mesh)
      found.append(self.read(params, part, settings=settings, size=size))
    whole = {name: jnp.concatenate([each[name] for each in found]) for name in found[0]}
    return jax.device_put(whole, alphabet.shardings(whole, self.train_mesh))

  def _read(self, params, batch, settings, size):
    options = dict(dtype=self.dtype)
    if settings.kind in divergence.KINDS:
      return dict(teacher_BTD=distillation.teacher_states(params, batch, **options))
    options |= dict(temperature=settings.temperature, size=size)
    if settings.kind == 'sampled':
      return dict(teacher_logp_BT=distillation.teacher_logp(params, batch, **options))
    ids = batch.get('top_ids_BTX')
    if ids is None:
      ids, logp = distillation.teacher_top(params, batch, self.top, **options)
    else:
      logp = distillation.teacher_at(params, batch, ids, **options)
    return dict(top_ids_BTX=ids, top_logp_BTX=logp)


def check_tokenizers(student, folder):
  """Raises ValueError where the teacher in `folder` numbers or splits text unlike `student`."""
  kind, found = load.find(folder)
  teacher = Tokenizer(found if kind == 'hf' else found / 'tokenizer')
  if difference := compare(student, teacher):
    raise ValueError(
      f"the student's tokenizer ({student.file}) and that of the teacher {folder} differ: "
      f'{difference}. On-policy distillation compares distributions over one vocabulary: take a '
      "student of the teacher's family, or learn from the teacher's texts alone "
      '(configs/distill_off.py)')


def compare(one, other):
  """What first differs between two tokenizers, in words; None where they give the same ids."""
  for id in range(max(one.size, other.size)):
    pieces = [_piece(tokenizer, id) for tokenizer in (one, other)]
    if pieces[0] != pieces[1]:
      said = ' and '.join('no token' if piece is None else repr(piece) for piece in pieces)
      return f'id {id} is {said}'
  merges = [_merges(tokenizer) for tokenizer in (one, other)]
  for rank, pair in enumerate(zip(*merges)):
    if pair[0] != pair[1]:
      return f'merge {rank} is {" and ".join(map(repr, pair))}'
  if len(merges[0]) != len(merges[1]):
    return f'they have {len(merges[0])} and {len(merges[1])} merges'
  return None


def _piece(tokenizer, id):
  try:
    return tokenizer.piece(id)
  except ValueError:
    return None


def _merges(tokenizer):
  """The merges of a tokenizer.json in order; SentencePiece has none but the order of its ids."""
  if tokenizer.file.suffix != '.json':
    return []
  merges = json.loads(tokenizer.file.read_text(encoding='utf-8'))['model'].get('merges', [])
  return [tuple(each.split(' ')) if isinstance(each, str) else tuple(each) for each in merges]
