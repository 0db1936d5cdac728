"""The refit of a super-block's d and dmin: against a dense solver, and Triton against torch."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmquant.quantize.ggml.codec import search  # noqa: E402
from mmquant.quantize.ggml.scalar import refit as refits  # noqa: E402
from mmquant.quantize.ggml.scalar.columns import Block, new_block, times  # noqa: E402
from mmquant.quantize.ggml.scalar.grid import values  # noqa: E402
from mmquant.quantize.ggml.types import GGMLType  # noqa: E402

KINDS = [GGMLType.Q4_K, GGMLType.Q2_K, GGMLType.Q6_K, GGMLType.IQ4_XS]
DEVICE = "cuda" if CUDA else "cpu"


def problem(kind: GGMLType, experts: int, rows: int) -> tuple[Block, Tensor, Tensor, Tensor]:
    """A block whose codes are of other weights, its values and the pull [256, E, R], H [E, 256, 256]."""
    g = torch.Generator().manual_seed(rows)
    weight = torch.randn(256, experts, rows, generator=g) * 0.05
    if rows > 1:
        weight[:, 0, 0] = 0
    x = torch.randn(experts, 512, 256, generator=g)
    moments = x.mT @ x / 512 + 0.1 * torch.eye(256)
    block = new_block(search((1.05 * weight).flatten(1).T.contiguous(), kind), experts)
    for column in range(256):
        block.round(column, weight[column])
    decoded = decoded_of(block, experts)
    return block, decoded, times(weight - decoded, moments), moments


def decoded_of(block: Block, experts: int) -> Tensor:
    return values(block.grid, block.codes.flatten(1).T.contiguous()).T.reshape(256, experts, -1).contiguous()


def gained(moments: Tensor, change: Tensor, pull: Tensor) -> Tensor:
    """[E, R]: by how much tr(E H E^T) falls when the values change."""
    return (change * (2 * pull - times(change, moments))).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_scales_are_better(kind: GGMLType) -> None:
    """The continuous optimum by a dense solver gains at most float16's rounding more."""
    block, decoded, pull, moments = problem(kind, 2, 9)
    before, first_pull = decoded.clone(), pull.clone()
    after = refits.refit(block, decoded, pull, moments)
    assert torch.allclose(decoded_of(after, 2), decoded, atol=1e-6)
    assert torch.allclose(first_pull - times(decoded - before, moments), pull, atol=1e-4)
    found = gained(moments, decoded - before, first_pull)
    assert bool((found >= 0).all())
    for expert in range(2):
        for row in range(9):
            scale = block.grid.d.view(2, -1)[expert, row].item()
            if scale == 0:
                assert found[expert, row] == 0
                continue
            parts = [part[:, expert, row] for part in refits._parts(block, decoded.shape[1:]) if part is not None]
            basis, h = torch.stack(parts, 1).double(), moments[expert].double()
            slope = basis.T @ first_pull[:, expert, row].double()
            best = float(slope @ torch.linalg.solve(basis.T @ h @ basis, slope))
            low = None if after.grid.dmin is None else after.grid.dmin.view(2, -1)[expert, row].item()
            if low is None or low > 0:
                assert float(found[expert, row]) == pytest.approx(best, rel=0.02, abs=2e-6)


@pytest.mark.parametrize("sums", [[1.0, 0.0, 0.0, 1.0, -9.0], [float("inf"), 0.0, float("nan"), 1.0, 1.0], [0.0] * 5])
def test_a_row_keeps_its_scales_without_a_gain_that_can_be_stored(sums: list[float]) -> None:
    """dmin would be negative, which no encoder of these types writes; sums overflowed; a block of nothing."""
    grid = problem(GGMLType.Q4_K, 1, 3)[0].grid
    d, low, moves = refits.best_scales(grid, torch.tensor(sums).view(5, 1, 1).expand(5, 1, 3))
    assert low is not None
    assert grid.dmin is not None
    assert torch.equal(d, grid.d)
    assert torch.equal(low, grid.dmin)
    assert not any(part.any() for part in moves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("experts", "rows"), [(1, 1), (2, 130)])
def test_triton(kind: GGMLType, experts: int, rows: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from mmquant.quantize.ggml.scalar import refit_triton

    block, decoded, pull, moments = problem(kind, experts, rows)
    grid = block.grid.to(torch.device(DEVICE))
    low = None if block.minimum is None else block.minimum.to(DEVICE)
    block = Block(grid, block.step.to(DEVICE), low, block.codes.to(DEVICE))
    decoded, pull, moments = decoded.to(DEVICE), pull.to(DEVICE), moments.to(DEVICE)
    expected = refits._parts(block, decoded.shape[1:])
    parts = [part for part in expected if part is not None]
    found = [part for part in refit_triton.parts(block) if part is not None]
    assert all(torch.allclose(*pair, rtol=1e-6) for pair in zip(found, parts, strict=True))
    bent = [times(part, moments) for part in parts]
    sums = refits._sums(parts, bent, pull)
    # Each sum by its own terms: F H F is 1e7 times what F and G have in common with the pull.
    terms = refits._sums([part.abs() for part in parts], [part.abs() for part in bent], pull.abs())
    assert bool(((refit_triton.sums(parts, bent, pull) - sums).abs() <= 1e-5 * terms).all())
    moves = refits.best_scales(grid, sums)[2]
    assert all(part.any() for part in moves)
    mine, theirs = (decoded.clone(), pull.clone()), (decoded.clone(), pull.clone())
    refits._move(*theirs, parts, bent, moves)
    refit_triton.move(*mine, parts, bent, moves)
    for pair in zip(mine, theirs, strict=True):
        assert torch.allclose(*pair, atol=1e-6 * float(pair[0].abs().max()) + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [-80, -40, -1, 1, 30, 40, 60, 80])
def test_the_moments_magnitude_does_not_matter(kind: GGMLType, power: int) -> None:
    """A power of two is exact in every sum, so bits are equal: their products would overflow from 1e9 on."""
    block, decoded, pull, moments = problem(kind, 2, 9)
    scale, far = 2.0**power, (decoded.clone(), 2.0**power * pull)
    found, expected = refits.refit(block, *far, scale * moments), refits.refit(block, decoded, pull, moments)
    assert torch.equal(found.grid.d, expected.grid.d)
    if expected.grid.dmin is not None:
        assert found.grid.dmin is not None
        assert torch.equal(found.grid.dmin, expected.grid.dmin)
    assert torch.equal(far[0], decoded)
    assert torch.equal(far[1], scale * pull)
    assert not torch.equal(expected.grid.d, block.grid.d)
