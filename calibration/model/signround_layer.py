"""SignRound of one layer: attention and experts, each against the output of the unquantized layer.

The reference is the unquantized layer on the unquantized stream; the quantized layer works on the stream that the
quantized layers before it leave behind, when that is known, and so makes good part of their error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.signround import RoundedWeight, SignRounded, Start, StepSchedule, Weights, sign_round, values_of
from .forward import Observer, attention

LARGEST_WORK = 40 << 30
# For each weight: positions at the start and now, values and their gradients, the best levels, temporaries.
LEARNING_BYTES = {"cpu": 34, "cuda": 18}


@dataclass(frozen=True)
class SignRoundOptions:
    """Bounds: steps of sign-SGD, tokens of one step, tokens learned on at all, share of them held out; bytes.

    batch   None: by the device, `tokens_a_step`
    memory  None: 40 GiB, on a card a quarter of what it has at most
    move    of a code, that all steps together may move a weight at the start's rate
    repair  see `repair`: each is on where it lowered the divergence on text of neither calibration nor evaluation
    """

    steps: int = 200
    batch: int | None = None
    tokens: int = 1 << 17
    held_share: float = 0.1
    memory: int | None = None
    repair_norms: bool = False
    repair_router: bool = True
    repair_bias: bool = False
    move: float = 0.3
    seed: int = 0

    @property
    def schedule(self) -> StepSchedule:
        """The rates fall to zero: all steps together move a weight by half of `move`; the start is compensated."""
        return StepSchedule(self.steps, self.move / self.steps, 0.1 / self.steps)

    def working_memory(self, device: torch.device) -> int:
        """Bytes that learning may take beside the layer; never what is free at the time (folder/layer.py)."""
        if self.memory is not None or device.type != "cuda":
            return self.memory if self.memory is not None else LARGEST_WORK
        return min(LARGEST_WORK, torch.cuda.get_device_properties(device).total_memory // 4)

    def tokens_a_step(self, device: torch.device) -> int:
        """Tokens of one step: a processor takes fewer, its time is their products."""
        return self.batch if self.batch is not None else 4096 if device.type == "cuda" else 1024


@dataclass(frozen=True)
class Routed:
    """Tokens of a layer: the experts' input [N, H], chosen [N, K], their weights [N, K], the wanted output [N, H]."""

    x: Tensor
    chosen: Tensor
    shares: Tensor
    target: Tensor


def routed_output(weights: Mapping[str, Tensor], tokens: Routed, first: int = 0) -> Tensor:
    """Differentiable sum of the experts first..first+E-1 over the tokens that chose them: [N, H] float32."""
    gate, up, down = weights["gate"], weights["up"], weights["down"]
    count, per_token = gate.shape[0], tokens.chosen.shape[1]
    flat = tokens.chosen.flatten() - first
    order = torch.argsort(flat, stable=True)
    numbers = flat[order]
    order = order[(numbers >= 0) & (numbers < count)]
    loads = torch.bincount(flat[order], minlength=count)
    token = order // per_token
    rows = tokens.x[token].to(gate.dtype)
    y = _experts(rows, (gate, up, down), loads)
    out = torch.zeros(tokens.x.shape, dtype=torch.float32, device=rows.device)
    return out.index_add(0, token, y.float() * tokens.shares.flatten()[order].unsqueeze(-1))


def _experts(rows: Tensor, weights: tuple[Tensor, Tensor, Tensor], loads: Tensor) -> Tensor:
    gate, up, down = weights
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        ends = loads.cumsum(0).to(torch.int32)

        def product(x: Tensor, w: Tensor) -> Tensor:
            return torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)  # pyright: ignore[reportPrivateImportUsage]

        return product(F.silu(product(rows, gate)) * product(rows, up), down)
    parts = []
    for expert, x in enumerate(rows.split(loads.tolist())):
        parts.append((F.silu(x @ gate[expert].T) * (x @ up[expert].T)) @ down[expert].T)
    return torch.cat(parts)


def sign_round_experts(
    starts: Mapping[str, Start],
    tokens: Routed,
    held: Routed,
    schedule: StepSchedule,
    *,
    batch: int,
    first: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> SignRounded:
    """Learn gate, up, down of experts first.. against the wanted output of `tokens`, stopped early on `held`."""
    generator = torch.Generator().manual_seed(seed)
    scale = held.target.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def loss(weights: Weights, step: int) -> Tensor:
        chosen = torch.randint(tokens.x.shape[0], (min(batch, tokens.x.shape[0]),), generator=generator)
        part = take(tokens, chosen.to(tokens.x.device))
        return (routed_output(weights, part, first) - part.target).square().mean() / scale

    def held_out(weights: Weights) -> float:
        total = torch.zeros((), device=held.x.device)
        for start in range(0, held.x.shape[0], batch):
            part = take(held, slice(start, start + batch))
            total += (routed_output(weights, part, first) - part.target).square().sum()
        return float(total / held.target.numel() / scale)

    return sign_round(starts, loss, held_out, schedule, dtype)


def sign_round_attention(
    starts: Mapping[str, Start],
    weights: LayerWeights,
    geometry: Geometry,
    streams: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    schedule: StepSchedule,
    *,
    batch: int,
    seed: int = 0,
) -> SignRounded:
    """Learn q, k, v, o. streams and held: (entering stream [W, T, H], what attention should add to it [W, T, H])."""
    generator = torch.Generator().manual_seed(seed)
    scale = held[1].square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def error(found: Weights, hidden: Tensor, target: Tensor) -> Tensor:
        layer = dataclasses.replace(weights, **{n.removesuffix("_proj"): w for n, w in found.items()})
        return (attention(layer, geometry, hidden, Observer()) - target).square().mean() / scale

    def loss(found: Weights, step: int) -> Tensor:
        chosen = torch.randint(streams[0].shape[0], (batch,), generator=generator).to(streams[0].device)
        return error(found, streams[0][chosen], streams[1][chosen])

    def held_out(found: Weights) -> float:
        parts = zip(held[0].split(batch), held[1].split(batch), strict=True)
        return sum(float(error(found, h, t)) * len(h) for h, t in parts) / len(held[0])

    return sign_round(starts, loss, held_out, schedule, weights.q.dtype)


def sign_round_chunks(
    weights: LayerWeights,
    starts_of: Callable[[slice], dict[str, Start]],
    tokens: Routed,
    train: int,
    options: SignRoundOptions,
) -> tuple[list[dict[str, RoundedWeight]], float]:
    """The experts, some at a time: each chunk is to give what its reference gives, and what is still unexplained.

    tokens.target [N, H] is what all experts together should add; the first `train` rows are learned on.
    Results by chunk, and the held-out loss after over before.
    """
    device, count = weights.gate.device, weights.gate.shape[0]
    batch = options.tokens_a_step(device)
    matrices = {name: getattr(weights, name) for name in ("gate", "up", "down")}
    left = tokens.target - _outputs(matrices, tokens, 0, batch)
    each = LEARNING_BYTES[device.type] * sum(m[0].numel() for m in matrices.values())
    step = max(1, options.working_memory(device) // each)
    parts, losses = [], []
    for start in range(0, count, step):
        chosen = slice(start, start + step)
        chunk = {name: matrix[chosen] for name, matrix in matrices.items()}
        part = dataclasses.replace(tokens, target=left + _outputs(chunk, tokens, start, batch))
        starts = starts_of(chosen)
        held, trained = take(part, slice(train, None)), take(part, slice(0, train))
        rounded = sign_round_experts(
            starts,
            trained,
            held,
            options.schedule,
            batch=batch,
            first=start,
            seed=options.seed,
            dtype=weights.gate.dtype,
        )
        dtype = weights.gate.dtype
        values = {n: values_of(w.levels, w.scales, dtype, w.offsets) for n, w in rounded.weights.items()}
        left = part.target - _outputs(values, tokens, start, batch)
        parts.append(rounded.weights)
        losses.append((rounded.before, rounded.after))
    return parts, losses[-1][1] / max(losses[0][0], 1e-30)


@torch.no_grad()
def _outputs(weights: dict[str, Tensor], tokens: Routed, first: int, batch: int) -> Tensor:
    parts = [slice(s, s + batch) for s in range(0, tokens.x.shape[0], batch)]
    return torch.cat([routed_output(weights, take(tokens, part), first) for part in parts])


def take(tokens: Routed, index: Tensor | slice) -> Routed:
    """Some of the tokens."""
    return Routed(tokens.x[index], tokens.chosen[index], tokens.shares[index], tokens.target[index])
