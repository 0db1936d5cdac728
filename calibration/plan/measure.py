"""Measure a model's sensitivity in one pass: output errors of every matrix and type, KLDs of some of them.

One residual stream of calibration text collects moments, layer by layer. Every matrix is rounded by the solver that
writes files, to every type (of many experts a sample), and its output error taken. At a few types, the probes, a second
text that the moments never saw goes through the model with that one matrix rounded, and its distance to the exact model
is taken at the head. Between probes the distance is interpolated by the output error (sensitivity.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.gguf.names import OUTPUT, TOKEN_EMBD
from ...convert.models.layer import Globals, LayerWeights
from ...convert.source import read_layer
from ...quantize.ggml.codec import decode, encode
from ...quantize.ggml.types import GGMLType
from ..gguf.moments import Pair, each_pooled
from ..gguf.run import MemoryPlan, plan_memory
from ..gguf.streams import Streams, experts_of, input_pair, input_pairs, middle_pairs, output_pair, pass_experts
from ..model.distributed import check_alone
from ..model.forward import rms_norm
from ..model.hidden import HiddenStates
from ..statistics.live import default_dtype
from .errors import Errors, rounded_kinds, steps
from .groups import FIELDS, group_of, kinds_of, probes_of
from .probes import Probes
from .sensitivity import Measured

PROBES = ("IQ2_S", "Q4_K", "Q6_K")
SAMPLED = 16  # experts of a layer that are rounded to types that are no probes
ROWS = 4096  # of embeddings and head, likewise


@dataclass(frozen=True)
class Rounded:
    """Matrices at the probes' types, by (short name, type): fields of the layer as it would be with them."""

    values: dict[tuple[str, str], Tensor]


class Measurement:
    """A pass on its way: calibration tokens [W, T] collect moments, judged tokens [V, T] give KLDs."""

    def __init__(
        self,
        source: Checkpoint,
        tokens: Tensor,
        judged: Tensor,
        device: torch.device | str,
        folder: Path | None = None,
        probes: tuple[str, ...] = PROBES,
    ) -> None:
        """FitError when a layer needs more memory than is free, InputError under torchrun."""
        check_alone("a plan")
        self.source, self.g, self.device, self.probes = source, source.geometry, device, probes
        self.dtype = default_dtype(device)
        windows, length = tokens.shape
        memory: MemoryPlan = plan_memory(self.g, windows, length, device)
        states = HiddenStates(windows, length, self.g.hidden, folder=folder, device=memory.place)
        self.streams = Streams(states, states, memory.batch, device, memory.moments)
        self.tokens, self.rows = tokens, tokens.numel()
        self.judged = Probes(judged, self.g, device, memory.batch, folder)
        self.found: dict[str, Measured] = {}

    def states(self) -> dict[str, HiddenStates]:
        """What a killed measurement needs back, by name."""
        blocks = {f"probes-{i:03d}": block.hidden for i, block in enumerate(self.judged.blocks)}
        return {"calibration": self.streams.reference, "judged": self.judged.exact, **blocks}

    def begin(self) -> None:
        """The embeddings: both texts begin, and a probe for each type of theirs."""
        table = self.source.read(self.g.names.embed)
        for states, tokens in ((self.streams.reference, self.tokens), (self.judged.exact, self.judged.tokens)):
            for start in range(0, len(tokens), self.streams.batch):
                part = tokens[start : start + self.streams.batch]
                states.put(start, torch.nn.functional.embedding(part, table).float())
        kinds = kinds_of(TOKEN_EMBD, self.g.hidden)
        chosen = probes_of(kinds, self.probes)
        some = table[:: max(1, len(table) // ROWS)].float()
        errors = {kind: float((_nearest(some, kind) - some).square().sum(1).mean()) for kind in kinds}
        self.found[TOKEN_EMBD] = Measured(errors, {})
        block = self.judged.open([(TOKEN_EMBD, kind) for kind in chosen])
        for index, kind in enumerate(chosen):
            for start in range(0, len(self.judged.tokens), self.streams.batch):
                part = self.judged.tokens[start : start + self.streams.batch]
                rows = _nearest(table[part.flatten()].float(), kind).view(*part.shape, -1)
                block.hidden.put(index * len(self.judged.tokens) + start, rows)

    def layer(self, number: int) -> None:
        """Measure one layer; all streams leave it."""
        weights = read_layer(self.source, number, self.device, self.dtype)
        values: dict[tuple[str, str], Tensor] = {}
        pair = input_pair(self.streams, weights, self.g)
        for name in ("attn_q", "attn_k", "attn_v"):
            self._attention(number, name, weights, pair, values)
        self._attention(number, "attn_output", weights, output_pair(self.streams, weights, weights, self.g), values)
        self._experts(number, weights, values)
        pass_experts(self.streams, self.streams.reference, weights, self.g)
        block = self.judged.open([(group_of(number, name), kind) for name, kind in values])
        for index, ((name, _), value) in enumerate(values.items()):
            self.judged.fill(block, index, replace(weights, **{FIELDS[name]: value}))
        self.judged.advance(weights, block)

    def finish(self) -> dict[str, Measured]:
        """The head, and what every probe costs in the end."""
        names = self.g.names
        norm, head = self.source.read(names.final_norm).to(self.device), self.source.read(names.head).to(self.device)
        pair = Pair.empty(1, self.g.hidden, self.device)
        for _, reference, _ in self.streams.batches():
            x = rms_norm(reference, norm, self.g.norm_eps).flatten(0, 1)
            pair.add(0, x, x)
        heads: dict[tuple[str, str], Tensor] = {}
        kinds = kinds_of(OUTPUT, self.g.hidden)
        chosen, errors, pair = probes_of(kinds, self.probes), Errors(), pair.pooled()
        few = head[:: max(1, len(head) // ROWS)].unsqueeze(0)
        for kind, _, found, _ in rounded_kinds(few, kinds, kinds, pair, slice(0, 1), 1, 1):
            errors.add(kind, found[0] * len(head) / few.shape[1], _all(found[0]), True)
        for kind, value, _, _ in rounded_kinds(head.unsqueeze(0), chosen, chosen, pair, slice(0, 1), 1, 1):
            heads[OUTPUT, kind] = value[0]
        self.found[OUTPUT] = Measured(errors.result(self.rows), {})
        outside = Globals(norm[:0], norm, head)
        for (name, kind), value in self.judged.judge(outside, heads).items():
            self.found[name].kld[kind] = value
        return self.found

    def _attention(
        self, layer: int, name: str, weights: LayerWeights, pair: Pair, values: dict[tuple[str, str], Tensor]
    ) -> None:
        weight, errors, pair = getattr(weights, FIELDS[name]).unsqueeze(0), Errors(), pair.pooled()
        kinds = kinds_of(name, weight.shape[2])
        chosen = probes_of(kinds, self.probes)
        for kind, value, found, _ in rounded_kinds(weight, kinds, kinds, pair, slice(0, 1), 1, 1):
            errors.add(kind, found[0], _all(found[0]), True)
            if kind in chosen:
                values[name, kind] = value[0].to(weight.dtype)
        self.found[group_of(layer, name)] = Measured(errors.result(self.rows), {})

    def _experts(self, layer: int, weights: LayerWeights, values: dict[tuple[str, str], Tensor]) -> None:
        g, streams = self.g, self.streams
        chunks, exponents = streams.plan(g).chunks(g.experts), torch.zeros(g.experts, device=self.device)
        gate_up, down = ("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",)

        def inputs(kept: range) -> Pair:
            return input_pairs(streams, experts_of(weights, kept), g, kept)[0]

        def middle(kept: range) -> Pair:
            part = experts_of(weights, kept)
            return middle_pairs(streams, part, part, g, kept, exponents)

        for names, collect in ((gate_up, inputs), (down, middle)):
            errors: dict[str, Errors] = {name: Errors() for name in names}
            each_pooled(
                chunks, collect, lambda kept, pair, n=names, e=errors: self._round(n, e, weights, kept, pair, values)
            )
            for name in names:
                self.found[group_of(layer, name)] = Measured(errors[name].result(self.rows), {})

    def _round(
        self,
        names: tuple[str, ...],
        errors: dict[str, Errors],
        weights: LayerWeights,
        kept: range,
        pair: Pair,
        values: dict[tuple[str, str], Tensor],
    ) -> None:
        """Some experts' matrices at all types; those of one input are stacked and share a factorization."""
        stacked = [getattr(weights, FIELDS[name]) for name in names]
        kinds = kinds_of(names[0], stacked[0].shape[2])
        chosen, stride = probes_of(kinds, self.probes), max(1, self.g.experts // SAMPLED)
        for few in steps(torch.cat([w[:1] for w in stacked], 1), kept):
            weight = torch.cat([w[few] for w in stacked], 1)
            part = slice(few.start - kept.start, few.stop - kept.start)
            for kind, value, found, which in rounded_kinds(weight, kinds, chosen, pair, part, stride, len(names)):
                numbers = torch.arange(few.start, few.stop, device=found.device)[which]
                for name, error, piece in zip(names, found, value.chunk(len(names), 1), strict=True):
                    errors[name].add(kind, error, numbers % stride == 0, kind in chosen)
                    if kind in chosen:
                        whole = values.setdefault((name, kind), torch.empty_like(getattr(weights, FIELDS[name])))
                        whole[few] = piece.to(whole.dtype)


def _nearest(rows: Tensor, kind: str) -> Tensor:
    return decode(encode(rows, GGMLType[kind]), GGMLType[kind], rows.shape[-1])


def _all(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)
