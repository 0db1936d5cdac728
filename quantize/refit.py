"""Refit stored scales (and norms) to the quantized model's output. File size does not change."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .integer.grid import IntWeight, bfloat16_exact, dequantize
from .linear_algebra import full_float32, solve

RIDGE = 0.01
PULL = 1e-3  # of a group's own curvature, towards the scale that it has
BIAS_ROUNDS = 50
REFIT_VALUES = {"cpu": 1 << 24, "cuda": 1 << 28}  # float32 values of the largest temporary


def refit_linear(weight: Tensor, reference: Tensor, found: Tensor, ridge: float = RIDGE) -> Tensor:
    """The matrix whose outputs on `found` come closest to those of `weight` on `reference`, pulled towards `weight`.

    weight [O, n]; reference, found [N, n] the same tokens' inputs before and after quantization; float32.
    Least squares: (F^T F + r I) V^T = F^T R W^T + r W^T with r a share of the mean square.
    """
    gram = found.T @ found
    pull = ridge * gram.diagonal().mean()
    gram.diagonal().add_(pull)
    wanted = found.T @ (reference @ weight.T) + pull * weight.T
    return solve(gram, wanted).T.contiguous()


def refit_gain(weight: Tensor, reference: Tensor, found: Tensor) -> Tensor:
    """A norm's weight [n], exact in bfloat16, that maps `found` to where it mapped `reference`, channel by channel.

    reference, found [N, n]: the same tokens' normed streams before and after quantization, `weight` not applied or
    applied to both; float32. Least squares: w <r, f> / <f, f>. A channel without energy keeps its weight.
    """
    energy = found.square().sum(0)
    gain = (reference * found).sum(0) / energy.clamp(min=1e-30)
    return bfloat16_exact(torch.where(energy > 0, weight * gain, weight))


def refit_bias(scores: Tensor, wanted: Tensor, bias: Tensor) -> Tensor:
    """The bias [E] under which `scores` [N, E] choose most of the wanted experts [N, K].

    Perceptron steps: an expert that is chosen too rarely rises, one chosen too often falls, by its share of the tokens
    times the scores' spread, a step that shrinks; the best bias met is returned (the given one when none is better).
    """
    tokens, per_token = wanted.shape
    target = torch.bincount(wanted.flatten(), minlength=len(bias)).float()
    spread = scores.std()
    best, most, now = bias, -1.0, bias.clone()
    for index in range(BIAS_ROUNDS):
        chosen = torch.topk(scores + now, per_token, dim=-1).indices
        found = agreement(chosen, wanted)
        if found > most:
            best, most = now.clone(), found
        load = torch.bincount(chosen.flatten(), minlength=len(bias)).float()
        now = now + (target - load) / tokens * spread * (1 - index / BIAS_ROUNDS)
    return best


def agreement(chosen: Tensor, wanted: Tensor) -> float:
    """Share of the wanted experts [N, K] that are among the chosen ones [N, K]."""
    return float((chosen.unsqueeze(-1) == wanted.unsqueeze(-2)).any(-1).float().mean())


def refit_scales(weight: Tensor, found: IntWeight, second: Tensor) -> IntWeight:
    """The same codes under the scales that cost the outputs least: all groups of a row by least squares together.

    weight [E, O, n] float32; second [E, n, n] mean second moments. A row keeps its scales when the new ones, rounded to
    bfloat16, are not better. On CUDA the products round their factors to TF32, which the rounding of scales hides.
    """
    scales = found.scales
    groups = scales.shape[-1]
    rows = max(1, REFIT_VALUES[weight.device.type] // (weight.shape[-1] * groups))
    gradients: list[Tensor] = []
    curvatures: list[Tensor] = []
    with full_float32(False):
        for expert in range(weight.shape[0]):
            zeros = None if found.zeros is None else found.zeros[expert]
            codes = dequantize(IntWeight(found.codes[expert], torch.ones_like(scales[expert]), zeros, found.bits))
            values = (torch.unflatten(codes, -1, (groups, -1)) * scales[expert].unsqueeze(-1)).flatten(-2)
            error = weight[expert] - values
            gradients.append(torch.unflatten(((error @ second[expert]) * codes), -1, (groups, -1)).sum(-1))
            curvatures += [curvature(part, second[expert], groups) for part in torch.split(codes, rows)]
    bend = torch.cat(curvatures).view(*scales.shape, groups)
    fitted = _fitted(scales, torch.stack(gradients), bend)
    return replace(found, scales=fitted)


def _fitted(scales: Tensor, gradient: Tensor, bend: Tensor) -> Tensor:
    """[..., G]: scales after a Newton step, where it pays; gradient (of half the loss) [..., G], bend [..., G, G]."""
    diagonal = bend.diagonal(dim1=-2, dim2=-1)
    pull = PULL * diagonal + 1e-30
    diagonal.add_(pull)
    step = solve(bend, gradient.unsqueeze(-1)).squeeze(-1)
    fitted = bfloat16_exact(scales + step)
    fitted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scales)
    step = fitted - scales
    bent = (bend @ step.unsqueeze(-1)).squeeze(-1) - pull * step
    better = (step * (2 * gradient - bent)).sum(-1, keepdim=True) > 0
    return torch.where(better, fitted, scales)


def curvature(codes: Tensor, second: Tensor, groups: int) -> Tensor:
    """[O, G, G]: for every output, what the products of two groups' codes [O, n] weigh under the moments [n, n]."""
    if codes.is_cuda:
        from . import refit_triton as repair_triton  # imported where it is needed: triton is not there on every machine

        if repair_triton.takes(codes.shape[-1] // groups):
            return repair_triton.curvature(codes, second, groups)
    blocks = torch.unflatten(codes, -1, (groups, -1)).transpose(0, 1)
    spread = torch.bmm(blocks, torch.unflatten(second, 0, (groups, -1)))  # [G, O, n]
    return torch.unflatten(spread.mul_(codes), -1, (groups, -1)).sum(-1).transpose(0, 1).contiguous()
