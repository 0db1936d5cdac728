"""MiniMax-M2.7's tensors in the release's names, dtypes and number of shards, from the sizes in its config.json.

How the release divides tensors among its shards is not known here: they are filled in the model's order to equal bytes,
so that shards end inside layers, which is the harder case. What stands in a shard's header decides its digest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.models.shapes import global_shapes, matrix_shapes, plain_shapes

from .generator import CODE_MAX, LARGEST, Law

SHARDS, LAYERS = 125, 62
WIDTH = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
TILE = 128
EMBED, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
OVERFLOWING = (61, 74)  # experts of the last layer whose inner values leave float16 (public findings of M2.7)
OVERFLOW = 2.0**15
DEMO = Path(__file__).parent.parent.parent / "mmquant" / "data" / "demo"
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 196608,
}
LAWS = {  # by the end of a plain tensor's name: dtype as in the release, mean, deviation
    "e_score_correction_bias": Law("normal", "F32", 8.0, 0.02),
    "gate.weight": Law("normal", "F32", 0.0, 0.02),
    "norm.weight": Law("normal", "BF16", 1.0, 0.1),
    "layernorm.weight": Law("normal", "BF16", 1.0, 0.1),
    EMBED: Law("normal", "BF16", 0.0, 0.05),
    HEAD: Law("normal", "BF16", 0.0, 0.02),
}
DEVIATION = 0.02  # of the weights of matrices


@dataclass(frozen=True)
class Piece:
    """A tensor of a shard: where its data begin and end in the file."""

    name: str
    shape: tuple[int, ...]
    law: Law
    start: int = 0

    @property
    def bytes(self) -> int:
        return prod(self.shape) * WIDTH[self.law.dtype]

    @property
    def end(self) -> int:
        return self.start + self.bytes


@dataclass(frozen=True)
class Layout:
    """One shard: its header and the tensors behind it."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return self.pieces[-1].end


@dataclass(frozen=True)
class Model:
    """The checkpoint with its first `layers` layers; the last of these has the overflowing experts.

    sizes: other values of config.json, for tests
    """

    layers: int = LAYERS
    sizes: tuple[tuple[str, int], ...] = ()
    shards: int = SHARDS  # of the whole model; fewer layers take fewer

    @cached_property
    def config(self) -> dict[str, Any]:
        demo = json.loads((DEMO / "config.json").read_text())
        found = {**demo, **SIZES, **dict(self.sizes), "num_hidden_layers": self.layers}
        return {**found, "attn_type_list": [1] * self.layers}

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.from_config(self.config)

    def tensors(self) -> Iterator[Piece]:
        """All tensors in the order of the model."""
        g, outside = self.geometry, global_shapes(self.geometry)
        yield Piece(EMBED, outside[EMBED], _law(EMBED))
        for layer in range(g.layers):
            for name, shape in plain_shapes(g, layer):
                yield Piece(name, shape, _law(name))
            for name, shape in matrix_shapes(g, layer):
                tiles = (ceil(shape[0] / TILE), ceil(shape[1] / TILE))
                yield Piece(name + ".weight", shape, Law("codes", "F8_E4M3"))
                yield Piece(name + ".weight_scale_inv", tiles, self._scales(name, layer))
        yield Piece(FINAL_NORM, outside[FINAL_NORM], _law(FINAL_NORM))
        yield Piece(HEAD, outside[HEAD], _law(HEAD))

    def _scales(self, name: str, layer: int) -> Law:
        factor = 1.0
        if layer == self.layers - 1 and any(f".experts.{expert}." in name for expert in OVERFLOWING):
            factor = {"w3": OVERFLOW, "w2": 1 / OVERFLOW}.get(name.rsplit(".", 1)[1], 1.0)
        return Law("scales", "F32", factor * DEVIATION * LARGEST / CODE_MAX)

    @cached_property
    def layouts(self) -> list[Layout]:
        whole = replace(self, layers=int(dict(self.sizes).get("num_hidden_layers", LAYERS)))
        limit = ceil(sum(t.bytes for t in whole.tensors()) / self.shards)
        groups: list[list[Piece]] = [[]]
        size = done = 0
        for tensor in self.tensors():
            if groups[-1] and done + size + tensor.bytes / 2 > limit * len(groups):
                done, size = done + size, 0
                groups.append([])
            groups[-1].append(tensor)
            size += tensor.bytes
        return [_laid_out(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, 1)]

    def small_files(self) -> dict[str, bytes]:
        """Everything but the shards: config, index, and the demo's tokenizer, template and licence."""
        table = {piece.name: layout.name for layout in self.layouts for piece in layout.pieces}
        total = sum(piece.bytes for layout in self.layouts for piece in layout.pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        carried = [p for p in DEMO.iterdir() if p.suffix in (".json", ".jinja") or p.name == "LICENSE"]
        files = {p.name: p.read_bytes() for p in carried if p.name not in ("training.json",)}
        files["config.json"] = (json.dumps(self.config, indent=2) + "\n").encode()
        files["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
        return files


def _law(name: str) -> Law:
    return next(law for end, law in LAWS.items() if name.endswith(end))


def _laid_out(name: str, tensors: list[Piece]) -> Layout:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.bytes]
        entries[tensor.name] = {"dtype": tensor.law.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed, at = [], len(header)
    for tensor in tensors:
        placed.append(replace(tensor, start=at))
        at += tensor.bytes
    return Layout(name, header, tuple(placed))
