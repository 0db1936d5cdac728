"""Tokenize texts of any length piece by piece, with the same tokens as in one piece.

A piece ends after a letter that white space or punctuation of CJK follows. There byte-level BPE starts anew: its
patterns end a run of letters, and no token reaches over. Tokenizers of another kind (one that marks the start of a
text) are found by trying, and get each text whole. A text without such a place is cut after 2^20 characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

PIECE = 1 << 15  # characters
LONGEST = 1 << 20
FIRST, BATCH = 1 << 13, 1 << 17  # characters that are encoded together, on all cores: few at first, then more
_CUT = re.compile(r"[^\W\d_](?=[ \t\r\n\u3001\u3002\uff0c\uff1b\uff1a\uff1f\uff01])")
_PROBES = (("ab", " cd"), ("A b", "\n\nc"), ("中", "。文"), ("x y", "\t z"))


def pieces(parts: Iterable[str], size: int = PIECE, longest: int = LONGEST) -> Iterator[str]:
    """A text's parts, cut anew where its tokens may be."""
    held = ""
    for part in parts:
        held += part
        while len(held) > size:
            cut = _last_cut(held, size, longest)
            if cut is None:
                break
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _last_cut(held: str, size: int, longest: int) -> int | None:
    """Where a piece of about `size` characters ends; None while there is no such place yet."""
    found = None
    for match in _CUT.finditer(held, max(0, size - 4096), size):
        found = match
    found = found or _CUT.search(held, size)
    if found is not None:
        return found.end()
    return longest if len(held) > longest else None


def can_cut(tokenizer: Tokenizer) -> bool:
    """Whether a text's tokens are its pieces' tokens."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return all(ids(a + b) == ids(a) + ids(b) for a, b in _PROBES)


def tokens_of(tokenizer: Tokenizer, texts: Iterable[Iterable[str]]) -> Iterator[tuple[int, str, list[int]]]:
    """(text's number, piece, its ids) of texts that are given in parts, in order."""
    cuts = can_cut(tokenizer)
    batch: list[tuple[int, str]] = []
    size, enough = 0, FIRST
    for number, parts in enumerate(texts):
        for piece in pieces(parts) if cuts else ["".join(parts)]:
            batch.append((number, piece))
            size += len(piece)
            if size >= enough:
                yield from _encoded(tokenizer, batch)
                batch, size, enough = [], 0, min(2 * enough, BATCH)
    yield from _encoded(tokenizer, batch)


def _encoded(tokenizer: Tokenizer, batch: list[tuple[int, str]]) -> Iterator[tuple[int, str, list[int]]]:
    found = tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False) if batch else []
    for (number, piece), encoding in zip(batch, found, strict=True):
        yield number, piece, encoding.ids
