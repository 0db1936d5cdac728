"""Write one HTML page of a folder of finished artifacts: what `mmquant report` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ..convert.files.parse import is_object, parse_json
from ..convert.files.schemas import ValidationError, hold_to_schema
from ..convert.fitting.text import REPORT
from ..convert.hub.card import MANIFEST, read_manifest
from .output import check_output
from .reports.artifacts import artifacts_page
from .reports.page import write
from .results import Result

SCORES = "summary.json"  # of `mmquant demo`: its evaluation is there


@dataclass(frozen=True)
class Reported(Result):
    """The page, and the artifacts that it shows."""

    path: Path
    artifacts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        return {"path": str(self.path), "artifacts": list(self.artifacts)}


def report(folder: str | Path, out: str | Path | None = None, evaluations: Sequence[str | Path] = ()) -> Reported:
    """Write one page about the artifacts of a folder: an artifact, or a folder of them (`run`, `demo`).

    out           the page; default mmquant.report.html in the folder
    evaluations   results of `mmquant eval --json`; those of `demo` are found by themselves

    The page needs no network. Plots need matplotlib (the extra `report`). InputError when the folder holds no finished
    artifact, or an evaluation is none.
    """
    top = Path(folder)
    target = Path(out) if out is not None else top / REPORT
    manifests = _distinct({where.name: read_manifest(where) for where in _finished(top)})
    if not manifests:
        raise InputError(f"{top}: no {MANIFEST} in it or one level below, expected finished artifacts")
    check_output("--out", target)
    results = [_evaluation(Path(path)) for path in evaluations] or list(_found(top))
    title = f"mmquant: {top.resolve().name}"
    write(target, artifacts_page(title, manifests, results))
    return Reported(target, tuple(a["id"] for m in manifests for a in m["artifacts"]))


def _finished(top: Path) -> Iterator[Path]:
    """Folders with a manifest: the folder itself, else those directly below it, by name."""
    if not top.is_dir():
        raise InputError(f"{top}: no such folder, expected finished artifacts")
    if (top / MANIFEST).is_file():
        yield top
        return
    yield from sorted(path.parent for path in top.glob(f"*/{MANIFEST}") if path.is_file())


def _distinct(manifests: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifests by folder; an artifact that is called as one of another folder is called by its folder as well."""
    ids = [a["id"] for found in manifests.values() for a in found["artifacts"]]

    def called(entry: dict[str, Any], key: str, folder: str) -> dict[str, Any]:
        return entry | {key: f"{entry[key]} ({folder})"} if ids.count(entry[key]) > 1 else entry

    return [
        found
        | {"artifacts": [called(a, "id", folder) for a in found["artifacts"]]}
        | {"targets": [called(t, "artifact", folder) for t in found["targets"]]}
        for folder, found in manifests.items()
    ]


def _evaluation(path: Path) -> dict[str, Any]:
    """A result of eval in a file of its own."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected the output of mmquant eval --json")
    return _checked(parse_json(path.read_bytes(), str(path)), path)


def _found(top: Path) -> Iterator[dict[str, Any]]:
    """The evaluation that `mmquant demo` left."""
    path = top / SCORES
    if path.is_file():
        data = parse_json(path.read_bytes(), str(path))
        if is_object(data) and "eval" in data:
            yield _checked(data["eval"], path)


def _checked(data: object, path: Path) -> dict[str, Any]:
    """A result of eval, held against its schema."""
    try:
        hold_to_schema(data, "eval")
    except ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "top level"
        found = f"{path}: {where}: {error.message[:200]}"
        raise InputError(f"{found}, expected the output of mmquant eval --json") from None
    assert is_object(data)
    return dict(data)
