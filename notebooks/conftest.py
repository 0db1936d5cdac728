"""Delete the notebooks' artifacts before a test run, so that they are written afresh; mark those of minutes slow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

QUICK = ("01_quickstart.ipynb", "03_fit_my_machine.ipynb")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly and not hasattr(config, "workerinput"):  # once, not in every process of xdist
        for folder in Path(__file__).parent.glob("m27-*"):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)
