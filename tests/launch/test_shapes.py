"""Slices: what exists, what it is called, how many hosts it has."""
import pytest

from launch import shapes


@pytest.mark.parametrize('text, accelerator, grid, hosts, machine', [
  ('v5e:1', 'v5litepod-1', '1x1', 1, 'ct5lp-hightpu-1t'),
  ('v5e:16', 'v5litepod-16', '4x4', 4, 'ct5lp-hightpu-4t'),
  ('v5p:4', 'v5p-8', '2x2x1', 1, 'ct5p-hightpu-4t'),
  ('v5p:64chips', 'v5p-128', '4x4x4', 16, 'ct5p-hightpu-4t'),
  ('v5p:8x8x8', 'v5p-1024', '8x8x8', 128, 'ct5p-hightpu-4t'),
  ('v6e:8', 'v6e-8', '2x4', 1, 'ct6e-standard-8t'),
  ('v6e:16x16', 'v6e-256', '16x16', 64, 'ct6e-standard-4t'),
  ('tpu7x:4x8x8', 'tpu7x-512', '4x8x8', 64, 'tpu7x-standard-4t')])
def test_shapes(text, accelerator, grid, hosts, machine):
  piece = shapes.parse(text)
  assert (piece.accelerator, piece.grid, piece.hosts, piece.machine) == (
    accelerator, grid, hosts, machine)
  assert piece.named and piece.hosts * (piece.chips // piece.hosts) == piece.chips


def test_a_torus_of_another_shape_has_no_accelerator_type_of_its_own():
  piece = shapes.parse('v5p:4x4x12')
  assert not piece.named and piece.chips == 192 and piece.hosts == 48


@pytest.mark.parametrize('text, says', [
  ('v5p-32', 'counts cores'), ('v5p:', 'is no TPU slice'), ('v9:4', 'is no TPU slice'),
  ('v5p:12', 'no slice of 12 chips; there are 4, 8, 16'), ('v6e:3x4', 'no topology 3x4'),
  ('v5p:12x4x4', 'no topology'), ('v5p:64x64x64', 'no topology'), ('v6e:4x4x4', 'no topology'),
  ('v5e:-4', 'no slice'), ('v6e:x', 'no topology')])
def test_impossible_shapes_are_refused(text, says):
  with pytest.raises(ValueError, match=says):
    shapes.parse(text)
