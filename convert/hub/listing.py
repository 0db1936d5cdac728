"""What a repository holds at one commit: names, sizes and digests, from either hub."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urljoin

from mmquant.errors import InputError

from .http import HF, MS, Client, HubError

DEFAULT_REVISION = {HF: "main", MS: "master"}
MS_CUT = 3000  # ModelScope lists so many entries at most, without saying so
COMMIT = re.compile(r"[0-9a-f]{40}")
SPEC = re.compile(r"(hf|ms):([\w.-]+/[\w.-]+)(?:@(.+))?")


@dataclass(frozen=True)
class RepoSpec:
    """hf:ORG/NAME[@REV] or ms:ORG/NAME[@REV]."""

    hub: str
    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{self.hub}:{self.repo}@{self.revision}"


@dataclass(frozen=True)
class RepoFile:
    """A file of a commit: SHA-256 of its bytes (LFS on Hugging Face, all on ModelScope), else git's blob SHA-1."""

    path: str
    size: int
    sha256: str | None
    git: str | None = None


@dataclass(frozen=True)
class Listing:
    """All files of a repository at one pinned commit."""

    spec: RepoSpec
    commit: str
    files: dict[str, RepoFile]

    @property
    def pinned(self) -> RepoSpec:
        return RepoSpec(self.spec.hub, self.spec.repo, self.commit)


def parse_spec(text: str) -> RepoSpec:
    """A source such as hf:ORG/NAME@REV; ValueError when it is malformed."""
    match = SPEC.fullmatch(text)
    if not match or ".." in match[2]:
        raise InputError(f"{text}: expected hf:ORG/NAME[@REV] or ms:ORG/NAME[@REV]")
    return RepoSpec(match[1], match[2], match[3] or DEFAULT_REVISION[match[1]])


def list_repo(client: Client, spec: RepoSpec) -> Listing:
    """Resolve the revision once and list that commit.

    Raises HubError for an unknown repository or revision or missing access, TransferError when the hub does not answer.
    """
    return _list_hf(client, spec) if spec.hub == HF else _list_ms(client, spec)


def file_url(endpoint: str, spec: RepoSpec, path: str) -> str:
    """Where a file of a repository is read."""
    if spec.hub == HF:
        return f"{endpoint}/{spec.repo}/resolve/{quote(spec.revision, safe='')}/{quote(path)}"
    return f"{endpoint}/api/v1/models/{spec.repo}/repo?" + urlencode({"Revision": spec.revision, "FilePath": path})


def digest_matches(data: bytes, file: RepoFile) -> bool:
    """Whether bytes in memory are the listed file."""
    if len(data) != file.size:
        return False
    if file.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == file.sha256
    return file.git is None or hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == file.git


def parse(data: bytes, what: str) -> Any:
    """JSON of a hub's answer; HubError when it is something else, such as a login page."""
    try:
        return json.loads(data)
    except ValueError:
        raise HubError(f"{what}: the answer is not JSON, expected the hub's API at this address") from None


def checked(path: object, what: str) -> str:
    """A path that stays inside the folder it will be written to."""
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or any(p in ("", ".", "..") for p in parts) or "\\" in str(path) or "\0" in str(path):
        raise HubError(f"{what}: the listing names {path!r}, expected a relative path")
    return str(path)


def _list_hf(client: Client, spec: RepoSpec) -> Listing:
    base, what = f"{client.endpoint.url}/api/models/{spec.repo}", str(spec)
    data, _ = client.get(f"{base}/revision/{quote(spec.revision, safe='')}", what=what)
    commit = parse(data, what).get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"{what}: the hub names commit {commit!r}, expected 40 hexadecimal digits")
    files: dict[str, RepoFile] = {}
    url: str | None = f"{base}/tree/{commit}?recursive=true"
    while url:
        data, response = client.get(url, what=what)
        for item in parse(data, what):
            if item.get("type") == "file":
                path, lfs = checked(item.get("path"), what), item.get("lfs")
                digest, size = (lfs["oid"], lfs["size"]) if lfs else (None, item["size"])
                files[path] = RepoFile(path, int(size), digest, item.get("oid"))
        more = response.links.get("next", {}).get("url")
        url = urljoin(url, more) if more else None
    return Listing(spec, commit, files)


def _list_ms(client: Client, spec: RepoSpec) -> Listing:
    what = str(spec)
    entries, short = _ms_entries(client, spec, "")
    files: dict[str, RepoFile] = {}
    revisions: dict[str, int] = {}
    for item in entries:
        if item.get("Type") == "tree":
            continue
        path = checked(item.get("Path"), what)
        files[path] = RepoFile(path, int(item.get("Size") or 0), item.get("Sha256") or None)
        if COMMIT.fullmatch(item.get("Revision") or ""):
            revisions[item["Revision"]] = max(revisions.get(item["Revision"], 0), int(item.get("CommittedDate") or 0))
    return Listing(spec, _ms_head(spec, short, revisions), files)


def _ms_head(spec: RepoSpec, short: str, revisions: dict[str, int]) -> str:
    """The commit behind a ModelScope branch.

    The API names it only abbreviated (LatestCommitter.ShortId), and in full as the last change of each file: the one
    that fits, or the newest (after a commit that only deletes no file carries the head's id; then every listed file is
    still the same at the newest of theirs).
    """
    if COMMIT.fullmatch(spec.revision):
        return spec.revision
    fitting = [r for r in revisions if short and r.startswith(short)]
    if not revisions:
        raise HubError(f"{spec}: the hub names no commit, expected one of 40 hexadecimal digits")
    return fitting[0] if fitting else max(revisions, key=lambda r: revisions[r])


def _ms_entries(client: Client, spec: RepoSpec, root: str) -> tuple[list[dict[str, Any]], str]:
    """(entries under `root`, the head's id or its abbreviation), folder by folder where the hub cuts the list off."""
    entries, head = _ms_page(client, spec, root, recursive=True)
    if len(entries) < MS_CUT:
        return entries, head
    direct, _ = _ms_page(client, spec, root, recursive=False)
    if len(direct) >= MS_CUT:
        raise HubError(f"{spec}: {root or 'the root'} holds {MS_CUT} files or more, which ModelScope does not list")
    folders = [str(e.get("Path")) for e in direct if e.get("Type") == "tree"]
    return direct + [e for folder in folders for e in _ms_entries(client, spec, folder)[0]], head


def _ms_page(client: Client, spec: RepoSpec, root: str, recursive: bool) -> tuple[list[dict[str, Any]], str]:
    query = {"Revision": spec.revision, "Recursive": str(recursive)} | ({"Root": root} if root else {})
    url = f"{client.endpoint.url}/api/v1/models/{spec.repo}/repo/files?" + urlencode(query)
    data, _ = client.get(url, what=str(spec))
    answer = parse(data, str(spec))
    if answer.get("Success") is False or not isinstance(answer.get("Data"), dict):
        raise HubError(f"{spec}: {answer.get('Message') or 'no file list'}, expected a list of files")
    latest = answer["Data"].get("LatestCommitter") or {}
    return answer["Data"].get("Files") or [], latest.get("Id") or latest.get("ShortId") or ""
