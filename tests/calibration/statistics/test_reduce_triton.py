"""The fused reductions equal float64 sums, in Triton's interpreter and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mmquant.calibration.statistics import reduce_triton

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
COUNTS = (70, 0, 33, 1, 150)  # a dead expert, one row, more than one step of rows


def case(inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(sum(COUNTS), inputs, generator=generator)
    share = torch.rand(sum(COUNTS), generator=generator)
    offsets = torch.tensor((0, *COUNTS)).cumsum(0).int()
    return x.to(DEVICE, DTYPE), share.to(DEVICE), offsets.to(DEVICE)


@pytest.mark.parametrize("inputs", [32, 200, 300])
def test_column_sums(inputs: int) -> None:
    x, share, offsets = case(inputs)
    scaled = torch.zeros_like(x)
    found = reduce_triton.column_sums(x, share, offsets, scaled)
    assert torch.equal(scaled, torch.mul(x, share[:, None]).to(DTYPE))
    assert found.bad == 0
    for e, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        v, s = x[start:stop].double(), share[start:stop].double()[:, None]
        torch.testing.assert_close(found.plain[e].double(), (v * v).sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.weighted[e].double(), (v * v * s * s).sum(0), rtol=1e-5, atol=1e-5)
        blocks = torch.nn.functional.pad(v, (0, -inputs % 32))
        for size, largest in ((16, found.sum16[e]), (32, found.sum32[e])):
            true = blocks.unflatten(1, (-1, size)).sum(2).abs().amax() if len(v) else torch.zeros((), device=DEVICE)
            torch.testing.assert_close(largest.double(), true.double(), rtol=1e-5, atol=1e-5)
        peak = v.abs().amax(0) if len(v) else torch.zeros_like(found.abs_max[e]).double()
        assert torch.equal(found.abs_max[e].double(), peak)


def test_every_bad_value_is_counted() -> None:
    x, share, offsets = case(200)
    x[3, 5], x[9, 199], x[150, 0] = float("nan"), float("inf"), float("-inf")
    assert reduce_triton.column_sums(x, share, offsets).bad == 3


@pytest.mark.parametrize("inputs", [32, 200, 300])
def test_grams_add_up_and_stay_symmetric(inputs: int) -> None:
    x, _, offsets = case(inputs)
    total = torch.zeros(len(COUNTS), inputs, inputs, device=DEVICE)
    reduce_triton.add_grams(total, x, offsets)
    reduce_triton.add_grams(total, x, offsets)
    assert not total.triu(1).any()
    reduce_triton.mirror(total)
    assert torch.equal(total, total.mT)
    for e, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        v = x[start:stop].double()
        torch.testing.assert_close(total[e].double(), 2 * v.T @ v, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 200), (300, 32), (136, 264)])
@pytest.mark.parametrize("indexed", [False, True])
def test_products_add_up(outputs: int, inputs: int, indexed: bool) -> None:
    b, _, offsets = case(inputs)
    generator = torch.Generator().manual_seed(outputs)
    a = torch.randn(len(b), outputs, generator=generator).to(b)
    token = torch.randint(0, len(b), (len(b),), generator=generator).to(DEVICE) if indexed else None
    total = torch.zeros(len(COUNTS), outputs, inputs, device=DEVICE)
    reduce_triton.add_products(total, a, b, offsets, token)
    reduce_triton.add_products(total, a, b, offsets, token)
    rows = a if token is None else a[token]
    for e, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        expected = 2 * rows[start:stop].double().T @ b[start:stop].double()
        torch.testing.assert_close(total[e].double(), expected, rtol=1e-4, atol=1e-3)


def test_segment_sums() -> None:
    _, share, offsets = case(32)
    sums, squares = reduce_triton.segment_sums(share, offsets)
    for e, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        torch.testing.assert_close(sums[e], share[start:stop].sum(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(squares[e], share[start:stop].square().sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "inputs"), [(0, 5), (1, 1), (7, 1023), (3, 2500)])
def test_row_norms(rows: int, inputs: int) -> None:
    y = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(inputs)).to(DEVICE, DTYPE)
    found = reduce_triton.row_norms(y).cpu()
    assert torch.allclose(found, y.cpu().double().norm(dim=1).float(), rtol=1e-5)


@pytest.mark.parametrize(("rows", "inputs"), [(0, 5), (1, 1), (257, 513), (600, 30)])
def test_column_abs_max(rows: int, inputs: int) -> None:
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(inputs)).to(DEVICE, DTYPE)
    wanted = x.cpu().float().abs().amax(0) if rows else torch.zeros(inputs)
    assert torch.equal(reduce_triton.column_abs_max(x).cpu(), wanted)
    for index, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        if rows > 1:
            x[rows - 1, index] = bad
            assert reduce_triton.column_abs_max(x)[index] == float("inf")
