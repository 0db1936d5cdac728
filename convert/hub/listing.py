"""List a repository at one commit: names, sizes and digests, from either hub."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from mmquant.errors import InputError

from ..files.parse import LARGEST, one_line, parse_any, path_fault, short, take, take_list
from .http import HF, MS, Client, HubError, joined

DEFAULT_REVISION = {HF: "main", MS: "master"}
MS_CUT = 3000  # ModelScope lists so many entries at most, without saying so
MOST_FILES = 1_000_000  # ten times what Hugging Face recommends at most
LISTING_LIMIT = 64 << 20  # bytes of one page of a listing
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SPEC = re.compile(r"(hf|ms):([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)


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
    """A file of a commit: SHA-256 of its bytes (LFS on Hugging Face, all on ModelScope), else git's blob SHA-1.

    Paths and digests become names of local files, so HubError unless they are plain ones, from wherever they come.
    """

    path: str
    size: int
    sha256: str | None
    git: str | None = None

    def __post_init__(self) -> None:
        if fault := path_fault(self.path):
            raise HubError(f"the listing names {short(self.path)}: {fault}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 0 <= self.size < LARGEST:
            raise HubError(f"{self.path}: the listing gives the size {short(self.size)}, expected bytes")
        for digest, form in ((self.sha256, SHA256), (self.git, COMMIT)):
            if digest is not None and not (isinstance(digest, str) and form.fullmatch(digest)):
                raise HubError(
                    f"{self.path}: the listing gives the digest {short(digest)}, expected hexadecimal digits"
                )

    @property
    def digest(self) -> str:
        """The digest that its bytes must have; HubError when the hub names none (seen in theory on ModelScope)."""
        found = self.sha256 or self.git
        if found is None:
            raise HubError(f"{self.path}: the hub names no SHA-256 for it, so its bytes cannot be checked; not fetched")
        return found


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
    revision_fault = path_fault(match[3]) if match and match[3] else None
    if not match or ".." in match[2] or revision_fault:
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
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == file.digest


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A hub's answer, an object of JSON; HubError when it is something else, such as a login page."""
    value = _parsed(data, what)
    if not isinstance(value, dict):
        raise HubError(f"{what}: the hub answers {short(value)}, expected an object")
    return value


def _parsed(data: bytes, what: str) -> Any:
    try:
        return parse_any(data, what)
    except InputError:
        raise HubError(f"{what}: the answer is not JSON, expected the hub's API at this address") from None


def _list_hf(client: Client, spec: RepoSpec) -> Listing:
    base, what = f"{client.endpoint.url}/api/models/{spec.repo}", str(spec)
    data, _ = client.get(f"{base}/revision/{quote(spec.revision, safe='')}", what=what, limit=LISTING_LIMIT)
    commit = parse(data, what).get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"{what}: the hub names commit {short(commit)}, expected 40 hexadecimal digits")
    files: dict[str, RepoFile] = {}
    url: str | None = f"{base}/tree/{commit}?recursive=true"
    seen: set[str] = set()
    while url:
        if url in seen or len(files) > MOST_FILES:
            raise HubError(f"{what}: the listing does not end, expected at most {MOST_FILES:,} files")
        seen.add(url)
        data, response = client.get(url, what=what, limit=LISTING_LIMIT)
        files |= {file.path: file for file in hf_files(data, what)}
        more = response.links.get("next", {}).get("url")
        url = joined(url, more) if more else None
    return Listing(spec, commit, files)


def hf_files(data: bytes, what: str) -> list[RepoFile]:
    """The files of one page of Hugging Face's tree. Raises HubError or InputError for anything that is not one."""
    items = _parsed(data, what)
    if not isinstance(items, list):
        raise HubError(f"{what}: the hub answers {short(items)}, expected a list of files")
    files = []
    for item in items:
        if not isinstance(item, dict):
            raise HubError(f"{what}: the listing holds {short(item)}, expected an object")
        if item.get("type") == "file":
            lfs = take(item, "lfs", dict, what, None)
            held = item if lfs is None else lfs
            sha256 = None if lfs is None else take(lfs, "oid", str, what)
            git = take(item, "oid", str, what)
            files.append(_file(what, take(item, "path", str, what), take(held, "size", int, what), sha256, git))
    return files


def _file(what: str, path: str, size: int, sha256: str | None, git: str | None = None) -> RepoFile:
    try:
        return RepoFile(path, size, sha256, git)
    except HubError as error:
        raise HubError(f"{what}: {error}") from None


def _list_ms(client: Client, spec: RepoSpec) -> Listing:
    what = str(spec)
    entries, short_id = _ms_entries(client, spec, "")
    files = {file.path: file for file in ms_files(entries, what)}
    return Listing(spec, _ms_head(spec, short_id, _ms_revisions(entries, what)), files)


def ms_files(entries: list[dict[str, Any]], what: str) -> list[RepoFile]:
    """The files among ModelScope's entries. Raises HubError or InputError for anything else."""
    return [
        _file(
            what, take(e, "Path", str, what), take(e, "Size", int, what, 0), take(e, "Sha256", str, what, None) or None
        )
        for e in entries
        if e.get("Type") != "tree"
    ]


def _ms_revisions(entries: list[dict[str, Any]], what: str) -> dict[str, int]:
    """The commits that last changed a file, and when."""
    found: dict[str, int] = {}
    for entry in entries:
        revision = take(entry, "Revision", str, what, "")
        if entry.get("Type") != "tree" and COMMIT.fullmatch(revision):
            found[revision] = max(found.get(revision, 0), take(entry, "CommittedDate", int, what, 0))
    return found


def _ms_head(spec: RepoSpec, short_id: str, revisions: dict[str, int]) -> str:
    """The commit behind a ModelScope branch.

    The API names it only abbreviated (LatestCommitter.ShortId), and in full as the last change of each file: the one
    that fits, or the newest (after a commit that only deletes no file carries the head's id; then every listed file is
    still the same at the newest of theirs).
    """
    if COMMIT.fullmatch(spec.revision):
        return spec.revision
    fitting = [r for r in revisions if short_id and r.startswith(short_id)]
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
    found = list(direct)
    for folder in (take(e, "Path", str, str(spec)) for e in direct if e.get("Type") == "tree"):
        if path_fault(folder) or not folder.startswith(f"{root}/" if root else ""):  # else it might never end
            raise HubError(f"{spec}: the listing of {root or 'the root'} names the folder {short(folder)}")
        found += _ms_entries(client, spec, folder)[0]
        if len(found) > MOST_FILES:
            raise HubError(f"{spec}: the listing does not end, expected at most {MOST_FILES:,} files")
    return found, head


def _ms_page(client: Client, spec: RepoSpec, root: str, recursive: bool) -> tuple[list[dict[str, Any]], str]:
    query = {"Revision": spec.revision, "Recursive": str(recursive)} | ({"Root": root} if root else {})
    url = f"{client.endpoint.url}/api/v1/models/{spec.repo}/repo/files?" + urlencode(query)
    data, _ = client.get(url, what=str(spec), limit=LISTING_LIMIT)
    return ms_page(data, str(spec))


def ms_page(data: bytes, what: str) -> tuple[list[dict[str, Any]], str]:
    """(entries, the head's id or its abbreviation) of ModelScope's answer. Raises HubError or InputError."""
    answer = parse(data, what)
    found = answer.get("Data")
    if answer.get("Success") is False or not isinstance(found, dict):
        raise HubError(f"{what}: {one_line(answer.get('Message') or 'no file list')}, expected a list of files")
    latest = take(found, "LatestCommitter", dict, what, {})
    head = take(latest, "Id", str, what, "") or take(latest, "ShortId", str, what, "")
    return take_list(found, "Files", dict, what, []), head
