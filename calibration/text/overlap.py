"""Evaluation text that was calibrated on is found by hashed 13-word shingles.

A word is a run of letters or digits, or a single CJK character. Two texts overlap when a passage of 50 words appears in
both, or when more than 1 % of the evaluation text's shingles do: licence headers pass, a copied page does not.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

SHINGLE = 13  # words; the length of the n-grams by which GPT-3's authors looked for contamination
PASSAGE = 50
SHARE = 0.01
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str) -> NDArray[np.uint64]:
    """64-bit hashes of all runs of 13 words, in order; empty for a shorter text."""
    words = np.array([zlib.crc32(w.group().lower().encode()) for w in _WORD.finditer(text)], dtype=np.uint64)
    if len(words) < SHINGLE:
        return np.empty(0, dtype=np.uint64)
    count = len(words) - SHINGLE + 1
    out = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):  # polynomial hash modulo 2^64
        out = out * _PRIME + words[offset : offset + count] + np.uint64(1)
    return out ^ (out >> np.uint64(29))


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation text is calibration text."""

    shared: int
    total: int
    longest: int  # words of the longest common passage
    passage: str

    @property
    def refused(self) -> bool:
        return self.longest >= PASSAGE or self.shared > SHARE * max(self.total, 1)


def overlap(evaluation: str, known: NDArray[np.uint64]) -> Overlap:
    """Compare a text with the shingles of calibration text, sorted."""
    found = shingles(evaluation)
    if not len(found) or not len(known):
        return Overlap(0, len(found), 0, "")
    at = np.minimum(np.searchsorted(known, found), len(known) - 1)
    hit = known[at] == found
    edges = np.flatnonzero(np.diff(np.concatenate(([0], hit.view(np.int8), [0]))))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    if not len(starts):
        return Overlap(0, len(found), 0, "")
    best = int(lengths.argmax())
    longest = int(lengths[best]) + SHINGLE - 1
    words = islice(_WORD.finditer(evaluation), int(starts[best]), int(starts[best]) + longest)
    passage = " ".join(word.group() for word in words)
    return Overlap(int(hit.sum()), len(found), longest, passage)


def check_disjoint(evaluation: dict[str, str], known: NDArray[np.uint64]) -> None:
    """Raise ValueError naming the first evaluation text that overlaps calibration text (`known`: its shingles)."""
    known = np.sort(known)
    for name, text in evaluation.items():
        found = overlap(text, known)
        if found.refused:
            start = found.passage[:60]
            raise InputError(
                f"{name}: overlaps the calibration text in {found.shared} of {found.total} {SHINGLE}-word shingles, "
                f"longest passage {found.longest} words ({start!r}...); expected other documents than the calibration's"
            )
