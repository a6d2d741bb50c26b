"""Kernels in a program's text, and their times: by the table, by its likes, or by a bound."""
from pathlib import Path

import pytest

from qwen3_jax.kernels import target
from qwen3_jax.scaling import kernel_calls

TEXT = (Path(__file__).parents[1] / 'fixtures/kernels.hlo').read_text()
SHAPE = 'bf16 1x512x256'


def test_calls_of_a_text_by_hand():
  fast, exact, router = kernel_calls.read(TEXT)
  assert fast == ('flash_forward', SHAPE, 7, 1e6, 400, ('either', 0))
  assert exact == ('flash_forward_running', SHAPE, 7, 1e6, 400, ('either', 1))
  assert router[:3] == ('router', 'f32 64, f32 8', 1)
  assert router.bytes == 4 * (128 * 64 + 8 * 8 + 8 * 128 + 128) and router.branch is None
  assert kernel_calls.counted(kernel_calls.read(TEXT)) == 7e6


@pytest.mark.parametrize('entries, by, seconds', [
  ([], 'bound', 1e6 / 1e9),
  ([dict(shape=SHAPE, flops=5e5, bytes=1, us=2000)], 'schedule', 2 * 2000e-6),
  ([dict(shape='bf16 1x9x9', flops=2e6, bytes=1, us=4000),
    dict(shape='bf16 1x9x9', flops=9e9, bytes=1, us=1)], 'like', 4000e-6 / 2),
  ([dict(shape=SHAPE, flops=1e6, bytes=1, us=1)], 'schedule', 1e6 / 1e9)])
def test_a_kernel_takes_what_its_schedule_says(entries, by, seconds, monkeypatch):
  monkeypatch.setattr(kernel_calls, 'table', lambda: {'v5p': {'flash_forward': entries}})
  call = kernel_calls.Call('flash_forward', SHAPE, 7, 1e6, 400)
  (time,) = kernel_calls.price([call], 'v5p', flops=1e9, bandwidth=1e6)
  assert time[:2] == ('flash_forward', 7) and time.by == by
  assert time.seconds == pytest.approx(7 * seconds)


def test_of_two_branches_the_longer_counts(monkeypatch):
  slow = [dict(shape=SHAPE, flops=1e6, bytes=400, us=9000)]
  monkeypatch.setattr(kernel_calls, 'table', lambda: {'v5p': {'flash_forward_running': slow}})
  names = [time.kernel for time in kernel_calls.price(kernel_calls.read(TEXT), 'v5p', 1e9, 1e12)]
  assert names == ['flash_forward_running', 'router']


def test_the_table_names_kernels_that_exist_and_says_where_its_times_are_from():
  sources = '\n'.join(path.read_text() for path in Path(target.__file__).parent.glob('*.py'))
  for chip, kernels in kernel_calls.table().items():
    assert chip in target.CHIPS
    for kernel, entries in kernels.items():
      assert kernel.removesuffix('_running') in sources
      for each in entries:
        assert each['us'] > 0 and 'libtpu' in each['source'] and each['flops'] + each['bytes'] > 0
