"""Single values of a quantization_config, checked."""

from __future__ import annotations

from typing import TypeGuard

from mmquant.errors import InputError

from ..files.parse import is_list, short

LARGE = 1 << 31  # no matrix has so many rows or columns


def is_group(size: object) -> TypeGuard[int]:
    """Whether a group size is a positive integer, or -1 for a whole row."""
    return isinstance(size, int) and not isinstance(size, bool) and (size == -1 or 0 < size < LARGE)


def block_of(value: object, where: str) -> tuple[int, int]:
    """(rows, columns) of a tile. InputError for anything but two positive integers."""
    if not is_list(value) or len(value) != 2 or not all(type(v) is int and 0 < v < LARGE for v in value):
        raise InputError(f"config.json: {where} is {short(value)}, expected two positive integers")
    return value[0], value[1]
