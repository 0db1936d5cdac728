"""Recognize files that are not what their name says: git-lfs pointers, web pages, archives."""

from __future__ import annotations

from mmquant.errors import InputError

from .lfs import POINTER

LOOK = len(POINTER) + 16  # bytes that tell
_HINTS = {
    POINTER: "a git-lfs pointer, not the file itself: run `git lfs pull` there, or download it again",
    b"# xet version": "a xet pointer, not the file itself: download it again",
    b"<!doctype html": "a web page, not the file itself: download it again",
    b"<html": "a web page, not the file itself: download it again",
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive (PyTorch's own format?)",
    b"\x80\x02": "a Python pickle",
    b"\x1f\x8b": "gzip, unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd, unpack it first",
}


def stranger(first: bytes) -> str | None:
    """What a file that begins like this is instead, in words; None when it may be what it should be."""
    start = first[:LOOK].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((words for magic, words in _HINTS.items() if start.startswith(magic.lower())), None)


def refuse_strangers(first: bytes, where: str, expected: str) -> None:
    """InputError when a file's first bytes are those of something else."""
    found = stranger(first)
    if found is not None:
        raise InputError(f"{where}: {found}; expected {expected}")
