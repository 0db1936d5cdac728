"""SignRound: learn codes and scales by sign-SGD on the error of a layer's output (AutoRound's method).

Each weight is level * scale, its level the one nearest to a position that moves; on integer grids the scale
moves, too. Gradients pass the rounding as if it were not there. The positions begin where the start rounded: after GPTQ
at the compensated weights, so that no move is GPTQ's own result. Only signs of gradients are used: no state is kept,
and the gradients may be bfloat16. On CUDA each of the two passes over the weights is one kernel.
Source: Cheng et al., https://arxiv.org/abs/2309.05516 (signed gradient descent with linear decay).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .integer.grid import IntWeight, bfloat16_exact, code_range

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """Where the learning of some matrices begins.

    position       [..., O, n] float32 in units of the scale
    scales         [..., O, G] float32; their signs stay
    low, high      the lowest and highest level
    table          [L] float32, the levels in rising order; None: the integers
    learns_scales  whether scales move, exact in bfloat16
    offsets        [..., O, G] that is added to level * scale; None: nothing
    """

    position: Tensor
    scales: Tensor
    low: float
    high: float
    table: Tensor | None = None
    learns_scales: bool = False
    offsets: Tensor | None = None

    @property
    def width(self) -> float:
        """Mean distance of neighbouring levels."""
        return 1.0 if self.table is None else (self.high - self.low) / (len(self.table) - 1)


@dataclass(frozen=True)
class SignRoundState:
    """Positions [..., O, n] and gains of the scales [..., O, G] (None where they stay): changed in place."""

    position: Tensor
    gain: Tensor | None


@dataclass(frozen=True)
class RoundedWeight:
    """levels [..., O, n] int8, the scales [..., O, G] that they are for, and offsets where there are some."""

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None = None


def grid_start(rounded: Tensor, weight: IntWeight) -> Start:
    """What was rounded [..., O, I] float32 to `weight`, without zero points. Scales move on symmetric integer grids."""
    scales = weight.scales
    grouped = torch.unflatten(rounded, -1, (scales.shape[-1], -1))
    low, high = code_range(weight.bits)
    if weight.biases is not None:
        offsets = weight.biases - low * scales  # of code 0
        position = ((grouped - offsets.unsqueeze(-1)) / scales.unsqueeze(-1)).flatten(-2)
        return Start(position, scales, float(low), float(high), offsets=offsets)
    position = (grouped / scales.unsqueeze(-1)).flatten(-2)
    if weight.levels is None:
        return Start(position, scales, float(low), float(high), learns_scales=True)
    table = torch.tensor(weight.levels, dtype=torch.float32, device=rounded.device)
    return Start(position, scales, float(weight.levels[0]), float(weight.levels[-1]), table=table)


def grid_weight(result: RoundedWeight, like: IntWeight) -> IntWeight:
    """A result of `grid_start`; like: what the learning started from."""
    return replace(like, codes=result.levels, scales=result.scales)


def begin(start: Start) -> SignRoundState:
    """No move yet."""
    return SignRoundState(start.position.clone(), torch.ones_like(start.scales) if start.learns_scales else None)


def scales_of(start: Start, state: SignRoundState) -> Tensor:
    """[..., O, G] as they are stored."""
    return start.scales if state.gain is None else bfloat16_exact(start.scales * state.gain)


def levels_of(start: Start, position: Tensor) -> Tensor:
    """The levels nearest to positions, float32."""
    if start.table is None:
        return position.round().clamp_(start.low, start.high)
    middles = (start.table[1:] + start.table[:-1]) / 2
    return start.table[torch.bucketize(position, middles)]


def values_of(
    levels: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, offsets: Tensor | None = None
) -> Tensor:
    """What levels [..., O, n] under scales (and offsets) stand for."""
    values = torch.unflatten(levels.float(), -1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
    if offsets is not None:
        values = values + offsets.unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def rounded_values(start: Start, state: SignRoundState, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the state stands for, [..., O, n]."""
    scales = scales_of(start, state)
    if state.position.is_cuda:
        from . import signround_triton  # imported where it is needed: triton is not there on every machine

        return signround_triton.rounded_values(start, state, scales, dtype)
    return values_of(levels_of(start, state.position), scales, dtype, start.offsets)


def move(start: Start, state: SignRoundState, grad: Tensor, rate: float, gain_rate: float) -> None:
    """One step down the sign of the loss's gradient by the values [..., O, n]; rate in widths of a level.

    Outside of the levels' range positions stay.
    """
    if grad.is_cuda:
        from . import signround_triton

        signround_triton.move(start, state, grad, rate, gain_rate)
        return
    groups = start.scales.shape[-1]
    signs = (torch.unflatten(grad, -1, (groups, -1)) * start.scales.sign().unsqueeze(-1)).flatten(-2)
    half = start.width / 2
    position = state.position
    signs *= (position >= start.low - half) & (position <= start.high + half)
    if state.gain is not None:
        products = torch.unflatten((grad * levels_of(start, position)), -1, (groups, -1)).sum(-1) * start.scales
        state.gain.sub_(products.sign_(), alpha=gain_rate).clamp_(0.5, 2.0)
    position.sub_(signs.sign_(), alpha=rate * start.width)


@dataclass(frozen=True)
class StepSchedule:
    """Steps, the largest move of a position in one step (and of a gain), and how often held-out loss is looked at."""

    steps: int = 200
    rate: float = 0.005
    gain_rate: float = 0.0005
    looks: int = 10


@dataclass(frozen=True)
class SignRounded:
    """The best results by held-out loss, and the losses at the start and at the best step."""

    weights: dict[str, RoundedWeight]
    before: float
    after: float
    step: int


def sign_round(
    starts: Mapping[str, Start],
    loss: Callable[[Weights, int], Tensor],
    held_out: Callable[[Weights], float],
    schedule: StepSchedule,
    dtype: torch.dtype = torch.float32,
) -> SignRounded:
    """Move positions and scales; keep what is best on held-out tokens (the start included).

    loss      weights (quantized, in `dtype`, leaves of the graph) and the step -> scalar on that step's tokens
    held_out  weights -> loss on tokens that are never trained on
    """
    states = {name: begin(start) for name, start in starts.items()}

    def weights() -> Weights:
        return {name: rounded_values(starts[name], state, dtype) for name, state in states.items()}

    with torch.no_grad():
        before = held_out(weights())
    best = SignRounded(_results(starts, states), before, before, 0)
    for step in range(schedule.steps):
        found = {name: value.requires_grad_() for name, value in weights().items()}
        loss(found, step).backward()
        decay = 1 - step / schedule.steps
        for name, value in found.items():
            assert value.grad is not None
            move(starts[name], states[name], value.grad, schedule.rate * decay, schedule.gain_rate * decay)
        del found
        if (step + 1) % max(1, schedule.steps // schedule.looks) == 0:
            with torch.no_grad():
                now = held_out(weights())
            if now < best.after:
                best = replace(best, weights=_results(starts, states), after=now, step=step + 1)
    return best


def _results(starts: Mapping[str, Start], states: Mapping[str, SignRoundState]) -> dict[str, RoundedWeight]:
    return {
        name: RoundedWeight(
            levels_of(start, states[name].position).to(torch.int8), scales_of(start, states[name]), start.offsets
        )
        for name, start in starts.items()
    }
