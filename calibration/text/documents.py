"""Index the documents of text files in one pass, and read each again on use."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from mmquant.errors import InputError

from .chat import ChatTemplate
from .files import decoded, json_rows, kind_of, line_rows
from .rows import Chat, parse_line, parse_row

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text of a set, in memory."""

    text: str
    domain: str
    origin: str  # file name, with the line for JSONL

    def parts(self) -> Iterator[str]:
        """The text in parts."""
        yield self.text


@dataclass(frozen=True)
class StoredDocument:
    """One text of a file: all of it, or the row at some bytes."""

    file: TextFile
    index: int
    domain: str
    origin: str

    def parts(self) -> Iterator[str]:
        """The text in parts, read anew."""
        return self.file.parts(self.index)

    @property
    def text(self) -> str:
        """All of it at once."""
        return "".join(self.parts())


@dataclass
class TextFile:
    """A file and where its documents are; a text file is one document."""

    path: Path
    kind: str
    template: ChatTemplate | None
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    halves: int = 0  # lone surrogates that became U+FFFD
    first_half: int = 0  # the row of the first

    @property
    def unit(self) -> str:
        """What its documents are counted in."""
        return "row" if self.kind == "json" else "line"

    def scan(self) -> Iterator[tuple[int, int, bytes, bool]]:
        """(index, characters, SHA-256, whether it says anything) of every document; what is wrong with one is said."""
        if self.kind == "text":
            digest, count, blank = hashlib.sha256(), 0, True
            for part in decoded(self.path):
                digest.update(part.encode())
                count, blank = count + len(part), blank and not part.strip()
            yield 0, count, digest.digest(), not blank
            return
        rows = line_rows(self.path) if self.kind == "lines" else json_rows(self.path)
        for index, row in enumerate(rows):
            self.numbers.append(row.number)
            self.offsets.append(row.offset)
            self.lengths.append(row.length)
            text = self._text(row.number, row.value)
            found = len(_SURROGATE.findall(text))
            if found:
                text, self.halves = _SURROGATE.sub("\ufffd", text), self.halves + found
                self.first_half = self.first_half or row.number
            yield index, len(text), hashlib.sha256(text.encode()).digest(), bool(text.strip())

    def parts(self, index: int) -> Iterator[str]:
        """A document's text in parts. InputError when the file is no longer what it was."""
        if self.kind == "text":
            yield from decoded(self.path)
            return
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            raw = file.read(self.lengths[index])
        try:
            value = raw.decode() if self.kind == "lines" else json.loads(raw)
        except ValueError:
            raise InputError(f"{self.path}: changed while it was read") from None
        yield _SURROGATE.sub("\ufffd", self._text(self.numbers[index], value))

    def _text(self, number: int, value: object) -> str:
        try:
            parsed = parse_line(str(value)) if self.kind == "lines" else parse_row(value)
            if isinstance(parsed, Chat):
                if self.template is None:
                    raise InputError("a chat, but the checkpoint has no chat template")
                parsed = self.template.render(parsed)
        except InputError as error:
            raise InputError(f"{self.path}: {self.unit} {number}: {error}") from None
        return parsed

    def notes(self) -> list[str]:
        """What was changed on the way, in words."""
        if not self.halves:
            return []
        where = f"{self.path}: {self.unit} {self.first_half}"
        return [f"{where}: a lone surrogate (half of a character) became U+FFFD, {self.halves} in the file"]


def open_file(path: Path, template: ChatTemplate | None) -> TextFile:
    """A file by its content. InputError for what is no text."""
    return TextFile(path, kind_of(path), template)


class StoredDocuments(Sequence[StoredDocument]):
    """Documents of files, a few bytes each."""

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self._files: list[TextFile] = []
        self._file, self._index = array("I"), array("Q")

    def add(self, file: TextFile, index: int) -> None:
        """One more, the `index`-th of a file."""
        if not self._files or self._files[-1] is not file:
            self._files.append(file)
        self._file.append(len(self._files) - 1)
        self._index.append(index)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, at: int) -> StoredDocument: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[StoredDocument]: ...
    def __getitem__(self, at: int | slice) -> StoredDocument | Sequence[StoredDocument]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        file, index = self._files[self._file[at]], self._index[at]
        several = len(file.numbers) > 1
        return StoredDocument(file, index, self.domain, f"{file.path.name}:{index + 1}" if several else file.path.name)


def digest(texts: Iterable[str]) -> str:
    """SHA-256 over the SHA-256 of each text, in hexadecimal."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
