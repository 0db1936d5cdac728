"""Read text files of any size in parts: content type, decoded text, rows."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ...convert.files.lfs import refuse_pointer
from .rows import parse_row

SUFFIXES = (".txt", ".md", ".rst", ".raw", ".jsonl", ".ndjson", ".json")
ROWS = (".jsonl", ".ndjson", ".json")
# What people keep data sets in besides; named, because a folder of it must not pass for one without text.
OTHER_DATA = (".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z", ".feather")
PART = 1 << 18  # bytes read at once
LARGEST_ROW = 64 << 20  # characters
SNIFFED = 1 << 16  # characters of a .txt that are searched for a first row
_MAGIC = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "PDF",
    b"GGUF": "GGUF",
    b"SQLite format 3": "SQLite",
}
_ADVICE = {
    "UTF-16": "iconv -f UTF-16 -t UTF-8 converts it",
    "UTF-32": "iconv -f UTF-32 -t UTF-8 converts it",
    "Parquet": "the datasets library saves JSONL with to_json(path, force_ascii=False)",
    "gzip": "gunzip unpacks it",
    "Zstandard": "unzstd unpacks it",
}
_BETWEEN = {False: re.compile(r"[\s\ufeff]*"), True: re.compile(r"[\s,]*")}


@dataclass(frozen=True)
class Row:
    """One row of a data set: its number, where its bytes are, and its value."""

    number: int
    offset: int
    length: int
    value: Any


def kind_of(path: Path) -> str:
    """`text`, `lines` (JSON, one row a line) or `json` (a list, or objects over several lines), by content.

    InputError for what is not UTF-8 text, by its signature and in words.
    """
    with open(path, "rb") as file:
        first = file.read(4096)
    refuse_pointer(str(path), first)
    for magic, name in _MAGIC.items():
        if first.startswith(magic):
            raise _refused(path, name)
    if path.suffix in (".csv", ".tsv"):
        raise InputError(f"{path}: a table, expected text, or JSONL with a row a line")
    if b"\0" in first:
        wide = first[1::2].count(0) > len(first) // 4 or first[::2].count(0) > len(first) // 4
        if wide:
            raise _refused(path, "UTF-16")
        raise InputError(f"{path}: byte {first.index(0)} is NUL: binary, expected UTF-8 text")
    start = first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if path.suffix in ROWS:
        return _rows_kind(path, start)
    return _rows_kind(path, start) if start in (b"{", b"[") and _has_rows(path) else "text"


def _refused(path: Path, name: str) -> InputError:
    advice = f" ({_ADVICE[name]})" if name in _ADVICE else ""
    return InputError(f"{path}: {name}, expected UTF-8 text or JSONL{advice}")


def _rows_kind(path: Path, start: bytes) -> str:
    """A list is read as one; objects are a row a line unless the first line is only a part of one."""
    if start == b"[":
        return "json"
    with open(path, "rb") as file:
        line = next((line for line in iter(lambda: file.readline(LARGEST_ROW), b"") if line.strip()), b"")
    whole = line.strip().endswith(b"}") or path.suffix in (".jsonl", ".ndjson")
    return "lines" if whole else "json"


def _has_rows(path: Path) -> bool:
    """Whether a file that is called a text begins with a row of a data set."""
    try:
        first = next(json_rows(path, SNIFFED), None)
        if first is not None:
            parse_row(first.value)
    except InputError:
        return False
    return first is not None


def decoded(path: Path, newlines: bool = True) -> Iterator[str]:
    """The text in parts, without its byte order mark; `newlines`: all of them as LF. InputError when not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if newlines else "utf-8")()
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    done = 0
    with open(path, "rb") as file:
        while True:
            data = file.read(PART)
            kept = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = done - kept + error.start
                raise InputError(f"{path}: byte {at} is not UTF-8, expected text") from None
            done += len(data)
            yield ends.decode(text, final=not data) if newlines else text
            if not data:
                return


def line_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file; `value` is the line's text. InputError naming the line that is not UTF-8."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if line.strip():
                try:
                    yield Row(number, offset + len(raw) - len(line), len(line), line.decode())
                except UnicodeDecodeError as error:
                    at = offset + len(raw) - len(line) + error.start
                    raise InputError(f"{path}: line {number}: byte {at} is not UTF-8, expected text") from None
            offset += len(raw)


class _Buffer:
    """Text ahead of a position in a file, and the byte at which it stands."""

    def __init__(self, path: Path) -> None:
        self._parts = decoded(path, newlines=False)
        self.text, self.at, self.offset = "", 0, 0

    def more(self) -> bool:
        """Read as much again as is held; False at the end of the file."""
        before, expected = len(self.text), max(1, len(self.text) - self.at)
        parts, got = [self.text[self.at :]], 0
        for part in self._parts:
            parts.append(part)
            got += len(part)
            if got >= expected:
                break
        self.text, before, self.at = "".join(parts), before - self.at, 0
        return len(self.text) > before

    def skip(self, to: int) -> None:
        self.offset += len(self.text[self.at : to].encode())
        self.at = to


def json_rows(path: Path, limit: int = LARGEST_ROW) -> Iterator[Row]:
    """Elements of a JSON list, or objects one after another, without holding more than one. InputError for others."""
    decoder, buffer = json.JSONDecoder(), _Buffer(path)
    listed, number = False, 0
    while True:
        match = _BETWEEN[listed].match(buffer.text, buffer.at)
        buffer.skip(match.end() if match else buffer.at)
        if buffer.at == len(buffer.text):
            if buffer.more():
                continue
            if listed:
                raise InputError(f"{path}: the list does not end, the file is cut off")
            return
        head = buffer.text[buffer.at]
        if head == "[" and not listed and number == 0:
            listed = True
            buffer.skip(buffer.at + 1)
            continue
        if head == "]" and listed:
            return
        value, end = _element(decoder, buffer, f"{path}: row {number + 1}", limit)
        number, start = number + 1, buffer.offset
        buffer.skip(end)
        yield Row(number, start, buffer.offset - start, value)


def _element(decoder: json.JSONDecoder, buffer: _Buffer, where: str, limit: int) -> tuple[Any, int]:
    """The value at the buffer's position and where it ends; reads on while it is not whole."""
    while True:
        try:
            value, end = decoder.raw_decode(buffer.text, buffer.at)
        except json.JSONDecodeError as error:
            cut = error.pos > len(buffer.text) - 16 or error.msg.startswith("Unterminated")
            if not cut or len(buffer.text) - buffer.at > limit or not buffer.more():
                raise InputError(f"{where}: not JSON ({error.msg})") from None
            continue
        except (RecursionError, ValueError) as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if end < len(buffer.text) or not buffer.more():
            return value, end
