"""--effort high: a layer learned against what the unquantized model computes from its own, unquantized stream.

Two streams go through the model: the reference's, and the one that the quantized layers leave behind. A layer is to
turn the second into the first: its attention (when INT4), then its router, then its experts, chunk by chunk, each
taking over the error that is left. So the layer makes good what the layers before it did.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..convert.files import replace_whole
from ..convert.minimax_m2 import Geometry, LayerWeights
from ..convert.source import Source, read_layer
from ..quantize.int_grid import IntWeight, dequantize, join
from ..quantize.learn import Schedule, Start
from ..quantize.repair import agreement, refit_linear
from .forward import Observer, attention, layer_forward, moe, rms_norm, route
from .hidden import HiddenStates
from .int4_layer import QuantizedLayer
from .int4_learn import Routed, learn_attention, learn_experts, routed_output, take

LEARNING_BYTES = 34  # for each weight: values, shifts, their gradients, quantized values and theirs, temporaries


@dataclass(frozen=True)
class LearnOptions:
    """Bounds: steps of sign-SGD, tokens of one step, tokens learned on at all, share of them held out; bytes."""

    steps: int = 200
    batch: int = 4096
    tokens: int = 1 << 17
    held_share: float = 0.1
    memory: int = 40 << 30
    repair_router: bool = True
    seed: int = 0

    @property
    def schedule(self) -> Schedule:
        # All steps together may move a weight by 0.15 of a code: the start is already compensated.
        return Schedule(self.steps, 0.3 / self.steps, 0.1 / self.steps)


@dataclass(frozen=True)
class Streams:
    """The same windows entering the layer: the reference's and the quantized model's residual stream [W, T, H]."""

    reference: Tensor
    quantized: Tensor


def streams(reference: HiddenStates, quantized: HiddenStates, options: LearnOptions, device: torch.device) -> Streams:
    """At most `tokens` tokens, in whole windows spread evenly over the set."""
    windows, length, _ = reference.shape
    count = min(windows, max(2, options.tokens // length))
    chosen = torch.linspace(0, windows - 1, count).round().long()
    return Streams(reference.all()[chosen].to(device), quantized.all()[chosen].to(device))


class ReferenceStream:
    """The unquantized model's residual stream beside a pass of quantized layers; saved as it enters each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.layer, self.hidden = folder, -1, None

    def enter(self, source: Source, layer: int, quantized: HiddenStates, device: torch.device) -> HiddenStates:
        """The stream entering `layer`: from memory, from what a killed run saved, or from the embedding (layer 0)."""
        if self.hidden is None:
            self.hidden = HiddenStates(*quantized.shape, folder=self.folder)
            if layer and not self._load(layer):
                raise ValueError(f"layer {layer}: the reference stream of the interrupted run is gone; start anew")
            if not layer:
                self.hidden.all().copy_(quantized.all())
            self.layer = layer
        while self.layer < layer:
            advance(read_layer(source, self.layer, device), source.geometry, self.hidden)
            self.layer += 1
        self._save()
        return self.hidden

    def _path(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f"reference-{layer}.f32"

    def _load(self, layer: int) -> bool:
        path = self._path(layer)
        assert self.hidden is not None
        if path is None or not path.is_file() or path.stat().st_size != self.hidden.bytes:
            return False
        values = np.fromfile(path, dtype=np.float32).reshape(self.hidden.shape)
        self.hidden.all().copy_(torch.from_numpy(values))
        return True

    def _save(self) -> None:
        path = self._path(self.layer)
        if path is None or self.hidden is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        self.hidden.all().numpy().tofile(temporary)
        replace_whole(temporary, path)
        old = self._path(self.layer - 2)
        if old is not None:
            old.unlink(missing_ok=True)


def advance(weights: LayerWeights, geometry: Geometry, hidden: HiddenStates, batch: int = 8) -> None:
    """Move a stream through one layer."""
    for start, values in hidden.batches(batch, weights.w1.device):
        hidden.put(start, layer_forward(weights, geometry, values))


def learn_layer(
    weights: LayerWeights, geometry: Geometry, first: QuantizedLayer, both: Streams, options: LearnOptions
) -> tuple[QuantizedLayer, dict[str, float]]:
    """Learn what GPTQ began (`first`, with what it rounded). Also held-out losses, after over before, by part."""
    windows, length, _ = both.reference.shape
    train = windows - max(1, round(options.held_share * windows))
    found: dict[str, float] = {}
    with torch.no_grad():
        middle = both.reference + _attention(weights, geometry, both.reference)
        after = middle + _moe(weights, geometry, middle)
    layer, attended, plain = weights, first.attention, dict(first.plain)
    if first.attention:
        attended, found["attention"] = _learn_attention(weights, geometry, first, both, middle, train, options)
        layer = _with_attention(layer, attended)
    with torch.no_grad():
        entering = both.quantized + _attention(layer, geometry, both.quantized)
        if options.repair_router:
            router, shares = repaired_router(layer, geometry, middle, entering, train)
            found |= shares
            if router is not None:
                plain["router"] = router
                layer = dataclasses.replace(layer, router=router)
        tokens = _routed(layer, geometry, entering, after)
    experts, found["experts"] = learn_chunks(weights, first, tokens, train * length, options)
    return dataclasses.replace(first, experts=experts, attention=attended, plain=plain, compensated={}), found


def _learn_attention(
    weights: LayerWeights,
    geometry: Geometry,
    first: QuantizedLayer,
    both: Streams,
    middle: Tensor,
    train: int,
    options: LearnOptions,
) -> tuple[dict[str, IntWeight], float]:
    """q, k, v, o so that the quantized stream leaves attention where the reference does."""
    starts = {n: Start(first.compensated[n], w.scales, w.bits) for n, w in first.attention.items()}
    wanted = middle - both.quantized
    learned = learn_attention(
        starts,
        weights,
        geometry,
        (both.quantized[:train], wanted[:train]),
        (both.quantized[train:], wanted[train:]),
        options.schedule,
        batch=max(1, options.batch // middle.shape[1]),
        seed=options.seed,
    )
    return learned.weights, learned.after / max(learned.before, 1e-30)


def learn_chunks(
    weights: LayerWeights, first: QuantizedLayer, tokens: Routed, train: int, options: LearnOptions
) -> tuple[dict[str, IntWeight], float]:
    """The experts, some at a time: each chunk is to give what its reference gives, and what is still unexplained.

    tokens.target [N, H] is what all experts together should add; the first `train` rows are learned on.
    """
    device, count = weights.w1.device, weights.w1.shape[0]
    matrices = {name: getattr(weights, name) for name in ("w1", "w3", "w2")}
    left = tokens.target - _outputs(matrices, tokens, 0, options.batch)
    each = LEARNING_BYTES * sum(m[0].numel() for m in matrices.values())
    step = max(1, options.memory // each)
    parts, losses = [], []
    for start in range(0, count, step):
        chosen = slice(start, start + step)
        mine = {name: matrix[chosen] for name, matrix in matrices.items()}
        part = dataclasses.replace(tokens, target=left + _outputs(mine, tokens, start, options.batch))
        starts = {
            n: Start(first.compensated[n][chosen].to(device), w.scales[chosen], w.bits)
            for n, w in first.experts.items()
        }
        held, trained = take(part, slice(train, None)), take(part, slice(0, train))
        learned = learn_experts(
            starts,
            trained,
            held,
            options.schedule,
            batch=options.batch,
            first=start,
            seed=options.seed,
            dtype=weights.w1.dtype,
        )
        values = {n: dequantize(w).to(weights.w1.dtype) for n, w in learned.weights.items()}
        left = part.target - _outputs(values, tokens, start, options.batch)
        parts.append(learned.weights)
        losses.append((learned.before, learned.after))
    experts = {name: join([part[name] for part in parts]) for name in matrices}
    return experts, losses[-1][1] / max(losses[0][0], 1e-30)


@torch.no_grad()
def _outputs(weights: dict[str, Tensor], tokens: Routed, first: int, batch: int) -> Tensor:
    parts = [slice(s, s + batch) for s in range(0, tokens.x.shape[0], batch)]
    return torch.cat([routed_output(weights, take(tokens, part), first) for part in parts])


def _routed(weights: LayerWeights, geometry: Geometry, middle: Tensor, after: Tensor) -> Routed:
    x = rms_norm(middle, weights.post_norm, geometry.norm_eps).flatten(0, 1)
    routing = route(x.to(weights.w1.dtype), weights.router, weights.router_bias, geometry.experts_per_token)
    return Routed(x.to(weights.w1.dtype), routing.chosen, routing.weights, (after - middle).flatten(0, 1))


def repaired_router(
    weights: LayerWeights, geometry: Geometry, reference: Tensor, quantized: Tensor, train: int
) -> tuple[Tensor | None, dict[str, float]]:
    """The router refitted to the quantized stream; None unless it chooses more of the reference's experts on held-out
    windows. reference, quantized: streams [W, T, H] that enter the experts."""
    if torch.equal(reference, quantized):
        return None, {}
    eps, per_token = geometry.norm_eps, geometry.experts_per_token
    x, y = (rms_norm(stream, weights.post_norm, eps).flatten(0, 1) for stream in (reference, quantized))
    cut = train * reference.shape[1]
    router = refit_linear(weights.router, x[:cut], y[:cut])

    def chosen(inputs: Tensor, matrix: Tensor) -> Tensor:
        return route(inputs, matrix, weights.router_bias, per_token).chosen

    wanted = chosen(x[cut:], weights.router)
    before, now = (agreement(chosen(y[cut:], m), wanted) for m in (weights.router, router))
    return (router if now > before else None), {"routing before": before, "routing": max(now, before)}


def _with_attention(weights: LayerWeights, found: dict[str, IntWeight]) -> LayerWeights:
    values = {n.removesuffix("_proj"): dequantize(w).to(weights.q.dtype) for n, w in found.items()}
    return dataclasses.replace(weights, **values)


def _attention(weights: LayerWeights, geometry: Geometry, hidden: Tensor, batch: int = 8) -> Tensor:
    return torch.cat([attention(weights, geometry, part, Observer()) for part in hidden.split(batch)])


def _moe(weights: LayerWeights, geometry: Geometry, middle: Tensor, batch: int = 8) -> Tensor:
    return torch.cat([moe(weights, geometry, part, Observer()) for part in middle.split(batch)])
