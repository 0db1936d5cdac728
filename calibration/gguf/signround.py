"""SignRound of a GGUF layer's experts (--effort high), against the output that the layer should add."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...convert.checkpoints.batches import to_host
from ...convert.gguf.names import EXPERT_TENSORS
from ...convert.models.minimax_m2 import Geometry, LayerWeights
from ...quantize.ggml.codec import decode
from ...quantize.ggml.scalar.grid import FORMS
from ...quantize.ggml.scalar.signround import grid_start, stored
from ...quantize.ggml.types import GGMLType
from ...quantize.signround import Start
from ..model.forward import rms_norm, route
from ..model.signround_layer import LearnOptions, Routed, learn_chunks
from .streams import Streams


def learn_experts(
    streams: Streams,
    weights: LayerWeights,
    new: LayerWeights,
    wanted: dict[str, Tensor],
    g: Geometry,
    kinds: dict[str, GGMLType],
    out: dict[str, np.ndarray],
    options: LearnOptions,
) -> tuple[LayerWeights, float | None]:
    """Better codes for the experts' matrices that have a reconstruction grid (types of grid.FORMS), under their scales.

    The reference stream has left the layer, the written one has passed attention. weights: what was rounded; wanted
    [E, O, n] by role: where each weight would go alone; out: bytes [E, O, b] by short name, changed in place. Also the
    held-out loss, after over before (None: nothing to learn).
    """
    names = {name: role for name, role in EXPERT_TENSORS.items() if kinds[name] in FORMS}
    if not names:
        return new, None
    device = weights.w1.device
    tokens, train = routed_tokens(streams, new, g, options)

    def starts(chosen: slice) -> dict[str, Start]:
        found = {}
        for name, role in names.items():
            data = torch.from_numpy(out[name][chosen]).to(device)
            found[role] = grid_start(data, kinds[name], wanted[role][chosen])
        return found

    fixed = {role: getattr(new, role) for name, role in EXPERT_TENSORS.items() if name not in names}
    parts, gained = learn_chunks(weights, starts, tokens, train, options, fixed)
    values = {}
    for name, role in names.items():
        old, first = torch.empty_like(getattr(new, role)), 0
        for part in parts:
            some = slice(first, first := first + len(part[role].levels))
            data = stored(torch.from_numpy(out[name][some]).to(device), kinds[name], part[role])
            out[name][some] = to_host(data).numpy()
            old[some] = decode(data.flatten(0, 1), kinds[name], old.shape[-1]).view(old[some].shape)
        values[role] = old
    return replace(new, **values), gained


def routed_tokens(streams: Streams, new: LayerWeights, g: Geometry, options: LearnOptions) -> tuple[Routed, int]:
    """Tokens in whole windows spread evenly over the text; so many of them are learned on, the rest is held out."""
    windows, length, _ = streams.reference.shape
    count = min(windows, max(2, options.tokens // length))
    chosen = torch.linspace(0, windows - 1, count).round().long()
    device = new.w1.device
    wanted, entering = (s.all()[chosen].to(device) for s in (streams.reference, streams.written))
    x = rms_norm(entering, new.post_norm, g.norm_eps).flatten(0, 1).to(new.w1.dtype)
    routing = route(x, new.router, new.router_bias, g.experts_per_token)
    train = count - max(1, round(options.held_share * count))
    return Routed(x, routing.chosen, routing.weights, (wanted - entering).flatten(0, 1)), train * length
