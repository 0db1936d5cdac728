"""The CUDA kernels of FP4 panels equal the CPU's, in Triton's interpreter and compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")

from mmquant.quantize.fp4 import panel_cpu, panel_triton  # noqa: E402
from mmquant.quantize.fp4.grid import MXFP4, Fp4Grid, weighing  # noqa: E402
from mmquant.quantize.integer.panel import Panel  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
FEW = Fp4Grid(16, 3, 1, 2, True)  # NVFP4 with fewer scales to try: the interpreter is slow


def panel(experts: int, columns: int, outputs: int, feedback: bool) -> Panel:
    """A slice of a wider array, as the sweep hands it over."""
    generator = torch.Generator().manual_seed(columns)
    wide = torch.randn(experts, columns + 64, outputs, generator=generator)
    wide[:, :, -1] = 0
    inside = slice(32, 32 + columns)
    triangle = torch.eye(columns) + 0.1 * torch.rand(experts, columns, columns, generator=generator).tril(-1)
    importance = torch.rand(experts, columns, generator=generator)
    codes, errors = torch.zeros(wide.shape, dtype=torch.int8), torch.zeros_like(wide)
    return Panel(
        wide.clone()[:, inside], wide[:, inside], triangle if feedback else None, importance,
        torch.empty(0), codes[:, inside], errors[:, inside] if feedback else None,
    )  # fmt: skip


def moved(given: Panel) -> Panel:
    """On the device, a copy."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)

    return Panel(*(None if value is None else copy(value) for value in vars(given).values()))


@pytest.mark.parametrize("grid", [FEW, MXFP4], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize(("experts", "columns", "outputs"), [(2, 32, 37), (1, 64, 70)])
def test_as_on_the_cpu(grid: Fp4Grid, feedback: bool, experts: int, columns: int, outputs: int) -> None:
    ours = panel(experts, columns, outputs, feedback)
    theirs = moved(ours)
    groups = columns // grid.group_size
    scales = torch.ones(experts, groups, outputs)
    fused = torch.ones(experts, groups, outputs, device=DEVICE)
    importance = weighing(ours.importance, grid.group_size)
    panel_cpu.round_columns(grid, ours, importance, scales, True)
    panel_triton.round_columns(grid, theirs, importance.to(DEVICE), fused, True)
    rows = (scales == fused.cpu()).all(1) & (ours.codes == theirs.codes.cpu()).all(1)  # [E, O]: no turned tie
    assert float(rows.float().mean()) > 0.85
    pairs = [(ours.part, theirs.part), (ours.errors, theirs.errors)] if feedback else []
    for mine, other in pairs:
        assert mine is not None
        assert other is not None
        assert torch.allclose(mine.mT[rows], other.cpu().mT[rows], atol=1e-4)
    fixed = moved(panel(experts, columns, outputs, feedback))
    panel_triton.round_columns(grid, fixed, importance.to(DEVICE), fused, False)
    assert torch.equal(fixed.codes, theirs.codes)
