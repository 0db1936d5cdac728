"""Pin a work folder to the commit that it began with."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from mmquant.errors import InputError

from ..files.atomic import write_whole
from ..files.parse import parse_json, take, take_list
from .cache import offline_listing
from .http import Client, HubError, TransferError
from .hubs import list_repo
from .listing import COMMIT, Listing, RepoFile, RepoSpec
from .options import FetchOptions

log = logging.getLogger("mmquant.hub")


def default_work() -> Path:
    """MMQUANT_CACHE, else the user's cache folder; under torchrun every process has one of its own in it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = Path(os.environ.get("MMQUANT_CACHE") or os.path.join(cache, "mmquant")).expanduser()
    rank = os.environ.get("RANK", "0")
    return folder if rank == "0" else folder / f"rank-{rank}"


def pinned_listing(client: Client, spec: RepoSpec, options: FetchOptions) -> Listing:
    """The listing that this work folder began with, else a new one. A named work folder keeps its commit for good."""
    work = options.work or default_work()
    record = work / f"{spec.hub}--{spec.repo.replace('/', '--')}--{spec.revision.replace('/', '--')}.json"
    saved = _saved_listing(record, spec)
    if saved and options.work is not None:
        return saved
    try:
        listing = list_repo(client, spec)
    except (TransferError, HubError) as error:
        known = saved or offline_listing(spec)
        if known is None or (isinstance(error, HubError) and not client.endpoint.offline):
            raise
        log.warning("%s: the hub does not answer, continuing at commit %s known from before", spec, known.commit)
        return known
    work.mkdir(parents=True, exist_ok=True)
    data = {"commit": listing.commit, "files": [asdict(f) for f in listing.files.values()]}
    write_whole(record, json.dumps(data).encode(), shared=True)
    return listing


def _saved_listing(record: Path, spec: RepoSpec) -> Listing | None:
    try:
        data = parse_json(record.read_bytes(), str(record))
        files = [RepoFile(**f) for f in take_list(data, "files", dict, str(record))]
        commit = take(data, "commit", str, str(record))
    except (OSError, InputError, TypeError):  # an older version's, or damaged: the hub is asked again
        return None
    return Listing(spec, commit, {f.path: f for f in files}) if COMMIT.fullmatch(commit) else None
