"""Check a manifest (mmquant.fit.json) that comes from a folder or a hub, without torch: its schema, and its paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from .files.parse import one_line, parse_json, path_fault, short
from .files.schemas import ValidationError, hold_to_schema


def read_checked(path: Path) -> dict[str, Any]:
    """The manifest in this file. Raises InputError when it is broken."""
    manifest = parse_json(path.read_bytes(), str(path))
    check_manifest(manifest, str(path))
    return manifest


def check_manifest(manifest: dict[str, Any], where: str) -> None:
    """InputError unless the schema holds and every path stays inside the manifest's folder."""
    try:
        hold_to_schema(manifest, "fit")
    except ValidationError as error:
        raise InputError(f"{where}: {error.json_path}: {one_line(error.message)}") from None
    for artifact in manifest["artifacts"]:
        paths = [file["path"] for file in artifact["files"]]
        paths += [artifact["entry"]] if artifact["entry"] != "." else []
        for path in paths:
            if fault := path_fault(path):
                raise InputError(f"{where}: the path {short(path)}: {fault}")
