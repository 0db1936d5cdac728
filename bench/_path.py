"""Make `mmquant` importable from a bare checkout (for benchmarks on a machine where nothing can be installed)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "mmquant": "mmquant",
    "mmquant.quantize": "quantize",
    "mmquant.convert": "convert",
    "mmquant.calibration": "calibration",
}


def use_checkout() -> None:
    """Map the rooms to their folders unless mmquant is installed already."""
    if importlib.util.find_spec("mmquant") is not None:
        return
    for name, folder in ROOMS.items():
        path = ROOT / folder
        spec = importlib.util.spec_from_file_location(
            name, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


use_checkout()
