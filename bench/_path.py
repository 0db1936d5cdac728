"""Make `mmquant` importable from a bare checkout, for machines on which nothing can be installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("mmquant") is None:
    sys.path.insert(0, str(ROOT))


def commit() -> str:
    """The commit of the checkout, short, with a plus where files have changed since; empty outside of git."""
    said = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(said, capture_output=True, text=True, check=False).stdout.strip()
