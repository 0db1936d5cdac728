"""Columns of a codebook super-block: the fused kernel equals torch, and torch its definition."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="triton is not installed")

from mmquant.quantize.ggml.codebook import columns  # noqa: E402
from mmquant.quantize.ggml.codebook import columns_triton as iquant_columns_triton  # noqa: E402
from mmquant.quantize.ggml.codebook import layout as iquants_layout  # noqa: E402
from mmquant.quantize.ggml.codebook import search as iquants_search  # noqa: E402
from mmquant.quantize.ggml.codebook.columns import CodebookBlock, new_codebook_block, unit_of  # noqa: E402
from mmquant.quantize.ggml.codebook.layout import LAYOUTS, SUPER, Fields, field_values  # noqa: E402
from mmquant.quantize.ggml.codebook.tables import points, points_on  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
Result = tuple[CodebookBlock, Tensor, Tensor]


def problem(name: str, experts: int, rows: int) -> tuple[CodebookBlock, Tensor, Tensor, Tensor]:
    """A super-block with scales and no points: it, weights and targets [E, 256, R], L [E, 256, 256].

    Importance spans four decades; one column is dead but for the damping; of several rows the first is zero.
    """
    layout, g = LAYOUTS[name], torch.Generator().manual_seed(rows)
    weight = torch.randn(experts, SUPER, rows, generator=g) * 0.05
    if rows > 1:
        weight[0, :, 0] = 0
    target = weight + 0.01 * torch.randn(weight.shape, generator=g) * (weight != 0)
    lower = torch.eye(SUPER) + 0.1 * torch.randn(experts, SUPER, SUPER, generator=g).tril(-1)
    diagonal = 10 ** (4 * torch.rand(experts, SUPER, generator=g) - 8)
    diagonal[:, 77] = 1e-9
    count = experts * rows
    level = torch.randint(layout.levels // 2, layout.levels, (count, layout.blocks), generator=g).to(torch.uint8)
    top = (layout.offset + layout.step * layout.levels) * float(points(name).max())
    scale = 0.15 / top * (1 + torch.rand(count, generator=g))
    scale[0] *= rows == 1
    minus = torch.rand(count, 32, generator=g) < 0.5 if name.startswith("IQ1") else torch.zeros(count, 32) > 0
    if name == "IQ1_S":
        minus = minus[:, ::4].repeat_interleave(4, 1)
    code = torch.zeros(count, layout.groups, dtype=torch.int16)
    fields = Fields(scale.half(), level, code, torch.zeros(count, 32, dtype=torch.uint8), minus)
    return new_codebook_block(layout, fields, diagonal), weight, target, lower


def on(block: CodebookBlock, device: str) -> CodebookBlock:
    """A copy of its own on `device`."""
    fields = Fields(*(getattr(block.fields, f).to(device, copy=True) for f in Fields.__dataclass_fields__))
    return replace(block, fields=fields, scale=block.scale.to(device), weight=block.weight.to(device))


def back(block: CodebookBlock, *tensors: Tensor) -> Result:
    first, second = (t.cpu() for t in tensors)
    return on(block, "cpu"), first, second


def swept(
    block: CodebookBlock, inner: slice | None, weight: Tensor, target: Tensor, lower: Tensor, fused: bool
) -> Result:
    """Block, values and errors of one tile, or of all columns (None)."""
    device = DEVICE if fused else "cpu"
    own, error, decoded = on(block, device), target.to(device, copy=True), torch.zeros_like(target, device=device)
    weight, lower = weight.to(device), lower.to(device)
    if inner is None:
        columns.sweep_columns(own, error, weight, decoded, lower)
    else:
        (iquant_columns_triton if fused else columns).sweep_tile(own, inner, error, weight, decoded, lower)
    return back(own, decoded, error)


def moments_of(block: CodebookBlock, lower: Tensor) -> Tensor:
    """H = D (L^T L + 1) D, of a size that follows the importance."""
    size = block.weight.sqrt().unsqueeze(1)
    return (lower.mT @ lower + torch.eye(SUPER)) * size * size.mT


def descended(
    block: CodebookBlock, inner: slice | None, weight: Tensor, decoded: Tensor, lower: Tensor, fused: bool
) -> Result:
    """Block, values and changes of one round of descent from `decoded`."""
    device, unit, moments = DEVICE if fused else "cpu", unit_of(block.layout), moments_of(block, lower)
    pull = moments @ (weight - decoded)
    blocks = moments.unflatten(1, (-1, unit)).unflatten(-1, (-1, unit)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    own, decoded = on(block, device), decoded.to(device, copy=True)
    pull, moments, inverse = pull.to(device), moments.to(device), torch.linalg.inv(blocks).contiguous().to(device)
    if inner is None:
        columns.descend_columns(own, pull, decoded, moments, inverse)
    else:
        (iquant_columns_triton if fused else columns).descend_tile(own, inner, pull, decoded, moments, inverse)
    return back(own, decoded, pull)


def agree(found: Result, expected: Result, part: slice = slice(None)) -> None:
    """The same fields, values and errors, but for rows in which a tie was rounded the other way."""
    ours, theirs = found[0].fields, expected[0].fields
    same = (ours.code == theirs.code).all(1) & (ours.signs == theirs.signs).all(1) & (ours.minus == theirs.minus).all(1)
    assert same.float().mean() > 0.95
    same = same.reshape(found[1].shape[0], 1, -1)
    for mine, other in zip(found[1:], expected[1:], strict=True):
        mine, other = mine[:, part], other[:, part]
        assert torch.allclose(mine * same, other * same, rtol=1e-4, atol=2e-6)
        assert torch.allclose(mine.square().mean(), other.square().mean(), rtol=0.02)
    stored = field_values(ours, found[0].layout).reshape(found[1].shape[0], -1, SUPER).mT[:, part]
    assert torch.allclose(found[1][:, part], stored, rtol=1e-5, atol=0)


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks thinned to about 12 points, spread over the whole: the interpreter walks them one by one."""

    def thinned(name: str, device: torch.device) -> Tensor:
        table = points_on(name, device)
        return table[:: len(table) // 12].contiguous()

    for module in (columns, iquant_columns_triton, iquants_layout, iquants_search):
        monkeypatch.setattr(module, "points_on", thinned)
    monkeypatch.setattr(columns, "choose", iquants_search.choose_torch)
    monkeypatch.setattr(iquant_columns_triton, "_squared", iquant_columns_triton._squared.__wrapped__)


@pytest.mark.usefixtures("few_points")
@pytest.mark.parametrize(
    ("name", "experts", "rows"),
    [  # one of each rule of signs in two programs, several experts, one row
        *((name, 1, 130) for name in ("IQ3_S", "IQ2_XXS", "IQ1_M", "IQ1_S")),
        *(("IQ3_XXS", 2, 3), ("IQ2_XS", 2, 7), ("IQ2_S", 1, 1)),
    ],
)
def test_a_tile_of_the_kernel_is_the_form_in_torch(name: str, experts: int, rows: int) -> None:
    block, weight, target, lower = problem(name, experts, rows)
    first = columns.TILE * (list(LAYOUTS).index(name) + 1)
    inner = slice(first, first + columns.TILE)
    expected = swept(block, inner, weight, target, lower, False)
    agree(swept(block, inner, weight, target, lower, True), expected, inner)
    block, decoded, _ = swept(block, None, weight, target, lower, False)
    expected = descended(block, inner, weight, decoded, lower, False)
    assert bool((expected[2][:, inner] != 0).any())
    assert bool((expected[2][:, inner] == 0).any())
    agree(descended(block, inner, weight, decoded, lower, True), expected, inner)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_descent_by_its_definition(name: str) -> None:
    """Each unit from the last to the first, with E H formed anew from all of E."""
    block, weight, target, lower = problem(name, 1, 20)
    block, decoded, _ = swept(block, None, weight, target, lower, False)
    found, values_found, changes = descended(block, None, weight, decoded, lower, False)
    moments = moments_of(block, lower)[0].double()
    own, now = on(block, "cpu"), decoded[0].double()
    unit = unit_of(block.layout)
    for first in range(SUPER - unit, -1, -unit):
        part = slice(first, first + unit)
        pull = (moments @ (weight[0].double() - now))[part]
        wanted = now[part] + torch.linalg.solve(moments[part, part], pull)
        nearest = columns.nearest_points(own, wanted.float().unsqueeze(0), first).values[0].double()
        change = nearest - now[part]
        better = (change * (moments[part, part] @ change - 2 * pull)).sum(0) < 0
        now[part] += change * better
    same = (now - values_found[0]).abs().amax(0) < 1e-6
    assert same.float().mean() > 0.9
    assert torch.allclose(changes, values_found - decoded, atol=1e-7)
    before, after = ((e * (moments.float() @ e)).sum() for e in (weight[0] - decoded[0], weight[0] - values_found[0]))
    assert after < 0.98 * before
    assert torch.allclose(field_values(found.fields, block.layout).mT, values_found[0], rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_gpu_gives_the_points_of_the_cpu(name: str) -> None:
    block, weight, target, lower = problem(name, 3, 131)
    expected = swept(block, None, weight, target, lower, False)
    agree(swept(block, None, weight, target, lower, True), expected)
    again = descended(expected[0], None, weight, expected[1], lower, False)
    agree(descended(expected[0], None, weight, expected[1], lower, True), again)
