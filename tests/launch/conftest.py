"""A folder with a gcloud that stands in for Google's."""
import json
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


class Fake:
  """The stand-in's folder: what was called, what exists."""

  def __init__(self, folder):
    self.folder = folder
    self.script(['ACTIVE'])

  def script(self, *states):
    (self.folder / 'script.json').write_text(json.dumps(states))

  def calls(self, word=''):
    path = self.folder / 'calls.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [argv for argv in map(json.loads, lines) if word in argv]

  def resources(self):
    path = self.folder / 'resources.json'
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture
def fake(tmp_path, monkeypatch):
  folder, programs = tmp_path / 'cloud', tmp_path / 'bin'
  folder.mkdir()
  programs.mkdir()
  program = programs / 'gcloud'
  program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "gcloud.py"} "$@"\n')
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{programs}{os.pathsep}{os.environ["PATH"]}')
  monkeypatch.setenv('FAKE_CLOUD', str(folder))
  return Fake(folder)
