"""Store the reference's next-token distributions in one file: top tokens and the mass of the rest.

Per position the smallest set of tokens that leaves at most `tail` of the probability, log-probabilities in steps of
2^-11 (16 bits); `tail` starts at 5e-5 and is tightened block by block until the KLD of a probe (the reference's own
logits with Gaussian noise) computed from the stored form is within 5e-5 nats of the exact one on average. The measured
error is stated in the file. The KLD of the stored form is that of the distributions with the tail merged into one
token: never above the exact one but for rounding. Little-endian:

    magic | blocks | JSON of what it was made of and the table of blocks | its offset, its length (u64) | magic
    block of n positions: kept tokens [n] u32 | -log p(next token) [n] f32 | log p(tail) [n] f32 | ids u32 | codes u16
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmquant.errors import InputError

from ...convert.files.atomic import TEMPORARY, said_of, whole_file
from ...convert.files.parse import parse_json
from ...convert.source import Source
from ..model.distributed import Ranks
from ..text.sample import Sample
from ..text.vocabulary import tokenizer_digest
from .metrics import BLOCK_BYTES, Scores, compare, join_metrics, log_softmax

MAGIC = b"MMQREF1\n"
STEPS = 2048.0  # codes per nat
TAIL, TIGHTEST = 5e-5, 1e-9
KLD_ERROR = 5e-5
PROBE_NOISE = 1.0
FOOTER = 24


@dataclass(frozen=True)
class Rows:
    """Some positions' distributions.

    `count` [n]: entries of the flat ids and log-probabilities (most probable first).
    """

    count: NDArray[np.int64]
    nll: NDArray[np.float64]  # of the true next token
    tail: NDArray[np.float64]  # log of the mass of all other tokens, -inf for none
    ids: NDArray[np.int64]
    logp: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.count)


def condense(logits: Tensor, target: Tensor, tail: float) -> Rows:
    """The stored form of logits [n, V]: quantized, as a reader will see it."""
    logp = log_softmax(logits)
    ordered, ids = logp.sort(dim=-1, descending=True, stable=True)
    # The best token stays first even where rounding ties it with another: agreement of the top token depends on it.
    mass = ordered.exp()
    kept = (mass.flip(-1).cumsum(-1).flip(-1) > tail).sum(-1).clamp(min=1)
    inside = torch.arange(logp.shape[-1], device=logp.device) < kept[:, None]
    rest = torch.where(inside, torch.zeros_like(mass), mass).sum(-1)
    codes = (-ordered[inside] * STEPS).round().clamp(max=65535)
    nll = -logp.gather(1, target.to(logp.device)[:, None])[:, 0]
    return Rows(
        kept.cpu().numpy(),
        nll.cpu().numpy().astype(np.float32).astype(np.float64),
        rest.log().cpu().numpy().astype(np.float32).astype(np.float64),
        ids[inside].cpu().numpy(),
        -codes.cpu().numpy().astype(np.float64) / STEPS,
    )


def compare_stored(base: Rows, logits: Tensor, target: Tensor) -> Scores:
    """As metrics.compare, the reference being stored rows."""
    step = max(1, BLOCK_BYTES // (8 * logits.shape[-1]))
    ends = np.concatenate([[0], np.cumsum(base.count)])
    parts = []
    for i in range(0, len(base), step):
        j = min(i + step, len(base))
        flat = slice(int(ends[i]), int(ends[j]))
        rows = Rows(base.count[i:j], base.nll[i:j], base.tail[i:j], base.ids[flat], base.logp[flat])
        parts.append(_compare_stored(rows, logits[i:j], target[i:j]))
    return join_metrics(parts)


def _compare_stored(base: Rows, logits: Tensor, target: Tensor) -> Scores:
    finite = torch.isfinite(logits).all(-1)
    candidate = log_softmax(torch.where(finite[:, None], logits, torch.zeros_like(logits)))
    row = np.repeat(np.arange(len(base)), base.count)
    where = torch.from_numpy(row).to(candidate.device), torch.from_numpy(base.ids).to(candidate.device)
    kept = candidate[where].double().cpu().numpy()
    total = np.log(np.bincount(row, np.exp(base.logp), len(base)) + np.exp(base.tail))
    logp, tail = base.logp - total[row], base.tail - total
    mass = np.exp(tail)
    left = np.log(np.maximum(1.0 - np.bincount(row, np.exp(kept), len(base)), 1e-300))
    rest = np.where(mass > 0, mass * (np.where(mass > 0, tail, 0.0) - left), 0.0)
    kld = np.bincount(row, np.exp(logp) * (logp - kept), len(base)) + rest
    nll = -candidate.gather(1, target.to(candidate.device)[:, None])[:, 0].double().cpu().numpy()
    best = base.ids[np.cumsum(base.count) - base.count]
    same = logits.argmax(-1).cpu().numpy() == best
    good = finite.cpu().numpy()
    return Scores(nll, base.nll, np.maximum(kld, 0.0), np.exp(-nll) - np.exp(-base.nll), same & good, good)


class StoreWriter:
    """Appends blocks to a part file of this rank; `close` on every rank makes the whole file appear on the first."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path, ranks
        self.part = self._part(ranks.rank)
        self.file = open(self.part, "wb")
        self.blocks: list[list[int]] = []  # positions, entries
        self.error, self.worst, self.probe, self.tail = 0.0, 0.0, 0.0, TAIL
        self.noise = torch.Generator().manual_seed(ranks.rank)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Store positions [n, V], in order."""
        noise = torch.randn(logits.shape, generator=self.noise).to(logits.device) * PROBE_NOISE
        exact = compare(logits, logits + noise, target).kld
        tail = TAIL
        while True:
            rows = condense(logits, target, tail)
            error = np.abs(compare_stored(rows, logits + noise, target).kld - exact)
            if error.mean() <= KLD_ERROR or tail <= TIGHTEST:
                break
            tail /= 4
        self.error += float(error.sum())
        self.probe += float(exact.sum())
        self.worst, self.tail = max(self.worst, float(error.max())), min(self.tail, tail)
        with said_of(self.path):
            for array in _packed(rows):
                self.file.write(array.tobytes())
        self.blocks.append([len(rows), len(rows.ids)])

    def close(self, source: Source, sample: Sample, activations: str = "exact") -> None:
        """Join the ranks' parts into the file, whole under its name at once."""
        with said_of(self.path):
            self.file.close()
        found = self.ranks.gather((self.blocks, self.error, self.worst, self.probe, self.tail))
        if self.ranks.first:
            self._join(provenance(source, sample, activations), found)
        self.ranks.gather(None)
        self.part.unlink(missing_ok=True)

    def _join(self, made_of: dict[str, Any], found: list[Any]) -> None:
        blocks = [block for part in found for block in part[0]]
        positions, entries = sum(b[0] for b in blocks), sum(b[1] for b in blocks)
        made_of = made_of | {
            "positions": positions,
            "tokens_kept_mean": entries / max(1, positions),
            "tail": min(part[4] for part in found),
            "kld_error_mean": sum(part[1] for part in found) / max(1, positions),
            "kld_error_max": max(part[2] for part in found),
            "probe_kld": sum(part[3] for part in found) / max(1, positions),
        }
        with whole_file(self.path) as file:
            file.write(MAGIC)
            for rank in range(self.ranks.world):
                with open(self._part(rank), "rb") as part:
                    while data := part.read(8 << 20):
                        file.write(data)
            offset = file.tell()
            header = json.dumps({"made_of": made_of, "blocks": blocks}).encode()
            file.write(header + struct.pack("<QQ", offset, len(header)) + MAGIC)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}{TEMPORARY}")


def _packed(rows: Rows) -> list[NDArray[Any]]:
    codes = np.round(-rows.logp * STEPS)
    pairs = ((rows.count, "<u4"), (rows.nll, "<f4"), (rows.tail, "<f4"), (rows.ids, "<u4"), (codes, "<u2"))
    return [array.astype(kind) for array, kind in pairs]


def provenance(source: Source, sample: Sample, activations: str) -> dict[str, Any]:
    """What a stored reference was made of; everything here must be equal where it is used again."""
    made_of = _expected(sample, tokenizer_digest(source), activations)
    return {"model": source.fingerprint, "label": source.label} | made_of


def _expected(sample: Sample, tokenizer: str | None, activations: str) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "texts": [text["sha256"] for text in sample.texts],
        "context": sample.context,
        "stride": sample.stride,
        "convention": sample.convention,
        "activations": activations,
        "tokens": sample.fingerprint(),
    }


class StoredReference:
    """A file of StoreWriter's, its sizes checked against the file before anything is read."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected reference logits of --save-reference")
        self.path = path
        self._data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self.made_of, self.blocks = self._header()
        self.label = str(self.made_of.get("label", path.name))
        sizes = np.array([12 * n + 6 * m for n, m in self.blocks], dtype=np.int64)
        self._at = len(MAGIC) + np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._row = np.concatenate([[0], np.cumsum([n for n, _ in self.blocks])]).astype(np.int64)
        if self._at[-1] != self._offset:
            raise InputError(f"{path}: blocks of {self._at[-1]} bytes, expected {self._offset}: the file is damaged")

    def _header(self) -> tuple[dict[str, Any], list[list[int]]]:
        size = len(self._data)
        whole = bytes(self._data[:8]) == MAGIC and bytes(self._data[-8:]) == MAGIC and size >= FOOTER + 8
        if not whole:
            raise InputError(f"{self.path}: not a file of reference logits, or cut off")
        self._offset, length = struct.unpack("<QQ", bytes(self._data[-FOOTER:-8]))
        if self._offset + length + FOOTER != size:
            raise InputError(f"{self.path}: header of {length} bytes at {self._offset} in {size}: the file is damaged")
        try:
            header = parse_json(bytes(self._data[self._offset : self._offset + length]), str(self.path))
            blocks = [[int(n), int(m)] for n, m in header["blocks"]]
            made_of = dict(header["made_of"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise InputError(f"{self.path}: its description is not readable: the file is damaged") from None
        if any(n < 0 or m < 0 or 12 * n + 6 * m > size for n, m in blocks):
            raise InputError(f"{self.path}: a block larger than the file: the file is damaged")
        return made_of, blocks

    def check(self, sample: Sample, source: Source | None, tokenizer: str | None, activations: str = "exact") -> None:
        """Refuse to stand in for another reference: ValueError naming the first thing that differs."""
        expected = _expected(sample, tokenizer, activations)
        if source is not None:
            expected = {"model": source.fingerprint} | expected
        for name, value in expected.items():
            if self.made_of.get(name) != value:
                found = self.made_of.get(name)
                raise InputError(f"{self.path}: made with another {name} ({_short(found)}), expected {_short(value)}")
        if self._row[-1] != int(sample.scored.sum()):
            raise InputError(f"{self.path}: {self._row[-1]} positions, expected {int(sample.scored.sum())}")

    def rows(self, start: int, stop: int) -> Rows:
        """Positions start..stop-1 of the whole sample."""
        parts = []
        for number in range(int(np.searchsorted(self._row, start, "right")) - 1, len(self.blocks)):
            low, high = int(self._row[number]), int(self._row[number + 1])
            if low >= stop:
                break
            parts.append(self._block(number, max(start, low) - low, min(stop, high) - low))
        names = Rows.__dataclass_fields__
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def _block(self, number: int, start: int, stop: int) -> Rows:
        n, m = self.blocks[number]
        data = self._data[self._at[number] : self._at[number + 1]].tobytes()
        count = np.frombuffer(data, "<u4", n).astype(np.int64)
        if count.sum() != m or (n and count.min() < 1):
            raise InputError(
                f"{self.path}: block {number} keeps {count.sum()} tokens, expected {m}: the file is damaged"
            )
        nll, tail = np.frombuffer(data, "<f4", n, 4 * n), np.frombuffer(data, "<f4", n, 8 * n)
        ends = np.concatenate([[0], np.cumsum(count)])
        flat = slice(int(ends[start]), int(ends[stop]))
        ids = np.frombuffer(data, "<u4", m, 12 * n)[flat].astype(np.int64)
        codes = np.frombuffer(data, "<u2", m, 12 * n + 4 * m)[flat]
        part = slice(start, stop)
        return Rows(count[part], nll[part].astype(np.float64), tail[part].astype(np.float64), ids, codes / -STEPS)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
