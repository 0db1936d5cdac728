"""Name a model after its repository where that is known, never after a commit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .hub.hubs import HUBS, KEYS
from .hub.listing import COMMIT

_SPEC = re.compile(rf"({KEYS}):([^@:]+)(?:@([^:]+))?(?::(.+))?")


def cached_repository(path: str | Path) -> tuple[str, str, str] | None:
    """(hub, ORG/NAME, commit or "") of a folder or file in the cache of a hub's client; None elsewhere."""
    for text in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
        text = text.replace(os.sep, "/")
        for hub in HUBS.values():
            if found := hub.cached_repository(text):
                return hub.key, *found
    return None


def repository_of(label: str) -> tuple[str, str, str] | None:
    """(hub, ORG/NAME, commit or "") of a source's label (hf:ORG/NAME@COMMIT, or a path in a hub's cache)."""
    if match := _SPEC.fullmatch(label):
        commit = match[3] or ""
        return match[1], match[2], commit if COMMIT.fullmatch(commit) else ""
    return cached_repository(label)


def short_name(label: str) -> str:
    """The model's own name: the last part of a repository's, or of a path."""
    found = repository_of(label)
    if found is not None:
        return found[1].rsplit("/", 1)[-1]
    return Path(os.path.abspath(label)).name or "model"
