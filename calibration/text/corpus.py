"""Which text a pass sees: named sets, mixed by weight, seed and budget, packed into windows and identified by hashes.

A set is made of documents: a text file, every text of a folder, a line of a JSONL file ({"text": ...} or a chat,
rendered with the checkpoint's template). Its domain is the file's stem, or the subfolder's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmquant.errors import InputError

from .chat import ChatTemplate, read_chats

DEFAULT = "default"
SUFFIXES = (".txt", ".md", ".rst", ".raw", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text of a set."""

    text: str
    domain: str
    origin: str  # file name, with the line for JSONL


@dataclass(frozen=True)
class TextSet:
    """Documents that share a weight in the mix. `weight` None: as many tokens as it has."""

    name: str
    documents: tuple[Document, ...]
    weight: float | None = None

    @property
    def sha256(self) -> str:
        """Digest of the documents' texts, in order."""
        return digest(document.text for document in self.documents)


@dataclass(frozen=True)
class Corpus:
    """Packed windows: tokens [W, T] int64, the domain of each window [W] (index into `domains`), and what they are."""

    tokens: Tensor
    domain: Tensor
    domains: tuple[str, ...]
    settings: dict[str, Any]  # sets (name, sha256, weight, tokens used), context, seed

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


def digest(texts: Iterable[str]) -> str:
    """SHA-256 over the SHA-256 of each text, in hexadecimal."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()


def bundled(side: str) -> Path:
    """Folder of the bundled text: `calibration` or `evaluation`."""
    return Path(str(resources.files("mmquant").joinpath("data", "text", side)))


def read_sets(specs: list[str], template: ChatTemplate | None = None) -> list[TextSet]:
    """Sets of PATH, PATH=WEIGHT or `default` (the bundled calibration text); a folder is one set for each domain.

    Raises ValueError for a path that is missing or empty, a weight that is none, a wrong JSONL line.
    """
    found: list[TextSet] = []
    for spec in specs or [DEFAULT]:
        path, weight = _parse(spec)
        documents = _documents(path, template)
        by_domain: dict[str, list[Document]] = {}
        for document in documents:
            by_domain.setdefault(document.domain, []).append(document)
        # A folder's weight is shared by its domains in proportion to their text.
        total = sum(len(document.text) for document in documents)
        for domain, members in by_domain.items():
            part = None if weight is None else weight * sum(len(d.text) for d in members) / total
            found.append(TextSet(domain, tuple(members), part))
    return found


def _parse(spec: str) -> tuple[Path, float | None]:
    if spec == DEFAULT:
        return bundled("calibration"), None
    if Path(spec).exists() or "=" not in spec:
        return Path(spec), None
    name, _, number = spec.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        raise InputError(f"{spec}: weight {number!r}, expected a positive number") from None
    if not 0 < weight < float("inf"):
        raise InputError(f"{spec}: weight {number}, expected a positive number")
    return bundled("calibration") if name == DEFAULT else Path(name), weight


def _documents(path: Path, template: ChatTemplate | None) -> list[Document]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    if not files:
        raise InputError(f"{path}: no text in this folder, expected files ending in {', '.join(SUFFIXES)}")
    out: list[Document] = []
    for file in files:
        inner = file.relative_to(path).parts if path.is_dir() else ()
        domain = inner[0] if len(inner) > 1 else file.stem
        texts = _texts(file, template)
        origins = [file.name] if len(texts) == 1 else [f"{file.name}:{n}" for n in range(1, len(texts) + 1)]
        out += [Document(text, domain, origin) for text, origin in zip(texts, origins, strict=True)]
    if not any(document.text.strip() for document in out):
        raise InputError(f"{path}: empty, expected text")
    return [document for document in out if document.text.strip()]


def _texts(file: Path, template: ChatTemplate | None) -> list[str]:
    try:
        return read_chats(file, template) if file.suffix == ".jsonl" else [file.read_text("utf-8")]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8, expected text") from None


def pack(sets: list[TextSet], tokenizer: Tokenizer, context: int, windows: int | None = None, seed: int = 0) -> Corpus:
    """Pack documents into windows of `context` tokens, at most `windows` of them, shared out by the sets' weights.

    Documents of a set are shuffled by `seed` and joined without separators or BOS (the model's tokenizer adds none; a
    chat template brings its own); a set that is too short gives what it has and the others take its share. Windows of
    all sets are interleaved evenly, so that a part of the corpus is a sample of the whole.

    Raises ValueError when the text is shorter than one window.
    """
    if context < 2 or (windows is not None and windows < 1):
        raise InputError(f"context {context}, {windows} windows: expected at least 2 tokens and 1 window")
    order = np.random.default_rng(seed)
    streams = []
    for part in sets:
        texts = [part.documents[i].text for i in order.permutation(len(part.documents))]
        ids = [token for text in tokenizer.encode_batch(texts, add_special_tokens=False) for token in text.ids]
        streams.append(torch.tensor(ids, dtype=torch.int64))
    available = [len(stream) // context for stream in streams]
    if not sum(available):
        longest = max((len(stream) for stream in streams), default=0)
        raise InputError(f"calibration text: {longest} tokens in the longest set, expected one window of {context}")
    counts = shares(available, [part.weight for part in sets], windows)
    domains = tuple(dict.fromkeys(part.name for part in sets))
    placed = []
    for index, (stream, count) in enumerate(zip(streams, counts, strict=True)):
        for number in range(count):
            placed.append(((number + 0.5) / count, index, stream[number * context : (number + 1) * context]))
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
    )


def shares(available: list[int], weights: list[float | None], windows: int | None) -> list[int]:
    """How many windows each set gives: in proportion to its weight (None: to what it has), never more than it has."""
    wanted = [float(a) if w is None else w for a, w in zip(available, weights, strict=True)]
    if any(w is not None for w in weights):
        # Sets without a weight among weighted ones count as 1.
        wanted = [1.0 if w is None else w for w in weights]
    if windows is None:
        # As many as the mix allows without repeating anything, or everything when no weight was given.
        if all(w is None for w in weights):
            return list(available)
        scale = min(a / w for a, w in zip(available, wanted, strict=True) if a)
        return [min(a, max(1, int(w * scale))) if a else 0 for a, w in zip(available, wanted, strict=True)]
    counts, left = [0] * len(available), min(windows, sum(available))
    while left:
        open_sets = [i for i, a in enumerate(available) if counts[i] < a]
        # The set that lies furthest behind its share gets the next window.
        behind = min(open_sets, key=lambda i: ((counts[i] + 1) / wanted[i], i))
        counts[behind] += 1
        left -= 1
    return counts
