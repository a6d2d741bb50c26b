"""What a run reports: metrics.jsonl, TensorBoard, one live line; and the chip's peak for MFU.

A line of metrics.jsonl is one step: `step`, `stage`, what the step gave (`loss`, `grad_norm`,
`lr`, at some steps `heldout_loss` ...), `seconds` (wall time of this step, the first with its
compilation), and from the second step on `tokens_per_s` and `mfu`. Both count `tokens`, the step's
loss targets (weight > 0): neither padding nor prompts. What is not finite is null; arrays of two
axes stay out of the file: arrays.json has those of the last step before a checkpoint.
"""

import collections
import contextlib
import functools
import json
import logging
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from etils import epath

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of one JAX device; `device_kind` contains the key, the first match counts.
PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12, 'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'TPU7x': 2307e12 / 2, 'TPU v7': 2307e12 / 2,  # a chip is two devices
  'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200': 989e12, 'A100': 312e12,
}


class Metrics:
  """Writes each step's values one step late, so that the device never waits for the host.

  All processes make one and call it alike; process 0 writes. `resume_step` is the step restored:
  lines after it are dropped from the file, so that it holds every step once. Call `flush` before
  a checkpoint is saved, or a killed run lacks the line of its last step. `flops_per_token` is
  that of training one token (forward and backward).
  """

  def __init__(self, workdir, total_steps, stage, resume_step=0, flops_per_token=None,
               seconds_between_lines=10.0, console=None):
    self.total_steps, self.stage, self.flops_per_token = total_steps, stage, flops_per_token
    self.path = epath.Path(workdir) / 'metrics.jsonl'
    self._writes = jax.process_index() == 0
    self._file = self._board = self._progress = None
    self._held = []  # lines for an object store, which cannot append
    self._pending, self._last, self._arrays = {}, {}, {}
    self._recent = collections.deque(maxlen=20)
    self._done = self._first = resume_step
    if self._writes:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      _drop_after(self.path, resume_step)
      self._file = None if '://' in str(workdir) else self.path.open('a')
      self._board = _open_tensorboard(self.path.parent / 'tensorboard', resume_step)
      self._show_from(console or rich.console.Console(), seconds_between_lines)
    self._clock = time.perf_counter()

  def write(self, step, values):
    """Takes step `step`'s dict of device scalars, writes the step before; returns that line.

    Values given for the same step again (a held-out loss) join its line. None is returned while
    there is nothing to write.
    """
    if self._pending and self._pending['step'] == step:
      self._pending |= values
      return None
    line = self._settle()
    self._pending = {'step': step, 'stage': self.stage} | values
    return line

  def flush(self):
    """Writes the step that is held back, and all lines to the disk; returns its line or None."""
    line = self._settle()
    if self._held:
      old = self.path.read_text() if self.path.exists() else ''
      self.path.write_text(old + ''.join(self._held))
      self._held.clear()
    if self._arrays and self._writes:
      arrays = {name: _to_json(value) for name, value in self._arrays.items()}
      new = self.path.parent / 'arrays.json.new'
      new.write_text(json.dumps({'step': self._done} | arrays))
      new.replace(self.path.parent / 'arrays.json')
    return line

  @contextlib.contextmanager
  def paused(self):
    """What runs within (an evaluation, a save) is not counted as time of a step."""
    jax.block_until_ready(self._pending)
    start = time.perf_counter()
    yield
    self._clock += time.perf_counter() - start

  def close(self):
    """Writes what is held back and ends the live line."""
    self.flush()
    if self._progress:
      self._progress.stop()
    for file in (self._file, self._board):
      if file:
        file.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _settle(self):
    """Reads the held-back step from the device and writes it."""
    if not self._pending:
      return None
    line = {name: _to_json(value) for name, value in self._pending.items() if np.ndim(value) < 2}
    self._arrays = {name: value for name, value in self._pending.items() if np.ndim(value) == 2}
    self._pending = {}
    now = time.perf_counter()
    line['seconds'] = round(now - self._clock, 6)
    self._clock = now
    if line['step'] > self._first + 1 and line.get('tokens') and line['seconds']:
      self._recent.append((line['tokens'], line['seconds']))
      line['tokens_per_s'] = line['tokens'] / line['seconds']
      line['mfu'] = self._mfu(line['tokens_per_s'])
    self._done = line['step']
    self._last |= line
    if self._writes:
      self._write_line(line)
    return line

  def _mfu(self, tokens_per_s):
    return self.flops_per_token and mfu(self.flops_per_token, tokens_per_s, jax.devices())

  def _write_line(self, line):
    text = json.dumps(line) + '\n'
    if self._file:
      self._file.write(text)
      self._file.flush()
    else:
      self._held.append(text)
    for name, value in line.items() if self._board else ():
      if isinstance(value, (int, float)) and name != 'step':
        self._board.add_scalar(f'{self.stage}/{name}', value, line['step'])
    self._show()

  def _show_from(self, console, seconds):
    """Chooses the live line on a terminal, else a plain line every so many seconds."""
    self._console, self._between, self._shown = console, seconds, -float('inf')
    if console.is_terminal:
      column = rich.progress.TextColumn
      self._progress = rich.progress.Progress(
        column('[bold]{task.description}'), rich.progress.BarColumn(bar_width=16),
        column('{task.completed}/{task.total}'), column('{task.fields[values]}'), console=console)
      self._task = self._progress.add_task(
        self.stage, total=self.total_steps, completed=self._done, values='compiling')
      self._progress.start()

  def _show(self):
    if self._progress:
      self._progress.update(self._task, completed=self._done, values=self.describe())
    elif (time.monotonic() - self._shown > self._between) or self._done == self.total_steps:
      self._shown = time.monotonic()
      self._console.print(f'{self.stage} {self._done}/{self.total_steps} {self.describe()}',
                          highlight=False, soft_wrap=True)

  def describe(self):
    """The values of the live line: the latest of each, rates over the last 20 steps, ETA."""
    latest = self._last.get
    tokens, seconds = (sum(column) for column in zip(*self._recent)) if self._recent else (0, 0)
    rate = tokens / seconds if seconds else None
    share = rate and self._mfu(rate)
    eta = seconds and (self.total_steps - self._done) * seconds / len(self._recent)
    parts = [
      ('loss', latest('loss'), '{:.3f}'), ('held-out', latest('heldout_loss'), '{:.3f}'),
      ('grad', latest('grad_norm'), '{:.2f}'), ('lr', latest('lr'), '{:.1e}'),
      ('tok/s', rate, '{:,.0f}'), ('MFU', share, '{:.1%}'),
      ('ETA', rate and format_seconds(eta), '{}')]
    return '  '.join(f'{name} {form.format(x)}' for name, x, form in parts if x is not None)


def read(path):
  """The lines of a metrics.jsonl (or of the one in a workdir) as dicts.

  A last line that a killed run left unfinished is ignored. Raises FileNotFoundError, or
  ValueError naming a line that is not a JSON object.
  """
  path = epath.Path(path)
  path = path / 'metrics.jsonl' if path.is_dir() else path
  *texts, torn = path.read_text().split('\n')
  lines = []
  for number, text in enumerate(texts, 1):
    try:
      lines.append(json.loads(text))
      lines[-1]['step']
    except (ValueError, TypeError, KeyError):
      raise ValueError(f'{path}, line {number}, is not a JSON object with a step: '
                       f'{text[:80]!r}; delete that line') from None
  return lines


def format_seconds(seconds):
  """4:05 or 3:07:09."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def mfu(flops_per_token, tokens_per_s, devices):
  """Share of the devices' peak that useful FLOPs are, or None where the peak is unknown."""
  peaks = [peak_flops(device) for device in devices]
  return None if None in peaks else flops_per_token * tokens_per_s / sum(peaks)


def peak_flops(device):
  """Peak dense matmul FLOP/s of a device: bfloat16 from a table, on CPU float32 as measured.

  None for a chip that is not in the table.
  """
  if device.platform == 'cpu':
    return _measure_cpu() / jax.local_device_count('cpu')
  return next((peak for kind, peak in PEAKS.items() if kind in device.device_kind), None)


@functools.cache
def _measure_cpu():
  """FLOP/s of a 1024 x 1024 float32 matmul on all cores, the best of ten."""
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    a = jnp.ones((1024, 1024))
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best = float('inf')
    for _ in range(10):
      start = time.perf_counter()
      multiply(a).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * 1024**3 / best


def _to_json(value):
  if isinstance(value, str):
    return value
  value = np.asarray(value)
  if value.ndim:
    return [_to_json(each) for each in value]
  value = value.item()
  return value if isinstance(value, int) or np.isfinite(value) else None


def _drop_after(path, step):
  """Rewrites the file with its lines up to `step`, by rename; without change if none are later."""
  if path.exists():
    kept = [line for line in read(path) if line['step'] <= step]
    text = ''.join(json.dumps(line) + '\n' for line in kept)
    if text != path.read_text():
      new = path.parent / f'{path.name}.new'
      new.write_text(text)
      new.replace(path)


def _open_tensorboard(folder, step):
  try:
    import tensorboardX
  except ImportError:
    log.warning('no TensorBoard files are written: pip install tensorboardX for them')
    return None
  return tensorboardX.SummaryWriter(os.fspath(folder), purge_step=step + 1 if step else None)
