"""The tensors of a stored matrix: which are there, and whether they are those of its scheme."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats.format import Part, Scheme
from .storage import Parts
from .store import TensorInfo

ONE_VALUE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))  # shapes of a scale of the whole matrix
Shapes = tuple[tuple[int, ...], ...]


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


def shapes_of(part: Part) -> Shapes:
    """The shapes in which a part is read, the usual one first."""
    return (part.shape, part.shape[:1], *ONE_VALUE) if part.single else (part.shape,)


def fits(scheme: Scheme, shape: tuple[int, int], parts: Parts) -> bool:
    """Whether the tensors that a scheme needs are there in its shapes."""
    needed = [part for part in scheme.format.parts(scheme, shape) if part.needed]
    return all(part.suffix in parts and parts[part.suffix].shape in shapes_of(part) for part in needed)


def as_stored(scheme: Scheme, shape: tuple[int, int], parts: Parts) -> Scheme:
    """The scheme, or another way in which the same settings were written where the tensors are those of that."""
    other = None if scheme.format.otherwise is None else scheme.format.otherwise(scheme)
    return other if other is not None and not fits(scheme, shape, parts) and fits(other, shape, parts) else scheme
