"""Detect evaluation text that was calibrated on, by hashed 13-word shingles.

A word is a run of letters or digits, or a single CJK character. Two texts overlap when a passage of 50 words appears in
both, or when more than 1 % of the evaluation text's shingles do: licence headers pass, a copied page does not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

from .tokens import pieces

SHINGLE = 13  # words; the length of the n-grams by which GPT-3's authors looked for contamination
PASSAGE = 50
SHARE = 0.01
SHOWN = 64  # words of a common passage that are kept
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class Words:
    """The words of a text that comes in parts: shingles that begin in one part and end in the next are not lost."""

    def __init__(self) -> None:
        self._tail = np.empty(0, dtype=np.uint64)

    def shingles(self, part: str) -> NDArray[np.uint64]:
        """64-bit hashes of the runs of 13 words that end in this part, in order."""
        return self.after(_WORD.findall(part))

    def after(self, found: list[str]) -> NDArray[np.uint64]:
        """The same of a part's words."""
        fresh = np.array([zlib.crc32(word.lower().encode()) for word in found], dtype=np.uint64)
        words = np.concatenate((self._tail, fresh))
        self._tail = words[-(SHINGLE - 1) :]
        count = max(0, len(words) - SHINGLE + 1)
        out = np.zeros(count, dtype=np.uint64)
        for offset in range(SHINGLE):  # polynomial hash modulo 2^64
            out = out * _PRIME + words[offset : offset + count] + np.uint64(1)
        return out ^ (out >> np.uint64(29))


def shingles(text: str) -> NDArray[np.uint64]:
    """64-bit hashes of all runs of 13 words, in order; empty for a shorter text."""
    return Words().shingles(text)


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation text is calibration text."""

    shared: int
    total: int
    longest: int  # words of the longest common passage
    passage: str  # its beginning

    @property
    def refused(self) -> bool:
        """Whether so much is shared that evaluation would not be honest."""
        return self.longest >= PASSAGE or self.shared > SHARE * max(self.total, 1)


def overlap(evaluation: str | Iterable[str], known: NDArray[np.uint64]) -> Overlap:
    """Compare a text, whole or in parts, with the shingles of calibration text, sorted."""
    words, shared, total = Words(), 0, 0
    run, best = 0, 0  # shingles in common that go on at the part's end; the longest such run
    kept: list[str] = []  # the last words, for a run that began in an earlier part
    opening, passage = "", ""
    for part in [evaluation] if isinstance(evaluation, str) else pieces(evaluation):
        own = _WORD.findall(part)
        found = words.after(own)
        text, kept = [*kept, *own], [*kept, *own][-(SHINGLE - 1) :]
        at = np.minimum(np.searchsorted(known, found), max(len(known) - 1, 0))
        hit = known[at] == found if len(known) else np.zeros(len(found), dtype=bool)
        shared, total = shared + int(hit.sum()), total + len(found)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], hit.view(np.int8), [0]))))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        if len(found) and not (runs and runs[0][0] == 0):
            run = 0
        for start, end in runs:
            goes_on = start == 0 and run > 0
            opening = opening if goes_on else " ".join(text[start : end + SHINGLE - 1][:SHOWN])
            run = run + end if goes_on else end - start
            if run > best:
                best, passage = run, opening
            run = run if end == len(found) else 0
    return Overlap(shared, total, best + SHINGLE - 1 if best else 0, passage)


def check_disjoint(evaluation: Iterable[tuple[str, str | Iterable[str]]], known: NDArray[np.uint64]) -> None:
    """Raise InputError naming the first evaluation text that overlaps calibration text (`known`: its shingles).

    evaluation: (name, text) pairs, each text whole or in parts.
    """
    known = np.sort(known)
    for name, text in evaluation:
        found = overlap(text, known)
        if found.refused:
            start = found.passage[:60]
            raise InputError(
                f"{name}: overlaps the calibration text in {found.shared} of {found.total} {SHINGLE}-word shingles, "
                f"longest passage {found.longest} words ({start!r}...); expected other documents than the calibration's"
            )
