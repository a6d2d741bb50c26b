"""On-policy distillation: the student answers, a teacher reads along, and the two heads meet.

The second phase of strong-to-weak distillation (Qwen3 Technical Report, section 4.5); the first,
learning the teacher's texts, is `stages.sft` on data that `commands.fuse` makes. An update:

  prompts in both modes   data.queries, data.switches, in the order of stages.curriculum
  answers of the student  generation.engine, by stages.rollouts (packing, parity gate, resume)
  the teacher's states    stages.teacher: in process, a program of its own, once a rollout
  the loss                training.distillation: KL of the two distributions at every drawn token

No reward is asked for: any prompt will do, one answer of it is enough, and an answer that was cut
off teaches as well as one that ended. Rewards of held-out prompts are measured beside it.

Several teachers: `config.teachers` sends prompts by the beginning of their `source`. An update has
one teacher, so that each may have a width of its own; a rollout's updates are shared out by the
number of its prompts, and their order is drawn.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.data import switches
from qwen3_jax.kernels import divergence
from qwen3_jax.model import transformer
from qwen3_jax.stages import load, placement, pretrain, rl, rollouts, scorers, teacher
from qwen3_jax.stages import run as stage
from qwen3_jax.stages.curriculum import Curriculum
from qwen3_jax.training import distillation


def run(config, workdir, tokenizer):
  """Trains `config.init` in `workdir` towards its teachers on its own answers; see `stages.run`.

  Raises ValueError for settings that do not fit and for a teacher with another tokenizer,
  `parity.Mismatch`.
  """
  spec = load.spec_from(config.model)
  stage.check_vocabulary(tokenizer, spec)
  settings = distillation.Distillation(**config.distillation)
  check(config, spec, settings)
  routes = teacher_routes(config)
  for _, folder in routes:
    teacher.check_tokenizers(tokenizer, folder)
  dtype = stage.compute_dtype(config)

  def cast(params):
    return transformer.cast(params, dtype) if dtype != jnp.float32 else params

  lent = stage.make_cast(config)

  def loss(params, batch, head_VD=None):
    return distillation.loss(lent(params), batch, head_VD, settings, size=tokenizer.size,
                             remat=config.remat, dtype=dtype, balance=config.balance or 0.0,
                             router_z=config.router_z or 0.0)

  p, shape = config.placement, {axis: size for axis, size in config.mesh.items() if size}
  train_mesh, rollout_mesh = placement.place(p.kind, p.fraction, p.slices, shape, p.rollout_mesh)

  def open_lessons(mesh):
    return Lessons(
      config, workdir, tokenizer, mesh, rollout_mesh, spec=spec, settings=settings,
      cast=jax.jit(cast), curriculum=Curriculum(
        [(switches.Switched(rl.open_prompts(name, 'train'), **config.modes), share)
         for name, share in pretrain.source_shares(config)],
        config.seed, math.inf, rl.used_questions(config.data.used)),
      heldout=[switches.switch(record, **config.modes) for record in rl.heldout_prompts(config)],
      router=scorers.open_router(config.rewards, mesh),
      values=rollouts.trainer_values(config, config.rollout.temperature, dtype, tokenizer.size),
      likeliest=likeliest_ids(config, settings, dtype, tokenizer.size),
      teachers=open_teachers(config, routes, mesh))
  return stage.train(config, workdir, spec=spec, loss=loss, open_loader=open_lessons,
                     report=distillation.report, micro_rows=config.micro_rows, mesh=train_mesh)


def check(config, spec, settings):
  """ValueError for settings that contradict one another, before anything is computed."""
  rollouts.check(config, spec)
  r, count = config.rollout, len(teacher_routes(config))
  wrong = None
  if not count:
    wrong = ('distillation needs a teacher: give one with --config.teacher=DIR (a run or a Hugging '
             'Face folder, for Qwen3 that of 32B or 235B-A22B)')
  elif count > r.updates:
    wrong = (f'config.rollout.updates is {r.updates} with {count} teachers: an update has one '
             f'teacher; want at least {count}')
  elif settings.kind == 'sampled' and settings.temperature != r.temperature:
    wrong = (f'config.distillation.temperature is {settings.temperature}, '
             f"config.rollout.temperature {r.temperature}: 'sampled' wants the distribution that "
             'was drawn from')
  if wrong:
    raise ValueError(wrong)


def teacher_routes(config):
  """[(beginning of a source's name, the teacher's folder)], the first that fits being the one."""
  routes = [tuple(pair) for pair in config.teachers]
  return routes + [('', config.teacher)] if config.teacher else routes


def open_teachers(config, routes, mesh):
  """[(beginning of a source, `teacher.Teacher`)]; a folder that comes twice is opened once."""
  known = ('float32', 'bfloat16', None)
  if config.teacher_dtype not in known:
    raise ValueError(f'config.teacher_dtype is {config.teacher_dtype!r}; want float32, bfloat16, '
                     'or None: that of the student')
  dtype = jnp.dtype(config.teacher_dtype or config.dtype)
  opened = {folder: None for _, folder in routes}
  for folder in opened:
    opened[folder] = teacher.Teacher(folder, mesh, shape=config.teacher_mesh, dtype=dtype,
                                     offload=config.teacher_offload, parts=config.data.batch,
                                     top=config.teacher_top)
  return [(prefix, opened[folder]) for prefix, folder in routes]


def likeliest_ids(config, settings, dtype, size):
  """ids(params, batch): the student's likeliest at each place (B, T, X); None where not asked."""
  if settings.kind != 'student_top':
    return None

  def ids(params, batch):
    return distillation.teacher_top(params, batch, config.teacher_top, size=size, dtype=dtype)[0]
  return jax.jit(ids)


class Lessons(rollouts.Rollouts):
  """Rollouts that teachers read; `frozen` is the head of the teacher of the batch last drawn."""

  def __init__(self, *args, settings, teachers, likeliest, **kwargs):
    super().__init__(*args, **kwargs)
    self.settings, self.routes, self.likeliest = settings, teachers, likeliest
    self.teachers = list(dict.fromkeys(each for _, each in teachers))
    self.taught, self.frozen = [], ()

  def gather(self):
    """All groups; each sample knows its teacher."""
    groups, _ = super().gather()
    for group in groups:
      number = self.teachers.index(self.teacher_of(group['record']))
      for sample in group['samples']:
        sample.teacher = number
    return groups, groups

  def teacher_of(self, record):
    """The teacher of a prompt; ValueError where no route leads to one."""
    source = str(record.get('source', ''))
    for prefix, each in self.routes:
      if source.startswith(prefix):
        return each
    raise ValueError(f'no teacher for prompts of the source {source!r}: config.teachers has '
                     f'{", ".join(repr(prefix) for prefix, _ in self.routes)}; add it there, or '
                     'set config.teacher for all others')

  def settle(self, params, step, drawn, notes):
    """The batches, of 'student_top' with the ids that the student finds likeliest now."""
    batches = super().settle(params, step, drawn, notes)
    if self.likeliest:
      for batch in batches:
        self.spend(batch, lambda length: rollouts.forward_flops(self.spec, length))
        batch['top_ids_BTX'] = np.asarray(self.likeliest(params, self.spread(batch)))
    return batches

  def deal(self, drawn, updates=None):
    """Samples for each update, all of one teacher; teachers have updates by their prompts."""
    updates = updates or self.config.rollout.updates
    by_teacher = {number: [sample for sample in drawn if sample.teacher == number]
                  for number in sorted({sample.teacher for sample in drawn})}
    counts = {number: len({sample.group for sample in part})
              for number, part in by_teacher.items()}
    dealt = [part for number, share in share_out(counts, updates).items()
             for part in super(Lessons, self).deal(by_teacher[number], share)]
    order = np.random.default_rng([self.config.seed, self.settled, 1]).permutation(len(dealt))
    return [dealt[place] for place in order] + [[]] * (updates - len(dealt))

  def pack(self, chosen, number):
    batch = super().pack(chosen, number)
    teacher = chosen[0].teacher if chosen else 0
    return batch | dict(teacher_B=np.full(len(batch['tokens_BT']), teacher, np.int32))

  def finish(self, batch):
    """The batch with what its teacher says; all batches of a rollout are read at its first."""
    if not self.taught:
      self.taught = self.teach([batch, *self.ready])
    reader = self.teachers[batch['teacher_B'][0]]
    self.frozen = (reader.head_VD,) if self.settings.kind in divergence.KINDS else ()
    self.spend(batch, lambda length: rollouts.forward_flops(reader.spec, length))
    return self.spread({name: x for name, x in batch.items() if name != 'teacher_B'}
                       ) | self.taught.pop(0)

  def teach(self, batches):
    """What the loss wants of the teachers for each of the batches; a teacher reads all of its own.
    """
    numbers = [int(batch['teacher_B'][0]) for batch in batches]
    found = [None] * len(batches)
    for number in sorted(set(numbers)):
      places = [place for place, each in enumerate(numbers) if each == number]
      read = self.teachers[number].score([batches[place] for place in places], self.settings,
                                         self.tokenizer.size)
      for place, values in zip(places, read, strict=True):
        found[place] = values
    return found


def share_out(counts, total):
  """`total` parts over the keys of `counts`, at least one each, else in proportion; none is empty.

  {key: parts}. Where there are fewer to give a part to than parts, there are fewer parts.
  """
  parts = dict.fromkeys(counts, 1)
  while sum(parts.values()) < total:
    open_ = [key for key in counts if parts[key] < counts[key]]
    if not open_:
      break
    parts[max(open_, key=lambda key: counts[key] / parts[key])] += 1
  return parts
