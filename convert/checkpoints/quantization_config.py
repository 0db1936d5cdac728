"""Which scheme config.json gives a matrix, as vLLM, SGLang and transformers read it.

How a quant_method says it is in convert/formats. Engines know matrices by names of their own and match lists
differently (formats/skip_lists.py): where they disagree, how the matrix is stored decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmquant.errors import InputError

from ..files.parse import is_object, short
from ..formats.format import Found, Scheme, Shape
from ..formats.skip_lists import names_of
from ..formats.table import METHODS, formats_of
from ..models.names import TensorNames

GROUPED = ("group", "tensor_group")  # strategies
# The second: compressed-tensors before 2025.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of quantization; None when it says nothing. InputError when it is no object.

    Where a key of a method's own says it, that stands for quant_method.
    """
    for name, method in METHODS.items():
        settings = config.get(method.top_key) if method.top_key else None
        if is_object(settings) and settings:
            return {**settings, "quant_method": name}
    for key in QUANTIZATION_KEYS:
        value = config.get(key)
        if value is None or value == {}:
            continue
        if not is_object(value):
            raise InputError(f"config.json: {key} is a {type(value).__name__}, expected an object")
        return value
    return None


def is_simple(weights: object) -> bool:
    """Whether settings of compressed-tensors' weights call for FP8 as sources have it: no zero points, no groups."""
    return is_object(weights) and weights.get("symmetric") is not False and weights.get("strategy") not in GROUPED


class SchemeBook:
    """The schemes of a quantization_config by matrix, one reading for each engine."""

    def __init__(self, quantization: dict[str, Any], names: TensorNames) -> None:
        self.quantization, self._tensors = quantization, names
        self.method = str(quantization.get("quant_method"))
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise InputError(
                f"config.json: quant_method is {short(quantization.get('quant_method'))}, expected {known}"
            )
        self._method = METHODS[self.method]
        self._formats = formats_of(self._method)
        self._known: dict[tuple[str, tuple[str, ...]], Scheme | None] = {}

    def readings(self, name: str) -> Iterator[tuple[str, Scheme | None]]:
        """(engine, scheme or None for left as it is) of the matrix `name` (without .weight), vLLM's first.

        Raises InputError for settings that are not read.
        """
        for engine in self.engines:
            yield engine, self.reading(name, engine)

    def reading(self, name: str, engine: str) -> Scheme | None:
        """What one engine takes the matrix for."""
        names = self._names(name, engine)
        if (engine, names) not in self._known:
            self._known[engine, names] = self._method.read(self._formats, self.quantization, names, engine)
        return self._known[engine, names]

    def _names(self, name: str, engine: str) -> tuple[str, ...]:
        return names_of(self._tensors, name, engine, self._method.single, self._method.fused)

    @property
    def engines(self) -> tuple[str, ...]:
        """Who reads the method."""
        return self._method.engines

    @property
    def stacked(self) -> bool:
        """Whether the experts of a layer lie in one tensor a projection."""
        return self._method.stacked

    @property
    def outside(self) -> bool:
        """Whether router, embeddings and head may be quantized."""
        return self._method.outside

    @property
    def left_out(self) -> tuple[str, ...]:
        """Fields of LayerWeights that count as zeros where no layer has them."""
        return self._method.left_out

    def derived(self, name: str, parts: Found, shape: Shape) -> Scheme | None:
        """The scheme of a matrix that the settings do not name, by its tensors; None where the method has no such."""
        if self._method.derive is None or not self.derives(name):
            return None
        return self._method.derive(self._formats, parts, shape)

    @property
    def integers(self) -> bool:
        """Whether the method has no format that can be quantized again."""
        return not any(row.requantizable for row in self._formats)

    @property
    def is_source(self) -> bool:
        """Whether everything that is quantized is FP8, so that it can be quantized again."""
        groups = self.quantization.get("config_groups")
        if all(row.group is None for row in self._formats) or not is_object(groups):
            return not self.integers
        sources = {row.name for row in self._formats if row.requantizable}
        said = [group for group in groups.values() if is_object(group)]
        return bool(said) and all(
            (group.get("format") or self.quantization.get("format")) in sources and is_simple(group.get("weights"))
            for group in said
        )

    def derives(self, name: str) -> bool:
        """Whether engines take the dtypes in the files for a skip list, there being none for a matrix."""
        if self._method.named is not None:
            return not self._method.named(self.quantization, self._names(name, self.engines[0])[0])
        return self._method.list_key is not None and not self.quantization.get(self._method.list_key)
