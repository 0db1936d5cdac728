"""Publish a finished folder: check layout and licence, write the card, upload what the hub lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError, PartialError

from ..convert.files.atomic import TEMPORARY
from ..convert.manifest import MANIFEST

if TYPE_CHECKING:
    from ..convert.hub.card import Place
    from ..convert.hub.push import Ledger
    from ..convert.hub.remote import Remote, Upload

STAGE = ".mmquant-push"
SUMS, CARD = "SHA256SUMS", "README.md"
NOTICE = "M2.7's licence forbids commercial use of the model and of derivatives without MiniMax's written authorization"


def push(
    folder: Path, remote: Remote, base_card: Path | None, *, private: bool, request: bool, delete: bool, dry_run: bool
) -> dict[str, Any]:
    """Check layout and licence, write the card, upload what the hub lacks. Returns what --json prints."""
    from ..convert.hub.card import Place, read_manifest
    from ..convert.hub.http import TransferError
    from ..convert.hub.layout import check_layout, remote_path
    from ..convert.hub.push import Ledger, Publisher, push_files, start

    manifest = read_manifest(folder)
    fields = _licence(folder, manifest, base_card)
    labels = [a["quant_label"] for a in manifest["artifacts"] if "quant_label" in a]
    ledger = Ledger(folder, remote)
    local = _local_files(folder)
    listed = [f["path"] for a in manifest["artifacts"] for f in a["files"]]
    moved = {p: remote_path(p, labels) for p in (*local, *listed)}
    here = {moved[p] for p in local} | {SUMS, CARD, MANIFEST}
    gone = {p: f for p, f in ledger.committed().items() if p not in here}
    sizes = {moved[p]: (folder / p).stat().st_size for p in local} | {p: f.size for p, f in gone.items()}
    check_layout(sizes, labels)
    _check_complete(folder, manifest, moved, gone)
    place = Place(remote.spec.hub, remote.spec.repo)
    answer = {"files": len(sizes) + 3, "bytes": sum(sizes.values()), "url": _url(remote), "commits": 0}
    if dry_run:
        return answer
    remote = start(remote, ledger, private, request)
    uploads = {moved[p]: ledger.upload(moved[p], folder / p) for p in local}
    _check_sums(folder, manifest, moved, {**gone, **uploads})
    staged = _stage(folder, remote, manifest, moved, place, fields, {**gone, **uploads}, ledger)
    uploads |= {u.path: u for u in staged}
    weights = [u for u in uploads.values() if u.path.endswith((".safetensors", ".gguf"))]
    publisher = Publisher(remote, ledger, delete, _progress(weights))
    try:
        push_files(publisher, weights, [u for u in uploads.values() if u not in weights])
    except TransferError as error:
        raise PartialError(str(error)) from None
    return {**answer, "commits": publisher.commits}


def _url(remote: Remote) -> str:
    base = remote.client.endpoint.url
    return f"{base}/{remote.spec.repo}" if remote.spec.hub == "hf" else f"{base}/models/{remote.spec.repo}"


def _local_files(folder: Path) -> list[str]:
    """What is published: everything but hidden and unfinished files; card, manifest and sums are made for the place."""
    made = {SUMS, CARD, MANIFEST}
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    shown = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    return sorted(n.as_posix() for n in shown if n.suffix not in (TEMPORARY, ".part") and n.as_posix() not in made)


def _licence(folder: Path, manifest: dict[str, Any], base_card: Path | None) -> dict[str, Any]:
    """The card's licence fields; ValueError without the licence itself or with `mit`. Says what the licence forbids."""
    from ..convert.hub.card import LICENSE_FILES, license_fields

    found = next((folder / n for n in LICENSE_FILES if (folder / n).is_file()), None)
    if found is None:
        raise InputError(
            f"{folder}: no licence file, expected the base model's LICENSE; without it nothing is published"
        )
    if manifest["license"]["commercial_use"] == "prohibited-without-authorization":
        print(f"mmquant: {NOTICE}", file=sys.stderr)
    return license_fields(_base_card(manifest, base_card), found.read_text(errors="replace"))


def _base_card(manifest: dict[str, Any], given: Path | None) -> str | None:
    """The base model's card at the pinned revision; None for a local base."""
    from ..convert.hub.card import base_spec
    from ..convert.hub.store import FetchOptions, hub_source

    if given is not None:
        return given.read_text()
    spec = base_spec(manifest["model"])
    if spec is None:
        return None
    store = hub_source(spec, FetchOptions())
    data = store.small(CARD)
    store.close()
    return data.decode(errors="replace") if data is not None else None


def _check_complete(folder: Path, manifest: dict[str, Any], moved: dict[str, str], gone: dict[str, Upload]) -> None:
    for artifact in manifest["artifacts"]:
        for file in artifact["files"]:
            path = folder / file["path"]
            if not path.is_file() and moved[file["path"]] not in gone:
                raise InputError(f"{folder}: {file['path']} is missing, the manifest lists it")
            if path.is_file() and path.stat().st_size != file["size"]:
                found = path.stat().st_size
                raise InputError(f"{path}: {found:,} bytes, the manifest says {file['size']:,}")


def _check_sums(folder: Path, manifest: dict[str, Any], moved: dict[str, str], known: dict[str, Upload]) -> None:
    """What is published is what was made: digests against the manifest."""
    for artifact in manifest["artifacts"]:
        for file in artifact["files"]:
            found = known[moved[file["path"]]].sha256
            if found != file["sha256"]:
                raise InputError(f"{folder / file['path']}: SHA-256 {found}, the manifest says {file['sha256']}")


def _stage(
    folder: Path,
    remote: Remote,
    manifest: dict[str, Any],
    moved: dict[str, str],
    place: Place,
    fields: dict[str, Any],
    files: dict[str, Upload],
    ledger: Ledger,
) -> list[Upload]:
    """Manifest, sums and card for this repository, merged with what it holds already."""
    from ..convert.files.atomic import write_whole
    from ..convert.files.parse import parse_json
    from ..convert.hub.card import card, check_manifest, merge, published

    stage = folder / STAGE
    stage.mkdir(exist_ok=True)
    theirs = _remote_small(remote, MANIFEST)
    other = parse_json(theirs, f"{remote.spec} {MANIFEST}") if theirs else None
    if other is not None:
        check_manifest(other, f"{remote.spec} {MANIFEST}")
    whole = merge(published(manifest, place, moved), other)
    write_whole(stage / MANIFEST, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
    made = ledger.upload(MANIFEST, stage / MANIFEST)
    sums = {f["path"]: f["sha256"] for a in whole["artifacts"] for f in a["files"]}
    sums |= {p: f.sha256 for p, f in files.items() if p not in (CARD, SUMS)} | {MANIFEST: made.sha256}
    write_whole(stage / SUMS, "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items())).encode())
    old = folder / CARD
    text = old.read_text() if old.is_file() else (_remote_small(remote, CARD) or b"").decode(errors="replace")
    text = card(whole, place, fields, text, manifest["license"].get("notice", ""))
    write_whole(old, text.encode())
    write_whole(folder / SUMS, (stage / SUMS).read_bytes())
    return [made, ledger.upload(SUMS, stage / SUMS), ledger.upload(CARD, old)]


def _remote_small(remote: Remote, name: str) -> bytes | None:
    from ..convert.hub.listing import file_url

    listing = remote.listing()
    if name not in listing.files:
        return None
    limit = listing.files[name].size
    url = file_url(remote.client.endpoint.url, listing.pinned, name)
    return remote.client.get(url, what=f"{remote.spec} {name}", limit=limit)[0]


def _progress(weights: list[Upload]) -> Any:
    from tqdm import tqdm

    bar = tqdm(total=sum(w.size for w in weights), desc="push", unit="B", unit_scale=True, disable=None)
    return lambda file: bar.update(file.size)
