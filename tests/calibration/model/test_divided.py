"""Work that is divided over ranks (gloo, processes of this machine) gives what a single process gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.calibration_cases import files, ranks
from helpers.run_cases import CALIBRATION, model
from mmquant.calibration.folder import solve
from mmquant.calibration.gguf import memory, streams
from mmquant.calibration.model import divided as divided_module
from mmquant.calibration.model import forward
from mmquant.calibration.model.divided import divided, from_owner
from mmquant.convert.open import open_source
from mmquant.convert.source import Source, read_globals, read_layer
from mmquant.runs.calibrate import calibrate
from mmquant.runs.fp4 import quantize_mxfp4, quantize_nvfp4
from mmquant.runs.gguf import quantize_gguf
from mmquant.runs.int4 import quantize_int4
from mmquant.runs.options import CalibrateOptions, GgufOptions, Int4Options, Mxfp4Options, Nvfp4Options

TEXT: dict[str, Any] = {"windows": 4, "context": 32, "text": (str(CALIBRATION),), "text_only": True}
JOBS: dict[str, Callable[[Path, Path], object]] = {
    "int4": lambda model, out: quantize_int4(model, out, Int4Options(group_size=32, **TEXT), device="cpu"),
    "int4-quantized": lambda model, out: quantize_int4(
        model, out, Int4Options(group_size=32, attention="int4", propagate="quantized", **TEXT), device="cpu"
    ),
    "awq": lambda model, out: quantize_int4(model, out, Int4Options(method="awq", group_size=32, **TEXT), device="cpu"),
    "nvfp4": lambda model, out: quantize_nvfp4(model, out, Nvfp4Options(**TEXT), device="cpu"),
    "mxfp4": lambda model, out: quantize_mxfp4(model, out, Mxfp4Options(**TEXT), device="cpu"),
    "gguf": lambda model, out: quantize_gguf(model, out, GgufOptions(type="Q4_K_M", **TEXT), device="cpu"),
    "gguf-fast": lambda model, out: quantize_gguf(
        model, out, GgufOptions(type="Q4_K_M", effort="fast", **TEXT), device="cpu"
    ),
}
# Of the error after two ranks over that after one, of logits and of matrices: sums are added in another order, and each
# rank holds other rows out, so codes differ; the error does not.
TOLERANCE = 0.05


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

        found = dict(divided(pieces, piece))
        assert done == [n for n in pieces if n % size == rank]
        assert sorted(found) == pieces
        for number, value in found.items():
            assert value["s"] == str(number)
            assert value["t"][0].dtype == torch.bfloat16
            assert torch.equal(value["t"][0].float(), torch.full((number, 2), float(number)))
            assert torch.equal(value["t"][1], value["t"][0] > 3)
            assert np.array_equal(value["a"], np.arange(number))
        assert from_owner(lambda: rank, 1) == 1

    ranks(size, work)


def written(folder: Path) -> Source:
    return open_source(next(iter(folder.glob("*.gguf")), folder))


def errors(model: Path, folder: Path) -> list[float]:
    """Relative error of the experts' matrices, by layer and matrix."""
    original, found = open_source(model), []
    for number in range(original.geometry.layers):
        exact, values = read_layer(original, number), read_layer(written(folder), number)
        for name in ("gate", "up", "down"):
            difference = getattr(values, name) - getattr(exact, name)
            found.append(float(difference.norm() / getattr(exact, name).norm()))
    return found


def logits(source: Source) -> torch.Tensor:
    outside, g = read_globals(source), source.geometry
    hidden = forward.embed(outside, torch.randint(0, g.vocab, (16, 32), generator=torch.Generator().manual_seed(3)))
    for number in range(g.layers):
        hidden = forward.layer_forward(read_layer(source, number), g, hidden)
    return forward.final_logits(outside, g, hidden)


def output_error(model: Path, folder: Path) -> float:
    """Relative error of the logits, of tokens that no text holds."""
    exact = logits(open_source(model))
    return float((logits(written(folder)) - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "command", ["int4-quantized", *(pytest.param(n, marks=pytest.mark.slow) for n in JOBS if n != "int4-quantized")]
)
def test_ranks_forward_their_windows_and_solve_their_experts(command: str, tmp_path: Path) -> None:
    """Two ranks give artifacts as near to the model as one process does, and the same bytes whenever they run."""
    source = model(tmp_path / "model")
    JOBS[command](source, tmp_path / "alone")

    def work() -> None:
        seen: list[int] = []
        inner = forward.attention

        def counted(weights: Any, g: Any, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
            seen.append(len(hidden))
            return inner(weights, g, hidden, *more)

        forward.attention = streams.attention = counted
        JOBS[command](source, tmp_path / "shared")
        assert seen
        assert max(seen) <= 2, "a rank forwarded more than its windows"

    ranks(2, work)
    outputs = [output_error(source, tmp_path / folder) for folder in ("alone", "shared")]
    assert outputs[0] == pytest.approx(outputs[1], rel=TOLERANCE)
    if command not in ("awq", "gguf"):  # AWQ's matrices hold its scales; GGUF's guard turns single experts away
        alone, shared = errors(source, tmp_path / "alone"), errors(source, tmp_path / "shared")
        assert alone == pytest.approx(shared, rel=TOLERANCE)
    assert not list((tmp_path / "shared").glob(".*"))
    if command in ("int4", "gguf"):
        ranks(2, lambda: JOBS[command](source, tmp_path / "again"))
        assert artifact(tmp_path / "again") == artifact(tmp_path / "shared")


@pytest.mark.parametrize("command", ["int4", pytest.param("gguf", marks=pytest.mark.slow)])
def test_stored_statistics_give_a_single_process_s_bytes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is summed then: a few experts are solved at a time, those of a piece by one rank."""
    monkeypatch.setattr(solve, "LARGEST_WORK", 4 * 7 * 256 * 512)
    monkeypatch.setattr(memory, "CPU_WORK", 4 * 256 * 19 * 512)
    source, statistics = model(tmp_path / "model"), tmp_path / "statistics"
    calibrate(source, statistics, CalibrateOptions(moments="full", **TEXT), device="cpu")

    def write(out: Path) -> None:
        if command == "int4":
            quantize_int4(source, out, Int4Options(group_size=32, statistics=statistics), device="cpu")
        else:
            quantize_gguf(source, out, GgufOptions(type="Q4_K_M", statistics=statistics), device="cpu")

    write(tmp_path / "alone")

    def work() -> None:
        pieces: list[int] = []
        inner = divided_module.from_owner

        def counted(make: Callable[[], Any], owner: int = 0) -> object:
            pieces.append(owner)
            return inner(make, owner)

        divided_module.from_owner = counted  # what `divided` calls
        write(tmp_path / "shared")
        assert set(pieces) == {0, 1}

    ranks(2, work)
    assert artifact(tmp_path / "shared") == artifact(tmp_path / "alone")
