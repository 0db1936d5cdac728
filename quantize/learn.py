"""Learned rounding: codes and scales moved by sign-SGD on the error of a layer's output, from a given start.

Each weight is code * scale with code = round(value / scale + shift), |shift| <= 1/2, and scale = start * gain;
gradients pass the rounding as if it were not there. `value` is what the start rounded: after GPTQ the compensated
weight, so that shift 0 is GPTQ's own result. Only signs of gradients are used: there is no optimizer state, and the
gradients may be bfloat16.
Source: Cheng et al., https://arxiv.org/abs/2309.05516 (signed gradient descent with linear decay).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .int_grid import IntWeight, bfloat16_exact, code_range

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """What was rounded [..., O, I] float32, the scales [..., O, G] it was rounded with, the bits. Symmetric grids."""

    values: Tensor
    scales: Tensor
    bits: int = 4


@dataclass(frozen=True)
class Schedule:
    """Steps, the largest move of a shift in one step (and of a gain), and how often held-out loss is looked at."""

    steps: int = 200
    rate: float = 0.005
    gain_rate: float = 0.0005
    looks: int = 10


@dataclass(frozen=True)
class Learned:
    """The best weights by held-out loss, and the losses at the start and at the best step."""

    weights: dict[str, IntWeight]
    before: float
    after: float
    step: int


class _Quantize(torch.autograd.Function):
    """Values of shifted codes; the gradient of the rounding is one inside the code range."""

    @staticmethod
    def forward(ctx: Any, shift: Tensor, gain: Tensor, start: Start, dtype: torch.dtype) -> Tensor:
        codes, inside = _codes(start, shift)
        scale = bfloat16_exact(start.scales * gain)
        ctx.save_for_backward(codes.to(torch.int8), inside, scale, start.scales)
        return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        codes, inside, scale, original = ctx.saved_tensors
        grad = gradients[0].unflatten(-1, (scale.shape[-1], -1))
        # Only signs matter: a positive factor per group is left out, the scale's sign is not.
        shift = (grad * scale.sign().unsqueeze(-1)).flatten(-2) * inside
        gain = (grad * codes.unflatten(-1, (scale.shape[-1], -1))).sum(-1) * original
        return shift, gain, None, None


def _codes(start: Start, shift: Tensor) -> tuple[Tensor, Tensor]:
    low, high = code_range(start.bits)
    position = (start.values.unflatten(-1, (start.scales.shape[-1], -1)) / start.scales.unsqueeze(-1)).flatten(-2)
    position = position + shift
    return position.round().clamp(low, high), (position >= low - 0.5) & (position <= high + 0.5)


def learn(
    starts: Mapping[str, Start],
    loss: Callable[[Weights, int], Tensor],
    held_out: Callable[[Weights], float],
    schedule: Schedule,
    dtype: torch.dtype = torch.float32,
) -> Learned:
    """Move shifts and gains down the sign of the gradient; keep what is best on held-out tokens (the start included).

    loss      weights (quantized, differentiable, in `dtype`) and the step -> scalar on that step's tokens
    held_out  weights -> loss on tokens that are never trained on
    """
    shifts = {n: torch.zeros_like(s.values, requires_grad=True) for n, s in starts.items()}
    gains = {n: torch.ones_like(s.scales, requires_grad=True) for n, s in starts.items()}

    def weights() -> Weights:
        return {n: _Quantize.apply(shifts[n], gains[n], s, dtype) for n, s in starts.items()}  # type: ignore[misc]

    def snapshot() -> dict[str, IntWeight]:
        return {n: _stored(s, shifts[n], gains[n]) for n, s in starts.items()}

    with torch.no_grad():
        before = held_out(weights())
    best = Learned(snapshot(), before, before, 0)
    for step in range(schedule.steps):
        loss(weights(), step).backward()
        decay = 1 - step / schedule.steps
        for name in starts:
            _move(shifts[name], schedule.rate * decay, -0.5, 0.5)
            _move(gains[name], schedule.gain_rate * decay, 0.5, 2.0)
        if (step + 1) % max(1, schedule.steps // schedule.looks) == 0:
            with torch.no_grad():
                now = held_out(weights())
            if now < best.after:
                best = Learned(snapshot(), before, now, step + 1)
    return best


def _move(parameter: Tensor, rate: float, low: float, high: float) -> None:
    assert parameter.grad is not None
    with torch.no_grad():
        parameter.sub_(parameter.grad.sign_(), alpha=rate).clamp_(low, high)
    parameter.grad = None


def _stored(start: Start, shift: Tensor, gain: Tensor) -> IntWeight:
    with torch.no_grad():
        codes, _ = _codes(start, shift)
        return IntWeight(codes.to(torch.int8), bfloat16_exact(start.scales * gain), None, start.bits)
