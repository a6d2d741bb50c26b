"""Collectives of a program's text: loops, groups, bytes."""
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import mesh as alphabet
from qwen3_jax.scaling import traffic

TEXT = (Path(__file__).parents[1] / 'fixtures/collectives.hlo').read_text()


class Mesh:
  """fsdp 2 x tensor 2."""
  axis_names = alphabet.AXES
  shape = dict(data=1, fsdp=2, expert=1, context=1, tensor=2)
  size = 4


def test_a_text_by_hand():
  found = {each.name: (each.kind, each.axes, each.runs, each.bytes)
           for each in traffic.read(TEXT, Mesh)}
  runs = [each.runs for each in traffic.read(TEXT, Mesh) if each.name == 'gathered']
  assert runs == [7, 3]
  assert found['gathered'][:2] == ('all-gather', 'fsdp+tensor')
  assert found['gathered'][3] == 2 * 16 * 8
  assert found['all-reduce.9'] == ('reduce-scatter', 'tensor', 1, 4 * 64 * 8)
  assert found['reduced'] == ('all-reduce', 'fsdp', 1, 2 * 40)
  assert found['moved'] == ('collective-permute', 'permute', 1, 20)
  assert found['tokens'] == ('ragged-all-to-all', 'tensor', 1, 12 * 16 * 2)  # not its 40 rows
  assert found['named'] == ('all-gather', 'tensor', 1, 24)


def test_a_compiled_program():
  mesh = alphabet.make_mesh(dict(fsdp=2, tensor=2))
  def place(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place('fsdp', 'tensor'))
  w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place('tensor', None))
  text = jax.jit(jnp.matmul, out_shardings=place('fsdp', None)).lower(x, w).compile().as_text()
  (only,) = traffic.read(text, mesh)
  assert only[:3] == ('all-reduce', 'tensor', 1) and only.bytes == 2 * 4 * 4 * 32


def test_text_that_is_none():
  with pytest.raises(ValueError, match='no ENTRY'):
    traffic.read('hello', Mesh)


def test_what_crosses_slices_and_what_stays_in_one():
  """The text is one slice's: its groups are of that slice's devices."""
  class Slices(Mesh):
    shape = Mesh.shape | dict(data=2)
  found = {each.name: each for each in traffic.read(TEXT, Slices, slices=2)}
  assert found['sent'][:4] == ('all-reduce', 'slices', 1, 4 * 64 * 8)  # 2 (2 - 1) / 2 of it
  assert found['reduced'].axes == 'fsdp' and found['gathered'].axes == 'fsdp+tensor'
  assert found['sent'].hidden and not found['reduced'].hidden and found['gathered'].hidden


@pytest.mark.parametrize('start, turns', [('constant(0)', 7), ('constant(1)', 6),
                                          ('parameter(3)', 7)])
def test_a_loop_counts_from_what_its_counter_begins_with(start, turns):
  """Where the first turn was peeled off, the counter begins at 1."""
  text = TEXT.replace('  %loop = ', f"""  %begin = s32[]{{:T(128)}} {start}
  %copied = s32[]{{:T(128)}} copy(%begin)
  %first = (s32[], bf16[4,8]{{1,0}}) tuple(%copied, %x)
  %loop = """).replace('while(%init)', 'while(%first)', 1)
  assert [each.runs for each in traffic.read(text, Mesh) if each.name == 'gathered'] == [turns, 3]
