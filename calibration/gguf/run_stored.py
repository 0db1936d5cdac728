"""Write a GGUF file from stored statistics: those of `mmquant calibrate`, or any imatrix.gguf.

One stream only: there are no tokens, so nothing is corrected for what earlier layers lost (streams.py does that), and
the head is not calibrated. Full moments give error feedback, diagonals a search weighted by importance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError, naming

from ...convert.checkpoints.batches import batches, to_host
from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.files.atomic import sha256_file
from ...convert.gguf.imatrix import Imatrix, read_imatrix, split_matrices
from ...convert.gguf.metadata import Importance
from ...convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, split_block
from ...convert.gguf.plan import GgufPlan
from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.ggml.codec import encode
from ...quantize.ggml.types import GGMLType
from ...quantize.moments import Moments, check_moments, shrunk_diagonal
from ...quantize.overflow import rescale_exponents
from ..model.distributed import world
from ..model.divided import divided
from ..model.reading import is_shared, read_layer_shared
from ..statistics.imatrix_export import moments_of
from ..statistics.live import default_dtype
from ..statistics.store import StoredStatistics, open_statistics
from .encode import encode_tensors
from .layer import ROLES
from .moments import Pair
from .provider import TensorProvider
from .solve import METHODS, Method, Report, experts_at_once, rounded_part

AT_ONCE = 16  # matrices that are read together where each is searched alone
DIAGONAL_PRIOR = 4.0  # strength of the pool in importance, in rows per input
INPUT_OF = {
    "attn_q": "attention_in",
    "attn_k": "attention_in",
    "attn_v": "attention_in",
    "attn_output": "attention_out",
}
INPUT_OF |= {"ffn_gate_exps": "expert_in", "ffn_up_exps": "expert_in", "ffn_down_exps": "expert_mid"}


@dataclass(frozen=True)
class Stored:
    """Statistics of a folder or of an imatrix, and how they are used."""

    path: Path
    known: StoredStatistics | Imatrix
    effort: str

    @property
    def method(self) -> Method:
        """Feedback needs second moments; diagonals allow the search alone."""
        return METHODS["fast"] if isinstance(self.known, Imatrix) else replace(METHODS[self.effort], correct=False)

    def run(self) -> dict[str, Any]:
        """What of the statistics decides the bytes."""
        if isinstance(self.known, Imatrix):
            return {"calibration": {"imatrix": sha256_file(self.path)}, "effort": self.effort}
        identity = self.known.identity
        corpus = {"corpus": identity["corpus"], "collect": identity["collect"]}
        return {"calibration": corpus, "effort": self.effort, "correction": False}

    def importance(self, geometry: Geometry) -> Importance:
        """The quantize.imatrix.* keys."""
        if isinstance(self.known, Imatrix):
            text = ", ".join(self.known.datasets)
            return Importance(self.path.name, text, len(self.known.weights), self.known.chunk_count)
        corpus = self.known.identity["corpus"]
        names = ", ".join(s["name"] for s in corpus["sets"])
        return Importance("mmquant", names, geometry.layers * 7, corpus["windows"])

    def moments(self, layer: int, g: Geometry) -> dict[str, Moments]:
        """What each matrix of a layer saw, by GGUF name. ValueError for statistics of another model."""
        if isinstance(self.known, Imatrix):
            found = self.known.layer(layer)
            out = {
                name: moments_of(split_matrices(found[name], g.experts if name in EXPERT_TENSORS else 1))
                for name in INPUT_OF
            }
        else:
            statistics = self.known.layer(layer, second=self.method.feedback)
            out = {name: getattr(statistics, field) for name, field in INPUT_OF.items()}
        inputs = {"attn_output": g.heads * g.head_dim, "ffn_down_exps": g.expert_width}
        for name, moments in out.items():
            experts = g.experts if name in EXPERT_TENSORS else 1
            check_moments(moments, experts, inputs.get(name, g.hidden), f"{self.path}: blk.{layer}.{name}")
        return out


def open_stored(path: Path, source: Checkpoint, effort: str) -> Stored:
    """A folder that `mmquant calibrate` wrote, or anybody's imatrix. InputError when it does not serve.

    An imatrix is held against the model here, before anything is written.
    """
    if path.is_file():
        imatrix = read_imatrix(path)
        if effort != "fast":
            raise InputError(f"{path}: an imatrix holds diagonals, which serve --effort fast only")
        stored = Stored(path, imatrix, effort)
        check_imatrix(path, imatrix, source.geometry)
        for layer in range(source.geometry.layers):
            stored.moments(layer, source.geometry)
        return stored
    if effort == "high":
        raise InputError(f"{path}: holds sums of a text; --effort high reads more of it, expected default or fast")
    known = open_statistics(path)
    known.check(source.fingerprint, source.geometry.layers)
    if not known.full and effort != "fast":
        raise InputError(
            f"{path}: holds diagonals, expected second moments (calibrate --moments full) or --effort fast"
        )
    return Stored(path, known, effort)


def check_imatrix(path: Path, imatrix: Imatrix, geometry: Geometry) -> None:
    """InputError naming the first weight of the model that an imatrix says nothing of, and how many there are."""
    layers = range(geometry.layers)
    expected = [(layer, name) for layer in layers for name in INPUT_OF]
    known = [imatrix.layer(layer) for layer in layers]
    missing = [f"blk.{layer}.{name}.weight" for layer, name in expected if name not in known[layer]]
    if missing:
        raise InputError(
            f"{path}: {missing[0]} is missing ({len(missing)} of {len(expected)} weights), expected an imatrix of this "
            "whole model (llama-imatrix leaves out what saw too little text: run it over more)"
        )


RESCALED = ("up", "down")  # by a power of two, and by its inverse


class StoredRun(TensorProvider):
    """The tensors of `plan` under stored statistics; nothing is carried from step to step."""

    def __init__(self, source: Checkpoint, plan: GgufPlan, stored: Stored, device: torch.device | str) -> None:
        self.source, self.plan, self.stored, self.device, self.report = source, plan, stored, device, Report()

    def tensors(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, bytes) of the tensors of one step, in order."""
        layer, infos = self.plan.layer(step), self.plan.steps[step]
        kinds = {stem_of(info.name): GGMLType[info.type] for info in infos}
        chosen = {name: kinds[name] for name in INPUT_OF if name in kinds}
        ready = {}
        if layer is not None:
            ready = encode_layer(self.source, self.stored, layer, chosen, self.device, self.report)
        for info in infos if world()[0] == 0 else ():  # the first rank writes
            data = ready.pop(stem_of(info.name), None)
            yield from [(info.name, data)] if data is not None else encode_tensors(self.source, [info], self.device)


def stem_of(name: str) -> str:
    """blk.3.attn_q.weight -> attn_q."""
    return split_block(name)[1].removesuffix(".weight")


def encode_layer(
    source: Checkpoint,
    stored: Stored,
    layer: int,
    kinds: dict[str, GGMLType],
    device: torch.device | str,
    report: Report,
) -> dict[str, np.ndarray]:
    """Bytes of a layer's matrices by short name; experts that would overflow float16 are rescaled first.

    One matrix, or a few experts of one projection, are in memory at once: a float32 layer of M2.7 has 14.5 GB.
    """
    g, moments, out = source.geometry, stored.moments(layer, source.geometry), {}
    middle, dtype = moments["ffn_down_exps"], default_dtype(device)
    exponents = rescale_exponents(middle.sum32.to(device))
    factors = torch.exp2(exponents).view(-1, 1, 1).to(dtype)
    report.rescaled |= {(layer, e): int(k) for e, k in enumerate(exponents.tolist()) if k > 0}
    report.unseen |= {(layer, e) for e, count in enumerate(middle.count.tolist()) if count == 0}

    # Of a hub's model the first rank reads for all: then the layer is read whole.
    whole = None if is_shared(source) or world()[1] == 1 else read_layer_shared(source, layer, device, dtype)

    def read(name: str, part: range) -> Tensor:
        if name in ATTENTION_TENSORS:
            if whole is not None:
                return getattr(whole, ROLES[ATTENTION_TENSORS[name]]).unsqueeze(0)
            weight = source.read(g.names.attention(layer, ATTENTION_TENSORS[name]) + ".weight").unsqueeze(0)
            return weight.to(device=device, dtype=dtype)
        role = EXPERT_TENSORS[name]
        if whole is None:
            weight = source.read_experts(layer, role, part, device, dtype)
        else:
            weight = getattr(whole, role)[part.start : part.stop].clone()
        if role not in RESCALED:
            return weight
        own = factors[part.start : part.stop]
        return weight.div_(own) if role == "up" else weight.mul_(own)

    for name, kind in kinds.items():
        with naming(f"blk.{layer}.{name}.weight"):
            out[name] = encode_matrices(partial(read, name), kind, moments[name], stored.method, torch.device(device))
    return out


def encode_matrices_of(
    weights: LayerWeights,
    moments: dict[str, Moments],
    kinds: dict[str, GGMLType],
    method: Method,
    layer: int,
    report: Report,
) -> dict[str, np.ndarray]:
    """Bytes of a layer's matrices by short name, each under its moments.

    Experts that would overflow float16 are rescaled and named in the report.
    """
    middle = moments["ffn_down_exps"]
    exponents = rescale_exponents(middle.sum32.to(weights.gate.device))
    report.rescaled |= {(layer, e): int(k) for e, k in enumerate(exponents.tolist()) if k > 0}
    report.unseen |= {(layer, e) for e, count in enumerate(middle.count.tolist()) if count == 0}
    out = {}
    with rescaled_in_place(weights, exponents):
        for name, kind in kinds.items():
            role = ROLES[ATTENTION_TENSORS[name]] if name in ATTENTION_TENSORS else EXPERT_TENSORS[name]
            weight = getattr(weights, role)
            weight = weight.unsqueeze(0) if weight.dim() == 2 else weight

            def read(part: range, weight: Tensor = weight) -> Tensor:
                return weight[part.start : part.stop]

            with naming(f"blk.{layer}.{name}.weight"):
                out[name] = encode_matrices(read, kind, moments[name], method, weight.device)
    return out


@contextmanager
def rescaled_in_place(weights: LayerWeights, exponents: Tensor) -> Iterator[None]:
    """Rescale experts by powers of two inside the block, in place: a layer is a third of a 24 GB card.

    They are put back afterwards: other artifacts of the run are made of the same weights.
    """
    kept = {}
    for expert in (exponents > 0).nonzero().flatten().tolist():
        kept[expert] = weights.up[expert].clone(), weights.down[expert].clone()
        weights.up[expert] /= torch.exp2(exponents[expert])
        weights.down[expert] *= torch.exp2(exponents[expert])
    try:
        yield
    finally:
        for expert, (up, down) in kept.items():
            weights.up[expert], weights.down[expert] = up, down


def encode_matrices(
    read: Callable[[range], Tensor], kind: GGMLType, moments: Moments, method: Method, device: torch.device
) -> np.ndarray:
    """Bytes [E, O, b] of E matrices under their moments; read: some of them [e, O, n].

    Under torchrun the ranks do the pieces of a single process in turn; every rank gets all.
    """
    count = moments.matrices
    if moments.second is not None and method.feedback:
        second = moments.second.to(device)
        pair = Pair(second, second, moments.weight.to(device), moments.count.to(device)).pooled()
        step = 1 if count == 1 else experts_at_once(read(range(1)))

        def work(part: range) -> np.ndarray:
            stored, _, _ = rounded_part(read(part), kind, pair, slice(part.start, part.stop), method)
            return to_host(stored).numpy()

    else:
        importance, step = shrunk_diagonal(moments, DIAGONAL_PRIOR).to(device), AT_ONCE

        def work(part: range) -> np.ndarray:
            rows = zip(read(part), importance[part.start : part.stop], strict=True)
            return np.stack([encode(matrix.float(), kind, chosen).cpu().numpy() for matrix, chosen in rows])

    pieces = list(batches(count, step))
    found = dict(divided(pieces, work))
    return np.concatenate([found[number] for number in range(len(pieces))])
