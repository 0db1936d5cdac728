"""A checkpoint with some of its experts: the same files, fewer of each layer's experts, a router cut to match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError, naming_label

from ..files.parse import is_a, is_list, is_object, parse_any, short
from ..models import architecture_of
from ..models.geometry import Geometry
from .checkpoint import Checkpoint, Kept
from .finite import check_finite
from .schedule import Schedule
from .storage import modules_of
from .store import TensorInfo
from .tensors import read_tensor

LIST_LIMIT = 64 << 20  # bytes of a list of experts
CUT = ("router", "router_bias")  # one row per expert


class PrunedCheckpoint(Checkpoint):
    """`source` with the experts `kept`; expert i of a layer is its kept[layer][i]. Nothing is copied."""

    def __init__(self, source: Checkpoint, kept: Kept) -> None:
        self.__dict__.update(source.__dict__)
        for cached in ("tile", "_fingerprint"):
            self.__dict__.pop(cached, None)
        check_kept(kept, source.geometry)
        count = len(kept[0])
        self._source_fingerprint = source.fingerprint
        self.kept, self.notes = kept, [*source.notes, f"{source.label}: {count} of {source.geometry.experts} experts"]
        self.config = {**source.config, architecture_of(source.config).experts_key: count}
        self.geometry = replace(source.geometry, experts=count)
        self._rows: dict[str, tuple[TensorInfo, tuple[int, ...]]] = {}
        self._schemes, self._checked = {}, set()
        self.shared = None
        self.tensors = self._chosen(source, kept)
        used = {name: info for name, info in self.tensors.items() if name not in self.skipped}
        self._modules = modules_of(used)
        self.schedule = Schedule(self.store, used, self.geometry)

    def _chosen(self, source: Checkpoint, kept: Kept) -> dict[str, TensorInfo]:
        """The tensors under their new names; those of other experts are left out."""
        names, found = self.names, dict[str, TensorInfo]()
        numbers = [{old: new for new, old in enumerate(layer)} for layer in kept]
        for name, info in source.tensors.items():
            stem, _, suffix = name.rpartition(".")
            expert = names.expert_of(stem)
            if expert is None or expert.layer >= len(numbers):
                found[name] = info
            elif (new := numbers[expert.layer].get(expert.number)) is not None:
                module = names.expert(expert.layer, new, expert.projection)
                found[f"{module}.{suffix}"] = replace(info, name=f"{module}.{suffix}")
                self._schemes[module] = source.scheme(stem)
        for layer, chosen in enumerate(kept):
            for name in (names.prefix(layer) + names.plain[field] for field in CUT if field in names.plain):
                if name in found:
                    self._rows[name] = (found[name], chosen)
                    found[name] = replace(found[name], shape=(len(chosen), *found[name].shape[1:]))
        return found

    @naming_label
    def raw(self, name: str) -> Tensor:
        """A tensor as stored, routers with the rows of the experts that stay."""
        if name not in self._rows:
            return super().raw(name)
        info, chosen = self._rows[name]
        self.schedule.reading(name)
        values = read_tensor(self.store, info)
        check_finite(values, f"{info.shard}: {name}")
        return values[torch.tensor(chosen)]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that are used, routers whole."""
        return sum(info.size for name, info in self.tensors.items() if name not in self.skipped)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the source's and of the experts that stay."""
        said = json.dumps([self._source_fingerprint, self.kept])
        return hashlib.sha256(said.encode()).hexdigest()


def check_kept(kept: Kept, g: Geometry) -> None:
    """InputError unless every layer has equally many experts to keep, all of the model, enough for a token."""
    if len(kept) != g.layers:
        raise InputError(f"experts to keep: {len(kept)} layers, the model has {g.layers}")
    for layer, chosen in enumerate(kept):
        where = f"experts to keep: layer {layer}"
        if len(chosen) != len(kept[0]):
            raise InputError(
                f"{where} has {len(chosen)}, layer 0 has {len(kept[0])}: config.json has one number for all"
            )
        if len(set(chosen)) != len(chosen) or list(chosen) != sorted(chosen):
            raise InputError(f"{where} names an expert twice")
        if chosen and not 0 <= chosen[0] <= chosen[-1] < g.experts:
            raise InputError(f"{where} names {short(chosen[-1])}, the model has experts 0 to {g.experts - 1}")
    if len(kept[0]) < g.experts_per_token:
        raise InputError(f"experts to keep: {len(kept[0])} of each layer, a token goes to {g.experts_per_token}")


def read_kept(path: Path) -> Kept:
    """A list of experts from a JSON file: of every layer the numbers that stay, bare or under `experts_kept`.

    Raises InputError for anything else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a JSON list of the experts to keep")
    if path.stat().st_size > LIST_LIMIT:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes, expected a list of experts")
    data: Any = parse_any(path.read_bytes(), str(path))
    layers = data.get("experts_kept") if is_object(data) else data
    if not is_list(layers) or not layers:
        raise InputError(f"{path}: {short(layers)}, expected a list of lists of experts, one a layer")
    return tuple(_layer(path, number, layer) for number, layer in enumerate(layers))


def _layer(path: Path, number: int, chosen: object) -> tuple[int, ...]:
    if not is_list(chosen) or not chosen or not all(is_a(expert, int) for expert in chosen):
        raise InputError(f"{path}: layer {number} is {short(chosen)}, expected numbers of experts")
    return tuple(sorted(chosen))


def most_salient(saliency: Sequence[Tensor], load: Sequence[Tensor], count: int) -> Kept:
    """The `count` experts of each layer whose output a router gives most to: REAP's criterion.

    saliency [E]: sum of router weight times |output| over an expert's tokens, load [E]: how many those are. An expert
    counts by the mean; one that saw no token goes first. Source: https://arxiv.org/abs/2510.13999.
    """
    kept: list[tuple[int, ...]] = []
    for total, tokens in zip(saliency, load, strict=True):
        mean = torch.where(tokens > 0, total / tokens.clamp(min=1), -1.0)
        chosen = torch.sort(mean, descending=True, stable=True).indices[:count]
        kept.append(tuple(sorted(int(expert) for expert in chosen)))
    return tuple(kept)
