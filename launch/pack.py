"""The repository's code as one archive whose name and bytes follow from its contents alone."""
import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

PARTS = ('setup.py', 'README.md', 'LICENSE', 'pyproject.toml', 'qwen3_jax', 'configs', 'launch')


def pack(repo, folder):
  """Writes code.tar.gz into `folder`; returns its path and sha256.

  What git does not track below PARTS comes too (an edited config, say), caches do not.
  """
  found = subprocess.run(['git', '-C', str(repo), 'ls-files', '-co', '--exclude-standard', '-z',
                          '--', *PARTS], capture_output=True, text=True, check=False)
  if found.returncode:
    names = [str(path.relative_to(repo)) for part in PARTS for path in
             ([repo / part] if (repo / part).is_file() else (repo / part).rglob('*'))
             if path.is_file() and '__pycache__' not in path.parts]
  else:
    names = [name for name in found.stdout.split('\0') if name]
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as tar:
    for name in sorted(set(names)):
      path = repo / name
      if not path.is_file():
        continue
      info = tarfile.TarInfo(name)
      data = path.read_bytes()
      info.size, info.mode = len(data), 0o755 if path.stat().st_mode & 0o100 else 0o644
      tar.addfile(info, io.BytesIO(data))
  packed = gzip.compress(buffer.getvalue(), mtime=0)
  path = Path(folder) / 'code.tar.gz'
  path.write_bytes(packed)
  return path, hashlib.sha256(packed).hexdigest()
