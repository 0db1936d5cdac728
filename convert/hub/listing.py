"""List a repository at one commit: names, sizes and digests, from either hub."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from ..files.parse import is_a, is_object, parse_any, path_fault, short
from .http import HubError

MOST_FILES = 1_000_000  # ten times what Hugging Face recommends at most
LISTING_LIMIT = 64 << 20  # bytes of one page of a listing
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RepoSpec:
    """A repository and a revision of it: HUB:ORG/NAME@REV, where `hub` is a key of `hubs.HUBS`."""

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
        if not is_a(self.size, int) or self.size < 0:
            raise HubError(f"{self.path}: the listing gives the size {short(self.size)}, expected bytes")
        for digest, form in ((self.sha256, SHA256), (self.git, COMMIT)):
            if digest is not None and not (is_a(digest, str) and form.fullmatch(digest)):
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
        """The same repository at the commit that was listed."""
        return RepoSpec(self.spec.hub, self.spec.repo, self.commit)


def digest_matches(data: bytes, file: RepoFile) -> bool:
    """Whether bytes in memory are the listed file."""
    if len(data) != file.size:
        return False
    if file.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == file.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == file.digest


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A hub's answer, an object of JSON; HubError when it is something else, such as a login page."""
    value = parsed(data, what)
    if not is_object(value):
        raise HubError(f"{what}: the hub answers {short(value)}, expected an object")
    return value


def parsed(data: bytes, what: str) -> object:
    """A hub's answer, any value of JSON; HubError when it is something else."""
    try:
        return parse_any(data, what)
    except InputError:
        raise HubError(f"{what}: the answer is not JSON, expected the hub's API at this address") from None


def listed(what: str, path: str, size: int, sha256: str | None, git: str | None = None) -> RepoFile:
    """A file as a listing names it. HubError, saying `what` was listed, when a field is not plain."""
    try:
        return RepoFile(path, size, sha256, git)
    except HubError as error:
        raise HubError(f"{what}: {error}") from None
