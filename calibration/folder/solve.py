"""Solve the matrices of one chunk of experts, and say how many a chunk holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...convert.models.layer import LayerWeights
from ...quantize.integer.gptq import gptq_quantize
from ...quantize.integer.panel import Solved
from ...quantize.moments import Moments, shrunk, shrunk_diagonal
from .guard import guarded
from .options import LayerOptions

WORKING_MATRICES = 7  # float32 [O, I] or [I, I] matrices that a solve holds for each expert
LARGEST_WORK = 16 << 30
LARGE_CARD = 60e9


def solve(
    weight: Tensor,
    moments: Moments,
    part: slice,
    options: LayerOptions,
    scale: Tensor | float = 1.0,
    pool: Tensor | None = None,
    stacked: int = 1,
) -> Solved:
    """One chunk of matrices [E, O, I] float32 by the options' method; inputs are divided by `scale` [I], [E, I].

    pool: that of `moments`, when it is known; stacked: how many matrices each is, by rows. What GPTQ rounded is kept
    for learning. Held-out rows of the moments are asked about the rest.
    """
    grid = options.grid
    if not options.compensated:
        importance = shrunk_diagonal(moments, options.shrinkage, part).to(weight.device)
        if isinstance(scale, Tensor):
            importance = importance / scale.square()
        rounded = grid.round_nearest(weight, importance)
        nothing = torch.zeros(weight.shape[0], device=weight.device)
        return Solved(rounded, None, nothing, nothing.bool())
    second = feedback_moments(moments, options, part, pool).to(weight.device)
    if isinstance(scale, Tensor):
        second = second / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    solved = gptq_quantize(weight, second, grid, options.damping, keep=options.sign_rounded)
    solved = grid.refit(weight, solved, second)
    if moments.held is None:
        return solved
    rows = moments.held[part].to(weight.device)
    rows = rows / scale.unsqueeze(-2) if isinstance(scale, Tensor) else rows
    return guarded(weight, solved, grid, (second.diagonal(dim1=-2, dim2=-1), rows), 1 if grid.shared else stacked)


def feedback_moments(moments: Moments, options: LayerOptions, part: slice, pool: Tensor | None) -> Tensor:
    """Mean second moments [E, n, n] that errors are fed back under.

    What few rows say off the diagonal is noise, so they lean on the layer's pool and get a ridge of
    floor + sampling * n / rows of the mean diagonal (at most 1).
    """
    second = shrunk(moments, options.prior, part, pool)
    n, rows = moments.inputs, moments.count[part]
    rows = rows + options.prior * n * (moments.matrices > 1)
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    ridge = (options.floor + options.sampling * n / rows.clamp(min=1.0)).clamp(max=1.0) * diagonal.mean(-1)
    diagonal.add_(ridge.unsqueeze(-1))
    return second


def compensated_place(device: torch.device) -> torch.device:
    """Where what GPTQ rounded waits for learning: on the device when its memory holds it (15 GB a layer of M2.7)."""
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > LARGE_CARD
    return device if large else torch.device("cpu")


def working_memory(device: torch.device) -> int:
    """Bytes that solves may take: 16 GiB, on smaller cards a sixth of what the card has (M2.7 then fits 24 GB).

    Never what is free at the time: the chunks, and with them the codes' last ties, would depend on it.
    """
    if device.type != "cuda":
        return LARGEST_WORK
    return min(LARGEST_WORK, torch.cuda.get_device_properties(device).total_memory // 6)


def expert_chunks(weights: LayerWeights, memory: int) -> Iterator[range]:
    """Ranges of experts whose solves fit into `memory` working bytes."""
    experts, width, hidden = weights.gate.shape
    each = 4 * WORKING_MATRICES * max(hidden, width) * max(hidden, 2 * width)
    step = max(1, memory // each)
    for start in range(0, experts, step):
        yield range(start, min(experts, start + step))
