"""Delete the notebooks' artifacts before a test run, so that they are written afresh."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, not in every process of xdist
        shutil.rmtree(Path(__file__).parent / "m27-demo", ignore_errors=True)
