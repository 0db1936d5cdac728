"""Random tensor data of which any range is cheap: element i is a table's entry number hash(key, i).

Counter-based (splitmix64 of key + i // 4, 16 bits for each of four elements), in integers throughout, so that the bytes
are the same on every machine. Values are normal: E4M3 codes as the release's scales leave them (a tile's largest weight
becomes 448), BF16 and F32 numbers around a mean. Tiles' scales are spread evenly over 0.75 to 1.25 of their mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numba
import numpy as np
import torch

VERSION = 1  # of the bytes: digests that were computed of others are not taken
ENTRIES = 1 << 16
CODE_MAX = 448.0
LARGEST = float(NormalDist().inv_cdf(1 - 0.5 / ENTRIES))  # standard deviations of the largest code, 4.17
LANES = 4  # elements of one hash


@dataclass(frozen=True)
class Law:
    """How the elements of a tensor are distributed.

    kind   codes (E4M3), scales (F32, mean +- 25 %) or normal; dtype as safetensors name it
    """

    kind: str
    dtype: str
    mean: float = 0.0
    deviation: float = 0.0


@cache
def table(law: Law) -> np.ndarray:
    """The 65,536 equally likely elements of a law, as unsigned integers of its width, little endian."""
    middle = (np.arange(ENTRIES) + 0.5) / ENTRIES
    if law.kind == "scales":
        values = torch.from_numpy((law.mean * (0.75 + middle / 2)).astype(np.float32))
        return values.numpy().view(np.uint32)
    normal = NormalDist()
    half = [normal.inv_cdf(float(p)) for p in middle[ENTRIES // 2 :]]
    values = torch.tensor([-v for v in reversed(half)] + half, dtype=torch.float64)
    if law.kind == "codes":
        return (values * (CODE_MAX / LARGEST)).float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    values = (values * law.deviation + law.mean).float()
    if law.dtype == "F32":
        return values.numpy().view(np.uint32)
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def key_of(seed: int, name: str) -> int:
    """64 bits that a tensor's data begin with."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def fill(out: np.ndarray, law: Law, key: int, start: int) -> None:
    """Bytes [start, start + len(out)) of a tensor's data into `out` (uint8)."""
    entries = table(law)
    unit = LANES * entries.itemsize
    first, last = start // unit, -(-(start + len(out)) // unit)
    if start % unit == 0 and len(out) % unit == 0:
        _fill(out.view(entries.dtype), entries, np.uint64(key), np.uint64(first))
        return
    whole = np.empty((last - first) * LANES, entries.dtype)
    _fill(whole, entries, np.uint64(key), np.uint64(first))
    out[:] = whole.view(np.uint8)[start - first * unit :][: len(out)]


@numba.njit(nogil=True)
def _fill(out, entries, key, first):  # pragma: no cover - compiled
    for block in range(len(out) // 4):
        x = key + (first + np.uint64(block)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
        at = 4 * block
        out[at] = entries[x & np.uint64(0xFFFF)]
        out[at + 1] = entries[(x >> np.uint64(16)) & np.uint64(0xFFFF)]
        out[at + 2] = entries[(x >> np.uint64(32)) & np.uint64(0xFFFF)]
        out[at + 3] = entries[x >> np.uint64(48)]
