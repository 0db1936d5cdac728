"""One pass for many artifacts: the bytes of the single commands, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmquant.convert.source as sources
from helpers.run_cases import alone, artifacts, digests, model, recipe
from mmquant.runs.run import run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "m")


def test_artifacts_are_those_of_the_single_commands(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every layer is dequantized once."""
    read: list[int] = []
    original = sources._read_layer

    def counted(source: Any, layer: int, *rest: Any) -> Any:
        read.append(layer)
        return original(source, layer, *rest)

    monkeypatch.setattr(sources, "_read_layer", counted)
    wanted = recipe(source)
    run(wanted, tmp_path / "run", device="cpu")
    assert read == [0, 1, 2]
    alone(wanted, tmp_path / "alone")
    assert artifacts(tmp_path / "run") == digests(tmp_path / "alone")
