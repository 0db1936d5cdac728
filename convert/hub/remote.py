"""What every hub can do for a push: create a repository, upload one large file, commit a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .http import Client
from .listing import Listing, RepoSpec

INLINE = 64 << 10  # bytes; larger files are LFS objects on ModelScope
BINARY = (".safetensors", ".gguf", ".bin", ".npz")


@dataclass(frozen=True)
class Upload:
    """A local file and its place in the repository."""

    path: str
    local: Path
    size: int
    sha256: str


class Conflict(Exception):
    """Somebody else's commit came first, or our own one whose answer was lost: look again."""


class Remote(Protocol):
    """A repository to write to."""

    spec: RepoSpec
    client: Client

    def create(self, private: bool) -> None:
        """Make the repository and its branch when they do not exist."""
        ...

    def open_request(self, title: str) -> str:
        """A pull request's branch name to commit to."""
        ...

    def listing(self) -> Listing:
        """What the branch holds now."""
        ...

    def check_card(self, text: str) -> None:
        """InputError when the hub would refuse this README.md; nothing where the hub cannot be asked."""
        ...

    def upload(self, file: Upload) -> None:
        """Bring one file's bytes to the hub's store; nothing moves when it has them."""
        ...

    def commit(self, files: Sequence[Upload], message: str, before: Listing) -> None:
        """One commit on top of `before`. Raises Conflict when the outcome is unknown or the branch has moved."""
        ...


def is_inline(file: Upload) -> bool:
    """Small text goes into the commit itself."""
    return file.size <= INLINE and not file.path.endswith(BINARY)
