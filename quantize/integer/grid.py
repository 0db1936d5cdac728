"""Integer grids: codes, scales and zero points of weight groups, and the search for the scale with the least error.

A value is (code - zero) * scale, codes and zeros stored signed (-8..7 at 4 bits; files add 2^(bits-1)). Scales are
exact in bfloat16 and codes are taken under the rounded scale. A symmetric grid has one code more below zero than above,
so the scale is signed: a negative one puts that code at the group's largest positive weight. The kernels multiply by
the scale and nothing else, so its sign is free (docs/lab.md names the places).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmquant.errors import InputError

SEARCH_WEIGHTS = 1 << 27  # searched at once on CUDA: bounds the temporaries at a few times this many weights
RATIOS, RATIO_LEAST, RATIO_SPAN = 24, 0.5, 0.7  # scales tried, as shares of the one that reaches the extreme
RANGE_LEAST, RANGE_SPAN = 0.5, 0.55  # and of the range, where there is a zero point


@dataclass(frozen=True)
class IntWeight:
    """Matrices on a grid of whole numbers: the values are (codes - zeros) * scales.

    codes   [..., O, I] int8
    scales  [..., O, G] float32, exact in what the format stores (bfloat16 for integers)
    zeros   [..., O, G] int8, None for symmetric grids
    levels  the codes' values in rising order, where they are not all the integers of `bits` (quantize/fp4)
    unit    [..., O, 1] float32: what the stored scales of a row are multiples of (NVFP4's global scale); else None
    biases  [..., O, G] float32, exact in bfloat16: the lowest code's values; the values are then
            (codes + 2^(bits-1)) * scales + biases (quantize/affine); else None
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    levels: tuple[int, ...] | None = None
    unit: Tensor | None = None
    biases: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Weights that share a scale (the whole row when per channel)."""
        return self.codes.shape[-1] // self.scales.shape[-1]


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest stored code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def groups_of(inputs: int, group_size: int, where: str = "weight") -> int:
    """Weights in a group: `group_size`, or the whole row for -1. ValueError when it does not divide the row."""
    size = inputs if group_size == -1 else group_size
    if size <= 0 or inputs % size:
        raise InputError(f"{where}: group size {group_size} does not divide {inputs} inputs")
    return size


def bfloat16_exact(values: Tensor) -> Tensor:
    """Nearest bfloat16, as float32."""
    return values.to(torch.bfloat16).float()


def dequantize(weight: IntWeight) -> Tensor:
    """Values [..., O, I] float32."""
    codes = torch.unflatten(weight.codes.float(), -1, (weight.scales.shape[-1], -1))
    if weight.zeros is not None:
        codes = codes - weight.zeros.float().unsqueeze(-1)
    if weight.biases is not None:
        values = (codes + (1 << (weight.bits - 1))) * weight.scales.unsqueeze(-1)
        return (values + weight.biases.unsqueeze(-1)).flatten(-2)
    return (codes * weight.scales.unsqueeze(-1)).flatten(-2)


def map_parts(weight: IntWeight, change: Callable[[Tensor], Tensor]) -> IntWeight:
    """`change` applied to codes, scales, zeros, units and biases."""
    zeros, unit, biases = (
        None if part is None else change(part) for part in (weight.zeros, weight.unit, weight.biases)
    )
    found = replace(weight, codes=change(weight.codes), scales=change(weight.scales))
    return replace(found, zeros=zeros, unit=unit, biases=biases)


def rows_of(weight: IntWeight, rows: slice) -> IntWeight:
    """Some output rows of a batch of matrices."""
    return map_parts(weight, lambda part: part[..., rows, :])


def select(weight: IntWeight, index: int) -> IntWeight:
    """One matrix of a batch."""
    return map_parts(weight, lambda part: part[index])


def join_weights(parts: list[IntWeight]) -> IntWeight:
    """Batches of matrices one after another."""
    zeros = [p.zeros for p in parts if p.zeros is not None]
    units = [p.unit for p in parts if p.unit is not None]
    biases = [p.biases for p in parts if p.biases is not None]
    return replace(
        parts[0],
        codes=torch.cat([p.codes for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        zeros=torch.cat(zeros) if zeros else None,
        unit=torch.cat(units) if units else None,
        biases=torch.cat(biases) if biases else None,
    )


def round_codes(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Nearest stored codes, as float; values [..., g] with scales and zeros [...] of their groups."""
    low, high = code_range(bits)
    codes = values / scales.unsqueeze(-1)
    if zeros is not None:
        codes = codes + zeros.unsqueeze(-1)
    return codes.round().clamp(low, high)


def round_to_codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> IntWeight:
    """Nearest codes of weight [..., O, I] under given scales [..., O, G]."""
    grouped = torch.unflatten(weight.float(), -1, (scales.shape[-1], -1))
    codes = round_codes(grouped, scales, None if zeros is None else zeros.float(), bits)
    return IntWeight(codes.to(torch.int8).flatten(-2), scales, zeros, bits)


def search_scales(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    signed: bool = True,
    tries: int = RATIOS,
) -> tuple[Tensor, Tensor | None]:
    """Scales [..., O, G] float32 (exact in bfloat16) and zeros [..., O, G] int8 with the least weighted square error.

    weight [..., O, I]; importance [..., I] >= 0 weighs the squared errors of a column (None: all alike).
    """
    size = groups_of(weight.shape[-1], group_size)
    grouped = torch.unflatten(weight.float(), -1, (-1, size))
    shape = grouped.shape[:-1]
    flat = grouped.reshape(-1, size)
    weighing = None
    if importance is not None:
        spread = torch.unflatten(importance.float(), -1, (-1, size)).unsqueeze(-3)
        weighing = search_weights(spread).expand_as(grouped)
    if flat.device.type == "cpu":
        scale, zero = _search_cpu(flat, weighing, bits, symmetric, signed, tries)
        return scale.view(shape), None if zero is None else zero.view(shape)
    step = max(1, SEARCH_WEIGHTS // size)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    rows = _rows(weighing, flat)
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        h = rows(start, start + part.shape[0])
        scale, zero = _symmetric(part, h, bits, signed, tries) if symmetric else _asymmetric(part, h, bits, tries)
        scales.append(scale)
        if zero is not None:
            zeros.append(zero)
    joined = None if symmetric else torch.cat(zeros).view(shape)
    return torch.cat(scales).view(shape), joined


def _search_cpu(
    flat: Tensor, weighing: Tensor | None, bits: int, symmetric: bool, signed: bool, tries: int
) -> tuple[Tensor, Tensor | None]:
    """The same search by numba, whose first use takes seconds to import and compile."""
    from .search_cpu import search_groups

    least, span = (RATIO_LEAST, RATIO_SPAN) if symmetric else (RANGE_LEAST, RANGE_SPAN)
    ratios = torch.tensor(_shares(least, span, tries))
    kind = ("signed" if signed else "positive") if symmetric else "asymmetric"
    table, rows = torch.ones(1, 1, flat.shape[-1]), max(1, len(flat))
    if weighing is not None:
        table, rows = _table(weighing), weighing.shape[-3] * weighing.shape[-2]
    return search_groups(flat, table, rows, code_range(bits), ratios, kind)


def _shares(least: float, span: float, tries: int) -> list[float]:
    return [least + span * index / (tries - 1) for index in range(tries)]


def _table(weighing: Tensor) -> Tensor:
    """Importance [T, G, g] of expanded [..., O, G, g]: that of one output row of each matrix."""
    return weighing.select(-3, 0).reshape(-1, *weighing.shape[-2:])


def _rows(weighing: Tensor | None, flat: Tensor) -> Callable[[int, int], Tensor]:
    """A reader of the importance of groups start..stop, without materialising it for every output row."""
    if weighing is None:
        one = torch.ones(1, flat.shape[-1], device=flat.device)
        return lambda start, stop: one
    outputs, per_row = weighing.shape[-3], weighing.shape[-2]
    table = _table(weighing)

    def read(start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=flat.device)
        return table[index // (outputs * per_row), index % per_row]

    return read


def search_weights(importance: Tensor) -> Tensor:
    """Importance [..., g] of a group's columns, with a little left to those that were never active."""
    return importance.clamp(min=0) + 1e-3 * importance.mean(-1, keepdim=True) + 1e-30


def _cost(part: Tensor, h: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """The better of `scale` and of the least-squares scale for its codes: (error less the weights' energy, scale)."""
    codes = round_codes(part, scale, zero, bits)
    if zero is not None:
        codes = codes - zero.unsqueeze(-1)
    cross, square = (part * codes * h).sum(-1), (codes.square() * h).sum(-1)
    refit = _usable(cross / square.clamp(min=1e-38))
    error = scale * (scale * square - 2 * cross)
    refitted = refit * (refit * square - 2 * cross)
    return torch.minimum(error, refitted), torch.where(refitted < error, refit, scale)


def _usable(scale: Tensor) -> Tensor:
    rounded = bfloat16_exact(scale)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _symmetric(part: Tensor, h: Tensor, bits: int, signed: bool, tries: int) -> tuple[Tensor, None]:
    low, high = code_range(bits)
    extreme = part.gather(-1, part.abs().argmax(-1, keepdim=True)).squeeze(-1)
    start = extreme / low if signed else extreme.abs() / (0.5 * (high - low))
    best_scale = _usable(start)
    best, best_scale = _cost(part, h, best_scale, None, bits)
    signs = (1.0, -1.0) if signed else (1.0,)
    for ratio in _shares(RATIO_LEAST, RATIO_SPAN, tries):
        for sign in signs:
            error, scale = _cost(part, h, _usable(start * (ratio * sign)), None, bits)
            better = error < best
            best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale, None


def _asymmetric(part: Tensor, h: Tensor, bits: int, tries: int) -> tuple[Tensor, Tensor]:
    low, high = code_range(bits)
    least, most = part.amin(-1).clamp(max=0), part.amax(-1).clamp(min=0)
    best_scale, best_zero = _usable((most - least) / (high - low)), torch.zeros_like(least)
    best = torch.full_like(least, torch.inf)
    for ratio in _shares(RANGE_LEAST, RANGE_SPAN, tries):
        scale = _usable((most - least) * (ratio / (high - low)))
        middle = low - least * ratio / scale
        for zero in (middle.floor().clamp(low, high), middle.ceil().clamp(low, high)):
            error, chosen = _cost(part, h, scale, zero, bits)
            better = error < best
            best, best_scale = torch.where(better, error, best), torch.where(better, chosen, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero.to(torch.int8)
