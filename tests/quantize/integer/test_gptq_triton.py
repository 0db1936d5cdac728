"""The fused GPTQ kernels equal torch, in Triton's interpreter and compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")

from mmquant.quantize.integer import gptq, gptq_grid, gptq_triton  # noqa: E402
from mmquant.quantize.integer.gptq_grid import GptqGrid  # noqa: E402
from mmquant.quantize.integer.grid import dequantize, search_scales, search_weights  # noqa: E402
from mmquant.quantize.integer.panel import Panel  # noqa: E402
from mmquant.quantize.integer.rtn import rtn_int  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


def values(experts: int, columns: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    part = torch.randn(experts, columns, outputs, generator=generator)
    return part.to(DEVICE), torch.rand(experts, columns, generator=generator).to(DEVICE)


@pytest.mark.parametrize(("experts", "columns", "outputs"), [(2, 32, 37), (1, 128, 64), (3, 16, 5)])
def test_search(experts: int, columns: int, outputs: int) -> None:
    part, importance = values(experts, columns, outputs, columns)
    part[0, :, 1] = 0.0
    ours = gptq_triton.search_group(part, search_weights(importance), 4)
    plain = search_scales(part.mT, importance, 4, -1)[0].squeeze(-1)
    assert (ours != plain).float().mean() < 0.05
    assert torch.isfinite(ours).all()
    assert (ours != 0).all()


def test_nearest_by_groups() -> None:
    """As the search of whole matrices: other experts, groups and columns than the kernel was given would show."""
    columns, importance = values(2, 64, 21, 3)
    weight = columns.mT.contiguous() * torch.tensor([1.0, 3.0], device=DEVICE).view(2, 1, 1)
    ours, plain = gptq_grid.nearest_fused(weight, importance, 32, 4), rtn_int(weight, 4, 32, importance=importance)
    assert ours.codes.shape == plain.codes.shape
    assert ours.scales.shape == plain.scales.shape
    same = ours.scales == plain.scales
    assert same.float().mean() > 0.95
    agreed = same.unsqueeze(-1).expand(2, 21, 2, 32).flatten(-2)
    assert torch.equal(ours.codes[agreed], plain.codes[agreed])


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("count", "outputs"), [(32, 40), (24, 7), (64, 65)])
def test_sweep_inside_a_block(count: int, outputs: int, zero_points: bool) -> None:
    part, _ = values(2, 96, outputs, 7)
    columns, _ = values(2, 96, outputs, 8)
    triangle = torch.eye(96, device=DEVICE) + 0.2 * torch.rand(2, 96, 96, device=DEVICE).tril(-1)
    scale = torch.rand(2, outputs, device=DEVICE) * 0.2 + 0.1
    zero = torch.randint(-8, 8, (2, outputs), device=DEVICE).float() if zero_points else None
    results, nothing = [], torch.empty(0)
    for step in (gptq_grid.sweep_block_torch, gptq_triton.sweep_block):
        own, errors = part.clone(), torch.zeros_like(part)
        codes = torch.zeros(part.shape, dtype=torch.int8, device=DEVICE)
        cut = (slice(None), slice(8, 8 + count))
        triangle_part = triangle[:, 8 : 8 + count, 8 : 8 + count]
        panel = Panel(own[cut], columns[cut], triangle_part, nothing, nothing, codes[cut], errors[cut])
        step(panel, (scale, zero), 4)
        results.append((own, codes, errors))
    (own, codes, errors), (own2, codes2, errors2) = results
    assert (codes != codes2).float().mean() < 0.01
    same = (codes == codes2).all(1)  # rows without a turned tie
    assert torch.allclose(own.mT[same], own2.mT[same], atol=1e-4)
    assert torch.allclose(errors.mT[same], errors2.mT[same], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("n", [256, 640])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (128, True), (-1, True), (128, False)])
def test_the_gpu_gives_the_codes_of_the_cpu(group: int, symmetric: bool, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2000, n, generator=generator) @ torch.randn(n, n, generator=generator) / 25
    second, weight = x.mT @ x / 2000, torch.randn(5, 200, n, generator=generator)
    grid = GptqGrid(4, group, symmetric)
    cpu = gptq.gptq_quantize(weight, second, grid).weight
    gpu = gptq.gptq_quantize(weight.cuda(), second.cuda(), grid).weight
    # A turned tie changes what is compensated afterwards, so codes are compared by the loss as well.
    assert (cpu.codes != gpu.codes.cpu()).float().mean() < 0.05
    losses = []
    for result in (cpu, gpu):
        error = weight - dequantize(result).cpu()
        losses.append(((error @ second) * error).sum())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("n", [384, 700])
def test_blocked_cholesky(n: int) -> None:
    from mmquant.quantize.linear_algebra import cholesky

    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, 2 * n, n, generator=generator)
    second = (x.mT @ x / (2 * n)).cuda()
    second[1, 600 if n > 600 else 300] *= -1
    lower, ok = cholesky(second.clone())
    assert ok.tolist() == [True, False, True]
    for e in (0, 2):
        expected = torch.linalg.cholesky(second[e].double())
        assert torch.allclose(lower[e].double(), expected, atol=1e-4)
