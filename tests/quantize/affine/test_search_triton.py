"""The CUDA search for scales and biases equals the CPU's, in Triton's interpreter and compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")

from mmquant.quantize.affine import search_cpu, search_triton  # noqa: E402
from mmquant.quantize.affine.grid import shares  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize(("bits", "experts", "columns", "outputs"), [(2, 3, 32, 20), (4, 1, 64, 20)])
def test_as_on_the_cpu(bits: int, experts: int, columns: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    wide = torch.randn(experts, columns + 64, outputs, generator=generator)
    wide[:, :, -1] = 0.5
    part, h = wide[:, 32 : 32 + columns], torch.rand(experts, columns, generator=generator) ** 4 + 0.001
    scale, bias = search_cpu.search_panel(part, h, bits, shares(bits))
    theirs, base = search_triton.search_panel(wide.to(DEVICE)[:, 32 : 32 + columns], h.to(DEVICE), bits)
    same = (scale == theirs.cpu()) & (bias == base.cpu())
    assert float(same.float().mean()) > 0.85
    code = ((part - base.cpu().unsqueeze(1)) / theirs.cpu().unsqueeze(1)).round().clamp(0, 2**bits - 1)
    off = part - code * theirs.cpu().unsqueeze(1) - base.cpu().unsqueeze(1)
    own = ((part - bias.unsqueeze(1)) / scale.unsqueeze(1)).round().clamp(0, 2**bits - 1)
    mine = part - own * scale.unsqueeze(1) - bias.unsqueeze(1)
    ratio = (h.unsqueeze(-1) * off.square()).sum() / (h.unsqueeze(-1) * mine.square()).sum()
    assert 0.99 < float(ratio) < 1.01
