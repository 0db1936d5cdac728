"""Publish a finished folder: check layout and licence, write the card, upload what the hub lacks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError, PartialError
from mmquant.monitor import Monitor, current, watching

from ..convert.files.atomic import TEMPORARY
from ..convert.files.parse import path_fault, short
from ..convert.fitting.text import FIT_TEXT, REPORT, fit_text
from ..convert.manifest import MANIFEST
from .options_use import PushOptions
from .results import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..convert.hub.push import Ledger
    from ..convert.hub.remote import Remote, Upload

STAGE = ".mmquant-push"
SUMS, CARD = "SHA256SUMS", "README.md"
MADE = {SUMS, CARD, MANIFEST, FIT_TEXT, REPORT}  # for the place that they are published in
NOTICE = "M2.7's licence forbids commercial use of the model and of derivatives without MiniMax's written authorization"


@dataclass(frozen=True)
class Pushed(Result):
    """A folder as it stands on a hub, or with dry_run would."""

    url: str
    files: int
    bytes: int
    commits: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        return {"files": self.files, "bytes": self.bytes, "url": self.url, "commits": self.commits}

    def line(self) -> str:
        """The same for people."""
        verb = "would publish" if self.dry_run else "published" if self.commits else "found whole"
        return f"{verb} {self.files} files, {self.bytes:,} bytes, as {self.url}"


def push(
    folder: str | Path,
    repo: str,
    options: PushOptions | None = None,
    *,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Pushed:
    """Upload a finished folder to ORG/NAME: weights first, card and manifest last, in few commits.

    Run again it continues. Raises InputError for a folder, licence or repository that will not do, PartialError when
    the network gives up in between.
    """
    from ..convert.files.lock import hold
    from ..convert.hub.http import Client
    from ..convert.hub.hubs import HUBS, endpoint_of, remote_of

    chosen, folder = options or PushOptions(), Path(folder)
    check_repository(repo, "--repo")
    if chosen.base_model is not None:
        check_repository(chosen.base_model, "--base-model")
    if chosen.pr and (not HUBS[chosen.hub].pull_requests or chosen.revision):
        raise InputError("--pr: Hugging Face only, and without --revision")
    remote = remote_of(Client(endpoint_of(chosen.hub)), repo, chosen.revision)
    with watching(monitor), hold(folder):
        return Pushed(**push_to(folder, remote, chosen, dry_run=dry_run), dry_run=dry_run)


def check_repository(name: str, option: str) -> None:
    """InputError unless `name` is ORG/NAME."""
    from ..convert.hub.hubs import DEFAULT_HUB, SPEC

    if not SPEC.fullmatch(f"{DEFAULT_HUB.key}:{name}") or "@" in name or ".." in name:
        raise InputError(f"{option}: {name!r}, expected ORG/NAME")


def push_to(folder: Path, remote: Remote, options: PushOptions, *, dry_run: bool) -> dict[str, Any]:
    """Check manifest, sums, layout, licence and card, then upload what the hub lacks. Returns what --json prints.

    Everything that can be refused is refused before the repository is made or a byte is sent.
    """
    from ..convert.hub.card import read_manifest
    from ..convert.hub.http import TransferError
    from ..convert.hub.layout import check_layout, remote_path
    from ..convert.hub.push import Ledger, Publisher, push_files, start

    manifest = read_manifest(folder)
    licence = _licence(folder, manifest)
    labels = [a["quant_label"] for a in manifest["artifacts"] if "quant_label" in a]
    ledger = Ledger(folder, remote)
    local = _local_files(folder)
    listed = [f["path"] for a in manifest["artifacts"] for f in a["files"]]
    moved = {p: remote_path(p, labels) for p in (*local, *listed)}
    here = {moved[p] for p in local} | MADE
    gone = {p: f for p, f in ledger.committed().items() if p not in here}
    sizes = {moved[p]: (folder / p).stat().st_size for p in local} | {p: f.size for p, f in gone.items()}
    check_layout(sizes, labels)
    _check_complete(folder, manifest, moved, gone)
    answer = {"files": len(sizes) + len(MADE), "bytes": sum(sizes.values()), "url": _url(remote), "commits": 0}
    draft = Draft(folder, manifest, moved, licence, _base_card(manifest, options.base_card), options)
    if dry_run:
        draft.documents(remote, None, None)
        return answer
    documents = _drafted(draft, remote)
    uploads = {moved[p]: ledger.upload(moved[p], folder / p) for p in local}
    _check_sums(folder, manifest, moved, {**gone, **uploads})
    remote = start(remote, ledger, options.private, options.pr)
    if options.pr:
        documents = _drafted(draft, remote)  # a pull request has a card and a manifest of its own
    staged = _stage(folder, remote.spec.repo, documents, {**gone, **uploads}, ledger)
    uploads |= {u.path: u for u in staged}
    weights = [u for u in uploads.values() if u.path.endswith((".safetensors", ".gguf"))]
    publisher = Publisher(remote, ledger, options.delete_after_upload, _progress(weights))
    try:
        push_files(publisher, weights, [u for u in uploads.values() if u not in weights])
    except TransferError as error:
        raise PartialError(str(error)) from None
    return {**answer, "commits": publisher.commits}


@dataclass(frozen=True)
class Draft:
    """What card and manifest are made of: the folder's own, the licence's text and the base model's card."""

    folder: Path
    manifest: dict[str, Any]
    moved: dict[str, str]
    licence: str
    base_card: str | None
    options: PushOptions

    def documents(self, remote: Remote, manifest: bytes | None, card_there: bytes | None) -> tuple[dict[str, Any], str]:
        """(manifest, README.md) for a repository that holds these two already (None: it does not)."""
        from ..convert.card import split_card
        from ..convert.files.parse import parse_json
        from ..convert.hub.card import UNKNOWN_BASE, Place, card, front_matter, merge, published
        from ..convert.manifest_check import check_manifest

        path = self.folder / CARD
        old = path.read_text(errors="replace") if path.is_file() else (card_there or b"").decode(errors="replace")
        owner, body = split_card(old)
        base = self._base(owner)
        place = Place(remote.spec.hub, remote.spec.repo)
        whole = published(self.manifest, place, self.moved)
        whole["model"]["base_model"] = base[0] if base else UNKNOWN_BASE
        other = parse_json(manifest, f"{remote.spec} {MANIFEST}") if manifest else None
        if other is not None:
            check_manifest(other, f"{remote.spec} {MANIFEST}")
        whole = merge(whole, other)
        front = front_matter(owner, whole, base, self._licence(owner))
        return whole, card(whole, place, front, body, self.manifest["license"].get("notice", ""))

    def _base(self, owner: dict[str, Any]) -> list[str]:
        """The option, else the owner's card, else the repository that was read; a folder's name is none."""
        from ..convert.card import base_models, is_repository

        if self.options.base_model is not None:
            return [self.options.base_model]
        if found := base_models(owner, CARD):
            return found
        name = self.manifest["model"]["base_model"]
        if is_repository(name):
            return [name]
        current().message("the base model is a local folder: the card names none (--base-model ORG/NAME)")
        return []

    def _licence(self, owner: dict[str, Any]) -> dict[str, Any]:
        """The option, else the owner's card, else the base model's card and licence."""
        from ..convert.card import LICENSE_FIELDS, license_fields, named_licence

        if self.options.license is not None:
            return named_licence(option_fields(self.options.license), self.licence, "--license")
        if any(owner.get(key) for key in LICENSE_FIELDS):
            return named_licence(owner, self.licence, CARD)
        return license_fields(self.base_card, self.licence)


def option_fields(typed: str) -> dict[str, str]:
    """--license mit, or a licence's own name (which hubs call other): mit -> license: mit."""
    from ..convert.licence import PERMISSIVE

    said = typed.strip()
    if said.lower() == "other" or PERMISSIVE.fullmatch(said.lower()):
        return {"license": said.lower()}
    return {"license": "other", "license_name": said, "license_link": "LICENSE"}


def _drafted(draft: Draft, remote: Remote) -> tuple[dict[str, Any], str]:
    """Manifest and card for this repository; the card as the hub accepts it."""
    from ..convert.hub.http import HubError

    try:
        remote_texts = [_remote_small(remote, name) for name in (MANIFEST, CARD)]
    except HubError:  # no such repository yet, or no access: making it will tell
        remote_texts = [None, None]
    whole, text = draft.documents(remote, *remote_texts)
    remote.check_card(text)
    return whole, text


def _url(remote: Remote) -> str:
    endpoint = remote.client.endpoint
    return endpoint.hub.page_url(endpoint.url, remote.spec.repo)


def _local_files(folder: Path) -> list[str]:
    """What is published: everything but hidden and unfinished files; card, manifest and sums are made for the place."""
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    shown = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    found = sorted(n.as_posix() for n in shown if n.suffix not in (TEMPORARY, ".part") and n.as_posix() not in MADE)
    for name in found:
        if fault := path_fault(name):
            raise InputError(f"{folder}: the file name {short(name)}: {fault}")
    return found


def _licence(folder: Path, manifest: dict[str, Any]) -> str:
    """The licence file's text; InputError when there is none. Says what it forbids."""
    from ..convert.licence import LICENSE_FILES, PROHIBITED

    found = next((folder / n for n in LICENSE_FILES if (folder / n).is_file()), None)
    if found is None:
        raise InputError(
            f"{folder}: no licence file, expected the base model's LICENSE; without it nothing is published"
        )
    text = found.read_text(errors="replace")
    if not text.strip():
        raise InputError(f"{found}: empty, expected the base model's licence")
    if manifest["license"]["commercial_use"] == PROHIBITED:
        current().message(NOTICE)
    return text


def _base_card(manifest: dict[str, Any], given: Path | None) -> str | None:
    """The base model's card at the pinned revision; None for a local base."""
    from ..convert.hub.card import base_spec
    from ..convert.hub.store import FetchOptions, hub_source

    if given is not None:
        return given.read_text(errors="replace")
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
    folder: Path, repo: str, documents: tuple[dict[str, Any], str], files: dict[str, Upload], ledger: Ledger
) -> list[Upload]:
    """Manifest, report, sums and card, written and ready to be sent."""
    from ..convert.files.atomic import write_whole
    from .reports.artifacts import artifacts_page

    whole, text = documents
    stage = folder / STAGE
    stage.mkdir(exist_ok=True)
    write_whole(stage / MANIFEST, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
    made = ledger.upload(MANIFEST, stage / MANIFEST)
    write_whole(stage / FIT_TEXT, fit_text(whole).encode())
    told = ledger.upload(FIT_TEXT, stage / FIT_TEXT)
    write_whole(stage / REPORT, artifacts_page(f"mmquant: {repo}", [whole]).encode())
    drawn = ledger.upload(REPORT, stage / REPORT)
    sums = {f["path"]: f["sha256"] for a in whole["artifacts"] for f in a["files"]}
    sums |= {p: f.sha256 for p, f in files.items() if p not in (CARD, SUMS)}
    sums |= {MANIFEST: made.sha256, FIT_TEXT: told.sha256, REPORT: drawn.sha256}
    write_whole(stage / SUMS, "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items())).encode())
    write_whole(folder / CARD, text.encode())
    write_whole(folder / SUMS, (stage / SUMS).read_bytes())
    return [made, told, drawn, ledger.upload(SUMS, stage / SUMS), ledger.upload(CARD, folder / CARD)]


def _remote_small(remote: Remote, name: str) -> bytes | None:
    from ..convert.hub.hubs import file_url

    listing = remote.listing()
    if name not in listing.files:
        return None
    limit = listing.files[name].size
    url = file_url(remote.client.endpoint.url, listing.pinned, name)
    return remote.client.get(url, what=f"{remote.spec} {name}", limit=limit)[0]


def _progress(weights: list[Upload]) -> Callable[[Upload], None]:
    bar = current().start("push", sum(w.size for w in weights), "B")
    return lambda file: bar.advance(file.size)
