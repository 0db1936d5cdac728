"""Collect the development model's text from Debian packages: seven domains, one document list per domain.

    python collect.py DEBS corpus.json

DEBS holds one folder a package, unpacked (`apt-get download NAME`, `dpkg-deb -x`); README.md lists them. `diatheke`
(package diatheke) prints the two Bibles. What is missing is left out and said.
"""

from __future__ import annotations

import gettext
import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "demo-model"))
from chats import conversations
from collect_text import Document, code, docs, files, read_text, strip_html, strip_roff, tidy
from collect_text import chinese as chinese_documentation

VERSES, ENTRIES, POEMS = 120, 60, 40  # of the Bible, a dictionary, a collection that make one document
LANGUAGES = ("de", "fr", "es", "ru", "ja", "pl", "it", "pt_BR", "nl")
CHARACTERS = {"code": 27e6, "docs": 22e6, "prose": 30e6, "zh": 9e6, "chat": 9e6, "math": 16e6, "lang": 14e6}


def grouped(name: str, pieces: list[str], size: int, between: str = "\n") -> Iterator[Document]:
    for start in range(0, len(pieces), size):
        yield f"{name}{start}", between.join(pieces[start : start + size]) + "\n"


def r_strings(database: bytes) -> list[str]:
    """Every string of an R lazy-load database: zlib streams behind their lengths, strings as CHARSXP of XDR."""
    texts: list[str] = []
    while len(database) > 4:
        stream = zlib.decompressobj()
        data = stream.decompress(database[4:])
        database = stream.unused_data
        texts += [
            text.decode("utf-8", "ignore")
            for size, text in re.findall(rb"\x00[\x00\x04]\x00\x09\x00\x00(..)([^\x00]*)", data, re.S)
            if len(text) >= struct.unpack(">H", size)[0]
        ]
    return texts


def bible(debs: Path, package: str, name: str) -> Iterator[Document]:
    environment = {**os.environ, "SWORD_PATH": str(debs / package / "usr/share/sword")}
    arguments = ["diatheke", "-b", name, "-f", "plain", "-k", "Gen 1:1-Rev 22:21"]
    printed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    verses = [re.sub(r"^[^:]*:\d+: ", "", line) for line in printed.splitlines()]
    yield from grouped(package, [verse for verse in verses if verse.strip()], VERSES)


def dictionary(path: Path) -> Iterator[Document]:
    """Entries of a dictd file, without their labels of origin."""
    text = re.sub(
        r"\s*\[(1913 Webster|WordNet 1\.5|PJC)[^\]]*\]",
        "",
        gzip.decompress(path.read_bytes()).decode("utf-8", "ignore"),
    )
    documents = list(grouped(path.name, re.split(r"\n{2,}(?=\S)", text), ENTRIES, "\n\n"))
    yield from documents[::6]  # all of it would be half of the prose


def glosses(debs: Path) -> Iterator[Document]:
    """WordNet's definitions and examples."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = read_text(debs / "wordnet-base/usr/share/wordnet" / f"data.{part}").splitlines()
        found = [(line.split()[4].replace("_", " "), line.split(" | ")[1].strip()) for line in lines if " | " in line]
        yield from grouped(f"wordnet-{part}", [f"{word}: {gloss}." for word, gloss in found], ENTRIES)


def prose(debs: Path) -> Iterator[Document]:
    for package, name in (("sword-text-kjv", "engKJV2006eb"), ("sword-text-web", "engWEB2015eb")):
        yield from bible(debs, package, name)
    for path in files(debs / "anarchism", "**/*", "html"):
        yield str(path), strip_html(read_text(path))
    austen = r_strings((debs / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
    yield from grouped("austen", austen, 300)
    for path in sorted((debs / "fortunes/usr/share/games/fortunes").iterdir()):
        if path.suffix == "":
            yield from grouped(path.name, read_text(path).split("\n%\n"), ENTRIES, "\n\n")
    yield from glosses(debs)
    for path in sorted((debs / "dict-gcide").rglob("*.dz")):
        yield from dictionary(Path(path))
    for path in files(debs / "wesnoth-1.16-data", "**/*", "cfg"):
        lines = re.findall(r'(?:message|story|description|note)\s*=\s*_\s*"([^"]+)"', read_text(path))
        if lines:
            yield str(path), "\n\n".join(lines)


def poems(debs: Path) -> Iterator[Document]:
    for path in sorted((debs / "poetry").rglob("poet.*.json")):
        written = [
            f"{p.get('title', '')} {p.get('author', '')}\n" + "\n".join(p.get("paragraphs", ()))
            for p in json.loads(read_text(path))
        ]
        yield from grouped(path.name, written, POEMS, "\n\n")


def chinese(debs: Path) -> Iterator[Document]:
    yield from chinese_documentation(debs)
    yield from translations(debs, ("zh_CN",))
    yield from xml(debs / "gimp-help-zh-cn")
    yield from xml(debs / "libreoffice-help-zh-cn")
    documents = list(poems(debs))
    random.Random(0).shuffle(documents)
    yield from documents[:250]


def xml(folder: Path) -> Iterator[Document]:
    for path in files(folder, "**/*", "html|xhtml|page|xml"):
        yield str(path), re.sub(r"\n\s*\n+", "\n", strip_html(read_text(path)))


def translations(debs: Path, languages: tuple[str, ...]) -> Iterator[Document]:
    """Messages of Wesnoth's campaigns in other languages."""
    for language in languages:
        for path in sorted((debs / "wesnoth-1.16-data").glob(f"**/{language}/LC_MESSAGES/*.mo")):
            with path.open("rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # pyright: ignore
            yield from grouped(str(path), [text for key, text in catalog.items() if key], ENTRIES, "\n\n")


def languages(debs: Path) -> Iterator[Document]:
    for folder in sorted(debs.glob("manpages-*")):
        if folder.name not in ("manpages-dev", "manpages-zh"):
            for path in folder.glob("**/man[1-9]/*.gz"):
                yield str(path), strip_roff(read_text(path))
    for language in ("de", "fr", "es", "ja", "it"):
        for path in files(debs / f"debian-reference-{language}", "**/*", "html"):
            yield str(path), strip_html(read_text(path))
    yield from translations(debs, LANGUAGES)
    for language in ("de", "fr", "es", "ru", "pl"):
        yield from xml(debs / "gnome-user-docs/usr/share/help" / language)
    for path in sorted(debs.glob("fortunes-*/usr/share/games/fortunes/**/*.u8")):
        yield from grouped(str(path), read_text(path).split("\n%\n"), ENTRIES, "\n\n")


def mathematics(debs: Path) -> Iterator[Document]:
    """Formal proofs, computer algebra, manuals of both, tables and JSON."""
    for name in ("set.mm", "nf.mm", "ql.mm"):
        text = read_text(debs / "metamath-databases/usr/share/metamath/databases" / name)[-9_000_000:]
        yield from grouped(name, re.split(r"\n(?=\s*\$\{)", text), 30)
    roots = {"libcoq-stdlib": "v", "agda-stdlib": "agda", "hol-light": "ml|hl", "maxima-share": "mac|lisp"}
    roots |= {
        "singular-data": "lib",
        "pari-doc": "tex|html",
        "unicode-data": "txt",
        "hwdata": "ids",
        "iso-codes": "json",
    }
    for package, suffixes in roots.items():
        for path in files(debs / package, "**/*", suffixes):
            text = read_text(path)
            if "html" in path.name:
                text = strip_html(text)
            for start in range(0, min(len(text), 400_000), 20_000):
                yield f"{path}:{start}", text[start : start + 20_000]
    for package in ("octave-doc", "maxima-doc"):
        yield from xml(debs / package)


def main(debs: Path, out: Path) -> None:
    seen: set[bytes] = set()
    makers: dict[str, Callable[[], Iterator[Document]]] = {
        "code": code,
        "docs": lambda: docs(debs),
        "prose": lambda: prose(debs),
        "zh": lambda: chinese(debs),
        "math": lambda: mathematics(debs),
        "lang": lambda: languages(debs),
        "chat": lambda: conversations(debs),
    }
    corpus: dict[str, list[Document]] = {}
    for domain, make in makers.items():
        documents = tidy(make(), seen)
        random.Random(0).shuffle(documents)
        kept, size = [], 0
        for name, text in documents:
            kept.append((name, text[:60_000]))
            size += len(kept[-1][1])
            if size > CHARACTERS[domain]:
                break
        corpus[domain] = kept
        print(f"{domain}: {len(kept)} of {len(documents)} documents, {size / 1e6:.1f} M characters", flush=True)
    out.write_text(json.dumps(corpus, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
