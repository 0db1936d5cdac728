"""Rows added in a few launches make the sums that `Pair.add` makes, in Triton's interpreter and compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from mmquant.calibration.gguf.moments import Lacking, Pair

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
COUNTS = ((70, 0, 33, 1, 150), (5, 0, 40, 0, 91))  # of two batches: a dead matrix, one row, more than one step of rows
N, OUTPUTS, TOKENS = 200, 96, 60


def sums(fused: bool, apart: float, outputs: int = OUTPUTS, one: bool = False) -> tuple[Pair, list[Tensor]]:
    """A pair of two batches whose streams lie `apart`, and its rows: x (scaled), z, share, d, offsets."""
    generator, parts = torch.Generator().manual_seed(0), []

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    matrices = 1 if one else len(COUNTS[0])
    pair = replace(Pair.empty(matrices, N, DEVICE, outputs, DTYPE), fused=fused)
    scale = None if one else torch.tensor([1.0, 1.0, 0.25, 1.0, 0.5], device=DEVICE)
    for counts in COUNTS:
        offsets = [0, sum(counts)] if one else list(accumulate(counts, initial=0))
        z, share = draw(offsets[-1], N).to(DTYPE), draw(offsets[-1]).abs()
        by = torch.ones(offsets[-1], 1, device=DEVICE)
        if scale is not None:
            by = scale.repeat_interleave(torch.tensor(offsets, device=DEVICE).diff()).unsqueeze(1)
        x = ((z + apart * draw(offsets[-1], N)) / by).to(DTYPE)
        hidden = draw(offsets[-1] if one else TOKENS, outputs)
        token = None if one else torch.randint(0, TOKENS, (offsets[-1],), generator=generator).to(DEVICE)
        lacking = Lacking(hidden, token) if outputs else None
        weight = None if one else share
        pair.add_sorted(x, z, offsets, weight, scale, lacking)
        share = torch.ones_like(share) if one else share
        lost = lacking.rows(slice(None)) if lacking is not None else torch.zeros(offsets[-1], 0, device=DEVICE)
        owner = torch.arange(matrices, device=DEVICE).repeat_interleave(torch.tensor(offsets, device=DEVICE).diff())
        parts.append([x * by.to(DTYPE), z, share, lost, owner])
    return pair.over_ranks(), [torch.cat(values) for values in zip(*parts, strict=True)]


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("outputs", [OUTPUTS, 0])
def test_fused_sums_are_those_of_their_definition(one: bool, outputs: int) -> None:
    """In float64, without the rows that are held; those, their numbers and weights equal the plain way's."""
    (pair, (x, z, share, lost, owner)), (plain, _) = (sums(fused, 0.3, outputs, one) for fused in (True, False))
    assert pair.held is not None
    assert plain.held is not None
    for name in ("x", "z", "d"):
        assert torch.equal(getattr(pair.held, name), getattr(plain.held, name)), name
    assert (pair.held.met, pair.held.count) == (plain.held.met, plain.held.count)
    torch.testing.assert_close(pair.weight, plain.weight)
    assert torch.equal(pair.rows, plain.rows)
    assert torch.equal(pair.own, pair.own.mT)
    tolerance = 1e-5 if DTYPE == torch.float32 else 6e-3
    for matrix in range(len(pair.rows)):
        mine = owner == matrix
        by, held = share[mine].double().unsqueeze(1), slice(0, pair.held.count[matrix])
        a, b, d = x[mine].double() * by, z[mine].double() * by, lost[mine].double() * by
        out = [part[matrix, held].double() for part in (pair.held.x, pair.held.z, pair.held.d)]
        near(pair.own[matrix], b.T @ b - out[1].T @ out[1], tolerance)
        near(pair.cross[matrix], a.T @ b - out[0].T @ out[1], tolerance)
        if pair.drift is not None:
            near(pair.drift[matrix], d.T @ b - out[2].T @ out[1], tolerance)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


def test_what_both_streams_share_is_in_no_rounding_of_their_difference() -> None:
    """Streams 1 % apart: the correction's own sums, (x - z) z^T, keep two digits; of rounded rows they had none."""
    pair, (x, z, share, _, owner) = sums(fused=True, apart=0.01)
    assert pair.held is not None
    for matrix in (0, 2, 4):
        mine, held = owner == matrix, slice(0, pair.held.count[matrix])
        by = share[mine].double().unsqueeze(1)
        a, b = x[mine].double() * by, z[mine].double() * by
        c, d = (part[matrix, held].double() for part in (pair.held.x, pair.held.z))
        near(pair.cross[matrix] - pair.own[matrix], (a - b).T @ b - (c - d).T @ d, 1e-2)


def test_equal_runs_give_equal_bits() -> None:
    first, second = (sums(fused=True, apart=0.3)[0] for _ in range(2))
    for name in ("own", "cross", "drift", "weight", "rows"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_only_rows_of_bfloat16_on_a_gpu_are_fused() -> None:
    assert Pair.empty(2, 8, DEVICE, rows=torch.bfloat16).fused == CUDA
    assert not Pair.empty(2, 8, DEVICE, rows=torch.float32).fused
    assert not Pair.empty(2, 8, "cpu", rows=torch.bfloat16).fused
