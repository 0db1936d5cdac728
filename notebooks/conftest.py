"""A test run writes the notebooks' artifacts afresh; by hand, a finished folder is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, not in every process of xdist
        shutil.rmtree(Path(__file__).parent / "m27-demo", ignore_errors=True)
