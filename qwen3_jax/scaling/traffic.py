"""Collectives of a compiled program, from its text: runs, bytes, and the mesh axes they cross.

A loop's body is counted as often as the loop turns. Wire bytes, for one device and one run: what
an all-gather puts together, what a reduce-scatter takes in, twice what an all-reduce sums (it is
both), what an all-to-all or a permute sends. Of a ragged all-to-all the text knows the buffers
only: its rows that leave the chip are those of an even routing (`kernels.expert_parallel`).
"""
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

SIZES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
         'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 's4': 0.5, 'u4': 0.5}
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'ragged-all-to-all', 'all-to-all',
         'collective-permute')

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')


class Collective(NamedTuple):
  """One collective of the text: `runs` of it, `bytes` on the wire for each.

  `hidden`: it is started and waited for apart, so that other work may go on beside it.
  """
  kind: str
  axes: str
  runs: int
  bytes: float
  name: str
  hidden: bool = False


class Step(NamedTuple):
  """An instruction where it is run: in a computation, `runs` times.

  `branch` is the outermost conditional's name and which of its branches this is in, or None.
  """
  computation: str
  name: str
  shape: str
  opcode: str
  tail: str
  runs: int
  branch: tuple | None


def read(text, mesh, slices=1):
  """[Collective] of a compiled program's text (`compiled.as_text()`) on `mesh`.

  Of a mesh over several slices the text is one slice's program: what crosses them it sends through
  a runtime of its own, and its axes are 'slices'.
  """
  groups, found = partitions(mesh, slices), []
  for step in walk(text):
    if step.opcode == 'send' and '"xla_megascale_runtime"' in step.tail:
      found.append(_between(step, slices))
    kind = next((k for k in KINDS if step.opcode in (k, f'{k}-start')), None)
    if not kind:
      continue
    size = wire(kind, step.shape, step.tail, step.opcode)
    if kind == 'all-reduce' and step.computation.startswith('all-reduce-scatter'):
      kind, size = 'reduce-scatter', size / 2  # of the sum each device keeps a part
    hidden = step.opcode.endswith('-start') or 'async' in step.computation
    found.append(Collective(kind, _axes(step.tail, groups), step.runs, size, step.name, hidden))
  return found


def walk(text):
  """Every `Step` of a compiled program's text, loops and called computations entered."""
  computations, entry = split(text)

  def visit(name, runs, inside, branch):
    for instruction, rest in computations.get(name, ()):
      shape, opcode, tail = _parse(rest)
      yield Step(name, instruction, shape, opcode, tail, runs, branch)
      if opcode == 'while':
        turns = count_turns(tail, computations, name)
        yield from visit(_name(tail, 'body'), runs * turns, inside, branch)
      elif opcode == 'conditional':
        for i, called in enumerate(_branches(tail)):
          yield from visit(called, runs, inside | {called}, branch or (instruction, i))
      elif not opcode.startswith(KINDS):
        for key in ('calls', 'to_apply'):
          called = _name(tail, key)
          if called and called not in inside:
            yield from visit(called, runs, inside | {called}, branch)
  return visit(entry, 1, frozenset(), None)


def _between(step, slices):
  """A collective of slices: bytes that a device sends in a ring of them."""
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', step.tail)
  kind = kind[1].lower().replace('_', '-') if kind else 'send'
  size, times = next(sizes(step.shape), 0), 2 if kind == 'all-reduce' else 1
  return Collective(kind, 'slices', step.runs, times * size * (slices - 1) / slices, step.name,
                    True)


def _branches(tail):
  """Names of the computations of a conditional."""
  if listed := re.search(r'branch_computations=\{([^}]*)\}', tail):
    return re.findall(r'%?([\w.\-]+)', listed[1])
  return [_name(tail, key) for key in ('true_computation', 'false_computation')]


def split(text):
  """({computation: [(instruction, the rest of its line)]}, the entry's name)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      if head := _HEAD.match(line.split(', execution_thread')[0].rstrip()):
        current = head[2]
        computations[current] = []
        entry = current if head[1] else entry
    elif line.startswith('}'):
      current = None
    elif match := _LINE.match(line):
      computations[current].append((match[1], match[2]))
  if entry is None:
    raise ValueError('the text is not that of a compiled program: it has no ENTRY')
  return computations, entry


def _parse(rest):
  """(shape, opcode, what follows) of an instruction's right side."""
  if rest.startswith('('):
    depth = itertools.accumulate((letter == '(') - (letter == ')') for letter in rest)
    end = next(i for i, open_ones in enumerate(depth) if not open_ones)
    shape, rest = rest[:end + 1], rest[end + 1:]
  else:
    shape, _, rest = rest.partition(' ')
  opcode, _, tail = rest.strip().partition('(')
  return shape, opcode, tail


def _name(tail, key):
  match = re.search(rf'\b{key}=%?([\w.\-]+)', tail)
  return match and match[1]


def count_turns(tail, computations, inside=None):
  """How often a while loop of the computation `inside` turns.

  As the compiler noted, else by its counter, limit and step, and the constant that the counter
  begins with, if it is one: where a loop's first turn was taken out before it, it is 1.
  """
  if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', tail):
    return int(noted[1])
  condition = dict(computations.get(_name(tail, 'condition'), ()))
  limits = {name: int(found[1]) for name, rest in condition.items()
            if (found := re.search(r'[su]32\[\][^ ]* constant\((\d+)\)', rest))}
  compare = next((rest for rest in condition.values() if ' compare(' in rest), '')
  limit = next((limits[name] for name in _operands(compare) if name in limits), 1)
  counter = next((re.search(r'index=(\d+)', condition[name]) for name in _operands(compare)
                  if 'get-tuple-element' in condition.get(name, '')), None)
  body, place = dict(computations.get(_name(tail, 'body'), ())), int(counter[1]) if counter else 0
  around = dict(computations.get(inside, ()))
  given = re.match(r'%([\w.\-]+)', tail)
  first = _operands(around.get(given[1], '')) if given else []
  start = _constant(around, first[place]) if place < len(first) else 0
  return max(1, -(-(limit - start) // _step(body, place)))


def _constant(around, name):
  """The number that an instruction gives, copied or not; 0 where that is not said."""
  while rest := around.get(name):
    if found := re.search(r'[su]32\[\][^ ]* constant\((\d+)\)', rest):
      return int(found[1])
    if ' copy(' not in rest and ' bitcast(' not in rest:
      break
    name = _operands(rest)[0]
  return 0


def _step(body, index):
  """By how much a loop's body raises the value of that place."""
  root = next((rest for rest in reversed(body.values()) if ' tuple(' in rest), '')
  names, step = _operands(root), 0
  name = names[index] if index < len(names) else ''
  while rest := body.get(name):
    if ' copy(' in rest or ' bitcast(' in rest:
      name = _operands(rest)[0]
    elif ' add(' in rest:
      name, other = _operands(rest)[:2]
      if constant := re.search(r' constant\((\d+)\)', body.get(other, '')):
        step += int(constant[1])
    else:
      break
  return step or 1


def _operands(rest):
  """Names of an instruction's operands, in order."""
  return re.findall(r'%([\w.\-]+)', _parse(rest)[2].partition('), ')[0]) if rest else []


def wire(kind, shape, tail, opcode):
  """Bytes of one run."""
  found = list(sizes(shape))
  if opcode.endswith('-start') and kind != 'all-reduce' and len(found) > 1:
    found = [max(found)] if kind != 'reduce-scatter' else [min(s for s in found if s)]
  size = sum(found)
  if kind == 'ragged-all-to-all' and (leaving := re.search(r'leaving_(\d+)', tail)):
    return size * int(leaving[1]) / int(_SHAPE.search(shape)[2].split(',')[0])
  if kind == 'reduce-scatter':
    return size * _group_size(tail)
  return 2 * size if kind == 'all-reduce' else size


def sizes(shapes):
  """Bytes of each array in a text of shapes."""
  for name, dims in _SHAPE.findall(shapes):
    yield SIZES.get(name, 0) * math.prod(int(d) for d in dims.split(',') if d)


def _group_size(tail):
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', tail):
    return listed[1].count(',') + 1
  groups = members(tail)
  return len(next(iter(groups))) if groups else 1


def members(tail):
  """A collective's groups of devices, or None where the text does not say."""
  if listed := re.search(r'replica_groups=\{(\{[\d,{}]+\})\}', tail):
    return frozenset(frozenset(map(int, group.split(',')))
                     for group in re.findall(r'\{([\d,]+)\}', listed[1]))
  if named := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', tail):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    chosen = re.findall(r"'(\w+)'", named[2])
    return _groups(sizes, chosen) if set(chosen) <= set(sizes) else None
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', tail)
  if not iota:
    return None
  dims = [int(d) for d in iota[3].split(',')]
  ids = np.arange(math.prod(dims)).reshape(dims)
  if iota[4]:
    ids = ids.transpose([int(d) for d in iota[4].split(',')])
  return frozenset(frozenset(map(int, row)) for row in ids.reshape(int(iota[1]), int(iota[2])))


def partitions(mesh, slices=1):
  """{groups of devices: axes} of every set of mesh axes; devices by their place in the mesh, which
  is one slice's part of it."""
  sizes = dict(mesh.shape)
  sizes['data'] //= slices
  axes = [axis for axis in mesh.axis_names if sizes[axis] > 1]
  return {_groups(sizes, chosen): '+'.join(chosen)
          for count in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, count)}


def _groups(sizes, chosen):
  """The groups that differ in the `chosen` axes of a mesh {axis: size} only."""
  places = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
  rest = [i for i, axis in enumerate(sizes) if axis not in chosen]
  inner = [i for i, axis in enumerate(sizes) if axis in chosen]
  rows = places.transpose(rest + inner).reshape(-1, math.prod(sizes[axis] for axis in chosen))
  return frozenset(frozenset(map(int, row)) for row in rows)


def _axes(tail, groups):
  got = members(tail)
  if got is None:
    return 'permute' if 'source_target_pairs' in tail else '?'
  if got in groups:
    return groups[got]
  if all(len(group) == 1 for group in got):
    return 'none'
  return f'groups of {len(next(iter(got)))}'
