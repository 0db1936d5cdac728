"""Quantize attention's matrices of one layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...convert.models.names import ATTENTION_STACKS
from ...quantize.integer.gptq_grid import GptqGrid
from ...quantize.integer.grid import rows_of
from ...quantize.integer.panel import Grid, Solved
from ..model.divided import divided
from ..statistics.layer import LayerStatistics
from .awq import attention_pair, spread_values, value_pair
from .options import LayerOptions
from .solve import solve

ATTENTION_BITS = 4  # also in layers whose experts keep more


def quantize_attention(
    weights: LayerWeights, statistics: LayerStatistics, options: LayerOptions, geometry: Geometry
) -> tuple[dict[str, Solved], dict[str, Tensor], Tensor | None]:
    """q, k, v under what enters them, o under what enters it; for AWQ also the norm that is changed and v's scale."""
    matrices = {"q_proj": weights.q, "k_proj": weights.k, "v_proj": weights.v, "o_proj": weights.o}
    matrices = {name: matrix.float() for name, matrix in matrices.items()}
    scales: dict[str, Tensor | float] = dict.fromkeys(matrices, 1.0)
    plain: dict[str, Tensor] = {}
    values = None
    if options.method == "awq":
        pair = attention_pair(weights, statistics, options.integers)
        values = value_pair(weights, statistics.attention_out, options.integers, geometry)
        matrices["v_proj"] = matrices["v_proj"] / values.unsqueeze(-1)
        scales |= {"q_proj": pair.scale, "k_proj": pair.scale, "v_proj": pair.scale}
        scales["o_proj"] = spread_values(values, geometry)
        plain["input_norm"] = pair.norm
    found: dict[str, Solved] = {}
    stacks = ATTENTION_STACKS if options.grid.shared else [(name,) for name in matrices]

    def solve_stack(names: tuple[str, ...]) -> Solved:
        moments = statistics.attention_out if "o_proj" in names else statistics.attention_in
        stack = torch.cat([matrices[name] * scales[name] for name in names]).unsqueeze(0)
        return solve(stack, moments, slice(None), options, scales[names[0]])

    for number, solved in divided(stacks, solve_stack):
        found |= split_rows(solved, {name: len(matrices[name]) for name in stacks[number]})
    return {name: found[name] for name in matrices}, plain, values


def attention_grid(grid: Grid) -> Grid:
    """Attention keeps ATTENTION_BITS in layers whose experts have more."""
    return dataclasses.replace(grid, bits=ATTENTION_BITS) if isinstance(grid, GptqGrid) else grid


def split_rows(solved: Solved, rows: dict[str, int]) -> dict[str, Solved]:
    """The matrices of one that was solved as a stack, by name with their outputs."""
    found, first = {}, 0
    for name, count in rows.items():
        outputs = slice(first, first + count)
        kept = None if solved.compensated is None else solved.compensated[..., outputs, :]
        found[name] = dataclasses.replace(solved, weight=rows_of(solved.weight, outputs), compensated=kept)
        first = outputs.stop
    return found
