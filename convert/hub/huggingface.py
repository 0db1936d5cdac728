"""Hugging Face: everything that is said of this hub alone. Its row in the table is `HUB`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from mmquant.errors import InputError

from ..files.parse import is_list, is_object, one_line, path_fault, short, take, take_list
from .http import (
    MISREAD,
    TRANSIENT,
    UNRESOLVED,
    Client,
    HubError,
    TransferError,
    joined,
    misread,
    reason,
    redact,
    retry_after,
    whole_body,
)
from .interface import Hub
from .listing import COMMIT, LISTING_LIMIT, MOST_FILES, SHA256, Listing, RepoFile, RepoSpec, listed, parse, parsed
from .remote import Conflict, Upload
from .xet import fetch_xet

BRANCH = "main"
Result = TypeVar("Result")
_SNAPSHOT = re.compile(r"(?:.*/)?models--(.+?)--(.+)/snapshots/([^/]+)(?:/.*)?")


# -- where it is, and who asks -----------------------------------------------------------------------------------------


def account() -> tuple[str, str | None]:
    """(endpoint, token): HF_ENDPOINT; HF_TOKEN or the login file."""
    from huggingface_hub import get_token

    return os.environ.get("HF_ENDPOINT") or HUB.endpoint, get_token()


def file_url(endpoint: str, spec: RepoSpec, path: str) -> str:
    """Where a file of a repository is read."""
    return f"{endpoint}/{spec.repo}/resolve/{quote(spec.revision, safe='')}/{quote(path)}"


# -- list --------------------------------------------------------------------------------------------------------------


def list_files(client: Client, spec: RepoSpec) -> Listing:
    """Resolve the revision once and list that commit, page by page."""
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
        files |= {file.path: file for file in files_of(data, what)}
        more = response.links.get("next", {}).get("url")
        url = joined(url, more) if more else None
    return Listing(spec, commit, files)


def files_of(data: bytes, what: str) -> list[RepoFile]:
    """The files of one page of Hugging Face's tree. Raises HubError or InputError for anything that is not one."""
    items = parsed(data, what)
    if not is_list(items):
        raise HubError(f"{what}: the hub answers {short(items)}, expected a list of files")
    files: list[RepoFile] = []
    for item in items:
        if not is_object(item):
            raise HubError(f"{what}: the listing holds {short(item)}, expected an object")
        if item.get("type") == "file":
            lfs = take(item, "lfs", dict, what, None)
            held = item if lfs is None else lfs
            sha256 = None if lfs is None else take(lfs, "oid", str, what)
            git = take(item, "oid", str, what)
            files.append(listed(what, take(item, "path", str, what), take(held, "size", int, what), sha256, git))
    return files


# -- its client's cache ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """huggingface_hub's cache: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _cached_folder(spec: RepoSpec) -> Path:
    return cache_folder() / ("models--" + spec.repo.replace("/", "--"))


def candidates(spec: RepoSpec, file: RepoFile) -> list[Path]:
    """Where huggingface_hub would have put this file."""
    blobs = _cached_folder(spec) / "blobs"
    return [blobs / digest for digest in (file.sha256, file.git) if digest]


def cached_repository(path: str) -> tuple[str, str] | None:
    """(ORG/NAME, commit or "") of a path with slashes in the cache, None elsewhere."""
    match = _SNAPSHOT.fullmatch(path)
    if match is None:
        return None
    return f"{match[1]}/{match[2]}", match[3] if COMMIT.fullmatch(match[3]) else ""


def offline_listing(spec: RepoSpec) -> Listing | None:
    """What huggingface_hub's cache knows of a repository: the commit behind the revision, names and digests.

    A snapshot holds links to blobs that are named by their digest (SHA-256 of LFS files, git's SHA-1 of others).
    """
    folder = _cached_folder(spec)
    reference = folder / "refs" / spec.revision
    commit = spec.revision
    if not COMMIT.fullmatch(commit):
        if not reference.is_file():
            return None
        commit = reference.read_text(errors="replace").strip()
        if not COMMIT.fullmatch(commit):
            return None
    snapshot = folder / "snapshots" / commit
    files: dict[str, RepoFile] = {}
    for path in sorted(snapshot.rglob("*")) if snapshot.is_dir() else []:
        digest = path.resolve().name
        name = path.relative_to(snapshot).as_posix()
        if path.is_file() and (COMMIT.fullmatch(digest) or SHA256.fullmatch(digest)) and not path_fault(name):
            sha256, git = (digest, None) if len(digest) == 64 else (None, digest)
            files[name] = RepoFile(name, path.stat().st_size, sha256, git)
    return Listing(spec, commit, files) if files else None


# -- write -------------------------------------------------------------------------------------------------------------


class Repository:
    """Through huggingface_hub's public calls: create_repo, preupload_lfs_files, create_commit."""

    def __init__(self, client: Client, spec: RepoSpec) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the run shows its own
        self.client, self.spec = client, spec
        self._api = HfApi(endpoint=client.endpoint.url, token=client.endpoint.token or False)
        self._ready: dict[str, Any] = {}

    def create(self, private: bool) -> None:
        """Make the repository, and the branch, unless they exist."""
        self._call(lambda: self._api.create_repo(self.spec.repo, private=private, exist_ok=True))
        if self.spec.revision != BRANCH and not self.spec.revision.startswith("refs/"):
            self._call(lambda: self._api.create_branch(self.spec.repo, branch=self.spec.revision, exist_ok=True))

    def open_request(self, title: str) -> str:
        """Open a pull request; its revision."""
        return str(self._call(lambda: self._api.create_pull_request(self.spec.repo, title=title)).git_reference)

    def listing(self) -> Listing:
        """Files of the branch as the hub lists them now."""
        return list_files(self.client, self.spec)

    def check_card(self, text: str) -> None:
        """InputError for a model card that the hub would refuse."""
        url = f"{self.client.endpoint.url}/api/validate-yaml"
        body = json.dumps({"content": text, "repoType": "model"}).encode()
        try:
            response = self.client.send("POST", url, {"Content-Type": "application/json"}, what="README.md", body=body)
            if response.status_code not in (200, 400):
                response.close()
                return  # the commit will say what is wrong
            answer = parse(whole_body(response, LISTING_LIMIT, "README.md"), "README.md")
        except TransferError:
            return
        if errors := take_list(answer, "errors", dict, "README.md", []):
            said = "; ".join(one_line(error.get("message")) for error in errors)
            raise InputError(f"README.md: the hub refuses its front matter: {said}")

    def upload(self, file: Upload) -> None:
        """Bring a large file's bytes to the hub, where they wait for a commit."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(file.path, str(file.local))
        repo, revision = self.spec.repo, self.spec.revision
        self._call(lambda: self._api.preupload_lfs_files(repo, [operation], revision=revision, free_memory=False))
        self._ready[file.path] = operation

    def commit(self, files: Sequence[Upload], message: str, before: Listing) -> None:
        """Commit files that were uploaded, and small ones. Conflict when the answer was lost or the branch moved."""
        from huggingface_hub import CommitOperationAdd

        operations = [self._ready.pop(f.path, None) or CommitOperationAdd(f.path, str(f.local)) for f in files]
        self._call(
            lambda: self._api.create_commit(
                self.spec.repo,
                operations,
                commit_message=message,
                revision=self.spec.revision,
                parent_commit=before.commit,
            ),
            once=True,
        )

    def _call(self, call: Callable[[], Result], once: bool = False) -> Result:
        """A call of the library, with its errors in one line; `once`: never repeated blindly, Conflict instead."""
        from huggingface_hub.errors import HfHubHTTPError

        trouble, host = "", urlsplit(self.client.endpoint.url).hostname
        for attempt in range(self.client.retry.attempts + 1):
            asked = None
            try:
                return call()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in TRANSIENT and status not in (409, 412):
                    raise self._refusal(status, str(error)) from None
                trouble, asked = f"HTTP {status}", retry_after(error.response.headers)
            except (_library_error(), RuntimeError) as error:
                trouble = redact(str(error), self.client.endpoint.token) or type(error).__name__
                if reason(error) == UNRESOLVED:
                    raise TransferError(f"{self.spec}: {host}: {UNRESOLVED}, is this machine online?") from None
            except MISREAD as error:
                trouble = misread(error, "huggingface_hub")
                if not once:
                    raise HubError(f"{self.spec}: {trouble}, expected the hub's API at {host}") from None
            if once:
                self.client.pause(0, asked)
                raise Conflict(trouble)
            if attempt < self.client.retry.attempts:
                self.client.pause(attempt, asked)
        raise TransferError(f"{self.spec}: {host}: {trouble}; run the command again to continue")

    def _refusal(self, status: int, text: str) -> HubError | TransferError:
        if status in (401, 403):
            return HubError(f"{self.spec}: no write access (HTTP {status}), set HF_TOKEN to a token that may write")
        if status == 404:
            return HubError(f"{self.spec}: not found (HTTP 404), check the name, the branch and the token's access")
        return TransferError(f"{self.spec}: HTTP {status}, {redact(text, self.client.endpoint.token)[:200]}")


def _library_error() -> type[Exception]:
    """The base of huggingface_hub's network errors: HTTPError of whichever httpx it is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError" and issubclass(c, Exception))


HUB = Hub(
    key="hf",
    name="Hugging Face",
    manifest_name="huggingface",
    hosts=("huggingface.co", "hf.co", "hf-mirror.com"),
    endpoint="https://huggingface.co",
    endpoint_variable="HF_ENDPOINT",
    token_variable="HF_TOKEN",
    login="hf auth login",
    offline_variable="HF_HUB_OFFLINE",
    page="",
    branch=BRANCH,
    download="hf download",
    ollama="hf.co",
    pull_requests=True,
    transports={"xet": fetch_xet},
    account=account,
    list_files=list_files,
    file_url=file_url,
    candidates=candidates,
    cached_repository=cached_repository,
    offline_listing=offline_listing,
    repository=Repository,
)
