"""mlx_lm's folder of a model, rounded to nearest: experts of a layer stacked, widths by module.

Router, its bias and norms are carried as they are. Attention, embeddings and head are modules of their own, which may
have other widths than the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..checkpoints.batches import batches, to_host
from ..checkpoints.checkpoint import Checkpoint
from ..formats.format import Format, Scheme, Shape, specs
from ..formats.mlx import METHOD
from ..formats.plain import plain_spec, plain_tensor
from ..formats.spec import TensorSpec
from ..formats.table import choices
from ..models.geometry import Geometry
from ..models.names import ATTENTION, PROJECTIONS
from ..models.shapes import attention_shapes, expert_shape, global_shapes, plain_shapes
from .kinds import ATTENTION as ATTENTION_UNIT
from .kinds import EMBEDDINGS, HEAD, Kind, group_name
from .layer_words import layers_in_words
from .variant import global_specs, global_tensors, plain_specs, plain_tensors

EIGHT_BIT = ("affine", 8, 64)  # mode, bits, group of attention, embeddings and head by default
BF16 = Kind("bf16")


def kind(mode: str, bits: int, group: int) -> Kind:
    """A way to store modules in a mode of the format; bits and group are those of affine."""
    row = choices("mlx")[mode]
    if len(row.bits) == 1:
        assert row.group_sizes is not None
        return Kind(f"mlx-{mode}", row, row.bits[0], row.group_sizes[0])
    return Kind(f"mlx-{bits}-g{group}", row, bits, group)


@dataclass(frozen=True)
class MlxVariant:
    """Every module at a kind; `units` of a plan, by their names there, override the three fields."""

    experts: Kind
    attention: Kind
    embeddings: Kind  # and the head
    units: tuple[tuple[str, Kind], ...] = ()
    command: str = "mlx"

    @property
    def stem(self) -> str:
        """The label without the method."""
        if self.units:
            return "MLX-planned"
        return f"{self._row.label.format(bits=self.experts.bits)}-g{self.experts.group}"

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return f"{self.stem}-rtn"

    @property
    def format(self) -> str:
        """The manifest's format."""
        return self._row.manifest

    @property
    def _row(self) -> Format:
        assert self.experts.storage is not None
        return self.experts.storage

    def kind_of(self, unit: str, layer: int | None = None) -> Kind:
        """Of gate, up, down, attention of a layer, or of embeddings, head."""
        name = unit if layer is None else group_name(layer, unit)
        usual = {ATTENTION_UNIT: self.attention, EMBEDDINGS: self.embeddings, HEAD: self.embeddings}
        return dict(self.units).get(name) or usual.get(unit, self.experts)

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        found: dict[str, Any] = {"command": self.command, "method": "rtn", "mode": self._row.choice}
        found |= {"bits": self.experts.bits, "group_size": self.experts.group}
        found |= {"attention": self.attention.word, "embeddings": self.embeddings.word}
        return {**found, "plan": self._planned_words()} if self.units else found

    def _planned_words(self) -> dict[str, str]:
        """A plan in short: of each unit the kinds with their layers, equal neighbours together."""
        layers: dict[str, list[tuple[int, str]]] = {}
        found: dict[str, str] = {}
        for name, chosen in self.units:
            parts = name.split(".")
            if len(parts) == 1:
                found[name] = chosen.word
            else:
                layers.setdefault(parts[2], []).append((int(parts[1]), chosen.word))
        for unit, words in layers.items():
            found[unit] = layers_in_words(sorted(words))
        return found

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        g, names = source.geometry, source.names
        check_model(g)
        found = plain_specs(source, plain_shapes(g, layer))
        attention = self.kind_of(ATTENTION_UNIT, layer)
        for projection, shape in attention_shapes(g).items():
            found += module_specs(source, attention, names.attention(layer, projection), shape)
        for projection in PROJECTIONS:
            name, shape = names.stack(layer, projection), expert_shape(g, projection)
            for spec in module_specs(source, self.kind_of(projection, layer), name, shape):
                found.append(TensorSpec(spec.name, spec.dtype, (g.experts, *spec.shape)))
        return found

    def outside_specs(self, source: Checkpoint) -> list[TensorSpec]:
        """Embeddings, final norm and head."""
        found: list[TensorSpec] = []
        shapes = global_shapes(source.geometry)
        for spec in global_specs(source):
            unit = self._outside(source, spec.name)
            stem = spec.name.removesuffix(".weight")
            if unit is None or self.kind_of(unit).storage is None:
                found.append(spec)
            else:
                rows, inputs = shapes[spec.name]
                found += module_specs(source, self.kind_of(unit), stem, (rows, inputs))
        return found

    def outside_tensors(self, source: Checkpoint, first: bool, device: torch.device | str) -> dict[str, Tensor]:
        """The embeddings (`first`), or the final norm and head."""
        found: dict[str, Tensor] = {}
        for name, value in global_tensors(source, first).items():
            unit = self._outside(source, name)
            chosen = BF16 if unit is None else self.kind_of(unit)
            if chosen.storage is None:
                found[name] = value
            else:
                found |= rounded(source, chosen, name.removesuffix(".weight"), value.to(device).float())
        return found

    @staticmethod
    def _outside(source: Checkpoint, name: str) -> str | None:
        return {source.names.embed: EMBEDDINGS, source.names.head: HEAD}.get(name)

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """The same tensors' values."""
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        tensors |= self.nearest_attention(source, layer, device)
        for projection in PROJECTIONS:
            chosen, g = self.kind_of(projection, layer), source.geometry
            scheme = scheme_of(source, chosen)
            parts: list[dict[str, Tensor]] = []
            for some in batches(g.experts):
                weights = source.read_experts(layer, projection, some, device, torch.float32)
                names = [source.names.expert(layer, expert, projection) for expert in some]
                assert scheme.format.nearest is not None
                parts.append(scheme.format.nearest(names, weights, scheme))
            tensors |= joined(source.names.stack(layer, projection), parts)
        return tensors

    def nearest_attention(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """A layer's attention rounded to nearest, or in bfloat16."""
        found: dict[str, Tensor] = {}
        chosen = self.kind_of(ATTENTION_UNIT, layer)
        for projection in ATTENTION:
            name = source.names.attention(layer, projection)
            found |= rounded(source, chosen, name, source.read(name + ".weight").to(device))
        return found

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        """The settings of config.json: the experts' at the top, and every module that has others."""
        usual = scheme_of(source, self.kind_of("gate", 0))
        assert METHOD.entry is not None
        found = METHOD.entry(usual)
        for name, chosen in self._modules(source):
            if chosen.storage is None:
                continue
            if (entry := METHOD.entry(scheme_of(source, chosen))) != METHOD.entry(usual) or "global_scale" in entry:
                found[name] = entry
        return {"quant_method": METHOD.names[0], **found}

    def _modules(self, source: Checkpoint) -> Iterator[tuple[str, Kind]]:
        names = source.names
        yield names.embed.removesuffix(".weight"), self.kind_of(EMBEDDINGS)
        for layer in range(source.geometry.layers):
            for projection in ATTENTION:
                yield names.attention(layer, projection), self.kind_of(ATTENTION_UNIT, layer)
            for projection in PROJECTIONS:
                yield names.stack(layer, projection), self.kind_of(projection, layer)
        if names.head in source.tensors:
            yield names.head.removesuffix(".weight"), self.kind_of(HEAD)


def scheme_of(source: Checkpoint, chosen: Kind) -> Scheme:
    """The scheme of a kind that is no bfloat16."""
    scheme = chosen.scheme(source)
    assert scheme is not None
    return scheme


def module_specs(source: Checkpoint, chosen: Kind, name: str, shape: Shape) -> list[TensorSpec]:
    """The tensors of one matrix."""
    return [plain_spec(name, shape)] if chosen.storage is None else specs(scheme_of(source, chosen), name, shape)


def rounded(source: Checkpoint, chosen: Kind, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Their values, of a weight [O, I] rounded to nearest."""
    if chosen.storage is None:
        return plain_tensor(name, weight)
    assert chosen.storage.nearest is not None
    packed = chosen.storage.nearest([name], weight.unsqueeze(0), scheme_of(source, chosen))
    return {f"{name}.{suffix}": to_host(value[0]) for suffix, value in packed.items()}


def joined(name: str, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One stack of the parts' experts, in order, on the CPU."""
    return {f"{name}.{suffix}": _cat([to_host(part[suffix]) for part in parts]) for suffix in parts[0]}


def _cat(parts: list[Tensor]) -> Tensor:
    out = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=parts[0].dtype)
    first = 0
    for part in parts:
        out[first : first + len(part)].copy_(part)
        first += len(part)
    return out


def check_model(g: Geometry) -> None:
    """InputError for what mlx_lm would compute otherwise."""
    if g.rope_scaling is not None:
        raise InputError("config.json: rope_scaling: mlx_lm's model of this architecture leaves it out, expected none")
