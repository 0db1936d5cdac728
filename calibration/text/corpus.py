"""Calibration corpora: named text sets, mixed by weight, packed into windows, identified by hashes.

A set is made of documents: a text file, every text of a folder, a row of a JSON or JSONL file (rows.py; chats are
rendered with the checkpoint's template). Its domain is the file's stem, or the subfolder's name.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mmquant.errors import InputError

from .chat import ChatTemplate
from .documents import Document, StoredDocument, StoredDocuments, digest, open_file
from .files import OTHER_DATA, SUFFIXES
from .overlap import Words
from .tokens import tokens_of

DEFAULT = "default"
CHATS = "chat"  # the folder of the bundled set that needs a chat template
COUNTED = 1 << 17  # characters of a set that are counted in tokens; beyond, its length is estimated
# By how much a domain of the bundled set counts more, or less, than its text is long: towards what chat and agent
# models are used for (docs/lab.md, "Which text, and how much of it").
EMPHASIS = {"chat": 1.3, "docs": 1.3, "prose": 1.7, "zh": 1.8, "languages": 0.6, "data": 0.6}


@dataclass(frozen=True)
class TextSet:
    """Documents that share a weight in the mix. `weight` None: as many tokens as it has, times `emphasis`."""

    name: str
    documents: Sequence[Document] | Sequence[StoredDocument]
    weight: float | None = None
    known: tuple[str, int] | None = None  # digest and characters, where they were found already
    emphasis: float = 1.0

    @property
    def sha256(self) -> str:
        """Digest of the documents' texts, in order."""
        return self.known[0] if self.known else digest(document.text for document in self.documents)

    @property
    def characters(self) -> int:
        """Length of all documents."""
        return self.known[1] if self.known else sum(len(document.text) for document in self.documents)


@dataclass(frozen=True)
class Corpus:
    """Packed windows: tokens [W, T] int64, the domain of each window [W] (index into `domains`), and what they are."""

    tokens: Tensor
    domain: Tensor
    domains: tuple[str, ...]
    settings: dict[str, Any]  # sets (name, sha256, weight, tokens used), context, seed
    seen: NDArray[np.uint64] = field(
        default_factory=lambda: np.empty(0, np.uint64), repr=False, compare=False
    )  # shingles

    @property
    def fingerprint(self) -> str:
        """Digest of the very tokens, in order, and of the window's length."""
        digest = hashlib.sha256(f"{tuple(self.tokens.shape)}".encode())
        digest.update(self.tokens.numpy().astype("<i4").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For manifests: settings, size and fingerprint."""
        windows = {name: int((self.domain == index).sum()) for index, name in enumerate(self.domains)}
        shape = {"windows": self.tokens.shape[0], "context": self.tokens.shape[1], "windows_by_domain": windows}
        return {**self.settings, **shape, "fingerprint": self.fingerprint}


def bundled(side: str) -> Path:
    """Folder of the bundled text: `calibration` or `evaluation`."""
    return Path(str(resources.files("mmquant").joinpath("data", "text", side)))


def read_sets(
    specs: list[str], template: ChatTemplate | None = None, notes: list[str] | None = None, side: str = "calibration"
) -> list[TextSet]:
    """Sets of PATH, PATH=WEIGHT or `default` (the bundled text of `side`); a folder is one set for each domain.

    Without a template the bundled chats are left out.

    Every document is looked at once and read again when it is used; `notes` takes what was changed or left out.
    Raises InputError for a path that is missing or empty, a weight that is none, a wrong row, a file that is no text.
    """
    found: list[TextSet] = []
    for spec in specs or [DEFAULT]:
        path, weight = _parse(spec, side)
        parts = _by_domain(path, template, notes if notes is not None else [])
        if path == bundled("calibration"):
            parts = [replace(part, emphasis=EMPHASIS.get(part.name, 1.0)) for part in parts]
        # A folder's weight is shared by its domains in proportion to their text.
        counts = [part.characters * part.emphasis for part in parts]
        total = sum(counts)
        found += [
            p if weight is None else replace(p, weight=weight * count / total)
            for p, count in zip(parts, counts, strict=True)
        ]
    return found


def check_specs(specs: Iterable[str], side: str = "calibration") -> None:
    """InputError as of `read_sets`, for a path that is missing or without text and for a weight that is none."""
    for spec in specs:
        _files(_parse(spec, side)[0], [])


def _parse(spec: str, side: str) -> tuple[Path, float | None]:
    if spec == DEFAULT:
        return bundled(side), None
    if Path(spec).exists() or "=" not in spec:
        return Path(spec), None
    name, _, number = spec.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        raise InputError(f"{spec}: weight {number!r}, expected a positive number") from None
    if not 0 < weight < float("inf"):
        raise InputError(f"{spec}: weight {number}, expected a positive number")
    return bundled(side) if name == DEFAULT else Path(name), weight


def _by_domain(path: Path, template: ChatTemplate | None, notes: list[str]) -> list[TextSet]:
    """A file or folder as sets without weights, in the order in which their domains appear."""
    documents: dict[str, StoredDocuments] = {}
    digests: dict[str, Any] = {}
    characters: dict[str, int] = {}
    without = CHATS if template is None and path == bundled("calibration") else None
    for name in _files(path, notes):
        inner = name.relative_to(path).parts if path.is_dir() else ()
        if without in inner:
            continue
        domain = inner[0] if len(inner) > 1 else name.stem
        file = open_file(name, template)
        for index, count, one, says in file.scan():
            if says:
                documents.setdefault(domain, StoredDocuments(domain)).add(file, index)
                digests.setdefault(domain, hashlib.sha256()).update(one)
                characters[domain] = characters.get(domain, 0) + count
        notes += file.notes()
    if not documents:
        raise InputError(f"{path}: empty, expected text")
    return [
        TextSet(domain, found, None, (digests[domain].hexdigest(), characters[domain]))
        for domain, found in documents.items()
    ]


def _files(path: Path, notes: list[str]) -> list[Path]:
    """The file itself, or the texts of a folder; other files of it are noted, and data sets in other forms refused."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    other = next((p for p in inside if p.suffix in OTHER_DATA), None)
    if other is not None:
        raise InputError(f"{other}: not text, expected files ending in {', '.join(SUFFIXES)} (or name them one by one)")
    files = [p for p in inside if p.suffix in SUFFIXES]
    if not files:
        raise InputError(f"{path}: no text in this folder, expected files ending in {', '.join(SUFFIXES)}")
    if left := [p.name for p in inside if p.suffix not in SUFFIXES]:
        names = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
        notes.append(f"{path}: {len(left)} files are not read ({names}), only those ending in {', '.join(SUFFIXES)}")
    return files


def pack_windows(
    sets: list[TextSet], tokenizer: Tokenizer, context: int, windows: int | None = None, seed: int = 0
) -> Corpus:
    """Pack documents into windows of `context` tokens, at most `windows` of them, shared out by the sets' weights.

    Documents of a set are shuffled by `seed` and joined without separators or BOS (the model's tokenizer adds none; a
    chat template brings its own); a set that is too short gives what it has and the others take its share. Windows of
    all sets are interleaved evenly, so that a part of the corpus is a sample of the whole. Documents are read and
    tokenized only as far as the windows need them; without weights a set's share is its number of tokens, estimated
    from its first COUNTED characters when it is longer.

    Raises InputError when the text is shorter than one window.
    """
    if context < 2 or (windows is not None and windows < 1):
        raise InputError(f"context {context}, {windows} windows: expected at least 2 tokens and 1 window")
    order = np.random.default_rng(seed)
    needed = None if windows is None else windows * context
    counted = COUNTED if len(sets) > 1 and all(part.weight is None for part in sets) else 0
    streams = [_stream(part, order.permutation(len(part.documents)), tokenizer, needed, counted) for part in sets]
    available = [stream.tokens // context for stream in streams]
    if not sum(available):
        longest = max((stream.tokens for stream in streams), default=0)
        raise InputError(f"calibration text: {longest} tokens in the longest set, expected one window of {context}")
    counts = shares(available, [part.weight for part in sets], windows, [part.emphasis for part in sets])
    domains = tuple(dict.fromkeys(part.name for part in sets))
    placed = []
    for index, (stream, count) in enumerate(zip(streams, counts, strict=True)):
        for number in range(count):
            tokens = stream.ids[number * context : (number + 1) * context]
            placed.append(((number + 0.5) / count, index, torch.tensor(tokens, dtype=torch.int64)))
    placed.sort(key=lambda item: item[:2])
    used = [
        {"name": s.name, "sha256": s.sha256, "weight": s.weight, "documents": len(s.documents), "windows": count}
        for s, count in zip(sets, counts, strict=True)
    ]
    return Corpus(
        tokens=torch.stack([tokens for _, _, tokens in placed]),
        domain=torch.tensor([domains.index(sets[index].name) for _, index, _ in placed]),
        domains=domains,
        settings={"sets": used, "seed": seed},
        seen=np.concatenate([s.shingles(count * context) for s, count in zip(streams, counts, strict=True)]),
    )


@dataclass
class _Stream:
    """A set's tokens as far as they may be used, how many there are in all, and the shingles of each piece."""

    ids: array[int]
    tokens: int
    pieces: list[tuple[int, NDArray[np.uint64]]]  # first token, shingles

    def shingles(self, used: int) -> NDArray[np.uint64]:
        found = [hashes for start, hashes in self.pieces if start < used]
        return np.concatenate([np.empty(0, np.uint64), *found])


def _stream(part: TextSet, order: NDArray[np.int64], tokenizer: Tokenizer, needed: int | None, counted: int) -> _Stream:
    """Tokens of a set's documents in `order`.

    `needed` are kept (None: all), and at most `counted` characters more are read to know how many there are.
    """
    found, words = _Stream(array("i"), 0, []), Words()
    characters, last = 0, -1
    for number, piece, ids in tokens_of(tokenizer, (part.documents[int(i)].parts() for i in order)):
        full = needed is not None and len(found.ids) >= needed
        if full and characters >= counted:
            rest = part.characters / characters if counted else 1.0
            found.tokens = int(found.tokens * max(rest, 1.0))
            break
        if not full:
            words = words if number == last else Words()
            found.pieces.append((len(found.ids), words.shingles(piece)))
            found.ids.extend(ids)
        found.tokens, characters, last = found.tokens + len(ids), characters + len(piece), number
    return found


def shares(
    available: list[int], weights: list[float | None], windows: int | None, emphasis: list[float] | None = None
) -> list[int]:
    """How many windows each set gives: in proportion to its weight, never more than it has.

    Without a weight: to what it has, times its emphasis.
    """
    emphasis = emphasis if emphasis is not None else [1.0] * len(available)
    needed = [a * e if w is None else w for a, e, w in zip(available, emphasis, weights, strict=True)]
    if any(w is not None for w in weights):
        # Sets without a weight among weighted ones count as 1.
        needed = [1.0 if w is None else w for w in weights]
    if windows is None:
        # As many as the mix allows without repeating anything, or everything when no weight was given.
        if all(w is None for w in weights):
            return list(available)
        scale = min(a / w for a, w in zip(available, needed, strict=True) if a)
        return [min(a, max(1, int(w * scale))) if a else 0 for a, w in zip(available, needed, strict=True)]
    counts, left = [0] * len(available), min(windows, sum(available))
    while left:
        open_sets = [i for i, a in enumerate(available) if counts[i] < a]
        # The set that lies furthest behind its share gets the next window.
        behind = min(open_sets, key=lambda i: ((counts[i] + 1) / needed[i], i))
        counts[behind] += 1
        left -= 1
    return counts
