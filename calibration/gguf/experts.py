"""Quantize the experts of one GGUF layer: gate and up, then down on their output."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import naming
from mmquant.stages import stage

from ...convert.checkpoints.batches import to_host
from ...convert.gguf.names import EXPERT_TENSORS
from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.ggml.codec import decode
from ...quantize.ggml.types import GGMLType
from ...quantize.overflow import rescale_exponents
from ..model.distributed import rank_shares, world
from ..model.divided import divided, owned_ranges
from .moments import Pair, each_pooled
from .solve import Method, Report, rounded_part
from .streams import (
    Streams,
    experts_of,
    input_pairs,
    leaving_pairs,
    middle_pairs,
    pass_experts,
    rescaled,
)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer on their way: `new` and `out` (bytes by short name) are filled, chunk by chunk.

    largest  [E] the reference's largest sums of 32 inputs of down, known when all inputs were collected
    plain    by short name, the experts that were rounded without feedback after all
    copier   copies bytes to the host; copies: what it was given
    """

    streams: Streams
    weights: LayerWeights
    new: LayerWeights
    g: Geometry
    kinds: dict[str, GGMLType]
    method: Method
    out: dict[str, np.ndarray]
    largest: Tensor
    copier: ThreadPoolExecutor
    copies: list[Future[None]] = field(default_factory=list)
    plain: dict[str, list[int]] = field(default_factory=dict)

    @property
    def exponents(self) -> Tensor:
        """[E] powers of two by which experts are rescaled.

        For Q4_K, Q5_K and others CUDA keeps sums of 32 inputs of down in float16 (llama.cpp ggml-cuda/quantize.cu).
        """
        return rescale_exponents(self.largest)

    def inputs(self, kept: range) -> Pair:
        """Sums of what gate and up see."""
        part = experts_of(self.weights, kept)
        with stage("moments"):
            pair, self.largest[kept.start : kept.stop] = input_pairs(self.streams, part, self.g, kept)
        return pair

    def middle(self, kept: range) -> Pair:
        """Sums of what down sees."""
        old, new = experts_of(self.weights, kept), experts_of(self.new, kept)
        with stage("moments"):
            return middle_pairs(self.streams, old, new, self.g, kept, self.exponents)

    def leaving(self, kept: range) -> Pair:
        """The same for all experts; the reference leaves the layer."""
        with stage("moments"):
            return leaving_pairs(self.streams, self.weights, self.new, self.g, self.exponents)

    def solve_inputs(self, kept: range, pair: Pair) -> None:
        """gate and up: of one type, they share a factorization and a sweep."""
        gate, up = "ffn_gate_exps", "ffn_up_exps"
        for names in [(gate, up)] if self.kinds[gate] == self.kinds[up] else [(gate,), (up,)]:
            self._solve(names, kept, pair)

    def solve_middle(self, kept: range, pair: Pair) -> None:
        """down."""
        self._solve(("ffn_down_exps",), kept, pair)

    def _solve(self, names: tuple[str, ...], kept: range, pair: Pair) -> None:
        with stage("solve"):
            self._solve_parts(names, kept, pair)

    def _solve_parts(self, names: tuple[str, ...], kept: range, pair: Pair) -> None:
        roles, plan = [EXPERT_TENSORS[name] for name in names], self.streams.plan(self.g)
        step = plan.down if roles == ["down"] else plan.step

        def solve(piece: range) -> tuple[Tensor, Tensor]:
            """Bytes, and which of a piece's matrices were rounded without feedback."""
            few = slice(piece.start, piece.stop)
            source = rescaled(experts_of(self.weights, piece), self.exponents[few])
            part = slice(few.start - kept.start, few.stop - kept.start)
            weight = torch.cat([getattr(source, role) for role in roles], 1)
            with naming(" and ".join(names)):
                found = rounded_part(weight, self.kinds[names[0]], pair, part, self.method, len(names))
            return found[0], found[2]

        pieces = [range(start, min(kept.stop, start + step)) for start in range(kept.start, kept.stop, step)]
        owners = None
        if pair.owned is not None:  # a matrix is solved where its sums are
            shares = [range(kept.start + s.start, kept.start + s.stop) for s in rank_shares(len(kept))]
            pieces, owners = owned_ranges(shares, step)
        for number, (stored, worse) in divided(pieces, solve, owners):
            few = slice(pieces[number].start, pieces[number].stop)
            self._keep(names, few, stored)
            for index, (name, role) in enumerate(zip(names, roles, strict=True)):
                into = getattr(self.new, role)
                data = stored.chunk(len(names), 1)[index]
                values = decode(data.flatten(0, 1), self.kinds[name], into.shape[2])
                into[few] = values.view_as(into[few]).to(into.dtype)
                if len(plain := worse[:, index].nonzero().flatten().tolist()):
                    self.plain.setdefault(name, []).extend(few.start + expert for expert in plain)

    def _keep(self, names: tuple[str, ...], few: slice, stored: Tensor) -> None:
        """Bytes go to the host where they are written, from a card while the next experts are solved."""
        if world()[0] != 0:
            return

        def copy() -> None:
            for name, data in zip(names, np.split(to_host(stored).numpy(), len(names), 1), strict=True):
                self.out[name][few] = data

        if stored.is_cuda:
            self.copies.append(self.copier.submit(copy))
        else:
            copy()


def quantize_experts(
    streams: Streams,
    weights: LayerWeights,
    new: LayerWeights,
    layer: int,
    kinds: dict[str, GGMLType],
    g: Geometry,
    method: Method,
    report: Report,
    out: dict[str, np.ndarray],
) -> LayerWeights:
    """gate and up, then down on what they give; the reference leaves the layer.

    Experts are taken in chunks where the device cannot hold all their moments; each chunk's are computed twice then.
    """
    empty = {role: torch.empty_like(getattr(weights, role)) for role in EXPERT_TENSORS.values()}
    for name, role in EXPERT_TENSORS.items() if world()[0] == 0 else ():  # the first rank writes
        out[name] = np.empty((*empty[role].shape[:2], kinds[name].row_bytes(empty[role].shape[2])), np.uint8)
    new, largest = replace(new, **empty), torch.zeros(g.experts, device=streams.device)
    chunks = streams.plan(g).chunks(g.experts)
    with ThreadPoolExecutor(1) as copier:
        experts = Experts(streams, weights, new, g, kinds, method, out, largest, copier)
        rows = each_pooled(chunks, experts.inputs, experts.solve_inputs)
        each_pooled(chunks, experts.leaving if len(chunks) == 1 else experts.middle, experts.solve_middle)
        for copied in experts.copies:
            copied.result()
    report.unseen |= {(layer, e) for e, count in enumerate(rows.tolist()) if count == 0}
    report.rescaled |= {(layer, e): int(k) for e, k in enumerate(experts.exponents.tolist()) if k > 0}
    report.plain |= {(layer, name): sorted(found) for name, found in experts.plain.items()}
    if len(chunks) > 1:
        pass_experts(streams, streams.reference, weights, g)
    return new
