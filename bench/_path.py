"""Make `mmquant` importable from a bare checkout, for machines on which nothing can be installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("mmquant") is None:
    sys.path.insert(0, str(ROOT))
