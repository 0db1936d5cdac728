"""The census of a model: what `mmquant inspect` prints."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mmquant.tables import WIDTH, Size, table

from ..convert.open import open_source
from .models import say_notes
from .results import Result

if TYPE_CHECKING:
    from pathlib import Path

    from ..convert.checkpoints.census import Kind
    from ..convert.models.geometry import Geometry


@dataclass(frozen=True)
class Census(Result):
    """Per kind of tensor the count, dtype, weights and bytes; the model's sizes."""

    model: str
    fingerprint: str
    geometry: Geometry
    kinds: list[Kind]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(kind.bytes for kind in self.kinds)

    @property
    def parameters(self) -> int:
        """Weights of the model by its geometry."""
        return self.geometry.parameters

    def rows(self) -> list[dict[str, Any]]:
        """One row each, for tables."""
        return [asdict(kind) for kind in self.kinds]

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        found = {"model": self.model, "fingerprint": self.fingerprint, "geometry": asdict(self.geometry)}
        return {**found, "kinds": self.rows(), "bytes": self.bytes, "parameters": self.parameters}

    def lines(self) -> list[str]:
        """The same for people."""
        g = self.geometry
        head = f"{self.model}: {g.layers} layers, hidden {g.hidden}, {g.experts} experts of {g.expert_width} (top "
        head += f"{g.experts_per_token}), {g.heads}/{g.kv_heads} heads of {g.head_dim}, vocabulary {g.vocab}"
        rows = [(k.kind, k.dtype, k.count, k.weights, Size(k.bytes)) for k in self.kinds]
        total = ("total", "", sum(k.count for k in self.kinds), g.parameters, Size(self.bytes))
        shown = table(("kind", "dtype", "count", "weights", "GB"), [*rows, total], text=("kind", "dtype"))
        return [*textwrap.wrap(head, WIDTH), *shown]


def inspect(model: str | Path) -> Census:
    """What is in a model, read from headers: any folder or GGUF file that mmquant reads, `demo`, or a hub's address.

    Raises InputError when it is none of these, or not whole.
    """
    source = open_source(model)
    try:
        source.validate()
        say_notes(source)
        return Census(str(model), source.fingerprint, source.geometry, source.census())
    finally:
        source.close()
