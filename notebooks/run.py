"""Run notebooks in order and keep their outputs (make notebooks); without times, so that equal ones change no byte."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    print(path, flush=True)
    book = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(book, timeout=None, record_timing=False, resources=place).execute()
    nbformat.write(book, path)
