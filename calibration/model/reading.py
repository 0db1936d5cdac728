"""Read a layer once for all ranks: each reads its share of local files, the first reads everything of a hub's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.checkpoints.census import Kind
from ...convert.formats.format import Scheme
from ...convert.models.layer import LayerWeights, layer_weights
from ...convert.models.names import ATTENTION
from ...convert.models.shapes import attention_shapes, expert_shape
from ...convert.source import SharedLayer, Source, read_layer
from .distributed import broadcast_later, rank_share, rank_shares, world
from .divided import from_owner

T = TypeVar("T")


class FirstReads:
    """A model that the first rank alone can read; what it reads goes to the others. All ranks must ask together.

    `inner` is that rank's; the others' is not touched.
    """

    def __init__(self, inner: Source | None) -> None:
        self.inner = inner

        def facts() -> tuple[Any, ...]:
            assert inner is not None
            return inner.geometry, inner.config, inner.label, inner.origin, inner.notes

        self.geometry, self.config, self.label, self.origin, self.notes = from_owner(facts)

    def _ask(self, what: Callable[[Source], T]) -> T:
        def asked() -> T:
            assert self.inner is not None
            return what(self.inner)

        return from_owner(asked)

    @property
    def fingerprint(self) -> str:
        """As of any source."""
        return self._ask(lambda inner: inner.fingerprint)

    @property
    def bytes(self) -> int:
        """Bytes of all tensor data."""
        return self._ask(lambda inner: inner.bytes)

    def read(self, name: str) -> Tensor:
        """Dequantized float32 CPU tensor by full release name."""
        return self._ask(lambda inner: inner.read(name))

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] of one projection, dequantized on the device."""
        return self._ask(lambda inner: inner.read_experts(layer, projection, experts, device, dtype))

    def small_file(self, name: str) -> bytes | None:
        """A small file's bytes."""
        return self._ask(lambda inner: inner.small_file(name))

    def file_names(self) -> Collection[str]:
        """Names of the files that `small_file` can read."""
        return self._ask(lambda inner: list(inner.file_names()))

    def ggml_type(self, name: str) -> str | None:
        """The ggml type of a tensor by its GGUF name."""
        return self._ask(lambda inner: inner.ggml_type(name))

    def scheme(self, name: str) -> Scheme | None:
        """How a matrix is stored is not handed over: InputError."""
        raise InputError(f"{self.label}: {name}: activations as an engine rounds them need one process")

    def validate(self) -> None:
        """Hold names, shapes and dtypes against the geometry."""
        self.notes = self._ask(_validated)

    def census(self) -> list[Kind]:
        """Count, dtype, bytes and weights of each kind of tensor."""
        return self._ask(lambda inner: inner.census())

    def close(self, finished: bool = False) -> None:
        """Stop fetching; no rank waits for another here."""
        if world()[0] == 0 and self.inner is not None:
            self.inner.close(finished)


def _validated(source: Source) -> list[str]:
    source.validate()
    return source.notes


def is_shared(source: Source) -> bool:
    """Whether every rank can read the model's files itself."""
    store = getattr(source, "store", None)
    return not isinstance(source, FirstReads) and (store is None or store.is_local)


def read_layer_shared(
    source: Source, layer: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LayerWeights:
    """`read_layer` from one reading by all ranks: each reads its share of the experts and of the attention matrices.

    Of a model that lies on a hub the first rank fetches and reads all.
    """
    if world()[1] == 1:
        return read_layer(source, layer, device, dtype)

    def read() -> LayerWeights:
        if is_shared(source):
            return _read_share(source, layer, device, dtype)
        return read_layer(source if isinstance(source, FirstReads) else FirstReads(source), layer, device, dtype)

    shared: SharedLayer | None = getattr(source, "shared", None)
    return shared.take(layer, device, dtype, read) if shared is not None else read()


def _read_share(source: Source, layer: int, device: torch.device | str, dtype: torch.dtype) -> LayerWeights:
    rank, size = world()
    g = source.geometry
    experts, shapes = rank_share(g.experts, rank, size), attention_shapes(g)

    going: list[Callable[[], object]] = []  # a card reads the next part while this one goes round

    def plain(name: str) -> Tensor:
        return source.read(g.names.prefix(layer) + name).to(device)

    def matrix(name: str) -> Tensor:
        owner = ATTENTION.index(name) % size
        value = torch.empty(shapes[name], dtype=dtype, device=device)
        if owner == rank:
            value.copy_(source.read(g.names.attention(layer, name) + ".weight"))
        going.append(broadcast_later(value, owner))
        return value

    def stacked(projection: str) -> Tensor:
        whole = torch.empty(g.experts, *expert_shape(g, projection), dtype=dtype, device=device)
        if len(experts):
            whole[experts.start : experts.stop] = source.read_experts(layer, projection, experts, device, dtype)
        for owner, part in enumerate(rank_shares(g.experts)):
            going.append(broadcast_later(whole[part.start : part.stop], owner))
        return whole

    weights = layer_weights(g.names, plain, matrix, stacked)
    for wait in going:
        wait()
    return weights
