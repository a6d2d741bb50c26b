"""metrics.jsonl holds every step once, whatever happened to the run."""

import io
import json
import logging
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import rich.console

from qwen3_jax.training import metrics
from qwen3_jax.training.metrics import Metrics, format_seconds, mfu, peak_flops, read


def run(workdir, start, stop, text=None, terminal=False, **options):
  console = rich.console.Console(file=text or io.StringIO(), force_terminal=terminal, width=160)
  with Metrics(workdir, 6, 's1', resume_step=start, console=console, **options) as out:
    for step in range(start + 1, stop + 1):
      out.write(step, {'loss': jnp.float32(8 - step), 'lr': 1e-3, 'tokens': jnp.int32(100)})


def test_each_step_is_one_line(tmp_path):
  run(tmp_path, 0, 3)
  lines = read(tmp_path)
  assert [line['step'] for line in lines] == [1, 2, 3]
  assert [line['loss'] for line in lines] == [7, 6, 5]
  assert all(line['stage'] == 's1' and line['tokens'] == 100 for line in lines)
  assert 'tokens_per_s' not in lines[0]  # compilation
  assert all(line['tokens_per_s'] == pytest.approx(100 / line['seconds']) for line in lines[1:])
  assert list((tmp_path / 'tensorboard').iterdir())


def test_values_arrive_one_step_late(tmp_path):
  out = Metrics(tmp_path, 6, 's1', console=rich.console.Console(file=io.StringIO()))
  assert out.write(1, {'loss': jnp.float32(4)}) is None
  assert read(tmp_path) == []
  assert out.write(2, {'loss': jnp.float32(3)})['loss'] == 4
  assert [line['step'] for line in read(tmp_path)] == [1]
  with out.paused():
    out.write(2, {'heldout_loss': jnp.float32(3.5)})
  assert out.flush()['heldout_loss'] == 3.5
  assert out.flush() is None
  out.close()
  assert [line['step'] for line in read(tmp_path)] == [1, 2]


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
  run(tmp_path, 0, 5)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 6, "lo')
  assert [line['step'] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
  run(tmp_path, 3, 6)
  assert [line['step'] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
  run(tmp_path, 6, 6)
  assert [line['step'] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
  run(tmp_path, 0, 2)
  assert [line['step'] for line in read(tmp_path)] == [1, 2]
  assert {path.name for path in tmp_path.iterdir()} == {'metrics.jsonl', 'tensorboard'}


def test_torn_line_in_the_middle_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(ValueError, match='line 2, is not a JSON object with a step'):
    read(tmp_path)
  with pytest.raises(FileNotFoundError):
    read(tmp_path / 'absent')


def test_values_not_finite_are_null_and_vectors_lists(tmp_path):
  with Metrics(tmp_path, 1, 's1', console=rich.console.Console(file=io.StringIO())) as out:
    out.write(1, {'loss': jnp.nan, 'grad_norm': jnp.inf, 'balance': jnp.array([1.0, 1.5]),
                  'expert_load_LE': jnp.ones((2, 4))})
  text = (tmp_path / 'metrics.jsonl').read_text()
  line = json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
  assert (line['loss'], line['grad_norm'], line['balance']) == (None, None, [1.0, 1.5])
  assert 'expert_load_LE' not in line
  arrays = json.loads((tmp_path / 'arrays.json').read_text())
  assert arrays == {'step': 1, 'expert_load_LE': [[1.0] * 4] * 2}


def test_plain_lines_where_there_is_no_terminal(tmp_path):
  text = io.StringIO()
  run(tmp_path, 0, 6, text, seconds_between_lines=1000, flops_per_token=1e3)
  first, last = text.getvalue().splitlines()
  assert first.split() == ['s1', '1/6', 'loss', '7.000', 'lr', '1.0e-03']
  for word in ('s1 6/6', 'loss 2.000', 'tok/s', 'MFU', 'ETA 0:00'):
    assert word in last
  assert '\x1b' not in text.getvalue()


def test_live_line_on_a_terminal(tmp_path):
  text = io.StringIO()
  run(tmp_path, 2, 6, text, terminal=True)
  assert '6/6' in text.getvalue()
  assert 'loss 2.000' in text.getvalue()


def test_tensorboard_is_optional(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with caplog.at_level(logging.WARNING):
    run(tmp_path, 0, 2)
  assert caplog.text.count('pip install tensorboardX') == 1
  assert len(read(tmp_path)) == 2


def test_peaks_of_known_chips():
  chip = lambda kind: SimpleNamespace(platform='tpu', device_kind=kind)
  kinds = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v5p': 459e12,
           'TPU v6 lite': 918e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H100 PCIe': 756e12}
  for kind, peak in kinds.items():
    assert peak_flops(chip(kind)) == peak
  assert 2 * peak_flops(chip('TPU7x')) == 2307e12
  assert peak_flops(chip('TPU v99')) is None
  assert mfu(6e9, 1000, [chip('TPU v99')]) is None
  assert mfu(6e9, 1e6, [chip('TPU v4')] * 100) == pytest.approx(6e15 / 275e14)


def test_peak_of_cpu_is_shared_by_its_fake_devices():
  devices = jax.devices('cpu')
  whole = metrics._measure_cpu()
  assert whole > 1e8
  assert sum(map(peak_flops, devices)) == pytest.approx(whole)


def test_format_seconds():
  assert [format_seconds(s) for s in (0, 65.4, 3600, 90061)] == [
    '0:00', '1:05', '1:00:00', '25:01:01']
