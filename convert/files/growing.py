"""Grow a file over several runs under a temporary name, and rename it when it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .atomic import CHUNK, temporary_of
from .progress import damaged


def begin(path: Path) -> BinaryIO:
    """A new file that will be called `path`."""
    return open(temporary_of(path), "wb")


def go_on(path: Path, length: int, seen: Callable[[bytes], object]) -> BinaryIO:
    """The file that will be called `path`, behind its first `length` bytes, which `seen` is shown; the rest is cut off.

    Killed between a file's last byte and the note of it, it carries its own name already, and loses it again.
    InputError when it is shorter.
    """
    temporary = temporary_of(path)
    if not temporary.exists() and path.exists():
        os.replace(path, temporary)
    if not temporary.exists():
        raise damaged(temporary, "no file", f"the {length} bytes that were written")
    size = temporary.stat().st_size
    if size < length:
        raise damaged(temporary, f"{size} bytes", f"the {length} bytes that were written")
    file = open(temporary, "rb+")
    left = length
    while left:
        block = file.read(min(left, CHUNK))
        seen(block)
        left -= len(block)
    file.truncate(length)
    return file
