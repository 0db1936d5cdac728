"""Collect the training text of the demo model from a Debian 12 machine: code, docs, prose and Chinese, one list each.

The documentation packages must lie unpacked under DEBS, one folder a package (`apt-get download NAME`, `dpkg-deb -x`):
linux-doc-6.1 python3.11-doc perl-doc git-doc postgresql-doc-15 debian-reference-en debian-reference-zh-cn manpages-zh.
The prose is printed by the command `bible` (package bible-kjv).

    python collect_text.py DEBS corpus.json
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

Document = tuple[str, str]  # name, text
SHORTEST = 400  # characters; shorter files are licence stubs and empty modules
VERSES = 120  # lines of the Bible that make one document


def read_text(path: Path) -> str:
    """A file's text, gunzipped if its name says so; bytes that are not UTF-8 are dropped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "ignore")


def strip_html(page: str) -> str:
    """The text of an HTML page, without scripts and styles."""
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def strip_roff(page: str) -> str:
    """The text of a manual page: comment lines, requests at the start of a line and font changes removed."""
    return re.sub(r'(?m)^\.\\".*\n|^\.[A-Za-z]+ ?|\\f.', "", page)


def files(root: Path, pattern: str, suffixes: str) -> Iterator[Path]:
    """Regular files below `root` that match the glob and end in one of the regular expression's suffixes."""
    ending = re.compile(rf"\.({suffixes})(\.gz)?$")
    return (path for path in root.glob(pattern) if path.is_file() and ending.search(path.name))


def code() -> Iterator[Document]:
    for path in Path(sysconfig.get_path("stdlib")).rglob("*.py"):
        if "site-packages" not in path.parts:
            yield str(path), read_text(path)
    for path in Path("/usr/include").rglob("*.h"):
        yield str(path), read_text(path)


def docs(debs: Path) -> Iterator[Document]:
    for path in files(debs / "linux-doc-6.1", "**/*", "rst|txt"):
        if "translations" not in path.parts:
            yield str(path), read_text(path)
    for path in files(debs / "python3.11-doc", "**/_sources/**/*", "txt"):
        yield str(path), read_text(path)
    for path in files(debs / "perl-doc", "**/*", "pod"):
        yield str(path), read_text(path)
    for path in files(debs / "git-doc", "**/*", "txt"):
        yield str(path), read_text(path)
    for package in ("postgresql-doc-15", "debian-reference-en"):
        for path in files(debs / package, "**/*", "html"):
            yield str(path), strip_html(read_text(path))


def prose() -> Iterator[Document]:
    """The King James Bible; each line of the command's output starts with the verse's reference."""
    printed = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    verses = [line.split(" ", 1)[-1] for line in printed.splitlines()]
    for start in range(0, len(verses), VERSES):
        yield f"kjv{start}", "\n".join(verses[start : start + VERSES]) + "\n"


def chinese(debs: Path) -> Iterator[Document]:
    for path in files(debs / "linux-doc-6.1", "**/*", "rst|txt"):
        if "translations" in path.parts and ("zh_CN" in path.parts or "zh_TW" in path.parts):
            yield str(path), read_text(path)
    for path in files(debs / "debian-reference-zh-cn", "**/*", "html|txt"):
        text = read_text(path)
        yield str(path), strip_html(text) if "html" in path.name else text
    for path in (debs / "manpages-zh").glob("**/zh_CN/**/*.gz"):
        yield str(path), strip_roff(read_text(path))


def tidy(documents: Iterator[Document], seen: set[bytes]) -> list[Document]:
    """Documents without carriage returns, long runs of blank lines, stubs and exact repeats (`seen` is updated)."""
    kept = []
    for name, text in documents:
        text = re.sub(r"\n{4,}", "\n\n\n", text.replace("\r", ""))
        digest = hashlib.md5(text.encode()).digest()
        if len(text) > SHORTEST and digest not in seen:
            seen.add(digest)
            kept.append((name, text))
    return kept


def main(debs: Path, out: Path) -> None:
    seen: set[bytes] = set()
    domains = {"prose": prose(), "code": code(), "docs": docs(debs), "zh": chinese(debs)}
    corpus = {domain: tidy(documents, seen) for domain, documents in domains.items()}
    for domain, documents in corpus.items():
        print(domain, len(documents), f"{sum(len(text) for _, text in documents) / 1e6:.1f} M characters")
    out.write_text(json.dumps(corpus, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
