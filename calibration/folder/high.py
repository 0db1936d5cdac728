"""SignRound of a layer (--effort high), against the unquantized layer on the unquantized stream.

Two streams go through the model: the reference's, and the one that the quantized layers leave behind. A layer is to
turn the second into the first: its attention (when quantized), then its router, then its experts, chunk by chunk, each
taking over the error that is left. So the layer makes good what the layers before it did.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...convert.source import Source, read_layer
from ...quantize.integer.grid import IntWeight, dequantize, map_parts
from ...quantize.refit import agreement, refit_bias, refit_gain, refit_linear
from ...quantize.signround import RoundedWeight, Start, grid_start, grid_weight
from ..model.forward import Observer, attention, layer_forward, moe, rms_norm, route
from ..model.hidden import HiddenStates, leaving, place_of
from ..model.signround_layer import Routed, SignRoundOptions, sign_round_attention, sign_round_chunks
from .layer import QuantizedLayer


@dataclass(frozen=True)
class Streams:
    """The same windows entering the layer: the reference's and the quantized model's residual stream [W, T, H]."""

    reference: Tensor
    quantized: Tensor


def streams(
    reference: HiddenStates, quantized: HiddenStates, options: SignRoundOptions, device: torch.device
) -> Streams:
    """At most `tokens` tokens, in whole windows spread evenly over the set."""
    windows, length, _ = reference.shape
    count = min(windows, max(2, options.tokens // length))
    chosen = torch.linspace(0, windows - 1, count).round().long()
    return Streams(reference.all()[chosen].to(device), quantized.all()[chosen].to(device))


class ReferenceStream:
    """The unquantized model's residual stream beside a pass of quantized layers; saved as it enters each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.layer, self.hidden = folder, -1, None

    def enter(self, source: Source, layer: int, quantized: HiddenStates, like: Tensor) -> HiddenStates:
        """The stream entering `layer`: from memory, from what a killed run saved, or from the embedding (layer 0).

        like: any matrix of a layer in the dtype and on the device that compute.
        """
        if self.hidden is None:
            place = place_of(like.device, quantized.bytes)
            self.hidden = HiddenStates(*quantized.shape, folder=self.folder, device=place)
            if layer and not self._load(layer):
                raise InputError(f"layer {layer}: the reference stream of the interrupted run is gone; start anew")
            if not layer:
                self.hidden.all().copy_(quantized.all())
            self.layer = layer
        while self.layer < layer:
            weights = read_layer(source, self.layer, like.device, like.dtype)
            advance(weights, source.geometry, self.hidden, where=leaving(source.label, self.layer))
            self.layer += 1
        self._save()
        return self.hidden

    def _path(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f"reference-{layer}.hidden"

    def _load(self, layer: int) -> bool:
        path = self._path(layer)
        assert self.hidden is not None
        if path is None or not path.is_file():
            return False
        self.hidden.load(path)
        return True

    def _save(self) -> None:
        path = self._path(self.layer)
        if path is None or self.hidden is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.hidden.save(path)
        old = self._path(self.layer - 2)
        if old is not None:
            old.unlink(missing_ok=True)


def advance(
    weights: LayerWeights, geometry: Geometry, hidden: HiddenStates, batch: int = 8, where: str | None = None
) -> None:
    """Move a stream through one layer; `where` names it, and has it checked (HiddenStates.put)."""
    for start, values in hidden.batches(batch, weights.gate.device):
        hidden.put(start, layer_forward(weights, geometry, values), where)


def sign_round_layer(
    weights: LayerWeights, geometry: Geometry, first: QuantizedLayer, both: Streams, options: SignRoundOptions
) -> tuple[QuantizedLayer, dict[str, float]]:
    """Learn what GPTQ began (`first`, with what it rounded). Also held-out losses, after over before, by part."""
    windows, length, _ = both.reference.shape
    train = windows - max(1, round(options.held_share * windows))
    found: dict[str, float] = {}
    with torch.no_grad():
        middle = both.reference + _attention(weights, geometry, both.reference)
        after = middle + _moe(weights, geometry, middle)
        layer, plain = weights, dict(first.plain)
        if options.repair_norms:
            plain["input_norm"], found["input norm"] = repaired_norm(
                weights.input_norm, geometry.norm_eps, both.reference, both.quantized, train
            )
            layer = dataclasses.replace(layer, input_norm=plain["input_norm"])
    attended = first.attention
    if first.attention:
        attended, found["attention"] = _sign_round_attention(layer, geometry, first, both, middle, train, options)
        layer = _with_attention(layer, attended)
    with torch.no_grad():
        entering = both.quantized + _attention(layer, geometry, both.quantized)
        repaired, shares = repair(weights, geometry, middle, entering, train, options)
        found |= shares
        plain |= repaired
        layer = dataclasses.replace(layer, **repaired)
        tokens = _routed(layer, geometry, entering, after)

    def starts(chosen: slice) -> dict[str, Start]:
        rounded = first.compensated
        return {
            n: grid_start(rounded[n][chosen].to(weights.gate.device), map_parts(w, lambda part: part[chosen]))
            for n, w in first.experts.items()
        }

    parts, found["experts"] = sign_round_chunks(weights, starts, tokens, train * length, options)
    experts = {n: grid_weight(_joined(parts, n), w) for n, w in first.experts.items()}
    return dataclasses.replace(first, experts=experts, attention=attended, plain=plain, compensated={}), found


def _joined(parts: list[dict[str, RoundedWeight]], name: str) -> RoundedWeight:
    return RoundedWeight(
        torch.cat([part[name].levels for part in parts]), torch.cat([part[name].scales for part in parts])
    )


def _sign_round_attention(
    weights: LayerWeights,
    geometry: Geometry,
    first: QuantizedLayer,
    both: Streams,
    middle: Tensor,
    train: int,
    options: SignRoundOptions,
) -> tuple[dict[str, IntWeight], float]:
    """q, k, v, o so that the quantized stream leaves attention where the reference does."""
    starts = {n: grid_start(first.compensated[n].to(w.scales.device), w) for n, w in first.attention.items()}
    target = middle - both.quantized
    best = sign_round_attention(
        starts,
        weights,
        geometry,
        (both.quantized[:train], target[:train]),
        (both.quantized[train:], target[train:]),
        options.schedule,
        batch=max(1, options.tokens_a_step(middle.device) // middle.shape[1]),
        seed=options.seed,
    )
    attended = {n: grid_weight(best.weights[n], w) for n, w in first.attention.items()}
    return attended, best.after / max(best.before, 1e-30)


def _routed(weights: LayerWeights, geometry: Geometry, middle: Tensor, after: Tensor) -> Routed:
    x = rms_norm(middle, weights.post_norm, geometry.norm_eps).flatten(0, 1)
    routing = route(x.to(weights.gate.dtype), weights.router, weights.router_bias, geometry)
    return Routed(x.to(weights.gate.dtype), routing.chosen, routing.weights, (after - middle).flatten(0, 1))


def repaired_norm(norm: Tensor, eps: float, reference: Tensor, quantized: Tensor, train: int) -> tuple[Tensor, float]:
    """A norm's weight refitted to the quantized stream, and its error on held-out windows, after over before.

    reference, quantized: streams [W, T, H] that enter the norm. The given weight, and 1, when nothing is gained.
    """
    x, y = (rms_norm(stream, norm, eps) for stream in (reference, quantized))
    fitted = refit_gain(norm, x[:train].flatten(0, 1), y[:train].flatten(0, 1))
    before = float((y[train:] - x[train:]).square().mean())
    after = float((rms_norm(quantized[train:], fitted, eps) - x[train:]).square().mean())
    return (fitted, after / before) if after < before else (norm, 1.0)


def repair(
    weights: LayerWeights,
    geometry: Geometry,
    reference: Tensor,
    quantized: Tensor,
    train: int,
    options: SignRoundOptions,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """post_norm, router and router_bias refitted to the quantized stream, each only when held-out windows gain by it.

    reference, quantized: streams [W, T, H] that enter the experts. Also the share of the reference's experts that are
    chosen on held-out windows, before and after.
    """
    if torch.equal(reference, quantized):
        return {}, {}
    changed: dict[str, Tensor] = {}
    found: dict[str, float] = {}
    eps, per_token = geometry.norm_eps, geometry.experts_per_token
    norm, router, bias = weights.post_norm, weights.router, weights.router_bias
    x, y = (rms_norm(stream, norm, eps).flatten(0, 1) for stream in (reference, quantized))
    cut = train * reference.shape[1]
    target = route(x, router, bias, geometry).chosen
    best = found["routing before"] = agreement(route(y[cut:], router, bias, geometry).chosen, target[cut:])
    if options.repair_norms:
        changed["post_norm"], found["post norm"] = repaired_norm(norm, eps, reference, quantized, train)
        y = rms_norm(quantized, changed["post_norm"], eps).flatten(0, 1)
    if options.repair_router:
        fitted = refit_linear(router, x[:cut], y[:cut])
        now = agreement(route(y[cut:], fitted, bias, geometry).chosen, target[cut:])
        if now > best:
            best, router = now, fitted
            changed["router"] = router
    if options.repair_bias and bias is not None:
        scores = route(y, router, bias, geometry).scores
        fitted = refit_bias(scores[:cut], target[:cut], bias.float())
        now = agreement(torch.topk(scores[cut:] + fitted, per_token, dim=-1).indices, target[cut:])
        if now > best:
            best = now
            changed["router_bias"] = fitted
    return changed, {**found, "routing": best}


def _with_attention(weights: LayerWeights, found: dict[str, IntWeight]) -> LayerWeights:
    values = {n.removesuffix("_proj"): dequantize(w).to(weights.q.dtype) for n, w in found.items()}
    return dataclasses.replace(weights, **values)


def _attention(weights: LayerWeights, geometry: Geometry, hidden: Tensor, batch: int = 8) -> Tensor:
    return torch.cat([attention(weights, geometry, part, Observer()) for part in hidden.split(batch)])


def _moe(weights: LayerWeights, geometry: Geometry, middle: Tensor, batch: int = 8) -> Tensor:
    return torch.cat([moe(weights, geometry, part, Observer()) for part in middle.split(batch)])
