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
from ..quantize.repair import agreement, refit_bias, refit_gain, refit_linear
from .forward import Observer, attention, layer_forward, moe, rms_norm, route
from .hidden import HiddenStates
from .int4_layer import QuantizedLayer
from .int4_learn import Routed, learn_attention, learn_experts, routed_output, take

LARGEST_WORK = 40 << 30
LEARNING_BYTES = 34  # for each weight: values, shifts, their gradients, quantized values and theirs, temporaries


@dataclass(frozen=True)
class LearnOptions:
    """Bounds: steps of sign-SGD, tokens of one step, tokens learned on at all, share of them held out; bytes.

    batch   None: by the device, `tokens_a_step`
    memory  None: 40 GiB, on cards below 80 GB half of what they have
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
    def schedule(self) -> Schedule:
        """The rates fall to zero: all steps together move a weight by half of `move`; the start is compensated."""
        return Schedule(self.steps, self.move / self.steps, 0.1 / self.steps)

    def working_memory(self, device: torch.device) -> int:
        """Bytes that learning may take beside the layer; never what is free at the time (int4_layer.py)."""
        if self.memory is not None or device.type != "cuda":
            return self.memory if self.memory is not None else LARGEST_WORK
        return min(LARGEST_WORK, torch.cuda.get_device_properties(device).total_memory // 2)

    def tokens_a_step(self, device: torch.device) -> int:
        """Tokens of one step: a processor takes fewer, its time is their products."""
        return self.batch if self.batch is not None else 4096 if device.type == "cuda" else 1024


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
        layer, plain = weights, dict(first.plain)
        if options.repair_norms:
            plain["input_norm"], found["input norm"] = repaired_norm(
                weights.input_norm, geometry.norm_eps, both.reference, both.quantized, train
            )
            layer = dataclasses.replace(layer, input_norm=plain["input_norm"])
    attended = first.attention
    if first.attention:
        attended, found["attention"] = _learn_attention(layer, geometry, first, both, middle, train, options)
        layer = _with_attention(layer, attended)
    with torch.no_grad():
        entering = both.quantized + _attention(layer, geometry, both.quantized)
        repaired, shares = repair(weights, geometry, middle, entering, train, options)
        found |= shares
        plain |= repaired
        layer = dataclasses.replace(layer, **repaired)
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
        batch=max(1, options.tokens_a_step(middle.device) // middle.shape[1]),
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
    batch = options.tokens_a_step(device)
    matrices = {name: getattr(weights, name) for name in ("w1", "w3", "w2")}
    left = tokens.target - _outputs(matrices, tokens, 0, batch)
    each = LEARNING_BYTES * sum(m[0].numel() for m in matrices.values())
    step = max(1, options.working_memory(device) // each)
    parts, losses = [], []
    for start in range(0, count, step):
        chosen = slice(start, start + step)
        mine = {name: matrix[chosen] for name, matrix in matrices.items()}
        part = dataclasses.replace(tokens, target=left + _outputs(mine, tokens, start, batch))
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
            batch=batch,
            first=start,
            seed=options.seed,
            dtype=weights.w1.dtype,
        )
        values = {n: dequantize(w).to(weights.w1.dtype) for n, w in learned.weights.items()}
        left = part.target - _outputs(values, tokens, start, batch)
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
    weights: LayerWeights, geometry: Geometry, reference: Tensor, quantized: Tensor, train: int, options: LearnOptions
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
    norm, router, bias = weights.post_norm, weights.router, weights.router_bias.float()
    x, y = (rms_norm(stream, norm, eps).flatten(0, 1) for stream in (reference, quantized))
    cut = train * reference.shape[1]
    wanted = route(x, router, bias, per_token).chosen
    best = found["routing before"] = agreement(route(y[cut:], router, bias, per_token).chosen, wanted[cut:])
    if options.repair_norms:
        changed["post_norm"], found["post norm"] = repaired_norm(norm, eps, reference, quantized, train)
        y = rms_norm(quantized, changed["post_norm"], eps).flatten(0, 1)
    if options.repair_router:
        fitted = refit_linear(router, x[:cut], y[:cut])
        now = agreement(route(y[cut:], fitted, bias, per_token).chosen, wanted[cut:])
        if now > best:
            best, router = now, fitted
            changed["router"] = router
    if options.repair_bias:
        scores = route(y, router, bias, per_token).scores
        fitted = refit_bias(scores[:cut], wanted[:cut], bias)
        now = agreement(torch.topk(scores[cut:] + fitted, per_token, dim=-1).indices, wanted[cut:])
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
