"""Work that is divided over ranks (gloo, processes of this machine) gives the bytes of a single process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.calibration_cases import files, ranks
from mmquant.calibration.folder import layer
from mmquant.calibration.gguf import memory
from mmquant.calibration.model import divided as divided_module
from mmquant.calibration.model.divided import divided, from_owner
from mmquant.runs.gguf import quantize_gguf
from mmquant.runs.int4 import quantize_int4
from mmquant.runs.options import GgufOptions, Int4Options

SMALL: dict[str, Any] = {"windows": 2, "context": 32, "text": ("default",)}
JOBS: dict[str, Callable[[Path], object]] = {
    "int4": lambda out: quantize_int4("demo", out, Int4Options(**SMALL), device="cpu"),
    "gguf": lambda out: quantize_gguf("demo", out, GgufOptions(type="Q4_K_M", **SMALL), device="cpu"),
}


def artifact(folder: Path) -> dict[str, bytes]:
    """The files but for the manifest, which holds the day."""
    return {name: data for name, data in files(folder).items() if not name.startswith((".", "mmquant.fit"))}


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_come_back_in_order_on_every_rank(size: int) -> None:
    def work() -> None:
        rank = int(os.environ["RANK"])
        pieces = list(range(7))
        done: list[int] = []

        def piece(number: int) -> dict[str, Any]:
            done.append(number)
            values = torch.full((number, 2), float(number))
            return {"t": (values.bfloat16(), values > 3), "a": np.arange(number, dtype=np.uint8), "s": str(number)}

        found = list(divided(pieces, piece))
        assert done == [n for n in pieces if n % size == rank]
        for number, value in enumerate(found):
            assert value["s"] == str(number)
            assert value["t"][0].dtype == torch.bfloat16
            assert torch.equal(value["t"][0].float(), torch.full((number, 2), float(number)))
            assert torch.equal(value["t"][1], value["t"][0] > 3)
            assert np.array_equal(value["a"], np.arange(number))
        assert from_owner(lambda: rank, 1) == 1

    ranks(size, work)


@pytest.mark.parametrize("command", ["int4", pytest.param("gguf", marks=pytest.mark.slow)])
def test_ranks_write_the_single_process_artifact(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are solved a few at a time, those of a piece by one rank, and only the first rank writes."""
    monkeypatch.setattr(layer, "LARGEST_WORK", 4 * 7 * 256 * 512 * 5)
    monkeypatch.setattr(memory, "CPU_WORK", 4 * 256 * 19 * 512 * 3)
    JOBS[command](tmp_path / "alone")

    def work() -> None:
        pieces: list[int] = []
        inner = divided_module.from_owner

        def counted(make: Callable[[], Any], owner: int = 0) -> object:
            pieces.append(owner)
            return inner(make, owner)

        divided_module.from_owner = counted  # what `divided` calls
        JOBS[command](tmp_path / "shared")
        assert set(pieces) == {0, 1}

    ranks(2, work)
    assert artifact(tmp_path / "shared") == artifact(tmp_path / "alone")
