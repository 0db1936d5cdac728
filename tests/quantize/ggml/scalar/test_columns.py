"""Columns of a super-block: numba and Triton equal torch, column by column."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmquant.quantize.ggml.codec import search  # noqa: E402
from mmquant.quantize.ggml.scalar import columns  # noqa: E402
from mmquant.quantize.ggml.scalar import columns_cpu as feedback_cpu  # noqa: E402
from mmquant.quantize.ggml.scalar.columns import Block, new_block  # noqa: E402
from mmquant.quantize.ggml.scalar.grid import FORMS  # noqa: E402
from mmquant.quantize.ggml.types import GGMLType  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


def problem(
    kind: GGMLType, count: int, experts: int, rows: int, device: str, kept: int = 256
) -> tuple[Block, Tensor, Tensor, Tensor]:
    """The last columns of a searched block that has a row of zeros: it, weights and targets [c, E, R], L [E, c, c]."""
    g = torch.Generator().manual_seed(count + rows)
    weight = torch.randn(count, experts, rows, generator=g) * 0.05
    weight[:, 0, 0] = 0
    target = weight + 0.01 * torch.randn(weight.shape, generator=g) * (weight != 0)
    lower = torch.eye(count) + 0.15 * torch.randn(experts, count, count, generator=g).tril(-1)
    block = new_block(search(target.flatten(1).T.contiguous().to(device), kind), experts)
    low = None if block.minimum is None else block.minimum[-kept:]
    block = Block(block.grid, block.step[-kept:], low, block.codes[-kept:])
    return block, weight[-kept:].to(device), target[-kept:].to(device), lower[:, -kept:, -kept:].to(device)


def fresh(block: Block) -> Block:
    """The same scales, codes to come."""
    return Block(block.grid, block.step, block.minimum, torch.zeros_like(block.codes))


def agree(found: tuple[Block, Tensor], expected: tuple[Block, Tensor], target: Tensor) -> None:
    """The same codes and values, but for rows in which a tie was rounded the other way."""
    same = (found[0].codes == expected[0].codes).all(0)
    assert same.float().mean() > 0.9
    assert torch.allclose(found[1][:, same], expected[1][:, same], rtol=1e-6, atol=0)
    errors = [(values - target).square().mean() for _, values in (found, expected)]
    assert torch.allclose(*errors, rtol=0.02)


def swept(block: Block, target: Tensor, weight: Tensor, lower: Tensor, how: str) -> tuple[Block, Tensor]:
    own = fresh(block)
    target, decoded = target.clone(), torch.zeros_like(weight)
    if how == "numba":
        feedback_cpu.sweep_columns(own, target, weight, decoded, lower)
        return own, decoded
    if how == "torch":
        columns.sweep_inner(own, slice(0, len(target)), target, weight, decoded, lower)
        return own, decoded
    from mmquant.quantize.ggml.scalar import columns_triton as feedback_triton

    for first in range(len(target) - columns.MINI, -1, -columns.MINI):
        inner = slice(first, first + columns.MINI)
        feedback_triton.sweep_inner(own, inner, target, weight, decoded, lower)
        target[:first] += columns.times(weight[inner] - decoded[inner], lower[:, inner, :first])
    return own, decoded


def descended(block: Block, weight: Tensor, lower: Tensor, how: str) -> tuple[Block, Tensor]:
    """From the nearest points, one round under H = L L^T."""
    own = fresh(block)
    decoded = torch.stack([own.round(k, weight[k]) for k in range(len(weight))])
    moments = lower @ lower.mT + torch.eye(len(weight), device=lower.device)
    pull = columns.times(weight - decoded, moments)
    if how == "numba":
        feedback_cpu.descend_columns(own, pull.contiguous(), decoded, moments)
        return own, decoded
    if how == "torch":
        columns.descend_inner(own, slice(0, len(weight)), pull, decoded, moments)
        return own, decoded
    from mmquant.quantize.ggml.scalar import columns_triton as feedback_triton

    for first in range(len(weight) - columns.MINI, -1, -columns.MINI):
        inner = slice(first, first + columns.MINI)
        before = decoded[inner].clone()
        feedback_triton.descend_inner(own, inner, pull, decoded, moments)
        pull[:first] += columns.times(before - decoded[inner], moments[:, inner, :first])
    return own, decoded


@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize(("experts", "rows"), [(2, 37), (1, 16), (3, 1)])
def test_numba(kind: GGMLType, experts: int, rows: int) -> None:
    block, weight, target, lower = problem(kind, 256, experts, rows, "cpu")
    agree(swept(block, target, weight, lower, "numba"), swept(block, target, weight, lower, "torch"), target)
    agree(descended(block, weight, lower, "numba"), descended(block, weight, lower, "torch"), weight)


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q2_K, GGMLType.Q6_K, GGMLType.IQ4_XS, GGMLType.Q8_0])
def test_triton(kind: GGMLType) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    block, weight, target, lower = problem(kind, 256, 1, 70, DEVICE, 64 if FORMS[kind].uniform else 32)
    agree(swept(block, target, weight, lower, "triton"), swept(block, target, weight, lower, "torch"), target)
    agree(descended(block, weight, lower, "triton"), descended(block, weight, lower, "torch"), weight)


def test_triton_takes_what_the_searches_give() -> None:
    """Slices of larger tensors, as `feedback` cuts them: 32 columns of a legacy type inside 96."""
    pytest.importorskip("triton", reason="triton is not installed")
    block, weight, target, lower = problem(GGMLType.Q5_1, 32, 2, 5, DEVICE)
    wide = torch.zeros(96, 2, 5, device=DEVICE)
    wide[32:64] = weight
    big = torch.eye(96, device=DEVICE).repeat(2, 1, 1)
    big[:, 32:64, 32:64] = lower
    decoded = torch.zeros_like(wide)
    from mmquant.quantize.ggml.scalar import columns_triton as feedback_triton

    feedback_triton.sweep_inner(block, slice(0, 32), target.clone(), wide[32:64], decoded[32:64], big[:, 32:64, 32:64])
    agree((block, decoded[32:64]), swept(block, target, weight, lower, "torch"), target)
    assert bool((decoded[:32] == 0).all())
    assert bool((decoded[64:] == 0).all())
