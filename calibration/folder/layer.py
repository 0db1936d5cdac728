"""Quantize one layer: codes, scales, and the layer as it reads back.

Experts are taken in chunks, so that the working memory is bounded whatever the layer's size. Every expert has its own
second moments, scales and error feedback; all share bits and group size, as the engines want.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...convert.models.names import ATTENTION_STACKS, EXPERT_STACKS
from ...quantize.integer.gptq import DAMPING, GptqGrid, Grid, Solved, gptq_quantize
from ...quantize.integer.grid import IntWeight, dequantize, join_weights, rows_of, select
from ...quantize.moments import Moments, check_moments, pooled, shrunk, shrunk_diagonal
from ...quantize.overflow import rescale_exponents, scale_pair
from ..model.distributed import rank_shares, sum_everywhere
from ..model.divided import divided, owned_ranges
from ..statistics.layer import LayerStatistics
from .awq import attention_pair, expert_pairs, experts_pair, spread_values, value_pair
from .guard import guarded
from .report import LayerReport, make_report

METHODS = ("gptq", "awq", "rtn")
PRIOR, FLOOR, SAMPLING = 16.0, 0.2, 4.0
EFFORTS = ("fast", "default", "high")
WORKING_MATRICES = 7  # float32 [O, I] or [I, I] matrices that a solve holds for each expert
ATTENTION_BITS = 4  # also in layers whose experts keep more
LARGEST_WORK = 16 << 30
LARGE_CARD = 60e9


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is quantized.

    grids      of single projections of experts (gate, up, down) that have another one
    shrinkage  strength of the pool (quantize/moments.py) in diagonals and what AWQ scales by; prior: in what GPTQ feeds
               errors back under; floor, sampling: its ridge (`feedback_moments`)
    memory  working bytes beside the layer, its moments and its codes; None: by the device (`working_memory`)
    """

    method: str = "gptq"
    effort: str = "default"
    grid: Grid = field(default_factory=GptqGrid)
    attention: bool = False  # on the grid, too
    attention_grid: Grid | None = None  # where it is another one
    grids: tuple[tuple[str, Grid], ...] = ()
    damping: float = DAMPING
    shrinkage: float = 1.0
    prior: float = PRIOR
    floor: float = FLOOR
    sampling: float = SAMPLING
    memory: int | None = None
    seed: int = 0

    def grid_of(self, projection: str) -> Grid:
        """The grid of a projection of experts."""
        return dict(self.grids).get(projection, self.grid)

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """Projections that are solved as one matrix: they have one input, and one grid."""
        one = self.grid_of("gate") == self.grid_of("up")
        return EXPERT_STACKS if one else tuple((name,) for stack in EXPERT_STACKS for name in stack)

    @property
    def compensated(self) -> bool:
        """Whether rounding errors are fed back: GPTQ unless fast, and AWQ with high effort (then both)."""
        return (self.method, self.effort) in (("gptq", "default"), ("gptq", "high"), ("awq", "high"))

    @property
    def integers(self) -> GptqGrid:
        """The grid, where the method works on integers only (AWQ)."""
        if not isinstance(self.grid, GptqGrid):
            raise InputError(f"method {self.method}: expected an integer grid")
        return self.grid

    @property
    def full(self) -> bool:
        """Whether second moments are needed; fast GPTQ only rounds, under the diagonals."""
        return self.compensated or self.method == "awq"

    @property
    def sign_rounded(self) -> bool:
        """Whether rounding is learned on the layer's output after GPTQ."""
        return self.method == "gptq" and self.effort == "high"


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
    device = weights.gate.device
    exponents = rescale_exponents(_largest(statistics.expert_mid)).to(device)
    mid = scaled_moments(statistics.expert_mid, exponents.to(statistics.expert_mid.weight.device))
    plain: dict[str, Tensor] = {}
    scale: Tensor | float = 1.0
    pools = pool_of(statistics.expert_in, statistics.own), pool_of(mid, statistics.own)
    if options.method == "awq":
        scale, plain = equalize_norm(weights, statistics, options, pools[0])
    rounded = empty_rounded(weights) if options.sign_rounded else {}
    memory = options.memory if options.memory is not None else working_memory(device)

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

    chunks, owners = list(expert_chunks(weights, memory)), None
    if statistics.own is not None:  # a matrix is solved where its moments are
        chunks, owners = owned_ranges(rank_shares(len(weights.gate)), len(chunks[0]))
    by_chunk: dict[int, tuple[Solved, ...]] = {}
    for number, parts in divided(chunks, solve_chunk, owners):
        for names, solved in zip(options.stacks, parts, strict=True):
            keep_rounded(rounded, names, slice(chunks[number].start, chunks[number].stop), solved)
        by_chunk[number] = tuple(dataclasses.replace(solved, compensated=None) for solved in parts)
    found = [by_chunk[number] for number in range(len(chunks))]
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


def _joined(found: list[tuple[Solved, ...]], stacks: tuple[tuple[str, ...], ...]) -> dict[str, IntWeight]:
    """gate, up, down of all chunks' solves of these stacks."""
    weights: dict[str, list[IntWeight]] = {name: [] for names in stacks for name in names}
    for parts in found:
        for names, solved in zip(stacks, parts, strict=True):
            each = solved.weight.codes.shape[1] // len(names)
            for place, name in enumerate(names):
                weights[name].append(rows_of(solved.weight, slice(place * each, (place + 1) * each)))
    return {name: join_weights(parts) for name, parts in weights.items()}


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


def check_statistics(layer: int, weights: LayerWeights, statistics: LayerStatistics) -> None:
    """ValueError unless the statistics fit the layer's matrices."""
    if statistics.layer != layer:
        raise InputError(f"statistics of layer {statistics.layer}, expected layer {layer}")
    experts, width, hidden = weights.gate.shape
    check_moments(statistics.expert_in, experts, hidden, f"layer {layer} gate, up")
    check_moments(statistics.expert_mid, experts, width, f"layer {layer} down")
    check_moments(statistics.attention_in, 1, hidden, f"layer {layer} q, k, v")
    check_moments(statistics.attention_out, 1, weights.o.shape[1], f"layer {layer} o")


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
