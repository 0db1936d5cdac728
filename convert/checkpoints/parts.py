"""The tensors of a stored matrix: which are there, and whether they are those of its scheme."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats.format import Scheme
from .storage import Parts
from .store import TensorInfo

ONE_VALUE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))  # shapes of a scale of the whole matrix


@dataclass(frozen=True)
class Stored:
    """One matrix: its logical shape, its scheme (None: plain) and the tensors it is made of, by suffix."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: dict[str, TensorInfo]


def known_parts(stored: Stored) -> list[TensorInfo]:
    """The tensors of a matrix that its scheme has, and those beside them that engines do not look at."""
    suffixes = {"weight"}
    if stored.scheme is not None:
        row = stored.scheme.format
        suffixes = {p.suffix for p in row.parts(stored.scheme, stored.shape)} | set(row.beside)
    return [info for suffix, info in stored.parts.items() if suffix in suffixes]


def fits(scheme: Scheme, shape: tuple[int, int], parts: Parts) -> bool:
    """Whether the tensors that a scheme needs are there in its shapes."""
    return all(
        p.suffix in parts and (parts[p.suffix].shape == p.shape or (p.single and parts[p.suffix].shape in ONE_VALUE))
        for p in scheme.format.parts(scheme, shape)
        if p.needed
    )
