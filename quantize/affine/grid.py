"""The affine grid of MLX: a weight is scale * code + bias, codes from 0 to 2^bits - 1, scale and bias bfloat16.

The range of a group need not be symmetric nor hold zero. Both its ends are shrunk, each by its own share; every pair is
tried with the codes that it gives, and with the scale and bias that fit these codes best. In a sweep of error feedback
that happens when the sweep reaches the group, on the weights that carry the errors of the groups before.

Codes are kept signed (IntWeight: int8), shifted by 2^(bits-1).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..finite import check_finite
from ..integer.descent import descend
from ..integer.gptq import blocks
from ..integer.gptq_grid import sweep_block
from ..integer.grid import IntWeight, bfloat16_exact, groups_of, search_weights
from ..integer.panel import Panel, Solved, put, take

BITS = (2, 3, 4, 5, 6, 8)
ENDS = 8  # shares of the range tried at each of its ends
LEAST = {2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.75, 8: 0.85}  # the least of them
MOST = 1.05
FLAT = 1e-6  # of a group whose codes differ so little that no scale can be told from its bias
PASSES = 2  # of the descent after error feedback


@dataclass(frozen=True)
class AffineGrid:
    """Bits of a code and inputs that share a scale and a bias: 32, 64 or 128."""

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    shared: bool = False

    @property
    def panel(self) -> int:
        """A group."""
        return self.group_size

    def searches_first(self, group: int) -> bool:
        """Never: groups are searched when the sweep reaches them."""
        del group
        return False

    def round_panel(self, panel: Panel, found: Tensor, zeros: Tensor | None, search: bool) -> None:
        """See `panel.Grid`; `zeros` holds biases."""
        assert zeros is not None
        place = panel.place[:, 0]
        if search:
            scale, bias = search_panel(panel.part, search_weights(panel.importance), self.bits)
            put(found, place, scale)
            put(zeros, place, bias)
        scale, bias = take(found, place), take(zeros, place)
        sweep_block(panel, (scale, shift_of(scale, bias, self.bits)), self.bits)

    def finish(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> IntWeight:
        """See `panel.Grid`; `zeros` holds biases."""
        assert zeros is not None
        return IntWeight(codes, scales, None, self.bits, biases=zeros.contiguous())

    def round_nearest(self, weight: Tensor, importance: Tensor | None) -> IntWeight:
        """Nearest codes of weight [E, O, I] under the best scales and biases; importance [E, I] weighs columns."""
        check_finite(weight)
        experts, outputs, n = weight.shape
        size = groups_of(n, self.group_size)
        columns = weight.float().mT.contiguous()
        spread = columns.new_ones(experts, n) if importance is None else importance.float()
        codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
        scales, biases = (columns.new_empty(experts, n // size, outputs) for _ in range(2))
        for start, stop in blocks(n, size):
            part, group = columns[:, start:stop], start // size
            scale, bias = search_panel(part, search_weights(spread[:, start:stop]), self.bits)
            scales[:, group], biases[:, group] = scale, bias
            shift = shift_of(scale, bias, self.bits)
            codes[:, start:stop] = nearest(part, scale, shift, self.bits).to(torch.int8)
        return self.finish(codes.mT.contiguous(), scales.mT.contiguous(), biases.mT)

    def refit(self, weight: Tensor, solved: Solved, second: Tensor) -> Solved:
        """Codes, scales and biases again, panel by panel with all others held."""
        return descend(weight, solved, second, self, PASSES)


def shift_of(scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """The signed code, not whole, whose value is zero."""
    return -(bias / scale) - (1 << (bits - 1))


def nearest(part: Tensor, scale: Tensor, shift: Tensor, bits: int) -> Tensor:
    """Signed codes of part [..., P, O] under scale and shift [..., O], as float."""
    high = 1 << (bits - 1)
    return (part / scale.unsqueeze(-2) + shift.unsqueeze(-2)).round_().clamp_(-high, high - 1)


def shares(bits: int) -> list[float]:
    """Shares of a range that are tried at each of its ends."""
    least = LEAST[bits]
    return [least + (MOST - least) * step / (ENDS - 1) for step in range(ENDS)]


def search_panel(part: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias [E, O] of the groups part [E, P, O] with the least error weighed by importance [E, P] > 0.

    Both are exact in bfloat16.
    """
    if part.is_cuda:
        return _fused().search_panel(part, importance, bits)
    from .search_cpu import search_panel as on_cpu  # numba takes seconds to import

    return on_cpu(part, importance, bits, shares(bits))


def search_panel_torch(part: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same, as the definition of the kernels."""
    top = float((1 << bits) - 1)
    h = importance.unsqueeze(-1)
    least, most = part.amin(1), part.amax(1)
    middle, half = (least + most) / 2, (most - least) / 2
    best = torch.full_like(least, torch.inf)
    found = torch.ones_like(least), bfloat16_exact(middle)
    for below in shares(bits):
        for above in shares(bits):
            low = bfloat16_exact(middle - below * half)
            scale = usable((middle + above * half - low) / top)
            code = ((part - low.unsqueeze(1)) / scale.unsqueeze(1)).round_().clamp_(0, top)
            for tried in ((scale, low), fitted(part, h, code)):
                error = (h * (part - code * tried[0].unsqueeze(1) - tried[1].unsqueeze(1)).square()).sum(1)
                better = error < best
                best = torch.where(better, error, best)
                found = torch.where(better, tried[0], found[0]), torch.where(better, tried[1], found[1])
    return found


def fitted(part: Tensor, h: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and bias [E, O] that fit codes [E, P, O] best, weighed by h [E, P, 1]."""
    total = h.sum(1)
    mean, centre = (h * code).sum(1) / total, (h * part).sum(1) / total
    moved = code - mean.unsqueeze(1)
    square, cross = (h * moved.square()).sum(1), (h * moved * part).sum(1)
    scale = usable(torch.where(square > FLAT * total, cross / square.clamp(min=1e-38), torch.ones_like(square)))
    return scale, bfloat16_exact(centre - scale * mean)


def usable(scale: Tensor) -> Tensor:
    """The nearest bfloat16, 1 in place of zero."""
    rounded = bfloat16_exact(scale)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _fused() -> ModuleType:
    from . import search_triton

    return search_triton
