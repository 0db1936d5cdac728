"""Build and read the manifest (mmquant.fit.json): files, quality, fit, provenance. It is written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from .files.atomic import sha256_file, write_whole
from .files.lock import hold
from .files.schemas import hold_to_schema
from .fitting.manifest import target_blocks
from .fitting.memory import kv_table
from .fitting.requires import requires
from .fitting.text import FIT_TEXT, fit_text
from .fitting.weights import Weights
from .hub.hubs import HUBS
from .licence import LICENSE_FILES, UNKNOWN_NAME, Licence, judge
from .manifest_check import read_checked
from .models import architecture_of
from .models.geometry import Geometry
from .source import Source

MANIFEST = "mmquant.fit.json"
QUALITY_WAIT = 60.0  # seconds for another process to put its quality block
UNKNOWN_BASE = "unknown"  # a local folder's name is no model's
UNKNOWN_REVISION = "0" * 40  # a local folder has no hub revision; provenance carries the weights' fingerprint


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path below its folder, bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """What the manifest says of one artifact; `entry` is the file or folder to give to an engine."""

    id: str
    format: str
    label: str
    entry: str
    files: tuple[FileEntry, ...]
    weights: Weights
    provenance: Mapping[str, Any]


def license_block(source: Source) -> dict[str, Any]:
    """What the source's licence file says: name, link, whether commercial use is allowed."""
    texts = (source.small_file(n) for n in LICENSE_FILES)
    text = next((t for t in texts if t), b"").decode(errors="replace")
    judged = judge(text) if text.strip() else Licence("unknown", None, "", "unknown")
    name = {"apache-2.0": "Apache-2.0", "mit": "MIT"}.get(judged.id, judged.id)
    name = "unknown" if judged.name == UNKNOWN_NAME else f"{name}:{judged.name}" if judged.name else name
    notice = next((line.strip() for line in text.splitlines() if line.strip().startswith("Copyright")), "")
    return {"spdx_or_name": name, "link": judged.link, "commercial_use": judged.use, "notice": notice}


def geometry_block(g: Geometry) -> dict[str, int]:
    """Sizes as the manifest has them."""
    return {
        "layers": g.layers,
        "hidden": g.hidden,
        "q_heads": g.heads,
        "kv_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "experts": g.experts,
        "experts_per_token": g.experts_per_token,
        "expert_ffn": g.expert_width,
        "vocab": g.vocab,
    }


def model_block(source: Source, base_model: str, revision: str, origin: str) -> dict[str, Any]:
    """What was quantized."""
    g = source.geometry
    return {
        "base_model": base_model,
        "base_revision": revision,
        "source": origin,
        "architecture": architecture_of(source.config).model_type,
        "parameters": g.parameters,
        "active_parameters": g.active_parameters,
        "geometry": geometry_block(g),
        "max_context_tokens": g.max_context,
        "kv_bytes_per_token": kv_table(g),
    }


def artifact_block(artifact: Artifact, g: Geometry) -> dict[str, Any]:
    """What was written."""
    weights = artifact.weights
    return {
        "id": artifact.id,
        "format": artifact.format,
        "quant_label": artifact.label,
        "bits_per_weight": round(8 * weights.total / g.parameters, 4),
        "entry": artifact.entry,
        "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in artifact.files],
        "weights": {
            "total": weights.total,
            "resident": weights.resident,
            "experts": weights.experts,
            "expert_layer": list(weights.expert_layer),
            "basis": "exact",
        },
        **({"requires": asked} if (asked := requires(artifact.provenance.get("run", {}), g)) else {}),
        "quality": {"status": "not-measured"},
        "provenance": dict(artifact.provenance),
    }


def build(source: Source, artifact: Artifact, version: str) -> dict[str, Any]:
    """The manifest of one artifact of `source`."""
    origin = source.origin
    base_model = origin.repo or UNKNOWN_BASE
    hub = HUBS[origin.hub].manifest_name if origin.hub in HUBS else origin.hub
    g, run = source.geometry, artifact.provenance.get("run", {})
    return {
        "schema": "mmquant-fit",
        "schema_version": "1.1",
        "generated": datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z"),
        "generator": {"name": "mmquant", "version": version},
        "model": model_block(source, base_model, origin.revision or UNKNOWN_REVISION, hub),
        "license": license_block(source),
        "artifacts": [artifact_block(artifact, g)],
        "targets": target_blocks(artifact.id, artifact.format, artifact.entry, artifact.weights, g, run),
    }


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Validate and write, what it says for people (FIT.md) first; an invalid manifest is our bug."""
    data = as_bytes(manifest)
    write_whole(folder / FIT_TEXT, fit_text(manifest).encode())
    write_whole(folder / MANIFEST, data)


def as_bytes(manifest: dict[str, Any]) -> bytes:
    """The file's bytes; an invalid manifest is our bug."""
    hold_to_schema(manifest, "fit")
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None when there is none; InputError when it is broken."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    return read_checked(path)


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Hold the files that are there against the sizes of their manifest; InputError naming the first other one.

    `push --delete-after-upload` leaves the manifest without the weights: a missing file is no fault here.
    """
    for file in [file for artifact in manifest["artifacts"] for file in artifact["files"]]:
        path = folder / file["path"]
        if path.is_file() and path.stat().st_size != file["size"]:
            size = path.stat().st_size
            raise InputError(f"{path}: {size} bytes, {MANIFEST} says {file['size']}: not the file that was written")


def check_files(folder: Path) -> None:
    """Hold a finished artifact's files against the digests of its manifest, where there is one.

    InputError naming the first that is missing, of another size or of other bytes.
    """
    found = read(folder) or {"artifacts": []}
    check_sizes(folder, found)
    for file in [file for artifact in found["artifacts"] for file in artifact["files"]]:
        path = folder / file["path"]
        if not path.is_file():
            raise InputError(f"{path}: no such file, {MANIFEST} lists it")
        digest = sha256_file(path)
        if digest != file["sha256"]:
            raise InputError(f"{path}: SHA-256 {digest}, {MANIFEST} says {file['sha256']}: not the bytes as written")


def set_quality(folder: Path, quality: dict[str, Any]) -> None:
    """Put a measured quality block into a folder's manifest, one process after the other."""
    with hold(folder, wait=QUALITY_WAIT):
        manifest = read(folder)
        if manifest is None:
            raise InputError(f"{folder}: {MANIFEST} is missing, expected a finished artifact")
        for artifact in manifest["artifacts"]:
            artifact["quality"] = quality
        write(folder, manifest)


def set_targets(folder: Path, blocks: list[dict[str, Any]]) -> None:
    """Put blocks of machines into a folder's manifest and FIT.md, first and in place of those of the same machines."""
    with hold(folder, wait=QUALITY_WAIT):
        manifest = read(folder)
        if manifest is None:
            raise InputError(f"{folder}: {MANIFEST} is missing, expected a finished artifact")
        known = {block["id"] for block in blocks}
        targets = [*blocks, *(target for target in manifest["targets"] if target["id"] not in known)]
        if targets != manifest["targets"]:
            write(folder, {**manifest, "targets": targets})
