"""One layer's INT4: from its weights and what calibration saw of it to codes, scales and the layer as it is read back.

Experts are taken in chunks, so that the working memory is bounded whatever the layer's size. Every expert has its own
second moments, scales and error feedback; all share bits and group size, as the engines want.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..convert.minimax_m2 import Geometry, LayerWeights
from ..quantize.gptq import DAMPING, Grid, Solved, quantize
from ..quantize.int_grid import IntWeight, dequantize, join, rows_of, select
from ..quantize.moments import Moments, check_moments, shrunk, shrunk_diagonal
from ..quantize.rtn import rtn_int
from ..quantize.transforms import overflow_cure, scale_pair
from .int4_awq import attention_pair, expert_pairs, experts_pair, spread_values, value_pair
from .statistics import LayerStatistics

METHODS = ("gptq", "awq", "rtn")
EFFORTS = ("fast", "default", "high")
WORKING_MATRICES = 7  # float32 [O, I] or [I, I] matrices that a solve holds for each expert
ATTENTION_BITS = 4  # of INT4 attention, also in layers whose experts keep more
LEAST_ROWS = 32  # an expert that saw fewer is reported

ReadExperts = Callable[[str, range], Tensor]


@dataclass(frozen=True)
class Int4Options:
    """How a layer is quantized. `shrinkage`: see quantize/moments.py; `memory`: working bytes beside the layer."""

    method: str = "gptq"
    effort: str = "default"
    grid: Grid = field(default_factory=Grid)
    attention: str = "bf16"
    damping: float = DAMPING
    shrinkage: float = 1.0
    memory: int = 16 << 30
    seed: int = 0

    @property
    def compensated(self) -> bool:
        """Whether rounding errors are fed back: GPTQ, and AWQ with high effort (then both)."""
        return self.method == "gptq" or (self.method == "awq" and self.effort == "high")

    @property
    def learned(self) -> bool:
        """Whether rounding is learned on the layer's output after GPTQ."""
        return self.method == "gptq" and self.effort == "high"


@dataclass(frozen=True)
class LayerReport:
    """What the user should know of a layer: experts without calibration, hard factorizations, cured overflows."""

    layer: int
    unseen: tuple[int, ...] = ()
    starved: tuple[int, ...] = ()
    damped: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    cured: dict[int, int] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """One line a finding."""
        if self.unseen:
            yield f"layer {self.layer}: experts {_some(self.unseen)} saw no token; the layer's pooled moments were used"
        if self.starved:
            yield f"layer {self.layer}: experts {_some(self.starved)} saw fewer than {LEAST_ROWS} calibration tokens"
        if self.damped:
            yield f"layer {self.layer}: {_some(self.damped)} needed more damping"
        if self.rounded:
            yield f"layer {self.layer}: {_some(self.rounded)} could not be factored and were rounded to nearest"
        for expert, power in self.cured.items():
            yield f"layer {self.layer}: expert {expert} overflowed float16; w3 * 2^-{power}, w2 * 2^{power}"


def _some(items: tuple[object, ...]) -> str:
    shown = ", ".join(str(i) for i in items[:8])
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's result.

    experts    w1, w3, w2: IntWeight with codes [E, O, I]
    attention  q_proj ...: IntWeight with codes [O, I]; empty unless attention is INT4
    plain      replaced norms, router or bias by LayerWeights field; empty when nothing changed
    values     [kv_heads * head_dim] what v's rows were divided by (AWQ, with INT4 attention); else None
    compensated  what GPTQ rounded, by matrix name, for learning (on the CPU when the work is on CUDA); else empty
    """

    experts: dict[str, IntWeight]
    attention: dict[str, IntWeight]
    plain: dict[str, Tensor]
    report: LayerReport
    values: Tensor | None = None
    compensated: dict[str, Tensor] = field(default_factory=dict)


def quantize_layer(
    layer: int,
    weights: LayerWeights,
    statistics: LayerStatistics,
    options: Int4Options,
    geometry: Geometry,
    read: ReadExperts | None = None,
) -> QuantizedLayer:
    """Codes of one layer: GPTQ, or moment-weighted rounding, after equalization for method awq.

    weights  any compute dtype, on the device that does the work
    read     gives experts in float32 (projection, range) when `weights` are not exact; default: from `weights`

    Raises ValueError when the statistics are not of this layer, or hold NaN or infinity.
    """
    check_statistics(layer, weights, statistics)
    device = weights.w1.device
    cure = overflow_cure(_largest(statistics.expert_mid)).to(device)
    reader = read if read is not None else _reader(weights)
    mid = scaled_moments(statistics.expert_mid, cure.to(statistics.expert_mid.weight.device))
    plain: dict[str, Tensor] = {}
    scale: Tensor | float = 1.0
    if options.method == "awq":
        scale, plain = equalize_norm(weights, statistics, options, reader)
    found: list[tuple[dict[str, IntWeight], list[Solved]]] = []
    rounded: dict[str, list[Tensor]] = {}
    for chosen in expert_chunks(weights, options.memory):
        w1, w3, w2 = (reader(name, chosen).to(device=device, dtype=torch.float32) for name in ("w1", "w3", "w2"))
        w3, w2 = scale_pair(w3, w2, cure[chosen.start : chosen.stop])
        part = slice(chosen.start, chosen.stop)
        between: Tensor | float = 1.0
        if options.method == "awq":
            between = expert_pairs(w2, mid, part, options.grid, options.shrinkage)
            w3, w2 = w3 / between.unsqueeze(-1), w2 * between.unsqueeze(-2)
        second = solve(w2, mid, part, options, between)
        first = solve(torch.cat((w1, w3), 1) * scale, statistics.expert_in, part, options, scale)
        width = w1.shape[1]
        for name, values in _rounded_values(first, second, width).items():
            rounded.setdefault(name, []).append(values)
        pieces = {"w1": rows_of(first.weight, slice(0, width)), "w3": rows_of(first.weight, slice(width, None))}
        found.append(({**pieces, "w2": second.weight}, [first, second]))
    experts = {name: join([piece[name] for piece, _ in found]) for name in ("w1", "w3", "w2")}
    report = make_report(layer, statistics, cure, [solved for _, solved in found])
    attention: dict[str, IntWeight] = {}
    values = None
    if options.attention == "int4":
        four = dataclasses.replace(options, grid=dataclasses.replace(options.grid, bits=ATTENTION_BITS))
        solved, changed, values = quantize_attention(weights, statistics, four, geometry)
        attention = {name: select(one.weight, 0) for name, one in solved.items()}
        plain |= changed
        rounded |= {n: [one.compensated[0]] for n, one in solved.items() if one.compensated is not None}
    compensated = {n: torch.cat(v) for n, v in rounded.items()}
    return QuantizedLayer(experts, attention, plain, report, values, compensated)


def _rounded_values(first: Solved, second: Solved, width: int) -> dict[str, Tensor]:
    """What GPTQ rounded of a chunk's w1 and w3 (stacked) and w2; nothing when it was not kept."""
    if first.compensated is None or second.compensated is None:
        return {}
    values = {"w1": first.compensated[:, :width], "w3": first.compensated[:, width:], "w2": second.compensated}
    return {name: v.cpu() if v.is_cuda else v for name, v in values.items()}


def solve(weight: Tensor, moments: Moments, part: slice, options: Int4Options, scale: Tensor | float = 1.0) -> Solved:
    """One chunk of matrices [E, O, I] float32 by the options' method; inputs are divided by `scale` [I], [E, I]."""
    grid = options.grid
    if not options.compensated:
        importance = shrunk_diagonal(moments, options.shrinkage, part).to(weight.device)
        if isinstance(scale, Tensor):
            importance = importance / scale.square()
        rounded = rtn_int(weight, grid.bits, grid.group_size, grid.symmetric, importance=importance)
        nothing = torch.zeros(weight.shape[0], device=weight.device)
        return Solved(rounded, None, nothing, nothing.bool())
    second = shrunk(moments, options.shrinkage, part).to(weight.device)
    if isinstance(scale, Tensor):
        second = second / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return quantize(weight, second, grid, options.damping, keep=options.learned)


def equalize_norm(
    weights: LayerWeights, statistics: LayerStatistics, options: Int4Options, read: ReadExperts
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scale [H] of w1 and w3's columns, and the norm and router that make up for it."""
    pair = experts_pair(weights, statistics, options.grid, options.shrinkage, read)
    return pair.scale, {"post_norm": pair.norm, "router": weights.router * pair.scale}


def quantize_attention(
    weights: LayerWeights, statistics: LayerStatistics, options: Int4Options, geometry: Geometry
) -> tuple[dict[str, Solved], dict[str, Tensor], Tensor | None]:
    """q, k, v under what enters them, o under what enters it; for AWQ also the norm that is changed and v's scale."""
    matrices = {"q_proj": weights.q, "k_proj": weights.k, "v_proj": weights.v, "o_proj": weights.o}
    matrices = {name: matrix.float() for name, matrix in matrices.items()}
    scales: dict[str, Tensor | float] = dict.fromkeys(matrices, 1.0)
    plain: dict[str, Tensor] = {}
    values = None
    if options.method == "awq":
        pair = attention_pair(weights, statistics, options.grid)
        values = value_pair(weights, statistics.attention_out, options.grid, geometry)
        matrices["v_proj"] = matrices["v_proj"] / values.unsqueeze(-1)
        scales |= {"q_proj": pair.scale, "k_proj": pair.scale, "v_proj": pair.scale}
        scales["o_proj"] = spread_values(values, geometry)
        plain["input_norm"] = pair.norm
    found = {}
    for name, matrix in matrices.items():
        moments = statistics.attention_out if name == "o_proj" else statistics.attention_in
        solved = solve((matrix * scales[name]).unsqueeze(0), moments, slice(None), options, scales[name])
        found[name] = solved
    return found, plain, values


def check_statistics(layer: int, weights: LayerWeights, statistics: LayerStatistics) -> None:
    """ValueError unless the statistics fit the layer's matrices."""
    if statistics.layer != layer:
        raise ValueError(f"statistics of layer {statistics.layer}, expected layer {layer}")
    experts, width, hidden = weights.w1.shape
    check_moments(statistics.expert_in, experts, hidden, f"layer {layer} w1, w3")
    check_moments(statistics.expert_mid, experts, width, f"layer {layer} w2")
    check_moments(statistics.attention_in, 1, hidden, f"layer {layer} q, k, v")
    check_moments(statistics.attention_out, 1, weights.o.shape[1], f"layer {layer} o")


def expert_chunks(weights: LayerWeights, memory: int) -> Iterator[range]:
    """Ranges of experts whose solves fit into `memory` working bytes."""
    experts, width, hidden = weights.w1.shape
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
        plain_diagonal=moments.plain_diagonal * square.unsqueeze(-1),
        amax=moments.amax * factor,
        sum32=moments.sum32 * factor,
        sum16=moments.sum16 * factor,
    )


def _largest(moments: Moments) -> Tensor:
    return torch.stack((moments.amax, moments.sum32, moments.sum16)).amax(0)


def _reader(weights: LayerWeights) -> ReadExperts:
    def read(projection: str, chosen: range) -> Tensor:
        return getattr(weights, projection)[chosen.start : chosen.stop]

    return read


def make_report(layer: int, statistics: LayerStatistics, cure: Tensor, solved: list[list[Solved]]) -> LayerReport:
    """Findings of a layer from its statistics and the solves of its chunks."""
    count = statistics.expert_in.count
    damped, rounded = [], []
    for index, name in enumerate(("w1+w3", "w2")):
        damping = torch.cat([part[index].damping for part in solved])
        failed = torch.cat([part[index].rounded for part in solved])
        usual = damping.min()
        damped += [f"{name} of expert {e}" for e in ((damping > usual) & ~failed).nonzero().flatten().tolist()]
        rounded += [f"{name} of expert {e}" for e in failed.nonzero().flatten().tolist()]
    return LayerReport(
        layer,
        tuple((count == 0).nonzero().flatten().tolist()),
        tuple(((count > 0) & (count < LEAST_ROWS)).nonzero().flatten().tolist()),
        tuple(damped),
        tuple(rounded),
        {e: int(cure[e]) for e in cure.nonzero().flatten().tolist()},
    )


def as_read_back(weights: LayerWeights, quantized: QuantizedLayer, dtype: torch.dtype | None = None) -> LayerWeights:
    """The layer with its quantized matrices' values, in the dtype of `weights` or another."""
    to = dtype if dtype is not None else weights.w1.dtype
    values = {name: dequantize_batch(found, to) for name, found in quantized.experts.items()}
    values |= {name.removesuffix("_proj"): dequantize(found).to(to) for name, found in quantized.attention.items()}
    return dataclasses.replace(weights, **values, **quantized.plain)


def dequantize_batch(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """Values [E, O, I]; one matrix at a time, so that float32 copies stay small."""
    if dtype == torch.float32:
        return dequantize(weight)
    return torch.stack([dequantize(select(weight, e)).to(dtype) for e in range(weight.codes.shape[0])])
