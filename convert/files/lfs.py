"""Recognize git-lfs pointers, which stand in for files cloned without `git lfs pull`."""

from __future__ import annotations

from mmquant.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(where: str, data: bytes) -> bytes:
    """The bytes of a file, or of its beginning, as they are. InputError when they are a pointer to it."""
    if data.startswith(POINTER):
        raise InputError(f"{where}: a git-lfs pointer, expected the file itself (run `git lfs pull`, or download it)")
    return data
