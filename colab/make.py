"""Writes the notebooks (.ipynb) of this folder from their sources (.py), which are what is edited.

  python colab/make.py

Cells have ids by their place and no outputs, so that equal sources give equal files. Needs
jupytext (`pip install -e .[dev]`).
"""
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
NOTEBOOKS = 'quickstart', 'train_tiny', 'grpo', 'distil'


def convert(source):
  """Text of the notebook that the percent script `source` (a path) describes."""
  notebook = jupytext.read(source, fmt='py:percent')
  notebook.metadata.pop('jupytext', None)
  notebook.nbformat, notebook.nbformat_minor = 4, 5
  for number, cell in enumerate(notebook.cells):
    cell.metadata = nbformat.NotebookNode()
    cell.id = f'{source.stem.replace("_", "-")}-{number:02d}'
  nbformat.validate(notebook)
  return nbformat.writes(notebook) + '\n'


if __name__ == '__main__':
  for name in NOTEBOOKS:
    (HERE / f'{name}.ipynb').write_text(convert(HERE / f'{name}.py'))
