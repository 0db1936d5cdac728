"""Interface of a readable model: dequantized weights by release name, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from mmquant.stages import stage

from .checkpoints.census import Kind
from .checkpoints.store import Origin
from .formats.format import Scheme
from .models import ARCHITECTURES
from .models.geometry import Geometry
from .models.layer import Globals, LayerWeights, layer_weights

CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    *(name for row in ARCHITECTURES.values() for name in row.code_files),
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENSE-MODEL",
    "NOTICE",
)


class Source(Protocol):
    """Any artifact whose weights can be read back: a native checkpoint, a quantized folder, a GGUF file."""

    geometry: Geometry
    config: dict[str, Any]
    label: str
    origin: Origin
    notes: list[str]  # what a user should know of the artifact: each one line

    @property
    def fingerprint(self) -> str:
        """Hex digest that identifies the weights: equal for equal checkpoints wherever they lie."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of all tensor data."""
        ...

    def read(self, name: str) -> Tensor:
        """Dequantized float32 CPU tensor by full release name."""
        ...

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] of one projection, dequantized on the device."""
        ...

    def small_file(self, name: str) -> bytes | None:
        """tokenizer.json, config.json, LICENSE ... or None."""
        ...

    def file_names(self) -> Collection[str]:
        """Names of the files that `small_file` can read; none of a source that makes them up."""
        ...

    def ggml_type(self, name: str) -> str | None:
        """The ggml type of a tensor by its GGUF name; None for what is no GGUF, or lacks the tensor."""
        ...

    def validate(self) -> None:
        """Hold names, shapes and dtypes against the geometry: InputError with the first fault."""
        ...

    def census(self) -> list[Kind]:
        """Count, dtype, bytes and weights of each kind of tensor."""
        ...

    def close(self, finished: bool = False) -> None:
        """Stop fetching; `finished`: nothing of it will be needed again."""
        ...


def scheme_of(source: Source, name: str) -> Scheme | None:
    """How a source stores the matrix of this name (without .weight); None for plain values and for GGUF."""
    read: Callable[[str], Scheme | None] | None = getattr(source, "scheme", None)
    return None if read is None else read(name)


def scale_beside(source: Source, name: str) -> Tensor | None:
    """A scale of a cache or of a matrix's inputs [1] float32 by its full name; None where the source has none."""
    read: Callable[[str], Tensor | None] | None = getattr(source, "scale_beside", None)
    return None if read is None else read(name)


class SharedLayer:
    """The dequantized layer that several readers of one source use in turn: read once, dropped by `release`.

    Readers leave its tensors as they are. An earlier layer than that is read for its reader alone.
    """

    def __init__(self) -> None:
        self.layer = -1
        self.reads = 0  # how often weights were read, of any layer
        self._found: dict[tuple[str, torch.dtype], LayerWeights] = {}

    def take(
        self, layer: int, device: torch.device | str, dtype: torch.dtype, read: Callable[[], LayerWeights]
    ) -> LayerWeights:
        """The weights of `layer` on the device, in `dtype`; `read` is called for what is not there."""
        if layer > self.layer:
            self.release()
            self.layer = layer
        place = torch.device(device)
        if str(place) == "cuda":  # the same as the current one by its number
            place = torch.device("cuda", torch.cuda.current_device())
        key = (str(place), dtype)
        if layer == self.layer and key in self._found:
            return self._found[key]
        self.reads += 1
        weights = read()
        if layer == self.layer:
            self._found[key] = weights
        return weights

    def release(self) -> None:
        """Drop what is held."""
        self._found.clear()


def read_layer(
    source: Source,
    layer: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    experts: range | None = None,
) -> LayerWeights:
    """One decoder layer (or only some of its experts), matrices in `dtype`, norms and router in float32.

    A whole one comes from the source's `shared` layer where it has one.
    """
    shared: SharedLayer | None = getattr(source, "shared", None)
    if shared is not None and experts is None:
        return shared.take(layer, device, dtype, lambda: _read_layer(source, layer, device, dtype, None))
    return _read_layer(source, layer, device, dtype, experts)


def _read_layer(
    source: Source, layer: int, device: torch.device | str, dtype: torch.dtype, experts: range | None
) -> LayerWeights:
    names, chosen = source.geometry.names, experts if experts is not None else range(source.geometry.experts)

    def plain(name: str) -> Tensor:
        return source.read(names.prefix(layer) + name).to(device)

    def matrix(projection: str) -> Tensor:
        return source.read(names.attention(layer, projection) + ".weight").to(device=device, dtype=dtype)

    def stacked(projection: str) -> Tensor:
        return source.read_experts(layer, projection, chosen, device, dtype)

    with stage("read"):
        return layer_weights(names, plain, matrix, stacked)


def read_globals(source: Source, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Globals:
    """Embeddings and head in `dtype`, final norm in float32."""
    names = source.geometry.names
    return Globals(
        embed=source.read(names.embed).to(device=device, dtype=dtype),
        norm=source.read(names.final_norm).to(device),
        head=source.read(names.head).to(device=device, dtype=dtype),
    )
