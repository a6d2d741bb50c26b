"""Keeps compiled programs on disk, so that no run compiles what one before it has compiled."""
import hashlib
import os
import platform
from pathlib import Path


def keep_compiled(least_seconds=0.5):
  """Points JAX, not yet imported, to a folder for programs that took `least_seconds` to compile.

  It lies below $QWEN3_JAX_CACHE, else ~/.cache/qwen3_jax, and may be deleted at any time. What the
  user set (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=0 ...) stays. Programs for CPUs
  are those of one kind of machine: each has a folder of its own.
  """
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR',
                        str(cache_folder() / 'compiled' / describe_machine()))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', str(least_seconds))


def cache_folder():
  """$QWEN3_JAX_CACHE, else ~/.cache/qwen3_jax."""
  return Path(os.environ.get('QWEN3_JAX_CACHE') or '~/.cache/qwen3_jax').expanduser()


def describe_machine():
  """A short name of this kind of machine: its architecture and what its CPU can do."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  kinds = sorted({line for line in lines if line.startswith(('flags', 'Features', 'model name'))})
  return f'{platform.machine()}-{hashlib.sha256("".join(kinds or lines).encode()).hexdigest()[:12]}'
