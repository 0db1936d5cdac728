"""Evaluation samples: token windows with domain, document and first scored position.

Position p of a window predicts token p + 1. By default every position but the last is scored; with `stride` below the
window's length only the tokens that the window before did not score; by llama-perplexity's convention the second half:
positions context // 2 to context - 2 (llama.cpp tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mmquant.errors import InputError

from ...convert.files.atomic import sha256_file
from .chat import ChatTemplate
from .corpus import DEFAULT, bundled
from .documents import StoredDocument, StoredDocuments, open_file
from .files import OTHER_DATA
from .tokens import tokens_of

CONVENTIONS = ("all", "llama.cpp")
SUFFIXES = (".txt", ".raw", ".jsonl", ".ndjson", ".json")
# Positions that are told apart: of long windows, and of those within the first range of them.
LONG_EDGES = (0, 2048, 8192, 32768, 65536)
SHORT_EDGES = (0, 128, 512)
FEWEST_DOCUMENTS = 8  # with fewer, resampling documents says nothing: windows are resampled


@dataclass(frozen=True)
class Text:
    """One file of evaluation text: its documents in order, the digest of its bytes and that of its documents."""

    name: str
    domain: str
    sha256: str
    documents: Sequence[str] | Sequence[StoredDocument]
    digest: str = ""

    def parts(self) -> Iterator[Iterable[str]]:
        """Every document in parts."""
        return ([d] if isinstance(d, str) else d.parts() for d in self.documents)

    def joined(self) -> Iterator[str]:
        """All documents in parts, a line apart."""
        for number, document in enumerate(self.parts()):
            if number:
                yield "\n"
            yield from document


@dataclass(frozen=True)
class Sample:
    """W windows of T tokens. `first` [W]: first scored position; `document`, `domain` [W]: index of each window's."""

    tokens: Tensor  # [W, T] int64
    first: NDArray[np.int64]
    document: NDArray[np.int64]
    domain: NDArray[np.int64]
    domains: tuple[str, ...]
    texts: tuple[dict[str, Any], ...]
    convention: str
    stride: int

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return self.tokens.shape[0]

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.tokens.shape[1]

    @property
    def scored(self) -> NDArray[np.int64]:
        """[W] positions that each window scores."""
        return self.context - 1 - self.first

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """[first, end) of the positions that are told apart in this context."""
        edges = LONG_EDGES if self.context > LONG_EDGES[1] else SHORT_EDGES
        kept = [edge for edge in edges if edge < self.context]
        return tuple(zip(kept, [*kept[1:], self.context], strict=True))

    def range_of(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the range that each position is in."""
        return np.searchsorted([end for _, end in self.ranges], position, "right")

    def positions(self) -> NDArray[np.int64]:
        """[positions] the place in its window of every scored position, in the order of the windows."""
        return np.concatenate([np.arange(first, self.context - 1) for first in self.first.tolist()])

    @property
    def unit(self) -> str:
        """What the bootstrap resamples: "document", or "window" where there are too few documents."""
        return "document" if len(np.unique(self.document)) >= FEWEST_DOCUMENTS else "window"

    def units(self) -> NDArray[np.int64]:
        """[positions] the resampled unit of every scored position, in the order of the windows."""
        ids = self.document if self.unit == "document" else np.arange(self.windows)
        return np.repeat(ids, self.scored)

    def part(self, windows: range) -> Sample:
        """The same sample with some of its windows only."""
        index = np.arange(windows.start, windows.stop)
        tokens = self.tokens[windows.start : windows.stop]
        fields = (self.first[index], self.document[index], self.domain[index])
        return Sample(tokens, *fields, self.domains, self.texts, self.convention, self.stride)

    def fingerprint(self) -> str:
        """Digest of the tokens and of what is scored."""
        digest = hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes())
        digest.update(self.first.astype("<i8").tobytes())
        digest.update(f"{self.context} {self.stride} {self.convention}".encode())
        return digest.hexdigest()


def read_text(
    path: Path, domain: str | None = None, template: ChatTemplate | None = None, notes: list[str] | None = None
) -> Text:
    """A text file, or a JSON or JSONL file of documents and chats (rows.py); the domain is its stem by default.

    Everything is looked at once and read again when it is used; `notes` takes what was changed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such text file")
    file, documents, digest = open_file(path, template), StoredDocuments(domain or path.stem), hashlib.sha256()
    for index, _, one, _ in file.scan():
        documents.add(file, index)
        digest.update(one)
    if notes is not None:
        notes += file.notes()
    return Text(path.name, documents.domain, sha256_file(path), documents, digest.hexdigest())


def read_texts(
    paths: Sequence[str | Path], template: ChatTemplate | None = None, notes: list[str] | None = None
) -> list[Text]:
    """Texts of files and folders (their .txt, .raw, .json and .jsonl); DOMAIN=PATH names the domain.

    `default` is the bundled evaluation text, as it is without any path.
    """
    return [read_text(file, domain, template, notes) for domain, file in text_files(paths)]


def text_files(paths: Sequence[str | Path]) -> list[tuple[str | None, Path]]:
    """(domain, where it is named; file) of everything that `read_texts` reads. InputError for what is not there."""
    found: list[tuple[str | None, Path]] = []
    for item in paths or [DEFAULT]:
        domain, spec = None, str(item)
        if not Path(spec).exists() and "=" in spec:
            domain, spec = spec.split("=", 1)
        path = bundled("evaluation") if spec == DEFAULT else Path(spec)
        found += [(domain, file) for file in (_inside(path) if path.is_dir() else [path])]
    for _, path in found:
        if not path.is_file():
            raise InputError(f"{path}: no such text file")
    return found


def _inside(folder: Path) -> list[Path]:
    inside = sorted(p for p in folder.iterdir() if p.is_file())
    other = next((p for p in inside if p.suffix in OTHER_DATA), None)
    if other is not None:
        raise InputError(f"{other}: not text, expected {', '.join(SUFFIXES)} (or name the files one by one)")
    files = [p for p in inside if p.suffix in SUFFIXES]
    if not files:
        raise InputError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder")
    return files


def make_sample(
    texts: list[Text],
    tokenizer: Tokenizer,
    context: int,
    count: int | None = None,
    convention: str = "all",
    stride: int | None = None,
) -> Sample:
    """Cut texts into windows; `count` of them at most, taken in turn from each domain, from its start.

    Raises ValueError for a text shorter than one window, and for a context or stride that makes no sense.
    """
    if convention not in CONVENTIONS:
        raise InputError(f"convention {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context:
        raise InputError(
            f"context {context}, stride {stride}: expected a context of 2 or more and 1 <= stride <= context"
        )
    if convention != "all" and stride != context:
        raise InputError(f"stride {stride}: the convention of llama.cpp has none, expected the context {context}")
    cut = [_cut(text, tokenizer, context, stride, convention, count) for text in texts]
    chosen = _shares([len(tokens) for tokens, _, _ in cut], count)
    names = tuple(dict.fromkeys(text.domain for text in texts))
    starts = np.cumsum([0, *(int(document.max()) + 1 for _, _, document in cut)])
    used = [
        {"name": t.name, "domain": t.domain, "sha256": t.sha256, "windows": n, "documents": len(t.documents)}
        for t, n in zip(texts, chosen, strict=True)
    ]
    return Sample(
        tokens=torch.cat([tokens[:n] for (tokens, _, _), n in zip(cut, chosen, strict=True)]),
        first=np.concatenate([first[:n] for (_, first, _), n in zip(cut, chosen, strict=True)]),
        document=np.concatenate([d[:n] + s for (_, _, d), n, s in zip(cut, chosen, starts, strict=False)]),
        domain=np.repeat([names.index(text.domain) for text in texts], chosen),
        domains=names,
        texts=tuple(used),
        convention=convention,
        stride=stride,
    )


def _cut(
    text: Text, tokenizer: Tokenizer, context: int, stride: int, convention: str, count: int | None
) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """(windows [n, context], first scored position [n], document [n]) of one text.

    It is read as far as `count` windows reach.
    """
    ids, owners = array("i"), array("i")
    for number, _, found in tokens_of(tokenizer, text.parts()):
        ids.extend(found)
        owners.extend([number] * len(found))
        if count is not None and len(ids) >= context + (count - 1) * stride:
            break
    if len(ids) < context:
        raise InputError(f"{text.name}: {len(ids)} tokens, shorter than one window of {context}")
    flat, owner = torch.tensor(ids, dtype=torch.int64), np.array(owners)
    tokens = flat.unfold(0, context, stride)[:count].contiguous()
    first = np.full(len(tokens), context // 2 if convention == "llama.cpp" else 0, dtype=np.int64)
    if stride < context:
        # A window of overlap scores only tokens that no window before it has scored.
        first[1:] = context - 1 - stride
    return tokens, first, owner[np.arange(len(tokens)) * stride]


def _shares(available: list[int], count: int | None) -> list[int]:
    """How many windows of each text: as equal as the texts' lengths allow, `count` in all."""
    if count is None:
        return available
    shares = [0] * len(available)
    left = min(count, sum(available))
    while left:
        for i, limit in enumerate(available):
            if left and shares[i] < limit:
                shares[i] += 1
                left -= 1
    return shares
