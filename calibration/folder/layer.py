"""Quantize one layer: codes, scales, and the layer as it reads back.

Experts are taken in chunks, so that the working memory is bounded whatever the layer's size. Every expert has its own
second moments, scales and error feedback; all share bits and group size, as the engines want.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.integer.grid import IntWeight, dequantize, join_weights, rows_of, select
from ...quantize.integer.panel import Solved
from ...quantize.moments import Moments, check_moments, pooled, shrunk
from ...quantize.overflow import rescale_exponents, scale_pair
from ..model.distributed import rank_shares, sum_everywhere
from ..model.divided import divided, owned_ranges
from ..statistics.layer import LayerStatistics
from .attention import attention_grid, quantize_attention
from .awq import expert_pairs, experts_pair
from .options import LayerOptions
from .report import LayerReport, Stacks, make_report
from .solve import compensated_place, expert_chunks, solve, working_memory


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's result.

    experts    gate, up, down: IntWeight with codes [E, O, I]
    attention  q_proj ...: IntWeight with codes [O, I]; empty unless attention is on the grid
    plain      replaced norms, router or bias by LayerWeights field; empty when nothing changed
    values     [kv_heads * head_dim] what v's rows were divided by (AWQ, with attention on the grid); else None
    compensated  what GPTQ rounded, by matrix name, for learning (`compensated_place`); else empty
    mid_power  [E] p of the exact rescaling: down's inputs are 2^-p of what was seen
    """

    experts: dict[str, IntWeight]
    attention: dict[str, IntWeight]
    plain: dict[str, Tensor]
    report: LayerReport
    mid_power: Tensor
    values: Tensor | None = None
    compensated: dict[str, Tensor] = field(default_factory=dict)


def quantize_layer(
    layer: int,
    weights: LayerWeights,
    statistics: LayerStatistics,
    options: LayerOptions,
    geometry: Geometry,
) -> QuantizedLayer:
    """Codes of one layer: GPTQ, or moment-weighted rounding, after equalization for method awq.

    weights  any compute dtype, on the device that does the work (bfloat16 is 2^-9 of a weight off, INT4 2^-4)

    Raises ValueError when the statistics are not of this layer, or hold NaN or infinity.
    """
    check_statistics(layer, weights, statistics)
    exponents = rescale_exponents(_largest(statistics.expert_mid)).to(weights.gate.device)
    mid = scaled_moments(statistics.expert_mid, exponents.to(statistics.expert_mid.weight.device))
    plain: dict[str, Tensor] = {}
    scale: Tensor | float = 1.0
    pools = pool_of(statistics.expert_in, statistics.own), pool_of(mid, statistics.own)
    if options.method == "awq":
        scale, plain = equalize_norm(weights, statistics, options, pools[0])
    rounded = empty_rounded(weights) if options.sign_rounded else {}

    def solve_chunk(chosen: range) -> tuple[Solved, ...]:
        """The stacks of some experts."""
        part = slice(chosen.start, chosen.stop)
        gate, up, down = (matrices[part].float() for matrices in (weights.gate, weights.up, weights.down))
        up, down = scale_pair(up, down, exponents[part])
        between: Tensor | float = 1.0
        if options.method == "awq":
            between = expert_pairs(down, shrunk(mid, options.shrinkage, part, pools[1]), options.integers)
            up, down = up / between.unsqueeze(-1), down * between.unsqueeze(-2)
        matrices, found = {"gate": gate, "up": up}, list[Solved]()
        for names in options.stacks[:-1]:
            own = dataclasses.replace(options, grid=options.grid_of(names[0]))
            stack = torch.cat([matrices[name] for name in names], 1) * scale
            found.append(solve(stack, statistics.expert_in, part, own, scale, pools[0], len(names)))
        own = dataclasses.replace(options, grid=options.grid_of("down"))
        return (*found, solve(down, mid, part, own, between, pools[1]))

    found = _solved_everywhere(weights, statistics, options, solve_chunk, rounded)
    experts = _joined(found, options.stacks)
    report = make_report(layer, statistics, exponents, found, options.stacks)
    done = QuantizedLayer(experts, {}, plain, report, exponents, None, rounded)
    return with_attention(done, weights, statistics, options, geometry) if options.attention else done


def carried_layer(layer: int, weights: LayerWeights) -> QuantizedLayer:
    """A layer of which nothing is on a grid yet."""
    exponents = torch.zeros(len(weights.gate), dtype=torch.int32, device=weights.gate.device)
    return QuantizedLayer({}, {}, {}, LayerReport(layer), exponents)


def with_attention(
    done: QuantizedLayer,
    weights: LayerWeights,
    statistics: LayerStatistics,
    options: LayerOptions,
    geometry: Geometry,
) -> QuantizedLayer:
    """The layer with its attention on the grid of the options, or on the one that they name for attention."""
    grid = options.attention_grid or attention_grid(options.grid)
    solved, changed, values = quantize_attention(weights, statistics, dataclasses.replace(options, grid=grid), geometry)
    plainly = [name for name, one in solved.items() if one.plain is not None and bool(one.plain.any())]
    place = compensated_place(weights.gate.device)
    kept = {n: one.compensated[0].to(place) for n, one in solved.items() if one.compensated is not None}
    return dataclasses.replace(
        done,
        attention={name: select(one.weight, 0) for name, one in solved.items()},
        plain=done.plain | changed,
        report=dataclasses.replace(done.report, plain=(*done.report.plain, *plainly)),
        values=values,
        compensated=done.compensated | kept,
    )


def empty_rounded(weights: LayerWeights) -> dict[str, Tensor]:
    """Room for what GPTQ rounds of all experts [E, O, I] float32, where it waits for learning."""
    place = compensated_place(weights.gate.device)
    return {name: torch.empty(getattr(weights, name).shape, device=place) for name in ("gate", "up", "down")}


def keep_rounded(rounded: dict[str, Tensor], names: tuple[str, ...], part: slice, solved: Solved) -> None:
    """What was rounded of a chunk's matrices, stacked by rows, goes to its place."""
    if solved.compensated is not None:
        for name, piece in zip(names, solved.compensated.chunk(len(names), 1), strict=True):
            rounded[name][part] = piece


def _solved_everywhere(
    weights: LayerWeights,
    statistics: LayerStatistics,
    options: LayerOptions,
    solve_chunk: Callable[[range], tuple[Solved, ...]],
    rounded: dict[str, Tensor],
) -> list[tuple[Solved, ...]]:
    """The solves of all chunks in order, divided among the ranks; what was rounded goes to its place."""
    memory = options.memory if options.memory is not None else working_memory(weights.gate.device)
    chunks, owners = list(expert_chunks(weights, memory)), None
    if statistics.own is not None:  # a matrix is solved where its moments are
        chunks, owners = owned_ranges(rank_shares(len(weights.gate)), len(chunks[0]))
    by_chunk: dict[int, tuple[Solved, ...]] = {}
    for number, parts in divided(chunks, solve_chunk, owners):
        for names, solved in zip(options.stacks, parts, strict=True):
            keep_rounded(rounded, names, slice(chunks[number].start, chunks[number].stop), solved)
        by_chunk[number] = tuple(dataclasses.replace(solved, compensated=None) for solved in parts)
    return [by_chunk[number] for number in range(len(chunks))]


def _joined(found: list[tuple[Solved, ...]], stacks: Stacks) -> dict[str, IntWeight]:
    """gate, up, down of all chunks' solves of these stacks."""
    weights: dict[str, list[IntWeight]] = {name: [] for names in stacks for name in names}
    for parts in found:
        for names, solved in zip(stacks, parts, strict=True):
            each = solved.weight.codes.shape[1] // len(names)
            for place, name in enumerate(names):
                weights[name].append(rows_of(solved.weight, slice(place * each, (place + 1) * each)))
    return {name: join_weights(parts) for name, parts in weights.items()}


def pool_of(moments: Moments, own: range | None) -> Tensor | None:
    """The pool of a layer's experts [n, n]; own: the experts whose moments are this rank's."""
    if own is None:
        return pooled(moments)
    part = pooled(moments, slice(own.start, own.stop))
    return None if part is None else sum_everywhere(part)


def equalize_norm(
    weights: LayerWeights, statistics: LayerStatistics, options: LayerOptions, pool: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scale [H] of gate and up's columns, and the norm and router that make up for it."""
    pair = experts_pair(weights, statistics, options.integers, options.shrinkage, pool)
    return pair.scale, {"post_norm": pair.norm, "router": weights.router * pair.scale}


def check_statistics(layer: int, weights: LayerWeights, statistics: LayerStatistics) -> None:
    """ValueError unless the statistics fit the layer's matrices."""
    if statistics.layer != layer:
        raise InputError(f"statistics of layer {statistics.layer}, expected layer {layer}")
    experts, width, hidden = weights.gate.shape
    check_moments(statistics.expert_in, experts, hidden, f"layer {layer} gate, up")
    check_moments(statistics.expert_mid, experts, width, f"layer {layer} down")
    check_moments(statistics.attention_in, 1, hidden, f"layer {layer} q, k, v")
    check_moments(statistics.attention_out, 1, weights.o.shape[1], f"layer {layer} o")


def scaled_moments(moments: Moments, power: Tensor) -> Moments:
    """Moments of inputs that were multiplied by 2^-p; power [E]."""
    if not bool(power.any()):
        return moments
    factor = torch.ldexp(torch.ones_like(moments.weight), -power)
    square = factor.square()
    return dataclasses.replace(
        moments,
        second=None if moments.second is None else moments.second * square.view(-1, 1, 1),
        diagonal=moments.diagonal * square.unsqueeze(-1),
        held=None if moments.held is None else moments.held * factor.view(-1, 1, 1),
        plain_diagonal=moments.plain_diagonal * square.unsqueeze(-1),
        amax=moments.amax * factor,
        sum32=moments.sum32 * factor,
        sum16=moments.sum16 * factor,
    )


def _largest(moments: Moments) -> Tensor:
    return torch.stack((moments.amax, moments.sum32, moments.sum16)).amax(0)


def as_read_back(weights: LayerWeights, quantized: QuantizedLayer, dtype: torch.dtype | None = None) -> LayerWeights:
    """The layer with its quantized matrices' values, in the dtype of `weights` or another."""
    to = dtype if dtype is not None else weights.gate.dtype
    values = {name: dequantize_batch(found, to) for name, found in quantized.experts.items()}
    values |= {name.removesuffix("_proj"): dequantize(found).to(to) for name, found in quantized.attention.items()}
    return dataclasses.replace(weights, **values, **quantized.plain)


def dequantize_batch(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """Values [E, O, I]; one matrix at a time, so that float32 copies stay small."""
    if dtype == torch.float32:
        return dequantize(weight)
    return torch.stack([dequantize(select(weight, e)).to(dtype) for e in range(weight.codes.shape[0])])
