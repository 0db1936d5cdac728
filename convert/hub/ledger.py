"""What a folder's ledgers say without a hub's client: which files were published and are no longer here."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ..files.parse import parse_json, take_map

LEDGER = ".mmquant-push"
COMMITTED = "committed"


def sent(folder: Path) -> set[str]:
    """Names of the files of `folder` that are on a hub, by the ledgers of its pushes, and no longer here."""
    found: set[str] = set()
    for path in sorted(folder.glob(f"{LEDGER}.*.json")):
        files: dict[str, dict[str, Any]] = take_map(parse_json(path.read_bytes(), str(path)), "files", dict, str(path))
        found |= {PurePosixPath(name).name for name, entry in files.items() if entry.get("state") == COMMITTED}
    return {name for name in found if not (folder / name).exists()}
